"""ImageNet at 64 x 64: the published arrays, or folders of images."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from paper_repro.data.folders import read_folders
from paper_repro.data.images import Split, Stored, check, found, reading, within

EXPECTED = (
    "ImageNet at 64 x 64 as image-net.org publishes it, downsampled: train_data_batch_1.npz to train_data_batch_10.npz "
    "and val_data.npz; or folders of JPEG or PNG images, one for each class, of 64 x 64 pixels or more"
)


def imagenet64(root: Path | None = None) -> Stored:
    """ImageNet at 64 x 64: 1,281,167 images (3, 64, 64) of 1000 classes to train on, and 50,000 to validate with.

    Args:
        root: the folder (or the one that holds `imagenet64`) with `train_data_batch_*.npz` and `val_data.npz`, or
            with folders of them; else with a folder of images for each class, laid out as in `afhq`. All arrays
            that are there are kept in memory, 16 GB for the ten; images of folders are decoded when asked for.

    References:
        Chrabaszcz, Loshchilov and Hutter, A Downsampled Variant of ImageNet as an Alternative to the CIFAR datasets
        (arXiv 1707.08819).

    Raises:
        FileNotFoundError: `root`, or a file of the set, does not exist.
        ValueError: `root` is None, or a file is damaged or of another shape.
    """
    root = found(root, EXPECTED)
    folder = within(root, "imagenet64")
    root = folder if folder.is_dir() else root
    train, test = (
        sorted([*root.glob(name), *root.glob(f"*/{name}")]) for name in ("train_data_batch_*.npz", "val_data.npz")
    )
    if not train:
        return read_folders(root, 64, EXPECTED)
    if not test:
        raise FileNotFoundError(f"{root / 'val_data.npz'} does not exist: expected {EXPECTED}")
    return Stored(_read(train), _read(test), img_size=64, num_classes=1000)


def _read(paths: list[Path]) -> Split:
    labels = [_array(path, "labels", 1).long() - 1 for path in paths]  # the files number the classes from 1
    sizes = [len(part) for part in labels]
    images = torch.empty(sum(sizes), 3, 64, 64, dtype=torch.uint8)  # made once, because it is most of the memory
    for path, part, rows in zip(paths, labels, torch.split(images, sizes), strict=True):
        data = _array(path, "data", 2)
        with reading(path, EXPECTED):
            if data.dtype != torch.uint8 or data.shape[1] != 3 * 64 * 64:
                raise ValueError(f"its images are {data.dtype} of shape {tuple(data.shape)}, not uint8 of (N, 12288)")
            check(data, part, 1000)
            rows.copy_(data.view(-1, 3, 64, 64))
    return Split(images, torch.cat(labels))


def _array(path: Path, name: str, ndim: int) -> Tensor:
    # opened here, because np.load leaves a damaged file open
    with reading(path, EXPECTED), path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        array = torch.from_numpy(arrays[name])
        if array.ndim != ndim:
            raise ValueError(f"its {name} have shape {tuple(array.shape)}, not {ndim} dimensions")
        return array
