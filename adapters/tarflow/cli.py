"""The commands of TarFlows: `parallel-decode demo`, `sample`, `bench` and `probe`."""

import os
import warnings
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
import typer
from matplotlib import pyplot as plt
from matplotlib.image import imsave
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor

from parallel_decode._command_line import Command, Seed, as_device, check_picture
from parallel_decode._outputs import aside, check_files
from parallel_decode.adapters.itarflow.load import load
from parallel_decode.adapters.tarflow import digits
from parallel_decode.adapters.tarflow.base import Flow
from parallel_decode.adapters.tarflow.bench import probes
from parallel_decode.adapters.tarflow.bench.command import command as bench
from parallel_decode.adapters.tarflow.bench.measure import precision
from parallel_decode.adapters.tarflow.shard_files import MANIFEST
from parallel_decode.adapters.tarflow.shards import SHARD_SIZE, draw, images, noise
from parallel_decode.selective import as_schedule
from parallel_decode.solution import Solution
from parallel_decode.solver import solve

matplotlib.use("agg")
app = typer.Typer()
app.command("bench", cls=Command)(bench())
app.command("probe", cls=Command)(probes.command)


@app.command(cls=Command)
def demo(
    out: Annotated[Path, typer.Option(help="where to draw the samples and the fronts", dir_okay=False)] = Path(
        "demo.png"
    ),
    n: Annotated[int, typer.Option(help="how many digits, in one batch", min=1, max=4096)] = 16,
    seed: Seed = 0,
    guidance: Annotated[float, typer.Option(help="strength of class guidance", min=0)] = 0.0,
    runs: Annotated[int, typer.Option(help="runs of each schedule, in turn; the median time counts", min=1)] = 5,
    learn: Annotated[int, typer.Option(help="runs of auto before, in which it finds its windows", min=0)] = 25,
) -> None:
    """Draw digits from one noise by four schedules: the same digits, in fewer passes."""
    check_picture(out, ".png", ".jpg", ".pdf", ".svg")
    console, flow = Console(), digits()
    z = torch.randn(n, *flow.var.shape, generator=torch.Generator().manual_seed(seed))
    y = torch.arange(n) % flow.num_classes
    schedules = ("sequential", "jacobi", "selective", "auto")

    def draw(schedule: str) -> Solution:
        return solve(flow.system(z, y=y, guidance=guidance), schedule).raise_for_status()

    with console.status(f"drawing {n} digits by each schedule ..."):
        for _ in range(learn):
            draw("auto")
        drawn = [{schedule: draw(schedule) for schedule in schedules} for _ in range(runs)]
    seconds = {name: sorted(sum(s.seconds for s in run[name].layers) for run in drawn)[runs // 2] for name in schedules}
    solutions = drawn[-1]
    truth = solutions["sequential"].value

    table = Table(
        title=f"{n} digit{'s' * (n > 1)} from one noise, {len(flow.blocks)} blocks of {flow.var.shape[0]} positions"
    )
    for column in ("schedule", "passes", "positions", "seconds", "speed-up", "deviation"):
        table.add_column(column, justify="left" if column == "schedule" else "right", no_wrap=True)
    for name, solution in solutions.items():
        table.add_row(
            name,
            " ".join(str(layer.passes) for layer in solution.layers),
            str(sum(layer.positions for layer in solution.layers)),
            f"{seconds[name]:.2f}",
            f"{seconds['sequential'] / seconds[name]:.2f}x",
            f"{(solution.value - truth).abs().max().item():.1e}",
        )
    console.print(table)
    console.print(
        "passes: of each block. positions: evaluated for each digit. seconds: the median of "
        f"{runs} interleaved runs. deviation: the largest from sequential, on images in [-1, 1], where a level of "
        "8 bits is 7.8e-3. Selective is the rule of SeJD: the first block sequential, the others Jacobi. Auto had "
        f"{learn} runs before, in which it finds its windows."
    )
    clean = {name: flow.denoised(solution.value, y) for name, solution in solutions.items()}
    _picture(clean, solutions, out)
    typer.echo(f"The samples side by side, and the fronts of each block: {out}")


def _picture(images: dict[str, Tensor], solutions: dict[str, Solution], out: Path) -> None:
    depth = len(next(iter(solutions.values())).layers)
    figure = plt.figure(figsize=(12, 6.2), layout="constrained")
    halves = figure.add_gridspec(2, 1, height_ratios=[1.15, 1])
    samples, fronts = halves[0].subgridspec(2, 2), halves[1].subgridspec(1, depth)
    for index, (name, x) in enumerate(images.items()):
        axes = figure.add_subplot(samples[index // 2, index % 2])
        axes.imshow(_grid(x, columns=min(len(x), 8)), cmap="gray", vmin=0, vmax=1)
        axes.set_title(name, fontsize=10)
        axes.set_axis_off()
    for index in range(depth):
        axes = figure.add_subplot(fronts[index])
        for name, solution in solutions.items():
            layer = solution.layers[index]
            axes.plot(range(layer.passes + 1), [0, *layer.fronts.float().mean(1).tolist()], label=name)
        axes.set(title=f"block {index + 1}", xlabel="passes", xscale="symlog")
        if index == 0:
            axes.set_ylabel("front (mean over the digits)")
            axes.legend(fontsize=8)
    with aside(out) as part:
        figure.savefig(part, format=out.suffix[1:].lower(), dpi=120)
    plt.close(figure)


def _grid(images: Tensor, columns: int) -> NDArray[np.float32]:
    """Images (B, C, H, W) in [-1, 1] as one, a pixel apart, (height, width) or with 3 channels last, in [0, 1]."""
    images = ((images.float().cpu() + 1) / 2).clamp(0, 1)
    if len(images) > 1:
        images = F.pad(images, (1, 1, 1, 1), value=0.5)
    rows = -(-len(images) // columns)
    filled = torch.cat([images, images.new_zeros(rows * columns - len(images), *images.shape[1:])])
    grid = filled.reshape(rows, columns, *images.shape[1:]).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    array: NDArray[np.float32] = (grid[..., 0] if grid.shape[-1] == 1 else grid[..., :3]).numpy()
    return array


@app.command(cls=Command)
def sample(
    out: Annotated[Path, typer.Option(help="folder for grid.png, and for single images or shards", file_okay=False)],
    checkpoint: Annotated[
        Path | None,
        typer.Option(help=".pth or .safetensors file, or a folder with config.json; the digits if left out"),
    ] = None,
    n: Annotated[int, typer.Option(min=1, help="how many; more than 64 are written as shards")] = 16,
    schedule: Annotated[
        str, typer.Option(help="auto, sequential, jacobi, gs-jacobi, jacobi-gs, sliding or selective")
    ] = "auto",
    tol: Annotated[float | None, typer.Option(help="see pd.solve; 0 is exact")] = None,
    seed: Seed = 0,
    classes: Annotated[
        str | None, typer.Option(help="labels, as 3 or 0,1,2: repeated to n; all in turn if left out")
    ] = None,
    guidance: float = 0.0,
    annealed_guidance: Annotated[
        bool, typer.Option("--annealed-guidance", help="let guidance rise linearly over the positions")
    ] = False,
    attn_temp: Annotated[float, typer.Option(help="attention temperature of the unconditional branch")] = 1.0,
    noise_std: Annotated[
        float | None,
        typer.Option(help="of the training; with it the images are denoised. The level that an iTARFlow draws at"),
    ] = None,
    in_channels: Annotated[int | None, typer.Option(min=1, help="of an image, where the weights leave it open")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, mps")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32; tf32 (CUDA); bfloat16 or float16, by autocast")] = "float32",
    batch_size: Annotated[int, typer.Option(min=1, help="images of a shard that are drawn at a time")] = 64,
    shard_size: Annotated[
        int | None,
        typer.Option(min=1, help=f"images of a shard, {SHARD_SIZE} if left out; asks for shards however few images"),
    ] = None,
) -> None:
    """Draw images from any TarFlow or iTARFlow checkpoint: a grid and single PNG files or, of many, shards of uint8 images.

    Shards may be drawn by many processes (torchrun, accelerate launch), and the same command goes on where one was ended.
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    singly = n <= 64 and shard_size is None and world == 1
    files = _files(out, n if singly else 0)
    if noise_std is not None and noise_std < 0:
        raise ValueError(f"--noise-std is {noise_std}, expected a number >= 0")
    place = as_device(device)
    config = {} if in_channels is None else {"in_channels": in_channels}
    flow = digits() if checkpoint is None else load(checkpoint, **config)
    flow.to(place).noise_std = flow.noise_std if noise_std is None else noise_std
    labels = _labels(classes, flow.num_classes)
    options: dict[str, Any] = dict(
        guidance=guidance,
        annealed_guidance=annealed_guidance,
        attn_temp=attn_temp,
        schedule=as_schedule(schedule),
        tol=tol,
        denoise=flow.noise_std is not None,
    )
    if singly:
        with precision(dtype, place):
            lines = _singly(flow, files, seed, labels, options)
    else:
        redrawn = draw(
            flow,
            out,
            n,
            seed=seed,
            batch_size=batch_size,
            shard_size=shard_size or SHARD_SIZE,
            labels=labels,
            dtype=dtype,
            rank=rank,
            world=world,
            progress=rank == 0,
            **options,
        )
        lines = [f"process {rank} of {world} is done: its shards of {n} images are in {out}"]
        if redrawn:
            lines.append(f"{len(redrawn)} x drawn again, as they were not finite: images {redrawn}")
        if rank == 0:
            _save(files[-1], next(images(out, world=world))[:64] / 127.5 - 1, 8)
    for line in lines:
        typer.echo(line)


def _files(out: Path, n: int) -> list[Path]:
    """The files of n single images, and of the grid, in a folder that holds no others."""
    files = [*(out / f"{index:04d}.png" for index in range(n)), out / "grid.png"]
    check_files(*files)
    other = {*out.glob("[0-9][0-9][0-9][0-9].png"), *(out.glob(MANIFEST) if n else ())} - set(files)
    if other:
        raise ValueError(f"--out is {out}, which holds {min(other).name} of another run: choose another folder")
    return files


def _singly(flow: Flow, files: list[Path], seed: int, labels: list[int] | None, options: dict[str, Any]) -> list[str]:
    """Draw and write single images, and their grid; returns what to say of them."""
    *singles, grid = files
    y = None if labels is None else torch.tensor([labels[i % len(labels)] for i in range(len(singles))])
    z = noise(flow, range(len(singles)), seed=seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "images .* are not finite")  # it is an error here
        x, solution = flow.sample(z=z, y=y, progress=True, return_solution=True, **options)
    solution.raise_for_status()
    if not x.isfinite().all():
        raise ValueError("some images are not finite once they are denoised: check the model and --noise-std")
    grid.parent.mkdir(parents=True, exist_ok=True)
    for file, image in zip(singles, x, strict=True):
        _save(file, image[None], 1)
    _save(grid, x, min(len(x), 8))
    seconds = sum(layer.seconds for layer in solution.layers)
    return [
        f"{len(x)} images in {seconds:.2f} s and {solution.passes} passes: {grid}",
        *(f"{solution.status.count(status)} x {status.value}" for status in dict.fromkeys(solution.status)),
    ]


def _save(path: Path, images: Tensor, columns: int) -> None:
    with aside(path) as part:
        imsave(part, _grid(images, columns), format="png", cmap="gray", vmin=0, vmax=1)


def _labels(text: str | None, num_classes: int) -> list[int] | None:
    """Classes, to be repeated; -1 for none."""
    if text is None:
        return list(range(num_classes)) or None
    try:
        labels = [max(-1, int(part)) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--classes is {text!r}, expected labels such as 3 or 0,1,2") from None
    if max(labels) >= num_classes:
        raise ValueError(f"--classes is {text!r}, expected numbers below {num_classes}, the classes of this flow")
    return labels
