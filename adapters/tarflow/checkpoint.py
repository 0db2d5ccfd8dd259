"""Checkpoints: Apple's files, safetensors, and folders that `save_pretrained` wrote. Nothing loads pickled code."""

import itertools
import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from torch import Tensor

from parallel_decode._json_file import read_json, reason
from parallel_decode._weight_files import fill, read_weights
from parallel_decode.adapters.tarflow.config import FlowConfig

if TYPE_CHECKING:
    from parallel_decode.adapters.tarflow.saved import Saved

Made = TypeVar("Made", bound="Saved")


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
    """See `Saved.from_checkpoint`."""
    path, kind = Path(path), cls.Config
    if os.path.isdir(path):  # Path.is_dir raises where a name is too long
        held = folder_config(path)
        if not held.keys() <= names(kind):
            what = f"{article(kind.kind)}, which holds {', '.join(sorted(names(kind)))}"
            raise ValueError(f"{path / 'config.json'} is not the configuration of {what}")
        given, path = held | dict(given), path / "model.safetensors"
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} does not exist: give a .pth or .safetensors file, or a folder that holds one")
    state = {cls.renamed(str(name)): value for name, value in read_weights(path, cls.skipped).items()}
    arguments = _arguments(state, given, path, kind)
    with torch.device("meta"):
        flow = cls(**arguments)
    fill(flow, state, path)
    return flow.eval()


def folder_config(folder: Path) -> dict[str, Any]:
    """The arguments in a folder's config.json.

    Raises:
        ValueError: the file is missing or damaged.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} is a folder without config.json, expected one that save_pretrained wrote")
    try:
        config: dict[str, Any] = read_json(path)
    except ValueError as error:
        raise ValueError(f"{path} cannot be read, it may be damaged: {reason(error)}") from None
    if type(config) is not dict:
        raise ValueError(f"{path} holds a {type(config).__name__}, and is not the configuration of a flow")
    return config


def names(kind: type[FlowConfig]) -> set[str]:
    """Of the arguments of such flows."""
    return {field.name for field in fields(kind)}


def _arguments(
    state: Mapping[str, Tensor], given: Mapping[str, Any], path: Path, kind: type[FlowConfig]
) -> dict[str, Any]:
    """The arguments of a flow: read off the shapes of its weights, which those that are given have to agree with.

    Raises:
        ValueError: the weights are not such a flow's, or not of these arguments.
    """
    if not all(name in state for name in kind.needed):
        wanted = " and ".join(map(repr, kind.needed))
        raise ValueError(f"{path} is not {article(kind.kind)} checkpoint: it has no {wanted}, but {_some(state)}")
    try:
        found = kind.read_off(state, given)
        arguments = {**found, **given}
        checked = kind(**{name: arguments[name] for name in names(kind) & arguments.keys()})
        other = [name for name in found if getattr(checked, name) != found[name]]
        if other:
            raise ValueError(
                ", ".join(f"{name} is {arguments[name]!r}, expected {found[name]} of these weights" for name in other)
            )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} does not fit this configuration: {reason(error)}") from None
    return arguments


def article(kind: str) -> str:
    """a TarFlow, an ITarFlow."""
    return f"an {kind}" if kind.startswith("I") else f"a {kind}"


def _some(state: Mapping[str, Tensor]) -> str:
    return ", ".join(repr(name)[:60] for name in itertools.islice(state, 3)) or "nothing"
