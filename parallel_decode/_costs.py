"""What `Auto` remembers within the process: seconds of a pass by its width, and passes for a position by width.

One lock guards all of it, since two threads may decode at once.
"""

import math
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from itertools import pairwise
from statistics import median
from typing import NamedTuple, TypeVar

# guesses, as long as nothing is measured
LATENCY = 4.0  # k: 3.4 to 4.5 on the flows of the benchmarks
SLOWNESS = 0.05  # c: 0.02 to 0.13 there
SAVED = 0.8  # of the passes, by the secant correction
ENOUGH = 3  # samples of what a pass costs
FORGET = 64  # runs after which times are measured anew, so that a bad moment of the machine does not count for ever

LOCK = threading.RLock()
T = TypeVar("T")


class Arm(NamedTuple):
    """What can be chosen: a width, with the secant correction or without."""

    width: int
    corrected: bool = False


def _seconds(sample: tuple[int, float]) -> float:
    return sample[1]


class Costs:
    """Seconds of a pass by its number of positions: the smallest of the last samples, since what disturbs them only adds."""

    def __init__(self) -> None:
        self.samples: dict[tuple[bool, int], deque[tuple[int, float]]] = {}
        self.runs = 0

    def begin_run(self) -> None:
        self.runs += 1
        if self.runs % FORGET == 0:
            self.samples = {key: samples for key, samples in self.samples.items() if key == (False, 1)}

    def add(self, arm: Arm, size: int, seconds: float) -> bool:
        """Add a pass over `size` positions; whether there are now just enough samples of that size."""
        samples = self.samples.setdefault((arm.corrected, size.bit_length()), deque(maxlen=31))
        samples.append((size, seconds))
        return len(samples) == ENOUGH

    def knows(self, arm: Arm) -> bool:
        """Whether passes of this arm have been measured."""
        return len(self.samples.get((arm.corrected, arm.width.bit_length()), ())) >= ENOUGH

    def seconds(self, size: float, corrected: bool) -> float:
        """On a straight line between the sizes that were measured, and beyond them from twice what a sequential pass takes.

        On the flows of the benchmarks a pass over n positions took about 2 a + b n, where a sequential one took a.
        """
        measured = [
            min(samples, key=_seconds)
            for (of_corrected, bits), samples in sorted(self.samples.items())
            if of_corrected == corrected and bits > 1 and len(samples) >= ENOUGH
        ]
        if not measured:
            return self.seconds(size, False)
        if size <= measured[0][0] or size >= measured[-1][0]:
            n, t = measured[0] if size <= measured[0][0] else measured[-1]
            fixed = min(2 * self.sequential(), 0.8 * t)
            return fixed + (t - fixed) * size / n
        (n0, t0), (n1, t1) = next(pair for pair in pairwise(measured) if size <= pair[1][0])
        return t0 + (t1 - t0) * (size - n0) / (n1 - n0)

    def sequential(self) -> float:
        """Seconds of a sequential pass."""
        return min(self.samples[False, 1], key=_seconds)[1]


class Gains:
    """Passes for a position by arm: measured over most of a layer, or by the law c + k / W from what was measured.

    Attributes:
        measured: of earlier runs.
        latest: of the present run.
        seconds: for a position, of runs by one arm from beginning to end.
        spent, regret: seconds for a position of all runs, and beyond what the best arm would have taken.

    Args:
        like: the gains of another batch size, to begin with.
    """

    def __init__(self, like: "Gains | None" = None) -> None:
        self.measured: dict[Arm, deque[float]] = {}
        self.latest: dict[Arm, float] = {}
        self.seconds: dict[Arm, deque[float]] = {}
        self.spent = self.regret = 0.0
        self.runs = 0
        if like is not None:
            like.begin_run()
            self.measured = {arm: deque(passes, maxlen=5) for arm, passes in like.measured.items()}

    def begin_run(self) -> None:
        self.runs += 1
        if self.runs % FORGET == 0 and self.seconds:
            best = min(self.seconds, key=lambda arm: median(self.seconds[arm]))
            self.seconds = {best: self.seconds[best]}
        for arm, passes in self.latest.items():
            self.measured.setdefault(arm, deque(maxlen=5)).append(passes)
        self.latest = {}

    def best_seconds(self) -> float:
        """Seconds for a position by the best arm that did a run; 0 if none did."""
        return min(map(median, self.seconds.values()), default=0.0)

    def passes(self, arm: Arm) -> float:
        """Passes for a position."""
        measured = {a: median(passes) for a, passes in self.measured.items()} | self.latest
        if arm in measured:
            return measured[arm]
        alike = [a for a in measured if a.corrected == arm.corrected]
        if not alike and arm.corrected:
            return SAVED * measured.get(Arm(arm.width), math.inf)  # only for a width that was run without
        if not alike:
            return SLOWNESS + LATENCY / arm.width
        nearest = min(alike, key=lambda a: abs(a.width.bit_length() - arm.width.bit_length()))
        return max(measured[nearest] + LATENCY * (1 / arm.width - 1 / nearest.width), 1 / arm.width)


COSTS: OrderedDict[Hashable, Costs] = OrderedDict()
GAINS: OrderedDict[Hashable, dict[int, Gains]] = OrderedDict()


def recall(table: OrderedDict[Hashable, T], key: Hashable, options: Hashable, make: Callable[[], T]) -> T:
    """What a table holds under a key, made if it is not there; nothing is kept where the key is None."""
    if key is None:
        return make()
    value = table.pop((key, options), None) or make()
    table[key, options] = value
    while len(table) > 1024:
        table.popitem(last=False)
    return value


def gains_of(key: Hashable, options: Hashable, batch: int) -> Gains:
    """The gains of a batch size; a new one begins with those of the nearest."""
    by_batch = recall(GAINS, key, options, dict[int, Gains])
    if batch not in by_batch:
        by_batch[batch] = Gains(by_batch[min(by_batch, key=lambda b: abs(b - batch))] if by_batch else None)
    return by_batch[batch]
