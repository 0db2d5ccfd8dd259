"""The one loop behind every schedule.

Shapes: B batch rows, L positions, W positions of the window, *E the event.
"""

import math
import time

import torch
from torch import Tensor

from parallel_decode.correction import Memory
from parallel_decode.schedules import Schedule
from parallel_decode.solution import LayerStats, Status, Trace
from parallel_decode.system import TriangularSystem, Window


class Loop:
    """The loop over one layer: each `step` is one pass.

    Rows that are done leave the batch once they are a quarter of it, if the system can drop them.

    Attributes:
        working: the system of the rows still in the batch.
        x: the iterate of the rows still in the batch, shape (B, L, *E); finite beyond the fronts.
        front: shape (B,), their leading positions that are final; an int where all have the same.
        least, most: the range of the fronts, known here without asking the device.
        rows: which of the rows that there were at first these are; None for all.
        trace: what `Trace` holds, on the host.
    """

    def __init__(
        self,
        system: TriangularSystem,
        schedule: Schedule,
        tol: float | None,
        guess: Tensor | None,
    ) -> None:
        self.began = time.perf_counter()
        self.system = self.working = system
        self.schedule = schedule
        self.x = self.whole = _first_guess(system, schedule, guess)
        self.tol = _tolerance(tol if schedule.tol is None else schedule.tol, self.x)
        self.chooser = schedule.begin(system, self.x, self.tol)
        if schedule.correction is not None and not self.x.is_floating_point():
            raise TypeError(f"{schedule!r} has a correction, and the system is {self.x.dtype}: corrections need floats")
        self.batch, length = self.x.shape[:2]
        self.length = length if self.batch else 0
        self.at = torch.arange(self.length, device=self.x.device)
        self.front: Tensor | int = 0
        self.least = self.most = 0
        self.ragged = schedule.ragged and system.ragged
        self.told = type(system).passed is not TriangularSystem.passed
        self.fresh: Tensor | int = 0  # from here on the iterate may have changed; on the host, for each row if ragged
        self.clean: Tensor | None = None  # (B, L), for strided windows: evaluated, and nothing before it moved since
        self.memory: Memory = None  # the correction's
        self.rows: Tensor | None = None
        self.may_drop = True
        self.lost: dict[int, tuple[int, Tensor]] = {}  # row -> its first position that is not finite, and its value
        self.trace: list[Tensor | int | tuple[int, float]] = []
        self.positions = 0
        self.compared = False

    def step(self) -> None:
        """One pass: a window, f on it, and the front."""
        if not self.schedule.freezes:
            self._sweep()
            return
        self.window = self._window()
        new = self._evaluate(self.window)
        if len(self.window.positions) == 1 and self.least == self.most:  # from final values alone: nothing to compare
            self.x[:, self.least] = new[:, 0]
            self.fresh, self.clean = self.least, None
            self.front = self.least = self.most = self.least + 1
            self.trace.append(self.least)
            if self.told:
                self._tell(torch.full((len(self.x),), self.least))
        else:
            self._settle(new)

    def _window(self) -> Window:
        positions = self.chooser.window(self.least, self.length)
        if not self.ragged or self.least == self.most:
            return Window(positions, self.fresh if isinstance(self.fresh, int) else int(self.fresh.min()))
        self.starts = self.host_front.clamp(max=self.length - len(positions))
        before = max(0, int((self.starts - self.fresh)[self.host_front < self.length].max()))
        shift = (self.starts - positions.start).to(self.x.device, non_blocking=True)
        return Window(positions, positions.start - before, shift)

    def _evaluate(self, window: Window) -> Tensor:
        p = window.positions
        if not isinstance(p, range) or not p or p.step < 1 or p[-1] >= self.length or p[0] != self.least:
            raise ValueError(
                f"{self.schedule!r} chose {p} with the front at {self.least} of {self.length}: a window is a range that rises from the front"
            )
        new = self.working.evaluate(self.x, window)
        expected = (len(self.x), len(p), *self.x.shape[2:])
        if new.shape != expected or new.dtype != self.x.dtype:
            raise ValueError(
                f"{type(self.system).__name__}.evaluate returned {new.dtype} of shape {tuple(new.shape)} "
                f"for {len(p)} positions, expected {self.x.dtype} of shape {expected}"
            )
        self.positions += len(p)
        return new

    def _sweep(self) -> None:
        """One pass of a schedule that freezes nothing: everything anew, until nothing changes in any row."""
        if self.trace:
            new = self.system.evaluate(self.x, self.window)
            self.positions += self.length
        else:
            self.window = Window(self.chooser.window(0, self.length), 0)
            new = self._evaluate(self.window)
        if self.chooser.correction is not None:
            new, self.memory = self.chooser.correction.correct(self.x, new, self.window, self.memory)
        residual = None
        if self.tol == 0:
            done = torch.equal(_bits(new), _bits(self.x))  # what stays NaN is no reason to go on
        else:
            change = (new - self.x).abs_()
            residual = change.max().item()
            if math.isnan(residual):
                residual = change.masked_fill_(_bits(new) == _bits(self.x), 0).max().item()
            done = residual <= self.tol
        self.x.copy_(new)
        self.compared = True
        if done or len(self.trace) + 1 == self.length:
            self.front = self.least = self.most = self.length
        self.trace.append(self.least if residual is None else (self.least, residual))

    def _settle(self, new: Tensor) -> None:
        window, positions = self.window, self.window.positions
        old = window.take(self.x)
        if self.most > self.least:  # rows ahead of the others keep what is final
            new = torch.where(_like(window.indices(new.device) < self._fronts()[:, None], new), old, new)
        if self.chooser.correction is not None:
            new, self.memory = self.chooser.correction.correct(self.x, new, window, self.memory)
        change = _event_max(_difference(new, old))
        settled = change <= (self.tol * (1 + _event_max(old.abs())) if self.tol > 0 else self.tol)
        residual = change.amax(1)
        front = self._advance(settled)
        host = _to_host(front, residual)
        finite = bool(host[1].isfinite().all())
        if not finite:
            new, front = self._without_non_finite(new, old, settled)
            host = _to_host(front, residual)
        window.put(self.x, new)

        self.front, self.host_front, self.compared = front, host[0].long(), True
        self.least, self.most = map(int, self.host_front.aminmax())
        self._record(host)
        if self.told:
            self._tell(self.host_front)
        if not finite:  # what the system keeps of this pass may be spoilt: the next reads again what this one did
            self.memory = None
            if window.shift is not None:
                self.fresh = self.starts - (positions.start - window.changed)
        elif self.tol == 0:  # what settled did not change at all
            self.fresh = self.least - 1 if window.shift is None else self.host_front - 1
        else:
            self.fresh = positions.start if window.shift is None else self.starts
        if self.may_drop and self.least < self.length == self.most:
            self._drop()

    def _tell(self, fronts: Tensor) -> None:
        """Let the system end rows, and guess."""
        before = None if self.clean is None else self.x.clone()
        after = self.working.passed(self.x, fronts)
        if self.clean is not None and before is not None:  # a guess was not evaluated
            moved = _event_max(_difference(self.x, before)) != 0
            self.clean &= moved.cumsum(1) == 0
        if not torch.equal(after, fronts):
            self.front, self.host_front = after.to(self.x.device), after
            self.least, self.most = map(int, after.aminmax())

    def _drop(self) -> None:
        """Let the rows that are done leave the batch, once they are a quarter of it."""
        at_work = self.host_front < self.length
        if 4 * int(at_work.sum()) > 3 * len(at_work):
            return
        keep = at_work.nonzero()[:, 0].to(self.x.device)
        fewer = self.working.select(keep)
        if fewer is None:
            self.may_drop = False
            return
        self.working = fewer
        self.whole = self.iterate()
        self.rows = keep if self.rows is None else self.rows[keep]
        self.x, self.front, self.host_front = self.x[keep], self._fronts()[keep], self.host_front[at_work]
        self.clean = None if self.clean is None else self.clean[keep]
        self.memory = None if self.memory is None else tuple(part[keep] for part in self.memory)
        self.fresh = self.fresh[at_work] if isinstance(self.fresh, Tensor) else self.fresh

    def iterate(self) -> Tensor:
        """The iterate of all rows, those that are done included."""
        if self.rows is None:
            return self.x
        self.whole[self.rows] = self.x
        return self.whole

    def _record(self, host: Tensor) -> None:
        if self.rows is not None:
            whole = host.new_tensor([[float(self.length)], [0.0]]).repeat(1, self.batch)
            whole[:, self.rows.cpu()] = host
            host = whole
        self.trace.append(host)

    def _advance(self, settled: Tensor, usable: Tensor | None = None) -> Tensor:
        """The fronts, shape (B,), after a pass in which `settled` (B, W) did not move and `usable` (all) took their new value."""
        positions = self.window.positions
        if positions.step == 1:
            self.clean = None
            lead = settled[:, :-1].cumprod(1).sum(1)  # these are final, and so is the next: computed from final values
            front = self._starts() + lead + (1 if usable is None else usable.gather(1, lead[:, None])[:, 0])
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
        front, here = self._advance(settled, finite), self._fronts()
        stuck = (front == here) & (here < self.length)
        if self.window.shift is None:
            stuck &= here == self.least
        if not stuck.any():
            return new, front
        self.x[stuck[:, None] & (self.at >= here[:, None])] = 0  # the guess that overflowed
        shift = None if self.window.shift is None else here.clamp(max=self.length - 1) - self.least
        alone = self._evaluate(Window(range(self.least, self.least + 1), self.window.changed, shift))
        good = _event_finite(alone)[:, 0]
        new[stuck] = self.window.take(self.x)[stuck]
        offset = here - self._starts()
        mended = stuck & good
        new[mended, offset[mended]] = alone[mended, 0]
        for row in (stuck & ~good).nonzero()[:, 0].tolist():
            self.lost[row if self.rows is None else int(self.rows[row])] = int(here[row]), alone[row, 0].clone()
        if self.clean is not None:
            self.clean[stuck, self.least] = True
        return new, torch.where(stuck, torch.where(good, here + 1, self.length), front)

    def _fronts(self) -> Tensor:
        """The fronts, shape (B,), on the system's device."""
        return self.front if isinstance(self.front, Tensor) else self.at.new_full((len(self.x),), self.front)

    def _starts(self) -> Tensor | int:
        """Where the windows of the rows start."""
        start = self.window.positions.start
        return start if self.window.shift is None else start + self.window.shift

    def result(self, verify: bool) -> tuple[Tensor, list[Status], LayerStats]:
        """The value, how each row ended, and what it took."""
        self.chooser.finish(self.least, self.length)
        x = self.iterate()
        for row, (position, value) in self.lost.items():
            x[row, position] = value
        good = Status.WITHIN_TOLERANCE if self.compared and self.tol > 0 else Status.EXACT
        if self.least == x.shape[1] and not self.lost and math.isfinite(x.sum()):  # a sum with one that is not is not
            status = [good] * self.batch
        else:
            fronts = self._fronts().new_full((self.batch,), self.length)
            fronts[slice(None) if self.rows is None else self.rows] = self._fronts()
            finite = _event_finite(x)
            spoilt = (~finite).cumsum(1) > ~finite  # everything after a row's first non-finite position
            if bool(spoilt.any()):
                x[spoilt] = math.nan
            status = [
                Status.NON_FINITE if not whole else good if front == x.shape[1] else Status.PASS_LIMIT
                for whole, front in zip(finite.all(1).tolist(), fronts.tolist(), strict=True)
            ]
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        seconds = time.perf_counter() - self.began

        residual = bound = None
        if verify:
            again = self.system.evaluate(x, Window.full(self.length)) if self.length else x
            residual = _event_max(_difference(again, x))
            if self.system.lipschitz is not None:
                constants = self.system.lipschitz.to(residual)
                system = torch.eye(len(constants)).to(constants) - constants
                bound = torch.linalg.solve_triangular(system, residual.T, upper=False, unitriangular=True).T
        trace = Trace(self.trace, self.batch)
        stats = LayerStats(self.schedule, len(self.trace), self.positions, seconds, trace, residual, bound)
        return x, status, stats


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _difference(new: Tensor, old: Tensor) -> Tensor:
    """|new - old|; for integers whether they differ, as 0. or 1."""
    return (new - old).abs() if new.is_floating_point() else (new != old).float()


def _bits(x: Tensor) -> Tensor:
    """Floats as integers, so that NaN equals itself."""
    return x.view(_INTEGERS[x.element_size()]) if x.is_floating_point() else x


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
