"""The one loop behind every schedule.

Shapes: B batch rows, L positions, W positions of the window, *E the event.
"""

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from parallel_decode.schedules import Schedule
from parallel_decode.solution import LayerStats, Status
from parallel_decode.system import TriangularSystem, Window


class Loop:
    """The loop over one layer: each `step` is one pass.

    Attributes:
        x: the iterate, shape (B, L, *E); finite beyond the fronts.
        front: shape (B,), the leading positions that are final; an int where all rows have the same.
        least, most: the range of the fronts, known here without asking the device.
        trace: after each pass the fronts and residuals, shape (2, B) on the host; an int is the front of all rows
            after a pass that had nothing to compare.
    """

    def __init__(self, system: TriangularSystem, schedule: Schedule, tol: float | None, guess: Tensor | None) -> None:
        self.began = time.perf_counter()
        self.system, self.schedule = system, schedule
        self.x = _first_guess(system, schedule, guess)
        self.tol = _tolerance(tol if schedule.tol is None else schedule.tol, self.x)
        if schedule.correction is not None and not self.x.is_floating_point():
            raise TypeError(f"{schedule!r} has a correction, and the system is {self.x.dtype}: corrections need floats")
        self.batch, length = self.x.shape[:2]
        self.length = length if self.batch else 0
        self.at = torch.arange(self.length, device=self.x.device)
        self.front: Tensor | int = 0
        self.least = self.most = 0
        self.changed = 0
        self.clean: Tensor | None = None  # (B, L), for strided windows: evaluated, and nothing before it moved since
        self.memory: Any = None  # the correction's
        self.lost: dict[int, tuple[int, Tensor]] = {}  # row -> its first position that is not finite, and its value
        self.trace: list[Tensor | int] = []
        self.positions = 0
        self.compared = False

    def step(self) -> None:
        """One pass: a window, f on it, and the front."""
        self.window = Window(self.schedule.window(self.least, self.length), self.changed)
        new = self._evaluate(self.window)
        if len(self.window.positions) == 1 and self.least == self.most:  # from final values alone: nothing to compare
            self.x[:, self.least] = new[:, 0]
            self.changed, self.clean = self.least, None
            self.front = self.least = self.most = self.least + 1
            self.trace.append(self.least)
        else:
            self._settle(new)

    def _evaluate(self, window: Window) -> Tensor:
        p = window.positions
        if (
            not isinstance(p, range)
            or not p
            or p.step < 1
            or p[-1] >= self.length
            or p[0] != (self.least if self.schedule.freezes else 0)
        ):
            raise ValueError(
                f"{self.schedule!r} chose {p} with the front at {self.least} of {self.length}: a window is a range that rises from the front"
            )
        new = self.system.evaluate(self.x, window)
        expected = (self.batch, len(p), *self.x.shape[2:])
        if new.shape != expected or new.dtype != self.x.dtype:
            raise ValueError(
                f"{type(self.system).__name__}.evaluate returned {new.dtype} of shape {tuple(new.shape)} "
                f"for {len(p)} positions, expected {self.x.dtype} of shape {expected}"
            )
        self.positions += len(p)
        return new

    def _settle(self, new: Tensor) -> None:
        window, positions = self.window, self.window.positions
        old = self.x[:, window.at]
        if self.most > self.least:  # rows ahead of the others keep what is final
            new = torch.where(_like(self.at[window.at] < self._fronts()[:, None], new), old, new)
        if self.schedule.correction is not None:
            new, self.memory = self.schedule.correction.correct(self.x, new, window, self.memory)
        change = _event_max(_difference(new, old))
        relative = self.tol > 0 and self.schedule.freezes
        settled = change <= (self.tol * (1 + _event_max(old.abs())) if relative else self.tol)
        residual = change.amax(1)
        front = self._advance(settled)
        host = _to_host(front, residual)
        finite = bool(host[1].isfinite().all())
        if not finite and self.schedule.freezes:
            new, front = self._without_non_finite(new, old, settled)
            host = _to_host(front, residual)
        self.x[:, window.at] = new

        self.front, self.compared = front, True
        self.least, self.most = map(int, host[0].aminmax())
        self.trace.append(host)
        if not finite:  # what the system keeps of this pass may be spoilt
            self.changed, self.memory = window.changed, None
        elif self.tol == 0 and self.schedule.freezes:  # what settled did not change at all
            self.changed = self.least - 1
        else:
            self.changed = positions.start

    def _advance(self, settled: Tensor, usable: Tensor | None = None) -> Tensor:
        """The fronts, shape (B,), after a pass in which `settled` (B, W) did not move and `usable` (all) took their new value."""
        positions = self.window.positions
        if not self.schedule.freezes:
            done = settled.all() | (len(self.trace) + 1 == self.length)
            return (done * self.length).expand(self.batch)
        if positions.step == 1:
            self.clean = None
            lead = settled[:, :-1].cumprod(1).sum(1)  # these are final, and so is the next: computed from final values
            front = self.least + lead + (1 if usable is None else usable.gather(1, lead[:, None])[:, 0])
        else:
            if self.clean is None:
                self.clean = self.at < self._fronts()[:, None]
            moved = torch.zeros_like(self.clean)
            moved[:, self.window.at] = ~settled
            self.clean[:, self.window.at] = True if usable is None else usable
            self.clean &= moved.cumsum(1) <= moved
            front = self.clean.cumprod(1).sum(1)
        return front if self.least == self.most else torch.maximum(front, self._fronts())

    def _without_non_finite(self, new: Tensor, old: Tensor, settled: Tensor) -> tuple[Tensor, Tensor]:
        """The new values and fronts where some new values are not finite.

        Beyond the front such a value is only a guess: the position keeps its old one. At the front it may still come from
        a tail that overflows inside the system (0 * inf is NaN), so that position is evaluated alone, as sequential
        decoding would. If it is not finite even then, the row is lost and holds up nobody.
        """
        finite = _event_finite(new)
        new = torch.where(_like(finite, new), new, old)
        front = self._advance(settled, finite)
        stuck = front == self.least
        if not stuck.any():
            return new, front
        here = self.least
        self.x[stuck, here:] = 0  # the guess that overflowed
        alone = self._evaluate(Window(range(here, here + 1), self.window.changed))
        good = _event_finite(alone)[:, 0]
        new[stuck] = self.x[stuck][:, self.window.at]
        new[stuck & good, 0] = alone[stuck & good, 0]
        for row in (stuck & ~good).nonzero()[:, 0].tolist():
            self.lost[row] = here, alone[row, 0].clone()
        if self.clean is not None:
            self.clean[stuck, here] = True
        return new, torch.where(stuck, torch.where(good, here + 1, self.length), front)

    def _fronts(self) -> Tensor:
        """The fronts, shape (B,), on the system's device."""
        return self.front if isinstance(self.front, Tensor) else self.at.new_full((self.batch,), self.front)

    def result(self, verify: bool) -> tuple[Tensor, list[Status], LayerStats]:
        """The value, how each row ended, and what it took."""
        x = self.x
        for row, (position, value) in self.lost.items():
            x[row, position] = value
        finite = _event_finite(x)
        spoilt = (~finite).cumsum(1) > ~finite  # everything after a row's first non-finite position
        if bool(spoilt.any()):
            x[spoilt] = math.nan
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        seconds = time.perf_counter() - self.began

        good = Status.WITHIN_TOLERANCE if self.compared and self.tol > 0 else Status.EXACT
        status = [
            Status.NON_FINITE if not whole else good if front == x.shape[1] else Status.PASS_LIMIT
            for whole, front in zip(finite.all(1).tolist(), self._fronts().tolist(), strict=True)
        ]
        residual = bound = None
        if verify:
            again = self.system.evaluate(x, Window.full(self.length)) if self.length else x
            residual = _event_max(_difference(again, x))
            if self.system.lipschitz is not None:
                constants = self.system.lipschitz.to(residual)
                system = torch.eye(len(constants)).to(constants) - constants
                bound = torch.linalg.solve_triangular(system, residual.T, upper=False, unitriangular=True).T
        fronts, residuals = records(self.trace, self.batch)
        stats = LayerStats(self.schedule, len(self.trace), self.positions, seconds, fronts, residuals, residual, bound)
        return x, status, stats


def _difference(new: Tensor, old: Tensor) -> Tensor:
    """|new - old|; for integers whether they differ, as 0. or 1."""
    return (new - old).abs() if new.is_floating_point() else (new != old).float()


def _event_max(x: Tensor) -> Tensor:
    """(B, W, *E) -> (B, W)."""
    return x.flatten(2).amax(2) if x.dim() > 2 else x


def _event_finite(x: Tensor) -> Tensor:
    """(B, W, *E) -> (B, W)."""
    return x.isfinite().flatten(2).all(2) if x.dim() > 2 else x.isfinite()


def _like(mask: Tensor, x: Tensor) -> Tensor:
    """A mask (B, W) that broadcasts over x (B, W, *E)."""
    return mask.view(mask.shape + (1,) * (x.dim() - 2))


def _to_host(front: Tensor, residual: Tensor) -> Tensor:
    """Both on the host by one transfer, the only one of a pass: shape (2, B)."""
    wide = torch.promote_types(residual.dtype, torch.float32)
    return torch.stack((front.to(wide), residual.to(wide))).cpu()


def records(trace: Sequence[Tensor | int], batch: int) -> tuple[Tensor, Tensor]:
    """A trace as fronts and residuals, each of shape (passes, B)."""
    rows = [t if isinstance(t, Tensor) else torch.tensor([[t], [math.nan]]).expand(2, batch) for t in trace]
    table = torch.stack(rows) if rows else torch.zeros(0, 2, batch)
    return table[:, 0].long(), table[:, 1]


def _first_guess(system: TriangularSystem, schedule: Schedule, guess: Tensor | None) -> Tensor:
    own = system.initial()
    expected = (*own.shape[:1], system.length, *own.shape[2:])
    if own.dim() < 2 or own.shape != expected:
        raise ValueError(
            f"the system's initial guess has shape {tuple(own.shape)}, expected (batch, {system.length}, *event)"
        )
    if own.is_complex():
        raise TypeError(
            f"the system is {own.dtype}, expected floating or integer values: solve for real and imaginary parts"
        )
    if guess is None:
        guess = torch.zeros_like(own) if schedule.start == "zeros" else own
    elif guess.shape != own.shape or guess.dtype != own.dtype:
        raise ValueError(
            f"initial is {guess.dtype} of shape {tuple(guess.shape)}, expected {own.dtype} of shape {tuple(own.shape)}"
        )
    return torch.where(guess.isfinite(), guess, torch.zeros_like(guess)).to(own.device)


def _tolerance(tol: float | None, x: Tensor) -> float:
    if not x.is_floating_point():
        if tol:
            raise ValueError(f"tol is {tol} for {x.dtype} values, which are equal or not: leave it out, or pass 0")
        return 0.0
    return float(torch.finfo(x.dtype).eps ** (2 / 3)) if tol is None else float(tol)
