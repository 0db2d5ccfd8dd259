"""Passes and time of each block (the paper's Tables A3 and A4)."""

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

import parallel_decode as pd
from paper_repro.experiments import methods
from paper_repro.experiments.table import table
from paper_repro.paper import FIRST_BLOCK, SWEEPS
from paper_repro.setup import Setup

TITLE = "Passes and time of each block"
LEARNS = 20  # runs of `auto` before it is looked at


def run(setup: Setup) -> dict[str, Any]:
    z, y = setup.noise()
    schedules = methods.paper() | methods.ours()

    def solve(name: str) -> tuple[pd.LayerStats, ...]:
        return pd.solve(setup.flow.system(z, y=y), schedules[name]).layers

    for name in schedules:
        for _ in range(setup.pick(LEARNS, LEARNS, 1) if name.startswith("auto") else 1):
            solve(name)
    rounds = [{name: solve(name) for name in schedules} for _ in range(setup.runs)]

    def median(name: str, what: Callable[[pd.LayerStats], float]) -> list[float]:
        blocks = zip(*(turn[name] for turn in rounds), strict=True)
        return [statistics.median(what(layer) for layer in block) for block in blocks]

    return {
        "batch": setup.batch,
        "length": len(setup.flow.var),
        "methods": {
            name: {
                "passes": median(name, lambda layer: float(layer.passes)),
                "seconds": median(name, lambda layer: layer.seconds),
            }
            for name in schedules
        },
    }


def tell(figures: dict[str, Any], data: str) -> str:
    found = figures["methods"]
    blocks = range(1, 1 + len(found["sequential"]["passes"]))
    rows = []
    for name, one in found.items():
        rows.append([name, "passes", *one["passes"], float(sum(one["passes"]))])
        rows.append([name, "seconds", *one["seconds"], float(sum(one["seconds"]))])
    for name, sweeps in SWEEPS.items():
        if name == data or data not in SWEEPS:
            rows.append(
                [
                    f"paper, SeJD, {name}",
                    "passes",
                    *list(sweeps)[: len(blocks)],
                    "..." if len(sweeps) > len(blocks) else float(sum(sweeps)),
                ]
            )
    seconds = found["SeJD"]["seconds"]
    share = seconds[0] / sum(seconds)
    ujd = found["UJD"]["passes"]
    hardest = 1 + max(range(len(ujd)), key=ujd.__getitem__)
    stated = ", ".join(f"{value:.0%} ({name})" for name, value in FIRST_BLOCK.items())
    return (
        table(["method", "", *(f"block {block}" for block in blocks), "all"], rows)
        + f"\n\nBlocks in the order of generation, batch {figures['batch']}, {figures['length']} positions. Block {hardest} takes the most sweeps under UJD. "
        f"The first block takes {share:.0%} of SeJD's time; in the paper {stated}."
    )


def draw(figures: dict[str, Any], path: Path) -> None:
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    found = figures["methods"]
    width = 0.8 / len(found)
    for index, (name, one) in enumerate(found.items()):
        for axes, what in ((left, "passes"), (right, "seconds")):
            at = [block + 1 + (index - len(found) / 2) * width for block in range(len(one[what]))]
            axes.bar(at, one[what], width, label=name, align="edge")
    for axes, what in ((left, "passes"), (right, "seconds")):
        axes.set(title=f"{what} of each block", xlabel="block, in the order of generation", ylabel=what, yscale="log")
        axes.set_xticks(range(1, 1 + len(found["sequential"][what])))
    left.legend(fontsize=8)
    figure.savefig(path, dpi=110)
