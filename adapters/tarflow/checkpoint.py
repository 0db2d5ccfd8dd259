"""Checkpoints: Apple's files, safetensors, and folders that `save_pretrained` wrote. Nothing loads pickled code."""

import inspect
import itertools
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from torch import Tensor

from parallel_decode._json_file import read_json, reason
from parallel_decode._options import check_at_least_one, check_kind
from parallel_decode._weight_files import fill, read_weights
from parallel_decode.adapters.tarflow.weights import HEAD_DIM

if TYPE_CHECKING:
    from parallel_decode.adapters.tarflow.base import Flow

FIRST = "blocks.0.proj_in.weight"
Made = TypeVar("Made", bound="Flow")


@dataclass(frozen=True)
class FlowConfig(ABC):
    """What the arguments of a flow may be, and how they are read off its weights.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: one is out of its range, or sizes do not divide.
    """

    kind: ClassVar[str]

    @classmethod
    @abstractmethod
    def read_off(cls, state: Mapping[str, Tensor], in_channels: int | None) -> dict[str, Any]:
        """The arguments that weights of these shapes have; a ValueError if there are none.

        Args:
            state: weights, among them `var` and the first block's `proj_in`, both of two dimensions.
            in_channels: if it was given.
        """

    def _check(self, nvp: bool, num_classes: int, noise_std: float | None) -> None:
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
class Config(FlowConfig):
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
        self._check(self.nvp, self.num_classes, self.noise_std)
        if self.img_size % self.patch_size:
            raise ValueError(f"img_size is {self.img_size}, expected a multiple of patch_size, {self.patch_size}")
        check_channels(self.channels)

    @classmethod
    def read_off(cls, state: Mapping[str, Tensor], in_channels: int | None) -> dict[str, Any]:
        (length, dim), channels = state["var"].shape, len(state[FIRST])
        found = channels_of([dim], in_channels)
        blocks = count(state, "blocks.{}.proj_in.weight")
        layers = count(state, "blocks.0.attn_blocks.{}.attention.qkv.weight")
        check_size(
            state, blocks * layers * 12 * channels**2, f"{blocks} blocks of {layers} layers of {channels} channels"
        )
        patch_size = math.isqrt(dim // found)
        return {
            "in_channels": found,
            "img_size": side(length) * patch_size,
            "patch_size": patch_size,
            "channels": channels,
            "num_blocks": blocks,
            "layers_per_block": layers,
            **of_first_block(state),
        }


def folder(name: str | Path, **options: Any) -> str | Path:
    """A folder on this machine: of this name, or of that repository of the Hub (`options` of `snapshot_download`).

    Raises:
        FileNotFoundError: it is neither.
    """
    if os.path.lexists(name):
        return name
    try:
        return snapshot_download(str(name), allow_patterns=["config.json", "model.safetensors"], **options)  # type: ignore[no-any-return]
    except HFValidationError:
        raise FileNotFoundError(f"{name} does not exist, and is no name of a repository of the Hub") from None


def load(cls: type[Made], path: str | Path, given: Mapping[str, Any]) -> Made:
    """See `Flow.from_checkpoint`."""
    path = Path(path)
    if os.path.isdir(path):  # Path.is_dir raises where a name is too long
        known = set(inspect.signature(cls.__init__).parameters) - {"self"}
        given = folder_config(path, known, cls.Config.kind) | dict(given)
        path = path / "model.safetensors"
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} does not exist: give a .pth or .safetensors file, or a folder that holds one")
    state = {cls.renamed(str(name)): value for name, value in read_weights(path, cls.skipped).items()}
    arguments = config(state, given, path, cls.Config)
    with torch.device("meta"):
        flow = cls(**arguments)
    fill(flow, state, path)
    return flow.eval()


def folder_config(folder: Path, known: set[str], kind: str) -> dict[str, Any]:
    """The arguments in a folder's config.json.

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
        raise ValueError(f"{path} is not the configuration of {article(kind)}, which holds {', '.join(sorted(known))}")
    return config


def config(state: Mapping[str, Tensor], given: Mapping[str, Any], path: Path, kind: type[FlowConfig]) -> dict[str, Any]:
    """The arguments of a flow: read off the shapes of its weights, which those that are given have to agree with.

    Raises:
        ValueError: the weights are not such a flow's, or not of these arguments.
    """
    if "var" not in state or FIRST not in state:
        raise ValueError(
            f"{path} is not {article(kind.kind)} checkpoint: it has no 'var' and {FIRST!r}, but {_some(state)}"
        )
    try:
        in_channels = given.get("in_channels")
        if in_channels is not None:
            check_at_least_one("in_channels", in_channels)
        if state["var"].dim() != 2 or state[FIRST].dim() != 2:
            raise ValueError(
                f"'var' and {FIRST!r} have shapes {tuple(state['var'].shape)} and {tuple(state[FIRST].shape)}, expected (L, D) and (C, D)"
            )
        found = kind.read_off(state, in_channels)
        arguments = {**found, **given}
        checked = kind(**{field.name: arguments[field.name] for field in fields(kind) if field.name in arguments})
        other = [name for name in found if getattr(checked, name) != found[name]]
        if other:
            raise ValueError(
                ", ".join(f"{name} is {arguments[name]!r}, expected {found[name]} of these weights" for name in other)
            )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} does not fit this configuration: {reason(error)}") from None
    if not bool(((state["var"] > 0) & state["var"].isfinite()).all()):
        raise ValueError(f"{path} has variances 'var' that are not all positive and finite: train the flow again")
    return arguments


def channels_of(dims: Iterable[int], in_channels: int | None) -> int:
    """The channels of an image of which patches of some blocks have so many values."""
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


def of_first_block(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Whether blocks scale, and their classes."""
    outputs, classes = state.get("blocks.0.proj_out.bias"), state.get("blocks.0.class_embed")
    return {
        "nvp": outputs is not None and outputs.numel() == 2 * state[FIRST].shape[1],
        "num_classes": 0 if classes is None else (*classes.shape, 1)[0],
    }


def count(state: Mapping[str, Tensor], name: str) -> int:
    """How many there are, numbered from 0."""
    return next(n for n in itertools.count() if name.format(n) not in state)


def article(kind: str) -> str:
    """a TarFlow, an ITarFlow."""
    return f"an {kind}" if kind.startswith("I") else f"a {kind}"


def _some(state: Mapping[str, Tensor]) -> str:
    return ", ".join(repr(name)[:60] for name in itertools.islice(state, 3)) or "nothing"
