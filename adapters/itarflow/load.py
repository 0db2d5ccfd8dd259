"""Flows for commands that take either kind."""

import os
from pathlib import Path
from typing import Any

from parallel_decode._weight_files import read_weights
from parallel_decode.adapters.itarflow.flow import ITarFlow
from parallel_decode.adapters.tarflow.base import Flow
from parallel_decode.adapters.tarflow.flow import TarFlow


def load(path: str | Path, noise_std: float | None = None, **config: Any) -> Flow:
    """An iTARFlow if its weights have a time embedding, else a TarFlow.

    Args:
        path: see `TarFlow.from_checkpoint`.
        noise_std: if given, in place of what a folder says.
        config: arguments of the flow.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: see `TarFlow.from_checkpoint`.
    """
    file = Path(path) / "model.safetensors" if os.path.isdir(path) else Path(path)
    names = read_weights(file, ITarFlow.skipped) if os.path.isfile(file) else {}
    kind = ITarFlow if any(".time_embed." in str(name) for name in names) else TarFlow
    return kind.from_checkpoint(path, **config, **({} if noise_std is None else {"noise_std": noise_std}))
