"""What schedules that measure remember within the process: seconds of a pass by its width. One lock guards it, since two threads may decode at once."""

import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from itertools import pairwise
from operator import itemgetter
from typing import NamedTuple, TypeVar

from parallel_decode._allowance import Allowance

ENOUGH = 3  # samples of what a pass costs
FORGET = 64  # runs, and fewer at first, after which a size that none of them used is measured anew: the machine may have been busy when it was

LOCK = threading.RLock()
T = TypeVar("T")
Measured = Sequence[tuple[int, float]]  # sizes and seconds


class Arm(NamedTuple):
    """What can be chosen: a width, with the secant correction or without."""

    width: int
    corrected: bool = False


class Timings:
    """Seconds of a pass by its number of positions: of the last samples a low one, since what disturbs them only adds.

    Between the sizes that were measured they are on a straight line.

    Args:
        beyond: the seconds of a size outside of those, from the nearest one and its seconds.
        bucket: sizes that have the same are measured together.
        enough: samples of what counts as measured.
        kept: samples.
        share: of the samples are below the one that counts.
    """

    def __init__(
        self,
        beyond: Callable[[float, int, float], float],
        bucket: Callable[[int], int] = int.bit_length,
        enough: int = ENOUGH,
        kept: int = 31,
        share: float = 1 / 8,
    ) -> None:
        self.beyond, self.bucket, self.enough, self.kept, self.share = beyond, bucket, enough, kept, share
        self.samples: dict[int, deque[tuple[int, float]]] = {}
        self._used: set[int] = set()
        self._chosen: dict[int, tuple[int, float]] = {}  # of every size that was measured, the sample that counts
        self._table: list[tuple[int, float]] | None = None

    def add(self, size: int, seconds: float) -> bool:
        """Add a pass over `size` positions; whether there are now just enough samples of that size."""
        bucket = self.bucket(size)
        samples = self.samples.setdefault(bucket, deque(maxlen=self.kept))
        samples.append((size, seconds))
        self._used.add(bucket)
        self._choose(bucket)
        return len(samples) == self.enough

    def _choose(self, bucket: int) -> None:
        samples = self.samples[bucket]
        if len(samples) >= self.enough:
            self._chosen[bucket] = sorted(samples, key=itemgetter(1))[int(self.share * len(samples))]
            self._table = None

    def forget(self) -> None:
        """Forget the sizes that had no sample since this was last called."""
        self.samples = {bucket: samples for bucket, samples in self.samples.items() if bucket in self._used}
        self._chosen = {bucket: sample for bucket, sample in self._chosen.items() if bucket in self._used}
        self._used.clear()
        self._table = None

    def restore(self, measured: Measured, scale: float = 1.0) -> None:
        """Let these be the samples: what `measured` was, its seconds times `scale`."""
        for size, seconds in measured:
            kept = [(size, scale * seconds)] * self.enough
            self.samples[self.bucket(size)] = deque(kept, maxlen=self.kept)
            self._used.add(self.bucket(size))
            self._choose(self.bucket(size))

    def knows(self, size: int) -> bool:
        """Whether such passes have been measured."""
        return len(self.samples.get(self.bucket(size), ())) >= self.enough

    def measured(self) -> list[tuple[int, float]]:
        """Sizes, rising, and their seconds."""
        if self._table is None:
            self._table = [sample for _, sample in sorted(self._chosen.items())]
        return self._table

    def seconds(self, size: float, measured: Measured = ()) -> float:
        """Of a pass over so many positions; `measured` is what `measured()` returned, and not empty, if it is known already."""
        measured = measured or self.measured()
        if size <= measured[0][0] or size >= measured[-1][0]:
            return self.beyond(size, *measured[0 if size <= measured[0][0] else -1])
        (n0, t0), (n1, t1) = next(pair for pair in pairwise(measured) if size <= pair[1][0])
        return t0 + (t1 - t0) * (size - n0) / (n1 - n0)


class Costs:
    """Seconds of passes of all arms, and what may be lost by trying some.

    Args:
        length: L.

    Attributes:
        allowance: in sequential passes.
    """

    def __init__(self, length: int) -> None:
        self.single = Timings(lambda size, near, seconds: seconds)
        self.windows = {corrected: Timings(partial(self._beyond, corrected)) for corrected in (False, True)}
        self.allowance = Allowance(free=min(20.0, length / 12), share=0.02, most=min(80.0, length / 3))
        self.runs, self._due = 0, 8
        self._foreign = False  # of another process, when the machine may have been faster or slower

    def begin_run(self) -> None:
        self.runs += 1
        if self.runs == self._due:
            self._due += min(self._due, FORGET)
            for timings in (self.single, *self.windows.values()):
                timings.forget()

    def add(self, arm: Arm, size: int, seconds: float) -> None:
        """Add a pass over `size` positions."""
        if size == 1 and arm.corrected:  # a window ended with it, and it is no sequential pass
            return
        timings = self.single if size == 1 else self.windows[arm.corrected]
        if self._foreign and timings.knows(size):
            self._foreign, scale = False, seconds / timings.seconds(size)
            for each in (self.single, *self.windows.values()):
                each.restore(each.measured(), scale)
        timings.add(size, seconds)

    def restore(self, single: Measured, windows: Sequence[Measured], left: float) -> None:
        """Begin with what another process measured, which is how sizes compare, and with what it left of the allowance. How fast all of it is tells the first pass."""
        self.allowance.restore(left)
        self.single.restore(single)
        for corrected in (False, True):
            self.windows[corrected].restore(windows[corrected])
        self._foreign = True

    @property
    def ready(self) -> bool:
        """Whether sequential passes have been measured."""
        return self.single.knows(1)

    def sequential(self) -> float:
        """Seconds of a sequential pass."""
        return self.single.seconds(1)

    def knows_windows(self) -> bool:
        """Whether any window has been measured."""
        return bool(self.windows[False].measured())

    def of(self, size: float, corrected: bool = False) -> float:
        """What a pass costs, in sequential passes; with correction as without until that is measured."""
        if size <= 1:
            return 1.0
        seconds, measured = self.windows[False].seconds(size), self.windows[True].measured()
        if corrected and measured:  # as much dearer as it was at the nearest size
            near, there = min(measured, key=lambda each: abs(each[0] - size))
            seconds *= there / self.windows[False].seconds(near)
        return seconds / self.sequential()

    def at_most(self, size: int, corrected: bool = False) -> float:
        """What a pass costs when nothing disturbs it, at most: what the next larger size that was measured does; twice what it should, where none was; as much as its positions one by one, where no window was."""
        if size <= 1:
            return 1.0
        known = next((n for n, _ in self.windows[corrected].measured() if n >= size), None)
        if known is None:
            return 2 * self.of(size, corrected) if self.knows_windows() else float(size)
        return self.of(known, corrected)

    def _beyond(self, corrected: bool, size: float, near: int, seconds: float) -> float:
        """On the benchmarks' flows 2 a + b n to 2.5 a + b n, where a sequential pass takes a; or the line through the two widest measured, where that is less."""
        fixed = min(2.5 * self.sequential(), 0.85 * seconds)
        law, measured = fixed + (seconds - fixed) * size / near, self.windows[corrected].measured()
        if size <= near or len(measured) == 1:
            return law
        (n0, t0), (n1, t1) = measured[-2:]
        return min(law, t1 + max(0.0, t1 - t0) * (size - n1) / (n1 - n0))


COSTS: OrderedDict[Hashable, Costs] = OrderedDict()


def recall(table: OrderedDict[Hashable, T], key: Hashable, options: Hashable, make: Callable[[], T]) -> T:
    """What a table holds under a key, made if it is not there; nothing is kept where the key is None."""
    if key is None:
        return make()
    value = table.pop((key, options), None) or make()
    table[key, options] = value
    while len(table) > 1024:
        table.popitem(last=False)
    return value
