"""The arguments of `ITarFlow`: what they may be, and how they are read off weights."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from torch import Tensor

from parallel_decode._options import check_at_least_one
from parallel_decode.adapters.tarflow.config import (
    ImageConfig,
    channels_of,
    check_channels,
    check_size,
    count,
    side,
    two,
)


@dataclass(frozen=True)
class Config(ImageConfig):
    """What the arguments of `ITarFlow` may be; see there. Those of blocks are kept as one for each block."""

    kind = "ITarFlow"
    in_channels: int
    img_size: int
    patch_sizes: tuple[int, ...]
    channels: tuple[int, ...]
    num_blocks: int
    layers_per_block: tuple[int, ...]
    nvp: bool = True
    num_classes: int = 0
    input_scale: float = 1.0
    shared_backbone_layers: int = 0
    noise_std: float | None = None

    def __post_init__(self) -> None:
        for name in ("in_channels", "img_size", "num_blocks"):
            check_at_least_one(name, getattr(self, name))
        for name in ("patch_sizes", "channels", "layers_per_block"):
            object.__setattr__(self, name, _each(name, getattr(self, name), self.num_blocks))
        self.check(self.nvp, self.num_classes, self.noise_std)
        scale, shared = self.input_scale, self.shared_backbone_layers
        if isinstance(scale, bool) or not isinstance(scale, Real):
            raise TypeError(f"input_scale is {scale!r}, expected a number")
        if not 0 < scale < math.inf:
            raise ValueError(f"input_scale is {scale}, expected a finite number above 0")
        if shared != 0 or isinstance(shared, bool):
            check_at_least_one("shared_backbone_layers", shared)
            if len(set(self.channels)) > 1:
                raise ValueError(f"channels is {self.channels}, expected one width for blocks that share layers")
            layers = tuple(max(layers, shared) for layers in self.layers_per_block)
            object.__setattr__(self, "layers_per_block", layers)
        for size in self.patch_sizes:
            if self.img_size % size:
                raise ValueError(f"img_size is {self.img_size}, expected a multiple of every patch size, {size}")
        for channels in self.channels:
            check_channels(channels)

    @classmethod
    def read_off(cls, state: Mapping[str, Tensor], given: Mapping[str, Any]) -> dict[str, Any]:
        if "blocks.0.time_embed.mlp.0.weight" not in state:
            raise ValueError("it has no time embedding, as of a TarFlow: load it by TarFlow.from_checkpoint")
        blocks = range(count(state, "blocks.{}.proj_in.weight"))
        channels, dims = zip(*(two(state, f"blocks.{i}.proj_in.weight") for i in blocks), strict=True)
        lengths = [two(state, f"blocks.{i}.pos_embed")[0] for i in blocks]
        found = channels_of(dims, given.get("in_channels"))
        sizes = tuple(math.isqrt(dim // found) for dim in dims)
        layer = "{}.attention.qkv.weight"
        shared = count(state, f"blocks.0.shared_backbone.{layer}")
        own = [count(state, f"blocks.{i}.head_blocks.{layer}") for i in blocks]
        values = [(12 * layers + 8) * width**2 for layers, width in zip(own, channels, strict=True)]
        check_size(
            state, sum(values) + 12 * shared * channels[0] ** 2, f"blocks of {own} layers of {channels} channels"
        )
        return super().read_off(state, given) | {
            "in_channels": found,
            "img_size": side(lengths[0]) * sizes[0],
            "patch_sizes": sizes,
            "channels": channels,
            "num_blocks": len(blocks),
            "layers_per_block": tuple(shared + layers for layers in own),
            "shared_backbone_layers": shared,
        }


def _each(name: str, value: Any, blocks: int) -> tuple[int, ...]:
    values = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    for one in values:
        check_at_least_one(name, one)
    if len(values) not in (1, blocks):
        raise ValueError(f"{name} is {value!r}, expected one number, or one for each of {blocks} blocks")
    return tuple(int(one) for one in values) * (blocks if len(values) == 1 else 1)
