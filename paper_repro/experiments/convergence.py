"""Distance to the sequential solution after each sweep, beside the bound of theorem 3 (docs/theory.md)."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

import parallel_decode as pd
from paper_repro.experiments.table import table
from paper_repro.setup import Setup

TITLE = "Convergence of Jacobi sweeps"
LEVELS = (1.0, 1e-1, 1e-2, 1e-3, 1e-6, 1e-9)  # of the relative distance
HUGE = 1e100  # what overflows is drawn as this
CHUNK = 64  # outputs whose gradients are taken at a time


def run(setup: Setup) -> dict[str, Any]:
    """In float64, so that rounding is out of the picture; the bound from the Jacobian at the solution of the first row, so to first order."""
    flow = deepcopy(setup.flow).double()
    z, y = setup.noise(setup.pick(8, 4, 2))
    sweeps = setup.pick(len(flow.var), 96, 6)
    blocks: list[dict[str, Any]] = []

    def look(index: int, make: Callable[[], pd.TriangularSystem]) -> Tensor:
        layer = make()
        truth = pd.solve(layer, "sequential").value
        norm = truth.flatten(1).norm(dim=1)
        distances: list[float] = []
        errors: list[Tensor] = []  # of the first row, position by position

        def note(x: Tensor) -> None:
            error = (x - truth).clamp(-HUGE, HUGE)
            distances.append(float((error.flatten(1).norm(dim=1) / norm).mean()))
            errors.append(error[0].norm(dim=-1))

        note(torch.cat([truth[:, :1], torch.zeros_like(truth[:, 1:])], 1))
        jacobi = pd.Jacobi(freeze=False, start="zeros")
        pd.solve(layer, jacobi, tol=0, max_passes=sweeps, callback=lambda one: note(one.x))
        first_row = layer.select(torch.zeros(1, dtype=torch.long))
        assert first_row is not None
        constants = _constants(first_row, truth[:1])
        bound, bounds = errors[0], [float(errors[0].norm())]
        for _ in errors[1:]:
            bound = (constants @ bound).clamp(max=HUGE)
            bounds.append(float(bound.norm()))
        first = float(truth[0].norm())
        measured = [float(error.norm()) / first for error in errors]
        blocks.append({"relative_distance": distances, "first_row": measured, "bound": [b / first for b in bounds]})
        return truth

    with torch.no_grad():
        flow.system(z.double(), y=y).walk(look)
    return {"batch": len(z), "length": len(flow.var), "blocks": blocks}


def _constants(layer: pd.TriangularSystem, x: Tensor) -> Tensor:
    """The spectral norms of d f_l / d x_m of the first row at x (B, L, D): shape (L, L)."""
    length, size = x.shape[1:]
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        outputs = layer.evaluate(x, pd.Window.full(length))[0].flatten()
        parts = []
        for rows in torch.eye(len(outputs), dtype=x.dtype, device=x.device).split(CHUNK):  # type: ignore[no-untyped-call]
            (part,) = torch.autograd.grad(outputs, x, rows, retain_graph=True, is_grads_batched=True)
            parts.append(part[:, 0])
    jacobian = torch.cat(parts).view(length, size, length, size).transpose(1, 2)
    norms: Tensor = torch.linalg.matrix_norm(jacobian, ord=2)
    return norms.tril(-1)


def passes_to(distances: list[float], level: float) -> int | None:
    """The first sweep after which the distance stays at or below a level; None if there is none."""
    beyond = [sweep for sweep, distance in enumerate(distances) if not distance <= level]
    first = beyond[-1] + 1 if beyond else 0
    return first if first < len(distances) else None


def tell(figures: dict[str, Any], data: str) -> str:
    rows = [
        [index, *(passes_to(block["relative_distance"], level) for level in LEVELS), max(block["relative_distance"])]
        for index, block in enumerate(figures["blocks"], 1)
    ]
    grows = [
        str(row[0])
        for row, block in zip(rows, figures["blocks"], strict=True)
        if max(block["relative_distance"]) > 1.01 * block["relative_distance"][0]
    ]
    said = (
        f"In block {', '.join(grows)} the distance first grows" if grows else "In no block does the distance grow first"
    )
    return (
        table(["block", *(f"sweeps to {level:.0e}" for level in LEVELS), "largest"], rows)
        + f"\n\nRelative distance (l2) to the sequential solution, mean of {figures['batch']} rows, from zeros, float64. {said}: spectral radius 0 gives no ratio of one sweep to the next "
        "(the paper's Proposition 1; docs/theory.md has the counterexample). The bound is C^t |e_0| with C the norms of the Jacobian at the solution, so it holds to first order alone."
    )


def draw(figures: dict[str, Any], path: Path) -> None:
    blocks = figures["blocks"]
    figure = Figure(figsize=(3.2 * len(blocks), 3.4), layout="constrained")
    for index, (axes, block) in enumerate(
        zip(figure.subplots(1, len(blocks), sharey=True, squeeze=False)[0], blocks, strict=True), 1
    ):
        axes.semilogy(block["first_row"], label="measured (first row)")
        axes.semilogy(block["bound"], linestyle="--", label="C^t |e_0| (theorem 3, first order)")
        axes.set(title=f"block {index}", xlabel="sweeps", ylim=(1e-14, 1e4))
    figure.axes[0].set_ylabel("relative distance to sequential")
    figure.axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=110)
