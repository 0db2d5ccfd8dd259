"""`parallel-decode demo`: digits by each schedule, beside the sampler that people have."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import matplotlib
import torch
import typer
from matplotlib import pyplot as plt
from rich.console import Console
from rich.table import Table
from torch import Tensor

from parallel_decode._command_line import Seed, check_picture
from parallel_decode._outputs import aside
from parallel_decode._threads import best_threads
from parallel_decode.adapters.tarflow import TarFlow, digits
from parallel_decode.adapters.tarflow.pictures import grid
from parallel_decode.adapters.tarflow.plain import plain_sample
from parallel_decode.solution import Solution
from parallel_decode.solver import solve

matplotlib.use("agg")
SCHEDULES = "sequential", "jacobi", "selective", "auto"


def demo(
    out: Annotated[Path, typer.Option(help="where to draw the samples and the fronts", dir_okay=False)] = Path(
        "demo.png"
    ),
    n: Annotated[int, typer.Option(help="how many digits in a batch, besides one alone", min=1, max=4096)] = 16,
    seed: Seed = 0,
    runs: Annotated[int, typer.Option(help="runs of each sampler, in turn; the median time counts", min=1)] = 3,
    learn: Annotated[int, typer.Option(help="runs of auto before, in which it finds its windows", min=0)] = 8,
) -> None:
    """Draw one digit, and many, by four schedules from the same noise: the same digits, in fewer passes."""
    check_picture(out, ".png", ".jpg", ".pdf", ".svg")
    console, flow = Console(), digits()
    z = torch.randn(n, *flow.var.shape, generator=torch.Generator().manual_seed(seed))
    y = torch.arange(n) % flow.num_classes
    found = {}
    for count in sorted({1, n}):
        with console.status(f"drawing {_digits(count)} by each schedule ..."):
            table, found[count] = _compared(flow, z[:count], y[:count], runs, learn)
        console.print(table)
    console.print(
        "as published: one position after the other over a key-value cache that grows by concatenation (our own code). passes: of each block. "
        f"positions: evaluated for each digit. seconds: the median of {runs} interleaved runs, after {learn} of auto. deviation: the largest "
        "from sequential, on images in [-1, 1], where a level of 8 bits is 7.8e-3. Selective is the rule of SeJD: the first block sequential, "
        "the others Jacobi."
    )
    clean = {name: flow.denoised(solution.value, y) for name, solution in found[n].items()}
    _picture(clean, found[1], out)
    typer.echo(f"The samples side by side, and the fronts of the first digit in each block: {out}")


def _digits(count: int) -> str:
    return f"{count} digit{'s' * (count > 1)}"


def _compared(flow: TarFlow, z: Tensor, y: Tensor, runs: int, learn: int) -> tuple[Table, dict[str, Solution]]:
    """A table of samplers of the same noise, and what each schedule found."""
    solutions: dict[str, Solution] = {}

    def by(schedule: str) -> Callable[[], Tensor]:
        def draw() -> Tensor:
            solutions[schedule] = solve(flow.system(z, y=y), schedule).raise_for_status()
            return solutions[schedule].value

        return draw

    samplers = {"as published": lambda: plain_sample(flow, z, y)} | {name: by(name) for name in SCHEDULES}
    seconds: dict[str, list[float]] = {name: [] for name in samplers}
    images: dict[str, Tensor] = {}
    with best_threads(samplers["sequential"]) as threads:
        for _ in range(learn):
            samplers["auto"]()
        for name in list(samplers) * runs:
            began = time.perf_counter()
            images[name] = samplers[name]()
            seconds[name].append(time.perf_counter() - began)
    median = {name: statistics.median(each) for name, each in seconds.items()}
    table = Table(
        title=f"{_digits(len(z))}, {len(flow.blocks)} blocks of {z.shape[1]} positions, {threads} thread{'s' * (threads > 1)}"
    )
    for column in ("sampler", "passes", "positions", "seconds", "speed-up", "deviation"):
        table.add_column(column, justify="left" if column == "sampler" else "right", no_wrap=True)
    for name, each in median.items():
        layers = solutions.get(name, solutions["sequential"]).layers
        table.add_row(
            name,
            " ".join(str(layer.passes) for layer in layers),
            str(sum(layer.positions for layer in layers)),
            f"{each:.2f}",
            f"{median['as published'] / each:.2f}x",
            f"{(images[name] - images['sequential']).abs().max().item():.1e}",
        )
    return table, {name: solutions[name] for name in SCHEDULES}


def _picture(images: dict[str, Tensor], solutions: dict[str, Solution], out: Path) -> None:
    """The images by each schedule, and the fronts of the solutions' first row."""
    depth = len(next(iter(solutions.values())).layers)
    figure = plt.figure(figsize=(12, 6.2), layout="constrained")
    halves = figure.add_gridspec(2, 1, height_ratios=[1.15, 1])
    samples, fronts = halves[0].subgridspec(2, 2), halves[1].subgridspec(1, depth)
    for index, (name, x) in enumerate(images.items()):
        axes = figure.add_subplot(samples[index // 2, index % 2])
        axes.imshow(grid(x, columns=min(len(x), 8)), cmap="gray", vmin=0, vmax=1)
        axes.set_title(name, fontsize=10)
        axes.set_axis_off()
    for index in range(depth):
        axes = figure.add_subplot(fronts[index])
        for name, solution in solutions.items():
            layer = solution.layers[index]
            axes.plot(range(layer.passes + 1), [0, *layer.fronts[:, 0].tolist()], label=name)
        axes.set(title=f"block {index + 1}", xlabel="passes", xscale="symlog")
        if index == 0:
            axes.set_ylabel("front of the first digit, alone")
            axes.legend(fontsize=8)
    with aside(out) as part:
        figure.savefig(part, format=out.suffix[1:].lower(), dpi=120)
    plt.close(figure)
