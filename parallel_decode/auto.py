"""`Auto`: sliding windows whose width is found as it runs.

What is to be least is the time for a position, (passes for a position) x (seconds for a pass). Seconds are measured for
each width and kept, for all systems that cost the same. Passes for a position follow, on every trained flow that we have measured and
within some 10%, the law c + k / W for windows of W > 1 positions: a position needs about k passes from when the window reaches it, and
the front moves by no more than 1 / c positions a pass, however wide the window. So a few passes at one width say how good the others would
be, and the best of them is then tried and measured itself. A window of 1 needs exactly one pass for a position: ordinary decoding.
"""

import math
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from parallel_decode.correction import Correction
from parallel_decode.schedules import NAMES, Chooser, Schedule
from parallel_decode.secant import SecantCorrection
from parallel_decode.system import TriangularSystem

SECANT = SecantCorrection()
LARGEST_EVENT = 256  # numbers of a position, up to which the secant correction is tried
# guesses, as long as nothing is known
LATENCY = 4.0  # k: 3.4 to 4.5 on the flows of the benchmarks
SLOWNESS = 0.05  # c: 0.02 to 0.13 there
SAVED = 0.8  # of the passes, by the secant correction
OPTIMISM = 0.8  # of the time that is predicted for what was never tried
DOUBT = 0.93  # likewise, for what has not done a whole run
PRICE = 0.03  # of all time, beyond one run: what may be lost by trying what turns out slower
# how long to look
FIRST = 64  # the width that is tried first
TRIAL = 8  # passes, and a quarter of the width, before it is judged in the run that tries it; wider ones than FIRST four times that
ENOUGH = 3  # samples of what a pass costs
TOGETHER = 16  # sequential passes that are timed together
FORGET = 64  # runs after which times are measured anew, lest a bad moment of the machine rules for ever
HOPELESS = 10.0  # times slower than sequential decoding by the first pass, and a width is tried no longer


@dataclass(frozen=True, repr=False)
class Auto(Schedule):
    """Sliding windows of the width that gains the most positions per second, for this layer, batch, device and dtype.

    It measures as it runs, and remembers within the process for what a system calls itself (`cost_key`, `gain_key`): a first call
    still tries widths, later ones know. `parallel_decode.Plan` keeps what was found in a file.

    Attributes:
        widths: the widths to choose from; powers of two from 8, and all positions, by default. 1, which is sequential
            decoding, always belongs to them.
        secant: also try the secant correction, on floats and where no other correction is given.
        per_row: as for `Sliding`.

    Example:
        >>> import torch, parallel_decode as pd
        >>> system = pd.from_function(lambda x: 1 + torch.nn.functional.pad(x, (1, -1)) / 2, torch.zeros(1, 300))
        >>> bool((pd.solve(system, "auto").value[0, -1] - 2).abs() < 1e-4)
        True
    """

    widths: tuple[int, ...] | None = None
    secant: bool = field(default=True, kw_only=True)
    per_row: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.widths is not None:
            if isinstance(self.widths, int) or not all(isinstance(w, int) and w >= 1 for w in self.widths):
                raise ValueError(f"widths is {self.widths!r}, expected whole numbers >= 1")
            object.__setattr__(self, "widths", tuple(sorted({1, *self.widths})))

    @property
    def ragged(self) -> bool:
        return self.per_row

    def window(self, front: int, length: int) -> range:
        raise RuntimeError("Auto chooses by what it measures in a run: solve(system, 'auto')")

    def begin(self, system: TriangularSystem, x: Tensor, tol: float) -> Chooser:
        length, batch = system.length, len(x)
        widths = self.widths or (1, *(2**i for i in range(3, 20) if 2**i < length), length)
        options = (self.per_row, self.correction, self.start, tol)
        costs = _kept(_COSTS, system.cost_key, (*options, length, torch.get_num_threads()), _Costs)
        by_batch = _kept(_GAINS, system.gain_key, options, dict)
        if batch not in by_batch:  # other batches say much about this one
            by_batch[batch] = _Gains(by_batch[min(by_batch, key=lambda b: abs(b - batch))] if by_batch else None)
        by_batch[batch].age()
        costs.age()
        arms = [_Arm(width) for width in widths if width <= length]
        if self.secant and self.correction is None and x.is_floating_point() and x[0, 0].numel() <= LARGEST_EVENT:
            arms += [_Arm(width, True) for width in widths if 1 < width <= length]
        return _Pilot(self.correction, costs, by_batch[batch], arms, x.is_cuda)


class _Arm(NamedTuple):
    """What can be chosen."""

    width: int
    corrected: bool = False


def _seconds(sample: tuple[int, float]) -> float:
    return sample[1]


class _Costs:
    """Seconds of a pass by its number of positions: the least of the last samples, since what disturbs them only adds."""

    def __init__(self) -> None:
        self.samples: dict[tuple[bool, int], deque[tuple[int, float]]] = {}
        self.runs = 0

    def age(self) -> None:
        """Another run begins."""
        self.runs += 1
        if self.runs % FORGET == 0:
            self.samples = {key: samples for key, samples in self.samples.items() if key == (False, 1)}

    def add(self, arm: _Arm, size: int, seconds: float) -> bool:
        """Take a pass down; whether that makes its size known."""
        samples = self.samples.setdefault((arm.corrected, size.bit_length()), deque(maxlen=31))
        samples.append((size, seconds))
        return len(samples) == ENOUGH

    def knows(self, arm: _Arm) -> bool:
        return len(self.samples.get((arm.corrected, arm.width.bit_length()), ())) >= ENOUGH

    def seconds(self, size: float, corrected: bool) -> float:
        """On a straight line between the sizes that are known, and beyond them from twice what a sequential pass takes.

        On the flows of the benchmarks a pass over n positions took about 2 a + b n, where a sequential one took a.
        """
        known = [
            min(samples, key=_seconds)
            for (of_corrected, bits), samples in sorted(self.samples.items())
            if of_corrected == corrected and bits > 1 and len(samples) >= ENOUGH
        ]
        if not known:
            return self.seconds(size, False)
        if size <= known[0][0] or size >= known[-1][0]:
            n, t = known[0] if size <= known[0][0] else known[-1]
            fixed = min(2 * self.single(), 0.8 * t)
            return fixed + (t - fixed) * size / n
        (n0, t0), (n1, t1) = next(pair for pair in pairwise(known) if size <= pair[1][0])
        return t0 + (t1 - t0) * (size - n0) / (n1 - n0)

    def single(self) -> float:
        """Seconds of a sequential pass."""
        return min(self.samples[False, 1], key=_seconds)[1]


class _Gains:
    """Passes for a position by arm: measured over most of a layer, or by the law c + k / W from what was."""

    def __init__(self, like: "_Gains | None" = None) -> None:
        self.measured: dict[_Arm, deque[float]] = {}
        self.latest: dict[_Arm, float] = {}  # of the present run
        self.seconds: dict[_Arm, deque[float]] = {}  # for a position, of whole runs
        # Seconds for a position: of all runs, and beyond what the best arm would have taken.
        self.spent = self.lost = 0.0
        self.runs = 0
        if like is not None:
            like.age()
            self.measured = {arm: deque(paces, maxlen=5) for arm, paces in like.measured.items()}

    def age(self) -> None:
        """Another run begins."""
        self.runs += 1
        if self.runs % FORGET == 0 and self.seconds:
            best = min(self.seconds, key=lambda arm: median(self.seconds[arm]))
            self.seconds = {best: self.seconds[best]}
        for arm, pace in self.latest.items():
            self.measured.setdefault(arm, deque(maxlen=5)).append(pace)
        self.latest = {}

    def least(self) -> float:
        """Seconds for a position by the best arm of those that did whole runs; 0 if none did."""
        return min(map(median, self.seconds.values()), default=0.0)

    def passes(self, arm: _Arm) -> float:
        """Passes for a position."""
        known = {a: median(paces) for a, paces in self.measured.items()} | self.latest
        if arm in known:
            return known[arm]
        alike = [a for a in known if a.corrected == arm.corrected]
        if not alike and arm.corrected:
            return SAVED * known.get(_Arm(arm.width), math.inf)  # only beside what was run without
        if not alike:
            return SLOWNESS + LATENCY / arm.width
        near = min(alike, key=lambda a: abs(a.width.bit_length() - arm.width.bit_length()))
        return max(known[near] + LATENCY * (1 / arm.width - 1 / near.width), 1 / arm.width)


_COSTS: OrderedDict[Hashable, _Costs] = OrderedDict()
_GAINS: OrderedDict[Hashable, dict[int, _Gains]] = OrderedDict()
T = TypeVar("T")


def _kept(store: OrderedDict[Hashable, T], key: Hashable, options: Hashable, make: Callable[[], T]) -> T:
    """What is remembered under a key; nothing is if it is None."""
    if key is None:
        return make()
    value = store.pop((key, options), None) or make()
    store[key, options] = value
    while len(store) > 1024:
        store.popitem(last=False)
    return value


class _Pilot:
    """One run of `Auto`."""

    def __init__(
        self, correction: Correction | None, costs: _Costs, gains: _Gains, arms: list[_Arm], asynchronous: bool
    ) -> None:
        self.given, self.costs, self.gains, self.arms = correction, costs, gains, arms
        self.asynchronous = asynchronous
        self.arm: _Arm | None = None
        self.size = 0
        self.together = self.left = 0  # passes that are timed together, and how many of them are still to come
        self.looks = self.since = self.front = 0  # how often was looked; and since when, from which front, by this arm
        self.start, self.began = time.perf_counter(), 0.0

    @property
    def correction(self) -> Correction | None:
        return SECANT if self.arm is not None and self.arm.corrected else self.given

    def window(self, front: int, length: int) -> range:
        if self.left:
            self.left -= 1
            return range(front, front + 1)
        if self.arm is None or self._observe(self.arm, front, length):
            arm = self._best(length)
            if arm != self.arm:
                self._took(front, length)
                self.arm, self.since, self.front = arm, 0, front
        assert self.arm is not None
        single = self.arm.width == 1
        self.size = min(self.arm.width, length - front)
        self.together = min(TOGETHER if self.costs.knows(_Arm(1)) else 4, length - front) if single else 1
        self.left = self.together - 1
        self.began = time.perf_counter()
        return range(front, front + self.size)

    def _observe(self, arm: _Arm, front: int, length: int) -> bool:
        """Take down what the last passes took and gained; whether to think again."""
        self.looks = self.looks + 1
        told = self._tell(arm, front, length)
        if self.asynchronous:  # single positions are only queued
            torch.cuda.synchronize()
        seconds = (time.perf_counter() - self.began) / self.together
        if min(self.looks, self.since) == 1:  # the first also prepares
            single = self.costs.single() if self.costs.knows(_Arm(1)) else math.inf
            if self.gains.passes(arm) * seconds < HOPELESS * single:
                return False
            for _ in range(ENOUGH - 1):
                self.costs.add(arm, self.size, seconds)
        new = self.costs.add(arm, self.size, seconds)
        return new or (told and self.since % 8 == 0)

    def finish(self, front: int, length: int) -> None:
        if self.arm is None or self.left:
            return
        self._tell(self.arm, front, length)
        least = self.gains.least()
        self._took(front, length)
        taken = (time.perf_counter() - self.start) / length
        self.gains.spent += taken
        self.gains.lost += max(0.0, taken - least) if least else 0.0

    def _took(self, front: int, length: int) -> None:
        """Take down the seconds of a run that was this arm's, or nearly."""
        if self.arm is None or self.front > 0 or 4 * front < 3 * length:
            return
        if self.asynchronous:
            torch.cuda.synchronize()
        taken = (time.perf_counter() - self.start) / front
        self.gains.seconds.setdefault(self.arm, deque(maxlen=5)).append(taken)

    def _tell(self, arm: _Arm, front: int, length: int) -> bool:
        """Take down what another pass gained; whether this says how fast the arm is."""
        self.since += 1
        trial = TRIAL + arm.width // 4 if arm.width <= FIRST else 4 * TRIAL + arm.width // 2
        gained = front - self.front
        far = gained >= length // 4 or self.since >= length // 4  # a layer may begin harder than it goes on
        told = arm.width > 1 and (gained >= length // 2 or (far and self.since >= trial))
        if told:
            self.gains.latest[arm] = self.since / gained
        return told

    def _best(self, length: int) -> _Arm:
        """The arm with the least time for a position."""
        sequential, *windows = self.arms
        if not self.costs.knows(sequential) or not windows:
            return sequential
        if not any(map(self.costs.knows, windows)):
            return min(windows, key=lambda arm: (arm.corrected, abs(arm.width - FIRST)))
        times = {sequential: self.costs.single()}
        for arm in windows:
            mean = arm.width - arm.width**2 / (2 * length)  # the last windows are shorter
            hope = DOUBT if arm in self.gains.measured or arm in self.gains.latest else OPTIMISM
            times[arm] = hope * self.gains.passes(arm) * self.costs.seconds(mean, arm.corrected)
        for arm in self.arms:
            whole = self.gains.seconds.get(arm, ())  # one alone may have met a bad moment of the machine
            if len(whole) > 1 or (whole and whole[0] < 1.3 * times[arm]):
                times[arm] = median(whole)
        if self.gains.lost > PRICE * self.gains.spent + self.gains.least():  # no more trials for now
            times = {
                arm: taken for arm, taken in times.items() if arm == self.arm or arm in self.gains.seconds
            } or times
        best = min(times, key=times.__getitem__)
        return best if self.arm is None or times[best] < 0.9 * times[self.arm] else self.arm


NAMES["auto"] = Auto
