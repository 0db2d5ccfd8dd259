"""`solve`: the options checked, each layer solved given the one before, and what came out.

Shapes: B batch rows, L positions, *E the event.
"""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from parallel_decode._adjoint import attach
from parallel_decode._attention import without_plans
from parallel_decode._claims import Claim
from parallel_decode._guess import first_iterate, guesses_of_layers
from parallel_decode._iterate import Run, iterate
from parallel_decode._options import check_at_least_one, check_kind, check_tol
from parallel_decode._outcome import outcome
from parallel_decode._progress import progress_bar
from parallel_decode._tolerance import Tolerance
from parallel_decode._verify import verified
from parallel_decode.schedules import Schedule
from parallel_decode.selective import Selective, as_schedule
from parallel_decode.solution import LayerStats, Solution, Status
from parallel_decode.system import LayeredSystem, TriangularSystem
from parallel_decode.window import Window


class Pass(NamedTuple):
    """One pass, as `callback` sees it.

    Attributes:
        layer: the layer's index in the order of solving.
        number: the pass within the layer, from 1.
        window: what was evaluated.
        front: shape (B,), the leading positions that are now final.
        residual: shape (B,), the largest change; NaN where there was nothing to compare.
        x: the iterate, shape (B, L, *E); the solver's own storage, to be read and not to be written to or kept.
    """

    layer: int
    number: int
    window: Window
    front: Tensor
    residual: Tensor
    x: Tensor


def solve(
    system: TriangularSystem | LayeredSystem,
    schedule: Schedule | Selective | str = "jacobi",
    *,
    tol: float | None = None,
    initial: Tensor | Sequence[Tensor | None] | None = None,
    max_passes: int | None = None,
    verify: bool = False,
    callback: Callable[[Pass], None] | None = None,
    progress: bool = False,
    differentiable: bool = False,
) -> Solution:
    """Solve a triangular system, or a chain of them, by parallel fixed-point passes.

    Every schedule ends within L passes for each layer, and with tol=0 at the sequential answer (docs/theory.md).

    Args:
        system: what to solve. (One that keeps state, a cache say, can be solved by one call at a time.)
        schedule: a schedule or its name: "sequential", "jacobi", "gs-jacobi", "jacobi-gs", "sliding", "selective", "auto".
        tol: a position is settled once max|new - old| <= tol * (1 + max|old|), the maxima over its event; with 0 once it has
            the same bits. None asks for equality of integers, and for floats takes the machine epsilon to the power 2/3
            (2.4e-5 in float32, 3.7e-11 in float64). A tolerance that a schedule carries itself goes before this one.
        initial: a first guess in place of the system's, shape (B, L, *E); for a layered system one for each layer.
            It changes how many passes are needed, never the answer at tol=0.
        max_passes: stop each layer after so many passes; rows that are not done by then say so in their status.
        verify: evaluate everything once more at the end and keep the residual, and the error bound where the
            system has Lipschitz constants. (What a system wrote itself, after the end of a text say, is compared like the rest.)
        callback: called after every pass with a `Pass`.
        progress: show a bar of the front (needs tqdm).
        differentiable: let the value have a gradient with respect to all that the system was made from (noise, embeddings,
            parameters), if gradients are enabled: exact at the solution, by the adjoint system, in the memory of one pass.
            `evaluate` has to be differentiable. Asking for a second derivative (`create_graph=True`) raises.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: an argument's value, or what the system returned, is not as expected.
        RuntimeError: the system is being solved already, in another thread or around a callback.

    References:
        Song et al., Accelerating Feedforward Computation via Parallel Nonlinear Equation Solving (arXiv 2002.03629).
        Zhang et al., Selective Jacobi Decoding (arXiv 2505.24791).

    Example:
        >>> import torch, parallel_decode as pd
        >>> f = lambda x: 1 + torch.nn.functional.pad(x, (1, -1)).cumsum(1) % 7  # x_l = 1 + (sum of x_<l) mod 7
        >>> solution = pd.solve(pd.from_function(f, torch.zeros(2, 6, dtype=torch.long)), "sliding")
        >>> solution.value[0].tolist(), solution.status[0].name
        ([1, 2, 4, 1, 2, 4], 'EXACT')
    """
    if not isinstance(system, (TriangularSystem, LayeredSystem)):
        raise TypeError(
            f"system is a {type(system).__name__}, expected a TriangularSystem or LayeredSystem: try pd.from_function"
        )
    check_tol(tol)
    if max_passes is not None:
        check_at_least_one("max_passes", max_passes)
    for name, flag in (("verify", verify), ("progress", progress), ("differentiable", differentiable)):
        check_kind(name, flag, bool, "True or False")
    if callback is not None and not callable(callback):
        raise TypeError(f"callback is {callback!r}, expected a function of a Pass, or None")
    chain = system if isinstance(system, LayeredSystem) else _Single(system)
    rule = as_schedule(schedule)
    rule = rule if isinstance(rule, Selective) else Selective((rule,))
    schedules = rule.for_layers(chain.depth if chain is system else None)
    rule.check(system)
    guesses = guesses_of_layers(initial, chain, layered=chain is system)
    differentiable = differentiable and torch.is_grad_enabled()
    status: list[Status] = []
    layers: list[LayerStats] = []

    def solve_layer(index: int, make: Callable[[], TriangularSystem]) -> Tensor:
        layer, began = make(), time.perf_counter()
        bar = progress_bar(progress, f"layer {index + 1}/{chain.depth}", layer.length)
        with torch.no_grad(), Claim(layer.resource()) as claim, bar as show:
            guess = first_iterate(layer, schedules[index], guesses[index])
            tolerance = _tolerance(schedules[index], tol, guess.dtype)

            def watch(run: Run) -> None:
                show(run.fronts.min)
                if callback is not None:
                    callback(_last_pass(index, run))

            watched = watch if progress or callback is not None else None
            run = iterate(layer, schedules[index], tolerance, guess, claim, max_passes, watched)
            value, ends = outcome(run, tolerance, layer.deterministic)
            if value.is_cuda:
                torch.cuda.synchronize(value.device)
            seconds = time.perf_counter() - began
            residual, bound = verified(layer, value, claim) if verify else (None, None)
        trace = run.trace
        layers.append(LayerStats(schedules[index], trace.passes, trace.positions, seconds, trace, residual, bound))
        status[:] = _worse(status, ends) if status and status != ends else ends
        return attach(layer, value, exact=tolerance.tol == 0) if differentiable else value

    with torch.set_grad_enabled(differentiable), without_plans():
        output = chain.walk(solve_layer)
    return Solution(output, tuple(status), tuple(layers))


def _worse(status: Sequence[Status], ends: Sequence[Status]) -> list[Status]:
    """The worst of each row, of two layers; one of them may have several rows, next to one another, for each of the other's."""
    rows = min(len(status), len(ends))
    parts = [
        [some[row * len(some) // rows : (row + 1) * len(some) // rows] for row in range(rows)]
        for some in (status, ends)
    ]
    return [max((*a, *b), key=list(Status).index) for a, b in zip(*parts, strict=True)]


def _last_pass(layer: int, run: Run) -> Pass:
    number, trace = run.trace.passes, run.trace
    return Pass(
        layer, number, run.window, trace.fronts(number - 1)[0], trace.residuals(number - 1)[0], run.rows.iterate()
    )


def _tolerance(schedule: Schedule, tol: float | None, dtype: torch.dtype) -> Tolerance:
    if schedule.correction is not None and not dtype.is_floating_point:
        raise TypeError(f"{schedule!r} has a correction, and the system is {dtype}: corrections need floats")
    return Tolerance.of(tol if schedule.tol is None else schedule.tol, dtype, schedule.tolerance_is_absolute)


class _Single(LayeredSystem):
    """A system without layers, as a chain of one."""

    depth = 1

    def __init__(self, system: TriangularSystem) -> None:
        self.system = system

    def layer(self, index: int, value: Tensor | None) -> TriangularSystem:
        return self.system

    def output(self, value: Tensor) -> Tensor:
        return value
