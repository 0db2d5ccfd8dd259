"""One run of `Auto`: which width the next passes have, by what passes cost and gain."""

import math
import time
from collections import deque
from statistics import median

import torch

from parallel_decode._costs import ENOUGH, LOCK, Arm, Costs, Gains
from parallel_decode.correction import Correction
from parallel_decode.secant import SecantCorrection
from parallel_decode.system import TriangularSystem

SECANT = SecantCorrection()
UNTRIED = 0.8  # of the time that is predicted for an arm that was never tried: optimism, so that it is
UNPROVEN = 0.93  # likewise, for one that has not done a whole run
REGRET = 0.03  # of all time, beyond one run: what may be spent on trying what turns out slower
FIRST = 64  # the width that is tried first
TRIAL = 8  # passes, and a quarter of the width, before an arm is judged in the run that tries it; wider ones than FIRST four times that
TIMED_TOGETHER = 16  # sequential passes that are timed together
BREAK_OFF = 10.0  # times slower than sequential decoding by the first pass, and a width is tried no longer


class Tuner:
    """Chooses the windows of one run."""

    ragged = True  # if its schedule is

    def __init__(
        self, correction: Correction | None, costs: Costs, gains: Gains, arms: list[Arm], asynchronous: bool
    ) -> None:
        self._given, self._costs, self._gains, self._arms = correction, costs, gains, arms
        self._asynchronous = asynchronous
        self._arm: Arm | None = None
        self._timer = Timer()
        self._front = self._passes = 0  # where this arm began, and its passes since
        self._observed = 0  # how often passes were timed

    @property
    def correction(self) -> Correction | None:
        return SECANT if self._arm is not None and self._arm.corrected else self._given

    def window(self, front: int, length: int) -> range:
        if self._timer.left:
            self._timer.left -= 1
            return range(front, front + 1)
        with LOCK:
            if self._arm is None or self._observe(self._arm, front, length):
                arm = self._best(length)
                if arm != self._arm:
                    self._note_run(front, length)
                    self._arm, self._passes, self._front = arm, 0, front
            assert self._arm is not None
            size = min(self._arm.width, length - front)
            together = min(TIMED_TOGETHER if self._costs.knows(Arm(1)) else 4, length - front)
        self._timer.begin(size, together if self._arm.width == 1 else 1)
        return range(front, front + size)

    def after_pass(self, system: TriangularSystem) -> None:
        """Nothing to note: drafts are `Adaptive`'s matter."""

    def finish(self, front: int, length: int) -> None:
        if self._arm is None or self._timer.left:
            return
        with LOCK:
            self._note_gain(self._arm, front, length)
            best = self._gains.best_seconds()
            self._note_run(front, length)
            seconds = self._timer.whole() / length
            self._gains.spent += seconds
            self._gains.regret += max(0.0, seconds - best) if best else 0.0

    def _observe(self, arm: Arm, front: int, length: int) -> bool:
        """Note the cost and gain of the last passes; whether to choose again."""
        self._observed += 1
        judged = self._note_gain(arm, front, length)
        if self._asynchronous:  # single positions are only queued
            torch.cuda.synchronize()
        seconds, size = self._timer.each(), self._timer.size
        if min(self._observed, self._passes) == 1:  # the first also prepares
            sequential = self._costs.sequential() if self._costs.knows(Arm(1)) else math.inf
            if self._gains.passes(arm) * seconds < BREAK_OFF * sequential:
                return False
            for _ in range(ENOUGH - 1):
                self._costs.add(arm, size, seconds)
        return self._costs.add(arm, size, seconds) or (judged and self._passes % 8 == 0)

    def _note_gain(self, arm: Arm, front: int, length: int) -> bool:
        """Note how far the last pass came; whether the arm has run for long enough to be judged by it."""
        self._passes += 1
        trial = TRIAL + arm.width // 4 if arm.width <= FIRST else 4 * TRIAL + arm.width // 2
        gained = front - self._front
        far = gained >= length // 4 or self._passes >= length // 4  # a layer may begin harder than it goes on
        judged = arm.width > 1 and (gained >= length // 2 or (far and self._passes >= trial))
        if judged:
            self._gains.latest[arm] = self._passes / gained
        return judged

    def _note_run(self, front: int, length: int) -> None:
        """Note the seconds of a run that was this arm's, or nearly."""
        if self._arm is None or self._front > 0 or 4 * front < 3 * length:
            return
        if self._asynchronous:
            torch.cuda.synchronize()
        self._gains.seconds.setdefault(self._arm, deque(maxlen=5)).append(self._timer.whole() / front)

    def _best(self, length: int) -> Arm:
        """The arm with the least time for a position."""
        gains, (sequential, *windows) = self._gains, self._arms
        if not self._costs.knows(sequential) or not windows:
            return sequential
        if not any(map(self._costs.knows, windows)):
            return min(windows, key=lambda arm: (arm.corrected, abs(arm.width - FIRST)))
        times = {sequential: self._costs.sequential()}
        for arm in windows:
            mean = arm.width - arm.width**2 / (2 * length)  # the last windows are shorter
            optimism = UNPROVEN if arm in gains.measured or arm in gains.latest else UNTRIED
            times[arm] = optimism * gains.passes(arm) * self._costs.seconds(mean, arm.corrected)
        for arm in self._arms:
            runs = gains.seconds.get(arm, ())  # one alone may have met a bad moment of the machine
            if len(runs) > 1 or (runs and runs[0] < 1.3 * times[arm]):
                times[arm] = median(runs)
        if gains.regret > REGRET * gains.spent + gains.best_seconds():  # no more trials for now
            times = {
                arm: seconds for arm, seconds in times.items() if arm == self._arm or arm in gains.seconds
            } or times
        best = min(times, key=times.__getitem__)
        return best if self._arm is None or times[best] < 0.9 * times[self._arm] else self._arm


class Timer:
    """Of the passes of a run.

    Attributes:
        size: positions of the passes that are being timed.
        left: how many of them are still to come.
    """

    def __init__(self) -> None:
        self.size = self.left = 0
        self._together = 1
        self._run = self._began = time.perf_counter()

    def begin(self, size: int, together: int) -> None:
        """So many passes are timed together from now on."""
        self.size, self._together, self.left = size, together, together - 1
        self._began = time.perf_counter()

    def each(self) -> float:
        """Seconds of each of them."""
        return (time.perf_counter() - self._began) / self._together

    def whole(self) -> float:
        """Seconds of the run so far."""
        return time.perf_counter() - self._run
