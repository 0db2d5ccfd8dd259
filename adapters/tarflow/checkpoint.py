"""Checkpoints: Apple's files, safetensors, and folders that `save_pretrained` wrote. Nothing loads pickled code."""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from numbers import Real
from pathlib import Path
from typing import Any

from torch import Tensor

from parallel_decode._json_file import read_json, reason
from parallel_decode._options import check_at_least_one, check_kind
from parallel_decode.adapters.tarflow.weights import HEAD_DIM

FIRST = "blocks.0.proj_in.weight"


@dataclass(frozen=True)
class Config:
    """What the arguments of `TarFlow` may be; see there.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: one is out of its range, or sizes do not divide.
    """

    in_channels: int
    img_size: int
    patch_size: int
    channels: int
    num_blocks: int
    layers_per_block: int
    nvp: bool = True
    num_classes: int = 0
    noise_std: float | None = None

    def __post_init__(self) -> None:
        for field in fields(self)[:6]:
            check_at_least_one(field.name, getattr(self, field.name))
        check_kind("nvp", self.nvp, bool, "True or False")
        if self.num_classes != 0 or isinstance(self.num_classes, bool):
            check_at_least_one("num_classes", self.num_classes)
        noise_std = self.noise_std
        if noise_std is not None:
            if isinstance(noise_std, bool) or not isinstance(noise_std, Real):
                raise TypeError(f"noise_std is {noise_std!r}, expected a number or None")
            if not 0 <= noise_std < math.inf:
                raise ValueError(f"noise_std is {noise_std}, expected a finite number >= 0")
        if self.img_size % self.patch_size:
            raise ValueError(f"img_size is {self.img_size}, expected a multiple of patch_size, {self.patch_size}")
        if self.channels % HEAD_DIM:
            raise ValueError(
                f"channels is {self.channels}, expected a multiple of {HEAD_DIM}, the size of an attention head"
            )


def folder_config(folder: Path, known: set[str], what: str = "TarFlow") -> dict[str, Any]:
    """The arguments in a folder's config.json, of what is so called.

    Raises:
        ValueError: the file is missing or damaged, or names something else than `known`.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} is a folder without config.json, expected one that save_pretrained wrote")
    try:
        config: dict[str, Any] = read_json(path)
    except ValueError as error:
        raise ValueError(f"{path} cannot be read, it may be damaged: {reason(error)}") from None
    if not isinstance(config, dict) or not config.keys() <= known:
        raise ValueError(f"{path} is not the configuration of a {what}, which holds {', '.join(sorted(known))}")
    return config


def config(state: Mapping[str, Tensor], given: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The arguments of TarFlow: read off the shapes of its weights, which those that are given have to agree with.

    Raises:
        ValueError: the weights are not a TarFlow's, or not of these arguments.
    """
    if "var" not in state or FIRST not in state:
        raise ValueError(f"{path} is not a TarFlow checkpoint: it has no 'var' and {FIRST!r}, but {_some(state)}")
    try:
        found = _read_off(state, given.get("in_channels"))
        arguments = {**found, **given}
        Config(**{field.name: arguments[field.name] for field in fields(Config) if field.name in arguments})
        other = [name for name in found if arguments[name] != found[name]]
        if other:
            raise ValueError(
                ", ".join(f"{name} is {arguments[name]!r}, expected {found[name]} of these weights" for name in other)
            )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} does not fit this configuration: {reason(error)}") from None
    if not bool(((state["var"] > 0) & state["var"].isfinite()).all()):
        raise ValueError(f"{path} has variances 'var' that are not all positive and finite: train the flow again")
    return arguments


def _read_off(state: Mapping[str, Tensor], in_channels: int | None) -> dict[str, Any]:
    if in_channels is not None:
        check_at_least_one("in_channels", in_channels)
    if state["var"].dim() != 2 or state[FIRST].dim() != 2:
        raise ValueError(
            f"'var' and {FIRST!r} have shapes {tuple(state['var'].shape)} and {tuple(state[FIRST].shape)}, expected (L, D) and (C, D)"
        )
    (length, dim), channels = state["var"].shape, len(state[FIRST])
    candidates = [in_channels] if in_channels else [3, 1]
    fitting = [c for c in candidates if dim % c == 0 and math.isqrt(dim // c) ** 2 == dim // c]
    if not fitting:
        raise ValueError(
            f"it has patches of {dim} values, no square of {candidates} channels: pass another in_channels"
        )
    if math.isqrt(length) ** 2 != length:
        raise ValueError(f"it has {length} patches, expected those of a square image")
    blocks = _count(state, "blocks.{}.proj_in.weight")
    layers = _count(state, "blocks.0.attn_blocks.{}.attention.qkv.weight")
    size = sum(tensor.nbytes for tensor in state.values())
    if size < (least := blocks * layers * 12 * channels**2 * 2):  # before any of them is made
        raise ValueError(
            f"its weights take {size:,} bytes, expected {least:,} at least for {blocks} blocks of {layers} layers of {channels} channels"
        )
    outputs, classes = state.get("blocks.0.proj_out.bias"), state.get("blocks.0.class_embed")
    patch_size = math.isqrt(dim // fitting[0])
    return {
        "in_channels": fitting[0],
        "img_size": math.isqrt(length) * patch_size,
        "patch_size": patch_size,
        "channels": channels,
        "num_blocks": blocks,
        "layers_per_block": layers,
        "nvp": outputs is not None and outputs.numel() == 2 * dim,
        "num_classes": 0 if classes is None else (*classes.shape, 1)[0],
    }


def _count(state: Mapping[str, Tensor], name: str) -> int:
    return next(n for n in itertools.count() if name.format(n) not in state)


def _some(state: Mapping[str, Tensor]) -> str:
    return ", ".join(repr(name)[:60] for name in itertools.islice(state, 3)) or "nothing"
