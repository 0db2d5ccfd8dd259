"""The folder of a training: `state.pt`, which has all to go on from, and what it restores: `config.json`, `model.safetensors`, `log.jsonl`.

The state is replaced at once, and the other files follow from it: however a training is killed, resuming it loses nothing.
"""

import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from parallel_decode._outputs import aside
from parallel_decode.adapters.tarflow import TarFlow

STATE = "state.pt"
DIGEST = hashlib.sha256().digest_size


def write(file: Path, state: dict[str, Any]) -> None:
    """Write a state, and its digest after it: `torch.load` stops before that."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()
    file.parent.mkdir(parents=True, exist_ok=True)
    for part in file.parent.glob(".*.part"):  # of a training that was killed as it wrote
        part.unlink(missing_ok=True)
    with aside(file) as part:
        part.write_bytes(content + hashlib.sha256(content).digest())


def read(file: Path, settings: dict[str, Any], device: str = "cpu") -> dict[str, Any]:
    """Read the state of a training with these settings, which are its entry "settings".

    Raises:
        ValueError: it is damaged, or of other settings.
    """
    content = file.read_bytes()
    if hashlib.sha256(content[:-DIGEST]).digest() != content[-DIGEST:]:  # so nothing damaged is unpickled
        raise ValueError(f"{file} is damaged, or of another version of this library: train in another --out")
    state: dict[str, Any] = torch.load(io.BytesIO(content), map_location=device, weights_only=True)
    begun = state["settings"]
    if different := [name for name in {**settings, **begun} if settings.get(name) != begun.get(name)]:
        pairs = "; ".join(f"{name} {begun.get(name)}, not {settings.get(name)}" for name in different)
        raise ValueError(f"{file} does not go with {', '.join(different)}: resume as it was begun: {pairs}")
    return state


def publish(out: Path, flow: TarFlow, log: list[dict[str, float]]) -> None:
    """Write what `TarFlow.from_checkpoint` loads, and the log."""
    with _staging(out) as staging:
        try:
            flow.save_pretrained(staging)
        except SafetensorError as error:
            raise OSError(f"{out / 'model.safetensors'} cannot be written: {error}") from None
        (staging / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
        for name in ("config.json", "model.safetensors", "log.jsonl"):
            os.replace(staging / name, out / name)


@contextmanager
def _staging(out: Path) -> Iterator[Path]:
    """An empty folder in `out`: one training writes there at a time, and a killed one's is removed."""
    staging = out / ".part"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)
