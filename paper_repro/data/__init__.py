"""The data sets of the experiments: images in [-1, 1] and their labels, by name."""

from collections.abc import Callable

from paper_repro.data.cifar import cifar10, cifar100
from paper_repro.data.folders import afhq
from paper_repro.data.imagenet import imagenet64
from paper_repro.data.images import Images, Stored
from paper_repro.data.leaves import Leaves
from paper_repro.data.shipped import Digits, Photographs

DATA: dict[str, Callable[..., Images]] = {
    "digits": Digits,
    "photos": Photographs,
    "photographs": Photographs,
    "leaves": Leaves,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "afhq": afhq,
    "imagenet64": imagenet64,
}
"""Each makes its set from `root: Path | None = None`, the folder with the files; the first four need no files."""

__all__ = ["DATA", "Digits", "Images", "Leaves", "Photographs", "Stored", "afhq", "cifar10", "cifar100", "imagenet64"]
