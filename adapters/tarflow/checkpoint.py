"""Checkpoints: Apple's files, safetensors, and folders that `save_pretrained` wrote. Nothing loads pickled code."""

import json
import math
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor


def load(path: Path) -> dict[str, Tensor]:
    try:
        state = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{path} cannot be read as a checkpoint, it may be damaged or of another kind: {reason}"
        ) from None
    if not isinstance(state, dict) or "var" not in state or "blocks.0.proj_in.weight" not in state:
        raise ValueError(f"{path} is not a TarFlow checkpoint: it has no 'var' and 'blocks.0.proj_in.weight'")
    return state


def folder_config(folder: Path, known: set[str]) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} is a folder without config.json, expected one that save_pretrained wrote")
    try:
        config = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} cannot be read, it may be damaged: {error}") from None
    if not isinstance(config, dict) or not config.keys() <= known:
        raise ValueError(f"{path} is not the configuration of a TarFlow, which holds {', '.join(sorted(known))}")
    return config


def config(state: dict[str, Tensor], in_channels: int | None, path: Path) -> dict[str, Any]:
    """The arguments of TarFlow, from the shapes of its weights."""
    length, dim = state["var"].shape
    candidates = [in_channels] if in_channels else [3, 1]
    fitting = [c for c in candidates if dim % c == 0 and math.isqrt(dim // c) ** 2 == dim // c]
    if not fitting:
        raise ValueError(
            f"{path} has patches of {dim} values, no square of {candidates} channels: pass another in_channels"
        )
    patch_size = math.isqrt(dim // fitting[0])
    classes = state.get("blocks.0.class_embed")
    return {
        "in_channels": fitting[0],
        "img_size": math.isqrt(length) * patch_size,
        "patch_size": patch_size,
        "channels": state["blocks.0.proj_in.weight"].shape[0],
        "num_blocks": 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks.")),
        "layers_per_block": 1 + max(int(key.split(".")[3]) for key in state if key.startswith("blocks.0.attn_blocks.")),
        "nvp": state["blocks.0.proj_out.weight"].shape[0] == 2 * dim,
        "num_classes": 0 if classes is None else classes.shape[0],
    }
