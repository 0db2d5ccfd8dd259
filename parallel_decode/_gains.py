"""What `Auto` remembers within the process: passes for a position by width."""

import math
from collections import OrderedDict
from collections.abc import Hashable
from typing import NamedTuple

from parallel_decode._costs import Arm, recall

# guesses, as long as nothing is counted
LATENCY = 6.0  # k: 3.4 to 12 on the flows of the benchmarks
SLOWNESS = 0.02  # c: 0.01 to 0.2 there
SAVED = 0.8  # of the passes, by the secant correction
SETTLED = 1.25  # passes for a window's width: the last windows of a layer are shorter
TURN = 10.0  # passes of a trial until its window has moved by its own width
BELIEVED = 6.0  # passes that the law counts for, beside those that were counted
KEPT = 64.0  # passes of an arm that count, the others are of long ago
FADES = 0.99  # of what counts, from run to run: what once lost is tried again some day


class Count(NamedTuple):
    """Of passes of an arm, the older ones by less.

    Attributes:
        passes: how many.
        positions: how many became final.
        sizes: how many were evaluated.
    """

    passes: float = 0.0
    positions: float = 0.0
    sizes: float = 0.0

    def scaled(self, by: float) -> "Count":
        return Count(*(by * value for value in self))

    def plus(self, other: "Count") -> "Count":
        return Count(self.passes + other.passes, self.positions + other.positions, self.sizes + other.sizes)


def _law(width: int) -> float:
    return SLOWNESS + LATENCY / width


def trial(arm: Arm) -> float:
    """Passes before an arm is judged by what it gained alone."""
    return 8 + arm.width / 4


class Gains:
    """Passes for a position by arm: counted, and by the law c + k / W as long as little was.

    Args:
        like: the gains of another batch size, to begin with.

    Attributes:
        turn: passes of a trial until its window has moved by its own width: until then few positions settle, however many nearly have.
    """

    def __init__(self, like: "Gains | None" = None) -> None:
        self.counts: dict[Arm, Count] = dict(like.counts) if like else {}
        self.turn: float = like.turn if like else TURN
        self.runs = 0

    def begin_run(self) -> None:
        self.runs += 1
        self.turn = TURN + FADES * (self.turn - TURN)
        for arm, count in self.counts.items():
            self.counts[arm] = count.scaled(min(FADES, max(KEPT, trial(arm)) / count.passes))

    def add(self, arm: Arm, count: Count) -> None:
        """These passes."""
        self.counts[arm] = self.counts.get(arm, Count()).plus(count)

    def broken_off(self, passes: int) -> None:
        """A trial ended before its window had moved by its own width: the next one has to be worth more."""
        self.turn = max(self.turn, 2.0 * passes)

    def proven(self, arm: Arm) -> bool:
        """Whether what was counted is enough to judge by; sequential decoding needs none of that."""
        return arm.width == 1 or self._missing(arm) == 0

    def passes(self, arm: Arm) -> float:
        """For a position: what was counted, and as long as that is little what the law expects besides."""
        if arm.width == 1:
            return 1.0
        count, more = self.counts.get(arm, Count()), min(BELIEVED, self._missing(arm))
        if not more:
            return count.passes / count.positions
        return (count.passes + more) / (count.positions + more / self.expected(arm))

    def size(self, arm: Arm, length: int) -> float:
        """Positions of a pass, in the mean over `length` positions, where the last windows are shorter."""
        if self.proven(arm) and arm in self.counts:
            return min(self.counts[arm].sizes / self.counts[arm].passes, length)
        width = min(arm.width, length)
        return width - width**2 / (2 * length)

    def expected(self, arm: Arm) -> float:
        """For a position: what the law says, through the two nearest widths that are proven; as long as there is but one, the better of what that one allows."""
        near, other, *_ = *self._nearest(arm), None, None
        if near is None:
            passes = SAVED * self.passes(Arm(arm.width)) if arm.corrected else _law(arm.width)
        elif self.settles(arm):
            passes = 1 / arm.width
        elif other is None:
            found = self.passes(near)
            passes = found * _law(arm.width) / _law(near.width)
            if arm.width < near.width:  # what takes longer than the law says may do so at all widths alike
                passes = min(passes, found + _law(arm.width) - _law(near.width))
        else:
            found, rest = self.passes(near), self.passes(other)
            slope = (found - rest) / (1 / near.width - 1 / other.width)
            passes = found + slope * (1 / arm.width - 1 / near.width)
            least, most = sorted((found, found * near.width / arm.width))  # k = 0, and c = 0
            passes = min(max(passes, least), most)
        return min(1.0, max(passes, 1 / arm.width))

    def settles(self, arm: Arm) -> bool:
        """Whether a pass may settle the whole window, as at the nearest width that is proven nearly every pass did."""
        return any(self.passes(near) * near.width < SETTLED for near in self._nearest(arm)[:1])

    def _nearest(self, arm: Arm) -> list[Arm]:
        """The other arms that are proven, the nearest width first."""
        known = [a for a in self.counts if a.corrected == arm.corrected and a != arm and self.proven(a)]
        return sorted(known, key=lambda a: abs(a.width.bit_length() - arm.width.bit_length()))

    def _missing(self, arm: Arm) -> float:
        """Passes to the end of a trial: none also where the window moved by its own width."""
        count = self.counts.get(arm, Count())
        return 0.0 if count.passes >= 4 and count.positions >= arm.width else max(0.0, trial(arm) - count.passes)


GAINS: OrderedDict[Hashable, dict[int, Gains]] = OrderedDict()


def gains_of(key: Hashable, options: Hashable, batch: int) -> Gains:
    """The gains of a batch size; a new one begins with those of the nearest."""
    by_batch = recall(GAINS, key, options, dict[int, Gains])
    if batch not in by_batch:
        near = min(by_batch, key=lambda b: abs(math.log(b or 1) - math.log(batch or 1)), default=None)
        by_batch[batch] = Gains(None if near is None else by_batch[near])
    return by_batch[batch]
