"""The one loop. Every schedule, the adjoint of a solution and the sweeps of masked flows go through `iterate`.

Shapes: B batch rows, A of them at work, L positions, W positions of the window, *E the event.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from parallel_decode._acceptance import Acceptance, Accepted, Consistent, Prefix, Whole
from parallel_decode._claims import Claim
from parallel_decode._fronts import Fronts
from parallel_decode._guard import NotFinite, guard
from parallel_decode._hook import after_pass
from parallel_decode._rows import Rows
from parallel_decode._tolerance import Tolerance
from parallel_decode._trace import Trace
from parallel_decode.schedules import Chooser, Schedule
from parallel_decode.system import TriangularSystem
from parallel_decode.window import Window


def iterate(
    system: TriangularSystem,
    schedule: Schedule,
    tol: Tolerance,
    guess: Tensor,
    claim: Claim,
    max_passes: int | None = None,
    watch: Callable[["Run"], None] | None = None,
) -> "Run":
    """Pass after pass, until every row is done.

    Args:
        system: what to solve.
        schedule: names the windows.
        tol: when a position is settled.
        guess: the first iterate, shape (B, L, *E), contiguous and finite; it is written to.
        claim: on what the system writes to.
        max_passes: stop after so many.
        watch: called after every pass.
    """
    if schedule.freezes and not system.ordered:
        raise ValueError(
            f"the positions of {type(system).__name__} are not in order: {schedule!r} would freeze what is not final, Jacobi(freeze=False) does not"
        )
    options = Options(schedule, schedule.begin(system, guess, tol.tol), tol, claim)
    run = Run(system, guess, options)
    fronts, most = run.fronts, math.inf if max_passes is None else max_passes
    while fronts.min < fronts.length and run.trace.passes < most:
        run.make_pass()
        if watch is not None:
            watch(run)
    options.chooser.finish(run.fronts.min, run.fronts.length)
    return run


class Options(NamedTuple):
    """What does not change during a run."""

    schedule: Schedule
    chooser: Chooser
    tol: Tolerance
    claim: Claim


class Run:
    """The state of one layer's iteration.

    Attributes:
        rows: those at work, with their system and iterate.
        fronts: of the rows at work.
        trace: of all rows.
        ended: rows that ended at a value that is not finite: row to its position, and the value.
        window: of the last pass.
    """

    def __init__(self, system: TriangularSystem, guess: Tensor, options: Options) -> None:
        self.rows = Rows(system, guess)
        self.fronts = Fronts(len(guess), guess.shape[1] if guess.numel() else 0, guess.device)
        self.trace = Trace(len(guess))
        self.ended: dict[int, tuple[int, Tensor]] = {}
        self.window = Window(range(0), 0)
        self._options = options
        # What draws anew would change final values, were it not to freeze them.
        self._acceptance: Acceptance = Prefix() if options.schedule.freezes or not system.deterministic else Whole()
        self._memory: tuple[Tensor, ...] | None = None  # the correction's
        # Where rows have windows of their own these are of each row, on the host.
        self._starts: Tensor | int = 0
        self._changed_from: Tensor | int = 0

    def make_pass(self) -> None:
        """A window, f on it, what of it is final, and what follows from that."""
        window = self.window = self._next_window()
        new = self.evaluate(window)
        new, accepted, settled_unchanged = self._accept(window, new)
        window.put(self.rows.x, new)
        if self.rows.has_pass_hook:
            accepted = after_pass(self.rows, self.fronts, accepted, self._acceptance)
        self.fronts.move(accepted.fronts, accepted.on_device)
        self._note_changes(window, accepted.finite, settled_unchanged)
        fronts, residuals = accepted.fronts, accepted.residual
        if self.rows.index is not None:
            fronts, residuals = self.rows.spread(fronts, self.fronts.length), self.rows.spread(residuals, 0.0)
        self.trace.add(fronts, residuals)
        if self.fronts.min < self.fronts.max == self.fronts.length:
            self._let_rows_leave()
        if self.rows.has_pass_hook:
            self._options.chooser.after_pass(self.rows.system)

    def evaluate(self, window: Window) -> Tensor:
        """f at the window's positions, of the rows at work: (A, W, *E)."""
        system, x, width = self.rows.system, self.rows.x, len(window.positions)
        expected = x.shape if width == x.shape[1] else (x.shape[0], width, *x.shape[2:])
        self._options.claim.evaluating = True
        new = system.evaluate(x, window)
        self._options.claim.evaluating = False
        if new.shape != expected or new.dtype != x.dtype:
            raise ValueError(
                f"{type(system).__name__}.evaluate returned {new.dtype} of shape {tuple(new.shape)} "
                f"for {width} positions, expected {x.dtype} of shape {tuple(expected)}"
            )
        self.trace.positions += width
        return new

    def _next_window(self) -> Window:
        fronts, options = self.fronts, self._options
        p = options.chooser.window(fronts.min, fronts.length)
        if p == self.window.positions and p.start == 0 and not options.schedule.ragged:
            return self.window
        from_front = isinstance(p, range) and p and p.start == fronts.min and p.step >= 1 and p[-1] < fronts.length
        if not from_front and (options.schedule.freezes or p != range(fronts.length)):
            raise ValueError(
                f"{options.schedule!r} chose {p} with the front at {fronts.min} of {fronts.length}: a window is a range that rises from the front"
            )
        changed_from = self._changed_from
        apart = options.schedule.ragged and options.chooser.ragged
        if fronts.uniform or not (apart and self.rows.system.ragged):
            first = changed_from if isinstance(changed_from, int) else int(changed_from.min())
            self._starts = p.start
            return Window(p, min(first, p.start))
        starts = self._starts = fronts.host.clamp(max=fronts.length - len(p))
        before = max(0, int((starts - changed_from)[fronts.host < fronts.length].max()))
        return Window(p, p.start - before, (starts - p.start).to(self.rows.x.device, non_blocking=True))

    def _accept(self, window: Window, new: Tensor) -> tuple[Tensor, Accepted, bool]:
        """The values to take, what became final, and whether what settled is as it was before to the last bit."""
        fronts, chooser, tol = self.fronts, self._options.chooser, self._options.tol
        if len(window.positions) == 1 and fronts.uniform:  # computed from final values alone: nothing to compare
            self._acceptance.written(None)  # its marks are no longer right
            return new, Accepted(fronts.min + 1, math.nan), True
        self._acceptance = _suited(self._acceptance, window)
        old, self.trace.compared = window.take(self.rows.x), True
        if self._acceptance.freezes or not fronts.uniform:
            new = fronts.hold(new, old, window)
        if chooser.correction is not None:
            corrected, self._memory = chooser.correction.correct(self.rows.x, new, window, self._memory)
            new = torch.where(corrected == new, new, corrected)  # adding 0 would turn -0.0 to 0.0
        accepted = self._acceptance.accept(window, new, old, fronts, tol)
        if not accepted.finite and not self.rows.system.ordered:
            raise NotFinite(self.rows.x, new)
        if not accepted.finite:
            self._acceptance, self._memory = self._acceptance.guarded(), None
            new, accepted, ended = guard(self.rows.x, window, new, old, fronts, tol, self._acceptance, self.evaluate)
            self.ended |= {self.rows.number(row): end for row, end in ended.items()}
        return new, accepted, tol.tol == 0

    def _note_changes(self, window: Window, finite: bool, settled_unchanged: bool) -> None:
        """From where the system has to read again at the next pass."""
        if not finite:  # the system may have kept values that are not: it reads again what this pass did
            self._changed_from = self._starts - (window.positions.start - window.changed_from)
        elif settled_unchanged:
            self._changed_from = (self.fronts.min if window.shift is None else self.fronts.host) - 1
        else:
            self._changed_from = self._starts

    def _let_rows_leave(self) -> None:
        stay = self.rows.leave(self.fronts.host >= self.fronts.length)
        if stay is None:
            return
        on_device = stay.to(self.rows.x.device)
        self.fronts.select(stay)
        self._acceptance.select(on_device)
        self._memory = None if self._memory is None else tuple(part[on_device] for part in self._memory)
        if isinstance(self._changed_from, Tensor):
            self._changed_from = self._changed_from[stay]


def _suited(acceptance: Acceptance, window: Window) -> Acceptance:
    """The same, if it is for such windows; else one that is, which relies on no earlier pass."""
    if isinstance(acceptance, Whole):
        return acceptance
    kind = Consistent if window.positions.step > 1 and len(window.positions) > 1 else Prefix
    return acceptance if isinstance(acceptance, kind) else kind()
