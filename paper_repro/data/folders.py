"""Folders of image files, one for each class, decoded as they are asked for."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from paper_repro.data.images import Split, Stored, found, reading, within

SUFFIXES = (".jpeg", ".jpg", ".png")
AFHQ = (
    "AFHQ as clovaai/stargan-v2 on GitHub publishes it: folders cat, dog and wild of JPEG or PNG images of 256 x 256 "
    "pixels or more, in afhq/train, and in afhq/val or afhq/test those to hold out"
)


@dataclass
class Files:
    """Image files, as bytes (3, size, size): the largest square in the middle of each, scaled down to `size` pixels."""

    paths: list[Path]
    size: int
    expected: str

    def __getitem__(self, row: int, /) -> Tensor:
        """Decode image number `row`.

        Raises:
            FileNotFoundError: its file has gone.
            ValueError: its file is damaged, or the image smaller than `size`.
        """
        with reading(self.paths[row], self.expected):
            from PIL import Image, ImageOps  # here, because the other sets do not need Pillow

            with Image.open(self.paths[row]) as image:
                if min(image.size) < self.size:
                    raise ValueError(f"it has {image.width} x {image.height} pixels, fewer than {self.size}")
                square = ImageOps.fit(image.convert("RGB"), (self.size, self.size), Image.Resampling.LANCZOS)
        return torch.from_numpy(np.array(square)).permute(2, 0, 1)


def afhq(root: Path | None = None) -> Stored:
    """Animal faces, 256 x 256: cats, dogs and wild animals (classes 0, 1, 2), about 5,000 of each.

    Args:
        root: the folder that holds `afhq`, or `afhq` itself: with `train/{cat,dog,wild}` and `val` or `test` to hold
            out, or `{cat,dog,wild}` alone. Without `val` and `test` every 20th image is held out, by a hash of its
            name. Images are decoded when asked for.

    References:
        Choi, Uh, Yoo and Ha, StarGAN v2: Diverse Image Synthesis for Multiple Domains (arXiv 1912.01865).

    Raises:
        FileNotFoundError: `root`, or the folder of a class, does not exist.
        ValueError: `root` is None, or a folder of a class has no images; later, an image is damaged or too small.
    """
    root = found(root, AFHQ)
    folder = within(root, "afhq")
    return read_folders(folder if folder.is_dir() else root, 256, AFHQ, ("cat", "dog", "wild"))


def read_folders(root: Path, size: int, expected: str, classes: tuple[str, ...] = ()) -> Stored:
    """The images of the folders of `classes` (all there are, by default, in the order of their names) in `root`.

    Those in `root/train` are to train on, and those in `root/val` or `root/test` are held out. Without `train` they
    are in `root` itself, and without the others every 20th is held out.
    """
    train = root / "train" if (root / "train").is_dir() else root
    test = next((root / name for name in ("val", "test") if (root / name).is_dir()), None)
    if not classes:
        inside = sorted(path.name for path in train.iterdir() if path.is_dir() and path.name not in ("val", "test"))
        classes = tuple(name for name in inside if not name.startswith("."))
    rows = _listed(train, classes, expected)
    if test is None:
        held = [row for row in rows if row[0] % 20 == 0]
        rows = [row for row in rows if row[0] % 20 != 0]
    else:
        held = _listed(test, classes, expected)
    if not rows or not held:
        raise ValueError(f"{root} has {len(rows)} images to train on and {len(held)} to hold out: expected {expected}")
    splits = [
        Split(Files([path for _, path, _ in part], size, expected), torch.tensor([label for _, _, label in part]))
        for part in (rows, held)
    ]
    return Stored(splits[0], splits[1], img_size=size, num_classes=len(classes))


def _listed(folder: Path, classes: tuple[str, ...], expected: str) -> list[tuple[int, Path, int]]:
    """Each image: a hash of its name, its path and its class; sorted by the hash, so that the classes are mixed."""
    rows = []
    for label, name in enumerate(classes):
        with reading(folder / name, expected):
            paths = [path for path in (folder / name).iterdir() if path.suffix.lower() in SUFFIXES]
            if not paths:
                raise ValueError("it has no JPEG or PNG images")
        for path in paths:
            digest = hashlib.sha256(f"{name}/{path.name}".encode()).digest()
            rows.append((int.from_bytes(digest[:8], "big"), path, label))
    return sorted(rows)
