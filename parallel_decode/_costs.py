"""What schedules that measure remember within the process: seconds of a pass by its width, and (of `Auto`) passes for a position by width.

One lock guards all of it, since two threads may decode at once.
"""

import math
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Sequence
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


class Timings:
    """Seconds of a pass by its number of positions: the smallest of the last samples, since what disturbs them only adds.

    Between the sizes that were measured they are on a straight line.

    Args:
        beyond: the seconds of a size outside of those, from the nearest one and its seconds.
        bucket: sizes that have the same are measured together.
        enough: samples of what counts as measured.
        kept: samples.
    """

    def __init__(
        self,
        beyond: Callable[[float, int, float], float],
        bucket: Callable[[int], int] = int.bit_length,
        enough: int = ENOUGH,
        kept: int = 31,
    ) -> None:
        self.beyond, self.bucket, self.enough, self.kept = beyond, bucket, enough, kept
        self.samples: dict[int, deque[tuple[int, float]]] = {}

    def add(self, size: int, seconds: float) -> bool:
        """Add a pass over `size` positions; whether there are now just enough samples of that size."""
        samples = self.samples.setdefault(self.bucket(size), deque(maxlen=self.kept))
        samples.append((size, seconds))
        return len(samples) == self.enough

    def knows(self, size: int) -> bool:
        """Whether such passes have been measured."""
        return len(self.samples.get(self.bucket(size), ())) >= self.enough

    def measured(self) -> list[tuple[int, float]]:
        """Sizes, rising, and their seconds."""
        return [min(s, key=_seconds) for _, s in sorted(self.samples.items()) if len(s) >= self.enough]

    def seconds(self, size: float, measured: Sequence[tuple[int, float]] = ()) -> float:
        """Of a pass over so many positions; `measured` is what `measured()` returned, and not empty, if it is known already."""
        measured = measured or self.measured()
        if size <= measured[0][0] or size >= measured[-1][0]:
            return self.beyond(size, *measured[0 if size <= measured[0][0] else -1])
        (n0, t0), (n1, t1) = next(pair for pair in pairwise(measured) if size <= pair[1][0])
        return t0 + (t1 - t0) * (size - n0) / (n1 - n0)


class Costs:
    """Seconds of passes of all arms."""

    def __init__(self) -> None:
        self.single = Timings(lambda size, near, seconds: seconds)
        self._forget()
        self.runs = 0

    def _forget(self) -> None:
        self.windows = {corrected: Timings(self._beyond) for corrected in (False, True)}

    def begin_run(self) -> None:
        self.runs += 1
        if self.runs % FORGET == 0:
            self._forget()

    def _of(self, size: int, corrected: bool) -> Timings:
        return self.single if size == 1 else self.windows[corrected]

    def add(self, arm: Arm, size: int, seconds: float) -> bool:
        """Add a pass over `size` positions; whether there are now just enough samples of that size."""
        if size == 1 and arm.corrected:  # that a window ended with, and no sequential pass
            return False
        return self._of(size, arm.corrected).add(size, seconds)

    def knows(self, arm: Arm) -> bool:
        """Whether passes of this arm have been measured."""
        return self._of(arm.width, arm.corrected).knows(arm.width)

    def seconds(self, size: float, corrected: bool) -> float:
        """Of windows; those with correction are taken to cost what the others do until they are measured."""
        corrected = corrected and bool(self.windows[True].measured())
        return self.windows[corrected].seconds(size)

    def sequential(self) -> float:
        """Seconds of a sequential pass."""
        return self.single.seconds(1)

    def _beyond(self, size: float, near: int, seconds: float) -> float:
        """On the flows of the benchmarks a pass over n positions took about 2 a + b n, where a sequential one took a."""
        fixed = min(2 * self.sequential(), 0.8 * seconds)
        return fixed + (seconds - fixed) * size / near


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
