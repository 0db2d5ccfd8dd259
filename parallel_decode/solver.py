"""`solve`: the options checked, a loop over each layer, and what came out.

Shapes: B batch rows, L positions, *E the event.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral
from typing import NamedTuple

import torch
from torch import Tensor

from parallel_decode.adjoint import attach
from parallel_decode.loop import Loop
from parallel_decode.schedules import Schedule, Selective, as_schedule, check_tol
from parallel_decode.solution import Solution, Status, Trace
from parallel_decode.system import LayeredSystem, TriangularSystem, Window


class Pass(NamedTuple):
    """One pass, as `callback` sees it.

    Attributes:
        layer: the layer's index in the order of solving.
        number: the pass within the layer, from 1.
        window: what was evaluated.
        front: shape (B,), the leading positions that are now final.
        residual: shape (B,), the largest change; NaN where there was nothing to compare.
        x: the iterate, shape (B, L, *E); the loop's own storage, to be read and not to be written to or kept.
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
        system: what to solve.
        schedule: a schedule or its name: "sequential", "jacobi", "gs-jacobi", "jacobi-gs", "sliding", "selective", "auto".
        tol: a position is settled once max|new - old| <= tol * (1 + max|old|), the maxima over its event. None asks
            for exact equality of integers, and for floats takes the machine epsilon to the power 2/3 (2.4e-5 in float32,
            3.7e-11 in float64). A tolerance that a schedule carries itself goes before this one.
        initial: a first guess in place of the system's, shape (B, L, *E); for a layered system one for each layer.
            It changes how many passes are needed, never the answer at tol=0.
        max_passes: stop each layer after so many passes; rows that are not done by then say so in their status.
        verify: evaluate everything once more at the end and keep the residual, and the error bound where the
            system has Lipschitz constants.
        callback: called after every pass with a `Pass`.
        progress: show a bar of the front (needs tqdm).
        differentiable: let the value have a gradient with respect to all that the system was made from (noise, embeddings,
            parameters), if gradients are enabled: exact at the solution, by the adjoint system, in the memory of one pass.
            `evaluate` has to be differentiable; a second derivative is an error.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: an argument's value, or what the system returned, is not as expected.

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
    if max_passes is not None and (
        isinstance(max_passes, bool) or not isinstance(max_passes, Integral) or max_passes < 1
    ):
        raise ValueError(f"max_passes is {max_passes!r}, expected None or a whole number >= 1")
    depth = system.depth if isinstance(system, LayeredSystem) else None
    schedule = as_schedule(schedule)
    rule = schedule if isinstance(schedule, Selective) else Selective((schedule,))
    schedules = rule.for_layers(depth)
    rule.check(system)
    guesses = _guesses(initial, depth)

    value: Tensor | None = None
    status: list[Status] = []
    layers = []
    differentiable &= torch.is_grad_enabled()
    with torch.set_grad_enabled(differentiable):
        for index, layer_schedule in enumerate(schedules):
            layer = system.layer(index, value) if isinstance(system, LayeredSystem) else system
            with torch.no_grad():
                loop = Loop(layer, layer_schedule, tol, guesses[index])
                with progress_bar(progress, f"layer {index + 1}/{len(schedules)}", loop.length) as show:
                    while loop.least < loop.length and len(loop.trace) != max_passes:
                        loop.step()
                        show(loop.least)
                        if callback is not None:
                            front, residual = Trace(loop.trace[-1:], loop.batch).tables()
                            callback(Pass(index, len(loop.trace), loop.window, front[0], residual[0], loop.iterate()))
                value, ends, stats = loop.result(verify)
            if differentiable:
                value = attach(layer, value)
            layers.append(stats)
            if status and status != ends:  # the worse of each two
                ends = [max(pair, key=list(Status).index) for pair in zip(status, ends, strict=True)]
            status = ends
        assert value is not None
        output = system.output(value) if isinstance(system, LayeredSystem) else value
    return Solution(output, tuple(status), tuple(layers))


def _guesses(initial: Tensor | Sequence[Tensor | None] | None, depth: int | None) -> Sequence[Tensor | None]:
    if depth is None:
        if initial is not None and not isinstance(initial, Tensor):
            raise TypeError(
                f"initial is a {type(initial).__name__}, expected a tensor of shape (batch, length, *event)"
            )
        return [initial]
    if initial is None:
        return [None] * depth
    if isinstance(initial, Tensor) or len(initial) != depth:
        raise ValueError(f"initial has to hold a tensor or None for each of the {depth} layers of this system")
    return initial


@contextmanager
def progress_bar(progress: bool, name: str, length: int, unit: str = "position") -> Iterator[Callable[[int], None]]:
    """A tqdm bar; yields what moves it."""
    if not progress:
        yield lambda done: None
        return
    try:
        from tqdm import tqdm
    except ImportError:
        raise ImportError("progress=True shows a tqdm bar: pip install tqdm") from None
    with tqdm(total=length, desc=name, unit=unit) as bar:

        def show(done: int) -> None:
            bar.update(done - bar.n)

        yield show
