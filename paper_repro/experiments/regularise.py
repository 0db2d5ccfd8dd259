"""Can training make the hard block easier, and what does that cost in likelihood? (A question that the paper leaves open.)"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from paper_repro.experiments.table import table
from paper_repro.experiments.training import look
from paper_repro.setup import Setup, small
from paper_repro.train import train
from parallel_decode.adapters.tarflow import TarFlow
from parallel_decode.adapters.tarflow.decoding import BlockSystem
from parallel_decode.adapters.tarflow.guidance import Guidance
from parallel_decode.cached import KeyValueStorage
from parallel_decode.window import Window

TITLE = "A penalty on the Jacobian of the hard block"
WEIGHTS = (0.0, 0.01, 0.1)
STEP = 0.01  # of the finite difference


def penalty(flow: TarFlow, x: Tensor, y: Tensor | None) -> Tensor:
    """||J v||^2 / ||v||^2 for a random v: the squared Frobenius norm of the Jacobian per position and value, of the map that Jacobi iterates in the block that is generated first.

    Args:
        flow: the flow.
        x: images, shape (B, C, H, W).
        y: classes, shape (B,), or None.
    """
    h = flow.patchify(x)
    for block in flow.blocks[:-1]:
        h, _ = block(h, y)
    last: Any = flow.blocks[-1]
    z, _ = last(h, y)
    layer = BlockSystem(last, last.permuted(z), y, Guidance(), KeyValueStorage())
    solution = last.permuted(h)
    v = STEP * torch.randn_like(solution)
    moved = layer.evaluate(solution + v, Window.full(layer.length)) - layer.evaluate(
        solution, Window.full(layer.length)
    )
    return moved.square().sum() / v.square().sum()


def run(setup: Setup) -> dict[str, Any]:
    """Trains a flow for each weight of the penalty, from the same seed on the same batches."""
    images = setup.needed_images()
    steps = setup.pick(20_000, 300, 2)
    rows = []
    for weight in WEIGHTS:
        folder = setup.out / f"regularise_{weight}"

        def term(flow: TarFlow, x: Tensor, y: Tensor | None, weight: float = weight) -> Tensor:
            return weight * penalty(flow, x, y)

        extra: Callable[[TarFlow, Tensor, Tensor | None], Tensor] | None = term if weight else None
        (line,) = train(
            folder,
            images,
            small(images, setup.scale),
            steps=steps,
            batch_size=setup.pick(128, 16, 2),
            lr=1e-3,
            seed=setup.seed,
            save_every=steps,
            device=str(setup.flow.var.device),
            extra=extra,
            again=True,
        )
        flow = TarFlow.from_checkpoint(folder).to(setup.flow.var.device)
        rows.append({"weight": weight, "held_out": line["held_out"], "blocks": look(flow, setup)})
    return {"steps": steps, "rows": rows}


def tell(figures: dict[str, Any], data: str) -> str:
    found = figures["rows"]
    blocks = range(1, 1 + len(found[0]["blocks"]))
    rows = [
        [
            row["weight"],
            f"{row['held_out']:.4f}",
            *(block["passes"] for block in row["blocks"]),
            sum(block["passes"] for block in row["blocks"]),
        ]
        for row in found
    ]
    plain, most = found[0], found[-1]
    before, after = (row["blocks"][0]["passes"] for row in (plain, most))
    return table(["weight", "held-out loss", *(f"block {block}" for block in blocks), "all"], rows) + (
        f"\n\nPasses of Jacobi at the default tolerance after {figures['steps']} steps. With the weight {most['weight']} the first block takes {after} passes in place of {before}, and the held-out loss (nats per value, without its constant) is "
        f"{most['held_out'] - plain['held_out']:+.4f} of what it is without."
    )


def draw(figures: dict[str, Any], path: Path) -> None:
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for row in figures["rows"]:
        axes.scatter(row["held_out"], row["blocks"][0]["passes"], s=50)
        at = row["held_out"], row["blocks"][0]["passes"]
        axes.annotate(f"weight {row['weight']}", at, (6, 6), textcoords="offset points", fontsize=8)
    axes.margins(0.2)
    axes.set(
        title="Passes of the first block against likelihood",
        xlabel="held-out loss, nats per value (lower is better)",
        ylabel="passes",
    )
    figure.savefig(path, dpi=110)
