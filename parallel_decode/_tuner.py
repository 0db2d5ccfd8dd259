"""One run of `Auto`: which width the next passes have, by what passes cost and gain."""

import math
import time

import torch

from parallel_decode._costs import ENOUGH, LOCK, Arm, Costs
from parallel_decode._gains import LATENCY, Gains, trial
from parallel_decode._learnt import save
from parallel_decode.correction import Correction
from parallel_decode.secant import SecantCorrection
from parallel_decode.system import TriangularSystem

SECANT = SecantCorrection()
SEQUENTIAL = Arm(1)
WORTH_A_TRIAL = 0.9  # of the least time for a position: what an arm has to promise before it is tried
BETTER = 0.93  # of the time of the present arm: what another one has to promise
COLD = 10.0  # times slower may the first pass of a size be than later ones, on a CPU
RISE = 8  # passes before a wider window gains more than the one before it
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
    ) -> None:
        self._given, self._costs, self._gains, self._arms = correction, costs, gains, arms
        self._asynchronous, self._name = asynchronous, name
        self._known = {arm for arm in arms if gains.proven(arm)}  # from earlier runs
        self._reserve = 0.6 * costs.allowance.left if costs.runs == 1 else 0.0  # the first layer may be the hardest
        self._arm, self._least = SEQUENTIAL, 1.0  # the time for a position by the best arm that is proven
        self._tried: set[Arm] = set()  # in this run
        self._timer = Timer()
        self._began = self._passes = 0  # where this arm began in this run, and its passes since
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
            arm = self._arm if self._stays(front, length) else self._best(front, length)
            if arm != self._arm:
                self._arm, self._began, self._passes = arm, front, 0
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
            if self._name is not None:
                save(self._name, self._costs, self._gains)

    def _note(self, front: int) -> None:
        """What the last passes cost and gained."""
        if self._asynchronous:  # passes are only queued
            torch.cuda.synchronize()
        arm, costs, size, seconds = self._arm, self._costs, self._timer.size, self._timer.each(self._asynchronous)
        first, opening = arm not in self._tried, not self._tried
        self._tried.add(arm)
        if not first:  # that one also prepares
            costs.add(arm, size, seconds)
        elif (
            costs.ready
            and not (self._asynchronous or costs.knows_windows())
            and self._gains.passes(arm) * seconds > COLD * costs.sequential()
        ):
            for _ in range(ENOUGH):  # hopeless, whatever it prepares
                costs.add(arm, size, seconds)
        rises = not self._gains.proven(arm) and self._passes <= LATENCY and front < self._front + size
        if arm.width > 1 and not rises and self._front + size >= self._reach:  # else wider windows have been there
            self._gains.add(arm, front - self._front, size)
        self._reach = max(self._reach, self._front + size)
        if costs.ready:
            spent, known = seconds / costs.sequential(), costs.at_most(size, arm.corrected)
            if known < math.inf or not (opening or (first and self._asynchronous)):  # those prepare
                spent = min(spent, known)  # the machine may have been busy
                costs.allowance.settle(spent * self._timer.together, front - self._front)

    def _best(self, front: int, length: int) -> Arm:
        """The arm with the least time for a position, of those whose trial the allowance covers."""
        costs, gains, left = self._costs, self._gains, length - front
        windows = [arm for arm in self._arms[1:] if arm == self._arm or self._may_begin(arm, front, length)]
        if not costs.ready or not windows or costs.allowance.closed:
            return SEQUENTIAL
        if not costs.knows_windows():  # the least of them tells what they cost
            return min(windows) if costs.allowance.left > self._reserve else SEQUENTIAL
        times = {SEQUENTIAL: 1.0}
        for arm in windows:
            times[arm] = gains.passes(arm) * costs.of(gains.size(arm, left), arm.corrected)
        other = min((arm for arm in times if gains.proven(arm)), key=times.__getitem__)  # in place of a trial
        self._least, now = times[other], costs.of(min(other.width, left), other.corrected)
        early = other == SEQUENTIAL and front < length // 8  # hard positions may come first, and would tell too little
        for arm in windows:
            if not gains.proven(arm):  # a wider window costs more for some passes before it gains more
                rise = 1 if gains.settles(arm) else RISE
                loss = 0.0 if arm == self._arm else rise * max(0.0, costs.of(arm.width, arm.corrected) - now)
                promising = arm == self._arm or times[arm] < WORTH_A_TRIAL * self._least
                if early or not (promising and costs.allowance.covers(self._reserve + loss)):
                    del times[arm]
        if self._arm in times and not gains.proven(self._arm) and self._may_win(left):
            return self._arm
        best = min(times, key=times.__getitem__)
        return best if times[best] < BETTER * times.get(self._arm, 2.0) else self._arm

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

    def _may_win(self, left: int) -> bool:
        """Whether the arm would be the best if it gained what the law says."""
        arm = self._arm
        return self._gains.expected(arm) * self._costs.of(self._gains.size(arm, left), arm.corrected) < self._least


class Timer:
    """Of the passes of a run.

    Attributes:
        size: positions of the passes that are being timed.
        together: how many there are.
        left: how many of them are still to come.
    """

    def __init__(self) -> None:
        self.size = self.together = self.left = 0
        self._begins: list[float] = []

    def begin(self, size: int, together: int) -> None:
        """So many passes are timed together from now on."""
        self.size, self.together, self.left = size, together, together - 1
        self._begins = [time.perf_counter()]

    def lap(self) -> None:
        """The next of them begins."""
        self.left -= 1
        self._begins.append(time.perf_counter())

    def each(self, queued: bool) -> float:
        """Seconds of each: of one that little disturbed, as `Timings` counts; the mean where passes were only queued."""
        ends = [*self._begins[1:], time.perf_counter()]
        if queued:
            return (ends[-1] - self._begins[0]) / self.together
        return sorted(end - begin for begin, end in zip(self._begins, ends, strict=True))[self.together // 8]
