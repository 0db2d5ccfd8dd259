"""Training a TarFlow: its likelihood loss on noised images, AdamW, a cosine rate, checkpoints that resume."""

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from parallel_decode.adapters.tarflow import TarFlow

if TYPE_CHECKING:  # the data needs scikit-image and scikit-learn, and training does not
    from paper_repro.data import Images


def loss(flow: TarFlow, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood in nats per dimension, without its constant, and z (TarFlow, arXiv 2412.06329)."""
    with torch.autocast(x.device.type, torch.bfloat16):
        z, logdet = flow(x, y)
    return (0.5 * z.square().sum((1, 2)) - logdet).mean() / z[0].numel(), z


def rate(step: int, steps: int, warmup: int = 100) -> float:
    """The learning rate's factor: a linear rise over `warmup` steps, then half a cosine down to 0."""
    return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))


def train(
    out: Path,
    data: "Images",
    config: dict[str, Any],
    *,
    steps: int,
    batch_size: int,
    lr: float,
    drop_label: float = 0.1,
    seed: int = 0,
    save_every: int = 250,
    device: str = "cpu",
    resume: bool = False,
) -> Iterator[dict[str, float]]:
    """Train, and yield a line of figures after every save: `out` holds what `TarFlow.from_checkpoint` loads, and `state.pt`.

    Raises:
        FileExistsError: `out` holds a training that `resume` was not asked to go on with.
        FileNotFoundError: `resume` was asked for, and `out` holds no training.
        ValueError: the training in `out` is of another configuration.
    """
    state_file = out / "state.pt"
    if state_file.exists() and not resume:
        raise FileExistsError(f"{state_file} exists: pass --resume to go on with it, or another --out")
    if resume and not state_file.exists():
        raise FileNotFoundError(f"{state_file} does not exist: there is nothing to resume, leave --resume out")

    torch.manual_seed(seed)
    flow = TarFlow(**config).to(device)
    optimizer = torch.optim.AdamW(flow.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=1e-4)
    generator = torch.Generator().manual_seed(seed)
    first = 0
    if resume:
        state = torch.load(state_file, map_location=device, weights_only=True)
        try:
            flow.load_state_dict(state["flow"])
        except RuntimeError:
            raise ValueError(
                f"{state_file} is of a flow of another configuration: resume with the one it was begun with"
            ) from None
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"].cpu())
        first = state["step"]

    losses: list[float] = []
    for step in (bar := tqdm(range(first, steps), initial=first, total=steps, unit="step")):
        x, y = data.batch(batch_size, generator)
        x = x + config["noise_std"] * torch.randn(x.shape, generator=generator)
        if y is not None:
            y = torch.where(torch.rand(batch_size, generator=generator) < drop_label, -1, y).to(device)
        for group in optimizer.param_groups:
            group["lr"] = lr * rate(step, steps)
        value, z = loss(flow, x.to(device), y)
        optimizer.zero_grad()
        value.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(flow.parameters(), 1.0)
        optimizer.step()
        if not flow.nvp:
            flow.var.lerp_(z.detach().square().mean(0), 0.1)
        losses.append(value.item())
        bar.set_postfix(loss=f"{losses[-1]:.4f}")
        if (step + 1) % save_every == 0 or step + 1 == steps:
            flow.save_pretrained(out)
            state = {"flow": flow.state_dict(), "optimizer": optimizer.state_dict(), "generator": generator.get_state()}
            torch.save(state | {"step": step + 1}, part := state_file.with_suffix(".part"))
            os.replace(part, state_file)
            held_out = held_out_loss(flow, data, config["noise_std"])
            yield {"step": step + 1, "loss": sum(losses) / len(losses), "held_out": held_out}
            losses.clear()


@torch.no_grad()
def held_out_loss(flow: TarFlow, data: "Images", noise_std: float) -> float:
    """The loss on the held-out images, under noise that is the same at every call."""
    x, y = data.held_out()
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    device = flow.var.device
    return loss(flow, (x + noise_std * noise).to(device), None if y is None else y.to(device))[0].item()
