"""`parallel-decode probe`."""

from pathlib import Path
from typing import Annotated

import torch
import typer
from matplotlib import pyplot as plt
from rich.console import Console
from rich.table import Table

from parallel_decode._command_line import Seed, as_device
from parallel_decode._outputs import aside, check_files
from parallel_decode.adapters.tarflow import digits
from parallel_decode.adapters.tarflow.load import load
from parallel_decode.adapters.tarflow.probe import Probe, probe


def command(
    out: Annotated[Path, typer.Option(help="folder for probe.json and probe.png", file_okay=False)] = Path("probe"),
    checkpoint: Annotated[
        Path | None,
        typer.Option(help=".pth or .safetensors file, or a folder with config.json; the digits if left out"),
    ] = None,
    n: Annotated[int, typer.Option(help="how many images", min=1, max=4096)] = 8,
    positions: Annotated[int, typer.Option(help="that the mean Jacobian is taken over", min=1)] = 16,
    noise_std: Annotated[float | None, typer.Option(help="the noise level that an iTARFlow draws at")] = None,
    seed: Seed = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, mps")] = "cpu",
) -> None:
    """Which blocks of a flow are hard to decode in parallel, and why."""
    place = as_device(device)
    check_files(out / "probe.json", out / "probe.png")
    flow = (digits() if checkpoint is None else load(checkpoint)).to(place)
    flow.noise_std = flow.noise_std if noise_std is None else noise_std
    found = probe(flow, n, generator=torch.Generator(place).manual_seed(seed), positions=positions)
    out.mkdir(parents=True, exist_ok=True)
    with aside(out / "probe.json") as part:
        found.save(part)
    _plot(found, out / "probe.png")
    console = Console()
    console = console if console.width >= 120 else Console(width=120)
    for table in _tables(found):
        console.print(table)
    console.print(
        "Blocks in the order of generation. jacobi, sliding: passes (of L) at the default tolerance. CRM: of GS-Jacobi, said to be larger "
        "where Jacobi is slower. IGM: distance of the first pass from the solution, from z and from zeros. hidden o: cosine and L2 to "
        "ordinary generation when the o nearest predecessors are hidden from attention. lag k: norm of the mean Jacobian of a position "
        "by the one k before.",
        style="dim",
    )
    typer.echo(f"The figures and the plot: {out}")


def _tables(found: Probe) -> list[Table]:
    """Passes, metrics and redundancy of each block; and its mean Jacobian."""
    hidden, lags = list(found.blocks[0].redundancy), list(found.blocks[0].jacobian)
    first = Table(title=f"{len(found.blocks)} blocks, from {found.batch} images")
    second = Table(title="norm of the mean Jacobian")
    for column in ["block", "jacobi", "sliding", "CRM", "IGM z", "IGM 0", *(f"hidden {o}" for o in hidden)]:
        first.add_column(column, justify="right", no_wrap=True)
    for column in ["block", *(f"lag {lag}" for lag in lags)]:
        second.add_column(column, justify="right", no_wrap=True)
    for number, block in enumerate(found.blocks, start=1):
        numbers = [block.crm, block.igm["system"], block.igm["zeros"]]
        cells = [str(number), *map(str, block.passes.values()), *(f"{value:.3g}" for value in numbers)]
        first.add_row(*cells, *(f"{cosine:.3f} {distance:.3g}" for cosine, distance in block.redundancy.values()))
        second.add_row(str(number), *(f"{norm:.2g}" for norm in block.jacobian.values()))
    return [first, second]


def _plot(found: Probe, path: Path) -> None:
    figure, axes = plt.subplots(2, 2, figsize=(10, 7), layout="constrained")
    blocks = range(1, len(found.blocks) + 1)
    for o in found.blocks[0].redundancy:
        axes[0, 0].plot(blocks, [block.redundancy[o][0] for block in found.blocks], "o-", label=f"{o} hidden")
    axes[0, 0].set(title="cosine to ordinary generation, predecessors hidden", xlabel="block")
    for name in found.blocks[0].passes:
        axes[0, 1].plot(blocks, [block.passes[name] for block in found.blocks], "o-", label=name)
    axes[0, 1].set(title="passes", xlabel="block", yscale="log")
    axes[1, 0].plot(blocks, [block.crm for block in found.blocks], "o-", label="CRM")
    for name, label in (("system", "IGM from z"), ("zeros", "IGM from zeros")):
        axes[1, 0].plot(blocks, [block.igm[name] for block in found.blocks], "o-", label=label)
    axes[1, 0].set(title="metrics of GS-Jacobi", xlabel="block", yscale="symlog")
    for number, block in enumerate(found.blocks, start=1):
        axes[1, 1].plot(list(block.jacobian), list(block.jacobian.values()), "o-", label=f"block {number}")
    axes[1, 1].set(title="norm of the mean Jacobian", xlabel="lag", yscale="symlog")
    for axis in axes.flat:
        axis.legend(fontsize=8)
    axes[0, 0].set_xticks(blocks)
    with aside(path) as part:
        figure.savefig(part, format="png", dpi=120)
    plt.close(figure)
