"""How the rows of a run ended.

Shapes: B batch rows, L positions, *E the event.
"""

import math

from torch import Tensor

from parallel_decode._iterate import Run
from parallel_decode._tolerance import Tolerance, all_finite, event_all
from parallel_decode.solution import Status


def outcome(run: Run, tol: Tolerance, deterministic: bool) -> tuple[Tensor, list[Status]]:
    """The value, and how each row ended."""
    x, batch, length = run.rows.iterate(), run.trace.batch, run.fronts.length
    for row, (position, value) in run.ended.items():
        x[row, position] = value
    good = Status.WITHIN_TOLERANCE if run.trace.compared and tol.tol > 0 else Status.EXACT
    if not deterministic:
        good = Status.SAMPLE
    if run.fronts.min == length and not run.ended and all_finite(x):
        return x, [good] * batch
    fronts = run.fronts.host if run.rows.index is None else run.rows.spread(run.fronts.host, length)
    finite = event_all(x.isfinite())
    after = (~finite).cumsum(1) > ~finite  # everything after a row's first non-finite position
    if x.is_floating_point() and bool(after.any()):
        x[after] = math.nan
    return x, [
        Status.NON_FINITE if not whole else good if front == length else Status.PASS_LIMIT
        for whole, front in zip(finite.all(1).tolist(), fronts.tolist(), strict=True)
    ]
