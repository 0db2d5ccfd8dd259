"""Flows for commands that take any of them."""

import os
from pathlib import Path
from typing import Any

from parallel_decode._weight_files import read_weights
from parallel_decode.adapters.itarflow.flow import ITarFlow
from parallel_decode.adapters.starflow.flow import StarFlow
from parallel_decode.adapters.tarflow.base import Flow
from parallel_decode.adapters.tarflow.checkpoint import folder_config, names
from parallel_decode.adapters.tarflow.flow import TarFlow

KINDS: tuple[type[Flow], ...] = (TarFlow, ITarFlow, StarFlow)


def load(path: str | Path, **config: Any) -> Flow:
    """A flow of the kind that a folder's configuration has the arguments of, or that has the names in a file of weights.

    Args:
        path: see `Flow.from_checkpoint`.
        config: arguments of the flow.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: see `Flow.from_checkpoint`; also where a file holds a STARFlow, whose arguments its weights do not tell.
    """
    kind = _of_folder(Path(path)) if os.path.isdir(path) else _of_file(Path(path))
    return kind.from_checkpoint(path, **config)


def _of_folder(path: Path) -> type[Flow]:
    held = folder_config(path).keys()
    return next((kind for kind in KINDS if held <= names(kind.Config)), TarFlow)


def _of_file(path: Path) -> type[Flow]:
    held = [*map(str, read_weights(path, ITarFlow.skipped))] if os.path.isfile(path) else []
    marks: dict[str, type[Flow]] = {".time_embed.": ITarFlow, ".sos_embed": StarFlow}  # a STARFlow may do without
    return next((kind for name in held for mark, kind in marks.items() if mark in name), TarFlow)
