"""The files of shards, and the manifest that says what they hold.

Shapes: B images of a shard, (C, H, W) an image.
"""

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

import parallel_decode
from parallel_decode._outputs import aside, check_output

FORMAT, MANIFEST = "parallel_decode shards 1", "manifest.json"


@dataclass(frozen=True)
class Shards:
    """The files of a folder.

    Attributes:
        folder: where they are.
        settings: all that the images depend on, as the manifest has them.
    """

    folder: Path
    settings: dict[str, Any]

    @classmethod
    def begin(cls, folder: Path, settings: dict[str, Any], begun: dict[str, Any]) -> "Shards":
        """The shards of these settings; `begun` says how the first process drew, for the record alone.

        What changes an image by more than rounding is a setting, and binds. Schedules agree within `tol`, which is one;
        batches, numbers of processes, devices and versions agree within rounding, so others may finish what some began.
        """
        present = sum(file.stat().st_size for file in folder.glob("shard-*.safetensors"))
        check_output(folder, settings["count"] * math.prod(settings["image_shape"]) - present)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / MANIFEST).exists():
            versions = {module.__name__: module.__version__ for module in (parallel_decode, torch, np)}
            content = {"format": FORMAT, "settings": settings, "begun": begun | versions}
            _write(folder / MANIFEST, json.dumps(content, indent=1).encode())
        there = cls.of(folder)
        different = [name for name in {**settings, **there.settings} if there.settings.get(name) != settings.get(name)]
        if different:
            pairs = ", ".join(f"{n} is {there.settings.get(n)} there and {settings.get(n)} here" for n in different)
            raise ValueError(
                f"{folder} holds images of other settings: {pairs}; repeat its settings, or take another folder"
            )
        return there

    @classmethod
    def of(cls, folder: Path) -> "Shards":
        """The shards of a folder's manifest."""
        path = folder / MANIFEST
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist, expected a folder that shards were drawn into")
        try:
            content = json.loads(path.read_bytes())
            if content["format"] != FORMAT:
                raise ValueError(f"its format is {content['format']!r}, expected {FORMAT!r}")
            return cls(folder, content["settings"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} cannot be read, it may be damaged: {error}; take another folder") from None

    def __len__(self) -> int:
        return len(range(0, self.settings["count"], self.settings["shard_size"]))

    def indices(self, number: int) -> range:
        """Of the images in a shard."""
        size = self.settings["shard_size"]
        return range(self.settings["count"])[number * size : (number + 1) * size]

    def path(self, number: int) -> Path:
        return self.folder / f"shard-{number:05d}.safetensors"

    def read(self, number: int) -> tuple[Tensor, list[int]] | None:
        """A shard's images, and the indices of those that were drawn again; None unless it is there, whole, and of these settings."""
        try:
            with safe_open(self.path(number), "pt") as file:
                shard, images = json.loads(file.metadata()["shard"]), file.get_tensor("images")
            whole = shard["sha256"] == self._sha256(number, images, shard["redrawn"])
        except (SafetensorError, OSError, ValueError, KeyError, TypeError):
            return None
        return (images, shard["redrawn"]) if whole else None

    def write(self, number: int, images: Tensor, redrawn: list[int]) -> None:
        # one entry, as safetensors does not keep the order of several, and equal shards are to have equal bytes
        shard = {"redrawn": redrawn, "sha256": self._sha256(number, images, redrawn)}
        _write(self.path(number), save({"images": images}, {"shard": json.dumps(shard)}))

    def tidy(self) -> None:
        """Once all shards are there, remove what killed processes left half-written."""
        if all(self.path(number).exists() for number in range(len(self))):
            for part in self.folder.glob("*.part"):
                part.unlink(missing_ok=True)

    def _sha256(self, number: int, images: Tensor, redrawn: list[int]) -> str:
        about = json.dumps([self.settings, number, redrawn, list(images.shape)], sort_keys=True)
        return hashlib.sha256(about.encode() + images.numpy().tobytes()).hexdigest()


def _write(path: Path, content: bytes) -> None:
    """All of the file or nothing; of several writers the last one stays."""
    try:
        with aside(path) as part:
            part.write_bytes(content)
    except FileNotFoundError:  # another process ended meanwhile, and tidied up
        if not path.parent.is_dir():
            raise
        _write(path, content)
