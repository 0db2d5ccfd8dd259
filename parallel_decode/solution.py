"""What `solve` returns."""

from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from parallel_decode._trace import Trace
from parallel_decode.schedules import Schedule


class Status(Enum):
    """How a row of the batch ended; the value says what happened and what to try."""

    EXACT = "exact: every position was computed from final values, as in sequential decoding"
    WITHIN_TOLERANCE = (
        "within tolerance: some positions became final when they changed by no more than tol; "
        "tol=0 gives the sequential answer, verify=True measures the residual"
    )
    SAMPLE = (
        "sample: the system draws anew at every evaluation, by a rule that keeps its distribution; "
        "the value is a sample of the model, and not the one that sequential decoding would draw"
    )
    PASS_LIMIT = "pass limit: max_passes was spent before every position was final; raise it, or leave it out (L passes always suffice)"
    NON_FINITE = (
        "non-finite: some position came out as infinity or NaN from the final values before it, as it would in sequential decoding; "
        "the positions after it hold NaN; "
        "try other inputs, a higher precision, or check the model"
    )

    def __repr__(self) -> str:
        return f"Status.{self.name}"

    @property
    def succeeded(self) -> bool:
        """Whether the row's value is a solution."""
        return self in (Status.EXACT, Status.WITHIN_TOLERANCE, Status.SAMPLE)


class SolveError(RuntimeError):
    """Raised by `Solution.raise_for_status`."""


@dataclass(frozen=True, eq=False)
class LayerStats:
    """What the solution of one layer took.

    Attributes:
        schedule: the schedule that it was solved by.
        passes: the number of passes.
        positions: the positions evaluated, over all passes (for each row).
        seconds: the wall-clock time.
        fronts: shape (passes, B), the leading positions that were final after each pass. A row that a window of several
            positions finds to be non-finite counts as done from then on.
        residuals: shape (passes, B), the largest change of each pass (1 where integers changed, 0 where none did);
            NaN where a pass had nothing to compare (a single position computed from final values). A schedule that does not
            freeze notes the largest of all rows, and at tol=0 only whether it is 0: else NaN.
        residual: with `verify=True`, |F(x) - x| in the maximum norm of the event, shape (B, L); else None.
        bound: with `verify=True` and Lipschitz constants, a bound on the distance from this layer's sequential
            solution, shape (B, L), rounding included (docs/theory.md, theorem 4); else None.
    """

    schedule: Schedule
    passes: int
    positions: int
    seconds: float
    _trace: Trace = field(repr=False)
    residual: Tensor | None = None
    bound: Tensor | None = None

    @cached_property
    def fronts(self) -> Tensor:
        return self._trace.fronts()

    @cached_property
    def residuals(self) -> Tensor:
        return self._trace.residuals()


@dataclass(frozen=True, eq=False)
class Solution:
    """The result of `solve`.

    Attributes:
        value: the solution, shape (B, L, *E), or what a layered system makes of it.
        status: one `Status` for each row.
        layers: one `LayerStats` for each layer, in the order of solving; one for a system without layers.
    """

    value: Tensor
    status: tuple[Status, ...]
    layers: tuple[LayerStats, ...]

    @property
    def passes(self) -> int:
        """The passes of all layers together."""
        return sum(layer.passes for layer in self.layers)

    @property
    def residual(self) -> Tensor | None:
        """With `verify=True`, the largest residual of each row over layers and positions, shape (B,); else None."""
        worst = [F.pad(layer.residual, (0, 1)).amax(1) for layer in self.layers if layer.residual is not None]
        if not worst:
            return None
        rows = min(map(len, worst))  # a layer may have several for each
        return torch.stack([each.view(rows, len(each) // rows if rows else 1).amax(1) for each in worst]).amax(0)

    def raise_for_status(self) -> "Solution":
        """The solution itself, if every row succeeded.

        Raises:
            SolveError: some rows met the pass limit or a non-finite value; it names them, and says what to try.
        """
        failed = [row for row, status in enumerate(self.status) if not status.succeeded]
        if failed:
            reasons = {status: [r for r in failed if self.status[r] is status] for status in Status}
            raise SolveError("; ".join(f"rows {_some(rows)}: {s.value}" for s, rows in reasons.items() if rows))
        return self


def _some(rows: list[int]) -> str:
    return ", ".join(map(str, rows[:8])) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")
