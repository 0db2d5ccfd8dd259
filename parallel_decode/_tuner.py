"""One run of `Auto`: which width the next passes have, by what passes cost and gain."""

import math

import torch

from parallel_decode._costs import ENOUGH, LOCK, Arm, Costs
from parallel_decode._gains import Count, Gains, trial
from parallel_decode._learnt import save
from parallel_decode._timer import Timer
from parallel_decode.correction import Correction
from parallel_decode.secant import SecantCorrection
from parallel_decode.system import TriangularSystem

SECANT = SecantCorrection()
SEQUENTIAL = Arm(1)
BETTER = 0.93  # of the time of the present arm: what another one has to promise
FORESEEN = 4  # times as wide as the widest window that was measured: what wider ones cost nobody knows
HOPELESS = 2.0  # times as long as its positions take one by one: a window that does is not measured again
PREPARES = 3.0  # sequential passes that the first pass of a size takes besides, where code and memory are touched for the first time
RISES = 3  # passes of a trial that later windows are spared, since windows before them have been there
TIMED_TOGETHER = 32  # sequential passes that are timed together


class Tuner:
    """Chooses the windows of one run.

    What it does not know it tries only as far as the allowance of `costs` goes. The unit of both is the sequential pass: what a pass costs is lost but for the positions that
    it gains.

    Args:
        correction: of the schedule.
        costs, gains: what is known of such systems.
        arms: to choose from, the first of them sequential.
        asynchronous: whether passes are only queued, as on a GPU.
        name: under which to keep what is known at the end, for other processes.
        recalled: whether that is what another process knew, and need not be kept again unless this run tries something, or loses by it.
    """

    ragged = True  # if its schedule is

    def __init__(
        self,
        correction: Correction | None,
        costs: Costs,
        gains: Gains,
        arms: list[Arm],
        asynchronous: bool,
        name: str | None = None,
        recalled: bool = False,
    ) -> None:
        self._given, self._costs, self._gains, self._arms = correction, costs, gains, arms
        self._asynchronous, self._name, self._recalled = asynchronous, name, recalled
        self._known = {arm for arm in arms if gains.proven(arm)}  # from earlier runs
        self._reserve = 0.6 * costs.allowance.left if costs.runs == 1 else 0.0  # the first layer may be the hardest
        self._arm = SEQUENTIAL
        self._tried: set[Arm] = set()  # in this run
        self._trial = Count()  # of this arm, what is not counted yet
        self._timer = Timer()
        self._began = self._passes = 0  # where this arm began in this run, and its passes since
        self._behind = 0.0  # what windows lost in this run
        self._limit = math.inf  # what windows may lose: what a proven choice takes to begin, and promised to gain
        self._front = self._reach = 0  # where the passes that are timed began; where the widest window so far ended

    @property
    def correction(self) -> Correction | None:
        return SECANT if self._arm.corrected else self._given

    def window(self, front: int, length: int) -> range:
        if self._timer.left:
            self._timer.lap()
            return range(front, front + 1)
        with LOCK:
            if self._timer.size:
                self._note(front)
            if self._behind > self._limit:
                arm = SEQUENTIAL
            else:
                arm = self._arm if self._stays(front, length) else self._best(front, length)
            if arm != self._arm:
                if not self._gains.proven(self._arm):
                    self._gains.broken_off(self._passes)
                self._arm, self._began, self._passes, self._trial = arm, front, 0, Count()
            self._front, self._passes = front, self._passes + 1
            size = min(self._arm.width, length - front)
            together = min(TIMED_TOGETHER if self._costs.ready else 4, length - front) if self._arm.width == 1 else 1
        self._timer.begin(size, together)
        return range(front, front + size)

    def after_pass(self, system: TriangularSystem) -> None:
        """Nothing to note: drafts are `Adaptive`'s matter."""

    def finish(self, front: int, length: int) -> None:
        with LOCK:
            if self._timer.size and not self._timer.left:
                self._note(front)
            used = self._recalled and self._tried <= self._known and self._behind <= 0  # what was known, and no more
            if self._name is not None and not used:
                save(self._name, self._costs, self._gains)

    def _note(self, front: int) -> None:
        """What the last passes cost and gained."""
        if self._asynchronous:  # passes are only queued
            torch.cuda.synchronize()
        arm, costs, size, seconds = self._arm, self._costs, self._timer.size, self._timer.each(self._asynchronous)
        if arm in self._tried:  # the first one also prepares
            hopeless = not costs.knows_windows() and costs.ready and seconds > HOPELESS * size * costs.sequential()
            for _ in range(ENOUGH if hopeless else 1):
                costs.add(arm, size, seconds)
        self._tried.add(arm)
        if arm.width > 1 and self._front + size >= self._reach:  # else wider windows have been there
            self._count(arm, front - self._front, size)
        self._reach = max(self._reach, self._front + size)
        if costs.ready:
            each = min(seconds / costs.sequential(), costs.at_most(size, arm.corrected))  # it may have been disturbed
            spent, gained = each * self._timer.together, front - self._front
            costs.allowance.settle(spent, gained)
            self._behind += spent - gained

    def _count(self, arm: Arm, positions: int, size: int) -> None:
        """A pass of a window. A trial counts once the window has moved by its own width."""
        gains = self._gains
        spared = not gains.proven(arm) and self._passes <= RISES and positions < size
        self._trial = self._trial.plus(Count(0, positions, 0) if spared else Count(1, positions, size))
        turned = self._trial.positions >= arm.width and self._trial.passes > 0
        if gains.proven(arm) or turned or self._passes >= trial(arm):
            if turned and not gains.proven(arm):
                gains.turn = max(4.0, float(self._passes))
            gains.add(arm, self._trial)
            self._trial = Count()

    def _best(self, front: int, length: int) -> Arm:
        """The arm with the least time for a position, of those whose trial the allowance covers."""
        costs, gains, left = self._costs, self._gains, length - front
        if not costs.ready or costs.allowance.closed:
            return SEQUENTIAL
        windows = [arm for arm in self._arms[1:] if arm == self._arm or self._may_begin(arm, front, length)]
        if not windows:
            return SEQUENTIAL
        if not costs.knows_windows():  # the least of them tells what they cost
            return min(windows) if costs.allowance.left > self._reserve else SEQUENTIAL
        times = {SEQUENTIAL: 1.0} | {arm: self._time(arm, left) for arm in windows if gains.proven(arm)}
        other = min(times, key=times.__getitem__)  # in place of a trial
        least, now = times[other], costs.of(min(other.width, left), other.corrected)
        early = other == SEQUENTIAL and front < length // 8  # hard positions may come first, and would tell too little
        for arm in windows if not early else ():
            if arm not in times and self._may_try(arm, least, now, left):
                times[arm] = self._time(arm, left)
        if self._arm in times and not gains.proven(self._arm):
            return self._arm
        best = min(times, key=times.__getitem__)
        if times[best] < BETTER * times.get(self._arm, 2.0):
            known = best != SEQUENTIAL and gains.proven(best)
            begins = gains.turn * (costs.of(best.width, best.corrected) - 1)
            self._limit = begins + (1 - times[best]) * length if known else math.inf
            return best
        return self._arm

    def _time(self, arm: Arm, left: int) -> float:
        """Of a position by that arm, in sequential passes."""
        return self._gains.passes(arm) * self._costs.of(self._gains.size(arm, left), arm.corrected)

    def _may_try(self, arm: Arm, least: float, now: float, left: int) -> bool:
        """Whether to try an arm, where a position takes `least` and a pass `now` otherwise, or to go on trying it."""
        costs, gains, covers = self._costs, self._gains, self._costs.allowance.covers
        passes, cost, new = 1.0 if gains.settles(arm) else gains.turn, costs.of(arm.width, arm.corrected), 0.0
        if arm == self._arm:
            passes = max(0.0, passes - self._passes)
        elif arm.width > FORESEEN * costs.windows[False].measured()[-1][0]:
            return False
        elif not costs.windows[arm.corrected].knows(arm.width):
            new = PREPARES
        most = 0.0 if arm == self._arm else new + passes * (cost - 1)  # of what it costs
        if not covers(self._reserve + most):
            return False
        gain, likely = least - self._time(arm, left), new + passes * max(0.0, cost - now)
        return gain > 0 and likely <= gain * left * gains.runs  # as many may follow

    def _may_begin(self, arm: Arm, front: int, length: int) -> bool:
        if self._arm.width == 1 and 2 * front > length:  # windows begin slowly: too little is left to make up for it
            return False
        plain = not arm.corrected or self._gains.proven(Arm(arm.width))
        return self._gains.proven(arm) or (arm.width <= length - front and plain)

    def _stays(self, front: int, length: int) -> bool:
        """Whether an arm that earlier runs have proven goes on without a thought: it begins slowly, and so may a layer."""
        if self._arm.width == 1 or self._arm not in self._known or self._costs.allowance.closed:
            return False
        long = front - self._began >= length // 2 or self._passes >= max(trial(self._arm), length // 4)
        return not long or self._passes % 8 > 0
