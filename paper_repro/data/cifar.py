"""CIFAR-10 and CIFAR-100 in every form in which they are published.

References:
    Krizhevsky, Learning Multiple Layers of Features from Tiny Images, technical report, University of Toronto (2009).
"""

import importlib
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paper_repro.data.images import Split, Stored, check, found, reading, within
from paper_repro.data.pickles import read_pickle

PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class Cifar:
    """One of the two, and how its files are named."""

    name: str
    num_classes: int
    train: tuple[str, ...]
    test: str
    python: str  # the folder of the pickles
    binary: str  # the folder of the binary files
    label_bytes: int  # before each image of a binary file; the last of them is the class
    label: str  # of pickles
    parquet: str  # the folder of the parquet files
    parquet_label: str

    @property
    def expected(self) -> str:
        return (
            f"{self.name} as the University of Toronto publishes it (the folder {self.python} or {self.binary}, or the "
            f"archive .tar.gz of either), or as the Hugging Face Hub does ({self.parquet}/train-*.parquet and test-*)"
        )

    def pickled(self, content: bytes) -> tuple[Tensor, Tensor]:
        """Images (N, 3, 32, 32) as bytes and labels (N,) out of a file of the folder `python`."""
        batch = read_pickle(content)
        if missing := {"data", self.label} - batch.keys():
            raise ValueError(f"it has no entry {', '.join(sorted(missing))}")
        pixels = np.asarray(batch["data"])
        if pixels.dtype != np.uint8 or pixels.shape[1:] != (PIXELS,):
            raise ValueError(f"its images are {pixels.dtype} of shape {pixels.shape}, not uint8 of (N, {PIXELS})")
        images = torch.from_numpy(pixels.copy()).view(-1, 3, 32, 32)
        labels = torch.tensor([int(label) for label in batch[self.label]], dtype=torch.long)
        check(images, labels, self.num_classes)
        return images, labels

    def packed(self, content: bytes) -> tuple[Tensor, Tensor]:
        """The same out of a file of the folder `binary`."""
        record = self.label_bytes + PIXELS
        if not content or len(content) % record:
            raise ValueError(f"it has {len(content)} bytes, not {record} for each image")
        rows = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(-1, record)
        images, labels = rows[:, self.label_bytes :].reshape(-1, 3, 32, 32), rows[:, self.label_bytes - 1].long()
        check(images, labels, self.num_classes)
        return images, labels

    def parquets(self, paths: list[Path]) -> tuple[Tensor, Tensor]:
        """The same out of parquet files with columns of images (PNG) and of labels."""
        try:
            datasets = importlib.import_module("datasets")
        except ImportError as error:
            raise ValueError(f"reading parquet files needs the package datasets ({error})") from None
        with tempfile.TemporaryDirectory() as cache:
            names = [str(path) for path in paths]
            table: Any = datasets.Dataset.from_parquet(names, cache_dir=cache, keep_in_memory=True)
        pixels = [np.asarray(image.convert("RGB")) for image in table.cast_column("img", datasets.Image())["img"]]
        images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()
        if images.shape[1:] != (3, 32, 32):
            raise ValueError(f"its images are of shape {tuple(images.shape[1:])}, not (3, 32, 32)")
        labels = torch.tensor(table[self.parquet_label][:], dtype=torch.long)
        check(images, labels, self.num_classes)
        return images, labels


CIFAR10 = Cifar(
    name="CIFAR-10",
    num_classes=10,
    train=tuple(f"data_batch_{i}" for i in range(1, 6)),
    test="test_batch",
    python="cifar-10-batches-py",
    binary="cifar-10-batches-bin",
    label_bytes=1,
    label="labels",
    parquet="plain_text",
    parquet_label="label",
)
CIFAR100 = Cifar(
    name="CIFAR-100",
    num_classes=100,
    train=("train",),
    test="test",
    python="cifar-100-python",
    binary="cifar-100-binary",
    label_bytes=2,
    label="fine_labels",
    parquet="cifar100",
    parquet_label="fine_label",
)


def cifar10(root: Path | None = None) -> Stored:
    """CIFAR-10: 50,000 images (3, 32, 32) of 10 classes to train on, and 10,000 to test with.

    Args:
        root: the folder that holds one of these, or the first three themselves: `cifar-10-batches-py`,
            `cifar-10-batches-bin`, the archive of either as downloaded, or the folder `plain_text` of parquet files,
            which are read by the package datasets. Files may hold fewer images than the published ones.

    Raises:
        FileNotFoundError: `root`, or a file of the set, does not exist.
        ValueError: `root` is None, or a file is damaged or of another shape. Pickles that name anything but
            arrays are refused, and run nothing.
    """
    return _read(CIFAR10, root)


def cifar100(root: Path | None = None) -> Stored:
    """CIFAR-100: as `cifar10`, of 100 classes, from `cifar-100-python`, `cifar-100-binary` or `cifar100` (parquet)."""
    return _read(CIFAR100, root)


def _read(cifar: Cifar, root: Path | None) -> Stored:
    root = found(root, cifar.expected)
    for form, folder, suffix, decode in (
        ("python", cifar.python, "", cifar.pickled),
        ("binary", cifar.binary, ".bin", cifar.packed),
    ):
        archive = f"{cifar.name.lower()}-{form}.tar.gz"
        read = []
        for path, content in _contents(cifar, root, folder, archive, suffix).items():
            with reading(path, cifar.expected):
                read.append(decode(content))
        if read:
            images, labels = zip(*read, strict=True)
            train = Split(torch.cat(images[:-1]), torch.cat(labels[:-1]))
            return Stored(train, Split(images[-1], labels[-1]), img_size=32, num_classes=cifar.num_classes)

    splits = []
    for split in ("train", "test"):
        paths = sorted([*root.glob(f"{split}-*.parquet"), *root.glob(f"{cifar.parquet}/{split}-*.parquet")])
        if not paths:
            raise FileNotFoundError(f"{root} holds no {split} files: expected {cifar.expected}")
        with reading(paths[0], cifar.expected):
            splits.append(Split(*cifar.parquets(paths)))
    return Stored(splits[0], splits[1], img_size=32, num_classes=cifar.num_classes)


def _contents(cifar: Cifar, root: Path, folder: str, archive: str, suffix: str) -> dict[Path, bytes]:
    """The training files and last the test file, by path: of a folder, else of an archive, and none without either."""
    names = [f"{name}{suffix}" for name in (*cifar.train, cifar.test)]
    if (place := within(root, folder)).is_dir():
        with reading(place, cifar.expected):
            return {place / name: (place / name).read_bytes() for name in names}
    if (place := within(root, archive)).is_file():
        # members are read without extracting them: no path in the archive is ever written to
        with reading(place, cifar.expected), tarfile.open(place, "r:gz") as tar:
            members = {PurePosixPath(member.name).name: member for member in tar if member.isfile()}
            if missing := set(names) - members.keys():
                raise ValueError(f"it has no {', '.join(sorted(missing))}")
            files = {place / name: tar.extractfile(members[name]) for name in names}
            return {path: file.read() for path, file in files.items() if file is not None}
    return {}
