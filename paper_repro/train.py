"""Training a TarFlow: its likelihood loss on noised images, AdamW, a cosine rate, checkpoints that resume."""

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from paper_repro import training_state
from parallel_decode._options import check_at_least_one
from parallel_decode.adapters.tarflow import TarFlow

if TYPE_CHECKING:  # the data needs scikit-image and scikit-learn, and training does not
    from paper_repro.data import Images


def loss(flow: nn.Module, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
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
    ema: float = 0.0,
    seed: int = 0,
    save_every: int = 250,
    device: str = "cpu",
    resume: bool = False,
    again: bool = False,
    extra: Callable[[TarFlow, Tensor, Tensor | None], Tensor] | None = None,
) -> Iterator[dict[str, float]]:
    """Train, and yield a line of figures after every save.

    `out` then holds what `TarFlow.from_checkpoint` loads, `log.jsonl` with all lines, and `state.pt` to resume from.

    Under `torchrun` or `accelerate launch` the processes share each batch, which is the same however many there are, and
    the first of them writes and yields.

    Args:
        out: a folder.
        data: what to learn.
        config: arguments of `TarFlow`.
        steps: of the optimizer in all; the learning rate falls to 0 at the last.
        batch_size: images of a step, those of all processes together.
        lr: the largest learning rate.
        drop_label: share of labels left out, for guidance.
        ema: the decay of an exponential moving average of the weights, which is then what is saved and judged; 0 for none.
        seed: of weights and data.
        save_every: steps.
        device: "cpu" or "cuda"; each process takes the GPU of its number.
        resume: go on with the training in `out`.
        again: begin anew, whatever `out` holds.
        extra: a term that is added to the loss, from the flow, the noised images and their labels.

    Raises:
        FileExistsError: `out` holds a training that `resume` was not asked to go on with.
        FileNotFoundError: `resume` was asked for, and `out` holds no training.
        ValueError: an option is out of range, the training in `out` is damaged or was begun otherwise, the processes do not
            divide the batch, or the loss is not finite.
    """
    for name, number in (("steps", steps), ("batch_size", batch_size), ("save_every", save_every)):
        check_at_least_one(name, number)
    if not (0 < lr < math.inf and 0 <= drop_label <= 1 and 0 <= ema < 1 and 0 <= config["noise_std"] < math.inf):
        got = f"lr {lr}, drop_label {drop_label}, ema {ema}, noise_std {config['noise_std']}"
        raise ValueError(f"{got}, expected lr > 0, drop_label from 0 to 1, ema from 0 to below 1, noise_std >= 0")
    state_file = out / training_state.STATE
    if state_file.exists() and not (resume or again):
        raise FileExistsError(f"{state_file} exists: pass --resume to go on with it, or another --out")
    if resume and not state_file.exists():
        raise FileNotFoundError(f"{state_file} does not exist: there is nothing to resume, leave --resume out")
    rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    if batch_size % world:
        raise ValueError(f"batch_size is {batch_size}, expected a multiple of the {world} processes")
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"

    torch.manual_seed(seed)
    flow = TarFlow(**config).to(device)
    average = AveragedModel(flow, multi_avg_fn=get_ema_multi_avg_fn(ema), use_buffers=True) if ema else None  # type: ignore[no-untyped-call]
    optimizer = torch.optim.AdamW(flow.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=1e-4)
    settings = dict(config=config, batch_size=batch_size, drop_label=drop_label, ema=ema, seed=seed)
    settings["data"] = type(data).__name__
    first, log = 0, []
    if resume:
        state = training_state.read(state_file, settings, device)
        flow.load_state_dict(state["flow"])
        if average is not None:
            average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        log = state["log"]
        first = state["step"]

    shared = DistributedDataParallel(flow) if world > 1 else flow
    learnt = flow if average is None else cast(TarFlow, average.module)
    if resume and rank == 0:  # a kill may have come between the state and these
        training_state.publish(out, learnt, log)
    losses: list[float] = []
    for step in (bar := tqdm(range(first, steps), initial=first, total=steps, unit="step", disable=rank > 0)):
        x, y = _batch(data, batch_size, config["noise_std"], drop_label, _seed(seed, step))
        x, y = x[rank::world].to(device), None if y is None else y[rank::world].to(device)
        for group in optimizer.param_groups:
            group["lr"] = lr * rate(step, steps)
        value, z = loss(shared, x, y)
        optimizer.zero_grad()
        (value if extra is None else value + extra(flow, x, y)).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(flow.parameters(), 1.0)
        optimizer.step()
        if not flow.nvp:
            flow.var.lerp_(_mean(z.detach().square().mean(0), world), 0.1)
        if average is not None:
            average.update_parameters(flow)
        losses.append(_mean(value.detach(), world).item())
        if not math.isfinite(losses[-1]):
            raise ValueError(
                f"the loss is {losses[-1]} at step {step + 1}: lower lr or noise_std; {out} is as last saved"
            )
        bar.set_postfix(loss=f"{losses[-1]:.4f}")
        if ((step + 1) % save_every == 0 or step + 1 == steps) and rank == 0:
            held_out = held_out_loss(learnt, data, config["noise_std"])
            log.append({"step": step + 1, "loss": sum(losses) / len(losses), "held_out": held_out})
            state = {
                "settings": settings,
                "flow": flow.state_dict(),
                "average": None if average is None else average.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step + 1,
                "log": log,
            }
            training_state.write(state_file, state)
            training_state.publish(out, learnt, log)
            yield log[-1]
            losses.clear()
    if world > 1:
        dist.destroy_process_group()


def _batch(data: "Images", size: int, noise_std: float, drop_label: float, seed: int) -> tuple[Tensor, Tensor | None]:
    """Noised images and their labels, some left out (-1): a function of the seed alone, so that a training can be resumed anywhere."""
    generator = torch.Generator().manual_seed(seed)
    x, y = data.batch(size, generator)
    x = x + noise_std * torch.randn(x.shape, generator=generator)
    return x, None if y is None else torch.where(torch.rand(size, generator=generator) < drop_label, -1, y)


def _seed(seed: int, step: int) -> int:
    """Of a step's batch. torch's CPU generator keeps 32 bits of it, so that seed and step have to share them."""
    return (
        2654435761 * seed + step
    ) % 2**32  # an odd factor, near 2^32 over the golden ratio: trainings of few seeds lie far apart


def _mean(value: Tensor, world: int) -> Tensor:
    """The mean over the processes."""
    if world > 1:
        dist.all_reduce(value)
    return value / world


@torch.no_grad()
def held_out_loss(flow: TarFlow, data: "Images", noise_std: float) -> float:
    """The loss on the held-out images, under noise that is the same at every call."""
    x, y = data.held_out()
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    device = flow.var.device
    return loss(flow, (x + noise_std * noise).to(device), None if y is None else y.to(device))[0].item()
