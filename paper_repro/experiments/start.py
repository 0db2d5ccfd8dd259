"""Where sweeps start: zeros, z, or normal noise."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

import parallel_decode as pd
from paper_repro.experiments import methods
from paper_repro.experiments.table import table
from paper_repro.setup import Setup

TITLE = "Where sweeps start"
DEFAULT = "default"


def run(setup: Setup) -> dict[str, Any]:
    """Passes of uniform Jacobi from each start, at the paper's tau and at the default tolerance."""
    z, y = setup.noise()
    system = setup.flow.system(z, y=y)
    depth = len(setup.flow.blocks)
    generator = torch.Generator().manual_seed(setup.seed + 1)
    normal = [torch.randn(z.shape, generator=generator).to(z) for _ in range(depth)]
    jacobi = {methods.TAU: pd.Jacobi(freeze=False, absolute=True, tol=methods.TAU), DEFAULT: pd.Jacobi()}

    def passes(schedule: pd.Jacobi, initial: list[Tensor] | None = None) -> list[int]:
        return [layer.passes for layer in pd.solve(system, schedule, initial=initial).layers]

    found = {
        str(tau): {
            "zeros": passes(replace(schedule, start="zeros")),
            "z": passes(replace(schedule, start="system")),
            "normal": passes(schedule, normal),
        }
        for tau, schedule in jacobi.items()
    }
    return {"batch": setup.batch, "passes": found}


def tell(figures: dict[str, Any], data: str) -> str:
    rows = [
        [tau, name, *passes, sum(passes)]
        for tau, starts in figures["passes"].items()
        for name, passes in starts.items()
    ]
    blocks = range(1, len(rows[0]) - 2)
    sums = {tau: [sum(passes) for passes in starts.values()] for tau, starts in figures["passes"].items()}
    spread = max(max(each) / min(each) for each in sums.values())
    return (
        table(["tau", "start", *(f"block {block}" for block in blocks), "all"], rows)
        + f"\n\nPasses of uniform Jacobi, batch {figures['batch']}. The worst start takes {spread:.2f} times the passes of the best; the paper finds that all perform alike."
    )


def draw(figures: dict[str, Any], path: Path) -> None:
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    for axes, (tau, starts) in zip(figure.subplots(1, 2), figures["passes"].items(), strict=True):
        for name, passes in starts.items():
            axes.plot(range(1, len(passes) + 1), passes, marker="o", label=name)
        title = "the default tolerance" if tau == DEFAULT else f"tau = {tau}"
        axes.set(title=f"passes of each block, {title}", xlabel="block, in the order of generation", ylabel="passes")
        axes.set_xticks(range(1, 1 + len(next(iter(starts.values())))))
        axes.legend(title="start", fontsize=8)
    figure.savefig(path, dpi=110)
