"""The arguments of flows: what they may be, and how they are read off weights."""

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any, ClassVar

from torch import Tensor

from parallel_decode._options import check_at_least_one, check_kind
from parallel_decode.adapters.tarflow.weights import HEAD_DIM

FIRST = "blocks.0.proj_in.weight"


@dataclass(frozen=True)
class FlowConfig(ABC):
    """What the arguments of a flow may be, and how they are read off its weights.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: one is out of its range, or sizes do not divide.

    Attributes:
        kind: what its flows are called.
        needed: names of weights that all such flows have.
    """

    kind: ClassVar[str]
    needed: ClassVar[tuple[str, ...]]

    @classmethod
    @abstractmethod
    def read_off(cls, state: Mapping[str, Tensor], given: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments that weights of these shapes have, as far as they tell; a ValueError if there are none.

        Args:
            state: weights, among them those that are needed.
            given: the arguments that are known.
        """


@dataclass(frozen=True)
class ImageConfig(FlowConfig):
    """What the arguments of flows over patches of images have in common."""

    needed = ("var", FIRST)

    @classmethod
    def read_off(cls, state: Mapping[str, Tensor], given: Mapping[str, Any]) -> dict[str, Any]:
        """Whether blocks scale, and their classes."""
        if not bool(((state["var"] > 0) & state["var"].isfinite()).all()):
            raise ValueError("its variances 'var' are not all positive and finite: train the flow again")
        _, dim = two(state, FIRST)
        outputs, classes = state.get("blocks.0.proj_out.bias"), state.get("blocks.0.class_embed")
        return {
            "nvp": outputs is not None and outputs.numel() == 2 * dim,
            "num_classes": 0 if classes is None else (*classes.shape, 1)[0],
        }

    def check(self, nvp: bool, num_classes: int, noise_std: float | None) -> None:
        """Raise unless these can be."""
        check_kind("nvp", nvp, bool, "True or False")
        if num_classes != 0 or isinstance(num_classes, bool):
            check_at_least_one("num_classes", num_classes)
        if noise_std is not None:
            if isinstance(noise_std, bool) or not isinstance(noise_std, Real):
                raise TypeError(f"noise_std is {noise_std!r}, expected a number or None")
            if not 0 <= noise_std < math.inf:
                raise ValueError(f"noise_std is {noise_std}, expected a finite number >= 0")


def check_channels(channels: int) -> None:
    """Raise unless heads divide it."""
    if channels % HEAD_DIM:
        raise ValueError(f"channels is {channels}, expected a multiple of {HEAD_DIM}, the size of an attention head")


@dataclass(frozen=True)
class Config(ImageConfig):
    """What the arguments of `TarFlow` may be; see there."""

    kind = "TarFlow"
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
        self.check(self.nvp, self.num_classes, self.noise_std)
        if self.img_size % self.patch_size:
            raise ValueError(f"img_size is {self.img_size}, expected a multiple of patch_size, {self.patch_size}")
        check_channels(self.channels)

    @classmethod
    def read_off(cls, state: Mapping[str, Tensor], given: Mapping[str, Any]) -> dict[str, Any]:
        (length, dim), (channels, _) = (two(state, name) for name in cls.needed)
        found = channels_of([dim], given.get("in_channels"))
        blocks = count(state, "blocks.{}.proj_in.weight")
        layers = count(state, "blocks.0.attn_blocks.{}.attention.qkv.weight")
        check_size(
            state, blocks * layers * 12 * channels**2, f"{blocks} blocks of {layers} layers of {channels} channels"
        )
        patch_size = math.isqrt(dim // found)
        return super().read_off(state, given) | {
            "in_channels": found,
            "img_size": side(length) * patch_size,
            "patch_size": patch_size,
            "channels": channels,
            "num_blocks": blocks,
            "layers_per_block": layers,
        }


def two(state: Mapping[str, Tensor], name: str) -> tuple[int, int]:
    """The shape of a tensor of two dimensions."""
    if name not in state:
        raise ValueError(f"{name!r} is missing")
    found = tuple(state[name].shape)
    if len(found) != 2:
        raise ValueError(f"{name!r} has shape {found}, expected two dimensions")
    return found


def channels_of(dims: Iterable[int], in_channels: int | None) -> int:
    """The channels of an image of which patches of some blocks have so many values."""
    if in_channels is not None:
        check_at_least_one("in_channels", in_channels)
    candidates = [in_channels] if in_channels else [3, 1]
    fitting = set(candidates)
    for dim in dims:
        fitting &= {c for c in candidates if dim % c == 0 and math.isqrt(dim // c) ** 2 == dim // c}
        if not fitting:
            raise ValueError(
                f"it has patches of {dim} values, no square of {candidates} channels: pass another in_channels"
            )
    return max(fitting)


def side(length: int) -> int:
    """The patches of a row, of so many in all."""
    if math.isqrt(length) ** 2 != length:
        raise ValueError(f"it has {length} patches, expected those of a square image")
    return math.isqrt(length)


def check_size(state: Mapping[str, Tensor], values: int, what: str) -> None:
    """Raise, before any layer is made, unless there are as many values as the layers have."""
    size = sum(tensor.nbytes for tensor in state.values())
    if size < 2 * values:
        raise ValueError(f"its weights take {size:,} bytes, expected {2 * values:,} at least for {what}")


def count(state: Mapping[str, Tensor], name: str) -> int:
    """How many there are, numbered from 0."""
    return next(n for n in itertools.count() if name.format(n) not in state)
