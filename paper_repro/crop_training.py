"""Training on labelled crops, for the commands that train small models of photographs.

Shapes: B pictures of H x W pixels.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from paper_repro import training_state
from paper_repro.data.crops import Draw
from paper_repro.train import rate


class Training(nn.Module, ABC):
    """What is trained, and by which loss."""

    @abstractmethod
    def loss(self, pixels: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Of pixels (B, 3, H, W) in [-1, 1] and their classes (B,), with random numbers of the generator alone."""


def fit(
    training: Training,
    draw: Draw,
    file: Path,
    *,
    steps: int,
    batch: int,
    lr: float,
    seed: int = 0,
    save_every: int = 250,
) -> Iterator[tuple[int, float]]:
    """Train, and yield the number of each step and its loss.

    Args:
        training: what is trained.
        draw: of crops.
        file: the state; a training that it holds goes on, with the losses that it would have had.
        steps, batch: how many of how many crops.
        lr: the largest learning rate.
        seed: of crops.
        save_every: steps.

    Raises:
        ValueError: the file is damaged, or of another model, batch or seed.
    """
    weights = [weight for weight in training.parameters() if weight.requires_grad]
    settings = {"batch": batch, "seed": seed}
    optimizer, first = torch.optim.AdamW(weights, lr, betas=(0.9, 0.95), weight_decay=0.01), 0
    if file.exists():
        state = training_state.read(file, settings)
        try:
            training.load_state_dict(state["training"])
        except RuntimeError:
            raise ValueError(
                f"{file} is of a model of another size: go on with it as it was begun, or train in another folder"
            ) from None
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    for step in range(first, steps):
        generator = torch.Generator().manual_seed(1_000_003 * seed + step)
        optimizer.param_groups[0]["lr"] = lr * rate(step, steps)
        loss = training.loss(*draw(batch, generator), generator)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        if (step + 1) % save_every == 0 or step + 1 == steps:
            state = {"training": training.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            training_state.write(file, state | {"settings": settings})
        yield step, loss.item()
