"""What training and evaluation need of a data set, and what the sets have in common.

Shapes: B images of a batch, N of a set, C channels, H = W pixels.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

HELD_OUT_SEED, REFERENCE_SEED = 2**31, 2**31 + 1
"""Of streams of drawn images: apart from the small seeds that trainings are given."""


class Images(Protocol):
    """What training and evaluation need of a data set."""

    img_size: int
    in_channels: int
    num_classes: int

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """`size` training images (size, C, H, W) in [-1, 1], and their labels (size,), None without classes."""

    def held_out(self) -> tuple[Tensor, Tensor | None]:
        """Images that training never sees, the same at every call, and their labels."""

    def reference(self, batch_size: int) -> Iterator[Tensor]:
        """What samples are compared with: the training images (B, C, H, W) in [-1, 1], in an order that is fixed.

        They are not augmented where there is a fixed set of them, and otherwise are 2,048 draws from a fixed seed.
        """


class Lookup(Protocol):
    """Gives image number `row` as bytes (C, H, W): a tensor (N, C, H, W), or files that are read when asked for."""

    def __getitem__(self, row: int, /) -> Tensor: ...


@dataclass
class Split:
    """N images as bytes (C, H, W), and their labels (N,)."""

    images: Lookup
    labels: Tensor

    def read(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The images (len(rows), C, H, W) in [-1, 1], and their labels."""
        return torch.stack([self.images[row] for row in rows]).float() / 127.5 - 1, self.labels[list(rows)]


@dataclass
class Stored:
    """A set of images that was read from files: batches are mirrored half of the time, nothing else is augmented.

    Args:
        train: the training images.
        test: those that training never sees; `held_out` gives the first 256, enough for a loss.
        img_size: height and width of the images, in pixels.
        num_classes: how many classes the labels number, from 0.
    """

    train: Split
    test: Split
    img_size: int
    num_classes: int
    in_channels: int = 3

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """`size` training images (size, 3, H, W), each mirrored half of the time, and their labels (size,)."""
        rows = torch.randint(len(self.train.labels), (size,), generator=generator)
        mirrored = torch.rand(size, 1, 1, 1, generator=generator) < 0.5
        images, labels = self.train.read(rows.tolist())
        return torch.where(mirrored, images.flip(3), images), labels

    def held_out(self) -> tuple[Tensor, Tensor]:
        """The first 256 images of the test split (all, if there are fewer), and their labels."""
        return self.test.read(range(min(256, len(self.test.labels))))

    def reference(self, batch_size: int) -> Iterator[Tensor]:
        """All training images, by batches (B, 3, H, W): as they are stored, in the order of the files."""
        for start, stop in spans(len(self.train.labels), batch_size):
            yield self.train.read(range(start, stop))[0]


def spans(count: int, batch_size: int) -> Iterator[tuple[int, int]]:
    """The start and stop of each batch of `count` images; the last may be smaller.

    Raises:
        ValueError: `batch_size` is not positive.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, expected 1 or more")
    for start in range(0, count, batch_size):
        yield start, min(start + batch_size, count)


def drawn_reference(data: Images, batch_size: int) -> Iterator[Tensor]:
    """2,048 images of a set that draws or augments them: one by one, so that every batch size gets the same."""
    generator = torch.Generator().manual_seed(REFERENCE_SEED)
    for start, stop in spans(2048, batch_size):
        yield torch.cat([data.batch(1, generator)[0] for _ in range(start, stop)])


@contextmanager
def reading(path: Path | str, expected: str) -> Iterator[None]:
    """Whatever fails in reading `path` becomes an error that names it, and says what was `expected` there."""
    try:
        yield
    except FileNotFoundError as error:
        missing = error.filename or path
        raise FileNotFoundError(f"{missing} does not exist: expected {expected}") from None
    except Exception as error:  # decoders of damaged files raise nearly anything
        raise ValueError(f"{path} cannot be read ({error or type(error).__name__}): expected {expected}") from error


def found(root: Path | None, expected: str) -> Path:
    """`root`, if there is such a folder or file.

    Raises:
        FileNotFoundError: there is not.
        ValueError: `root` is None.
    """
    if root is None:
        raise ValueError(f"root is None: give the path of a folder that holds {expected}")
    if not Path(root).exists():
        raise FileNotFoundError(f"{root} does not exist: expected a folder that holds {expected}")
    return Path(root)


def within(root: Path, name: str) -> Path:
    """The file or folder `name` in `root`, or `root` where that is its own name."""
    return root if root.name == name else root / name


def check(images: Tensor, labels: Tensor, num_classes: int) -> None:
    """That images (N, C, H, W) and labels (N,) fit.

    Raises:
        ValueError: there are no images, or not one label in 0 to `num_classes` - 1 for each.
    """
    if labels.ndim != 1 or len(images) != len(labels):
        raise ValueError(f"it has {len(images)} images and labels of shape {tuple(labels.shape)}, not one for each")
    if not len(images):
        raise ValueError("it has no images")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(f"its labels go from {labels.min()} to {labels.max()}, not within 0 to {num_classes - 1}")
