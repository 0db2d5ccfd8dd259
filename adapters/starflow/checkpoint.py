"""Checkpoints: Apple's files, safetensors, and folders that `save_pretrained` wrote. Nothing loads pickled code."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from parallel_decode._weight_files import read_weights
from parallel_decode.adapters.starflow.config import Config
from parallel_decode.adapters.tarflow.checkpoint import folder_config


def read(path: Path, config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The arguments, those of a folder where they are left out, and the weights.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: the file is damaged, or smaller than these arguments.
    """
    config = dict(config)
    if os.path.isdir(path):  # Path.is_dir raises where a name is too long
        config = folder_config(path, set(Config.__dataclass_fields__), "STARFlow") | config
        path = path / "model.safetensors"
    state = read_weights(path)
    layers = config.get("layers_per_block", 0)
    counts = config.get("num_blocks", 0), *(layers if isinstance(layers, (list, tuple)) else [layers])
    if any(isinstance(count, int) and count > len(state) for count in counts):  # before any of them is made
        raise ValueError(f"{path} holds {len(state)} tensors, fewer than there are layers in this configuration")
    return config, state


def constants(flow: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The buffers that are not among the weights: nothing reads them, and published files may leave them out."""
    missing = {name: like.shape for name, like in flow.named_buffers() if name not in state}
    return {
        name: torch.ones(shape).tril() if name.endswith("attn_mask") else torch.full(shape, float(name == "var"))
        for name, shape in missing.items()
    }
