"""What the commands have in common that train on crops of photographs."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer

from paper_repro.crop_training import Training, fit
from paper_repro.data.crops import Draw


@contextmanager
def extras() -> Iterator[None]:
    """Say how to install what cannot be imported."""
    try:
        yield
    except ModuleNotFoundError as error:
        hint = 'pip install "parallel-decode[repro,transformers,diffusers]"'
        raise ModuleNotFoundError(f"{error.name} is missing: {hint}") from None


def train(training: Training, draw: Draw, file: Path, steps: int, batch: int, seed: int, lr: float = 1e-3) -> None:
    """Train, and print the loss of every fiftieth step and of the last; see `fit`."""
    file.parent.mkdir(parents=True, exist_ok=True)
    for step, loss in fit(training, draw, file, steps=steps, batch=batch, lr=lr, seed=seed):
        if (step + 1) % 50 == 0 or step + 1 == steps:
            typer.echo(f"{file.stem}: step {step + 1:>5}  loss {loss:.4f}")
