"""What `Adaptive` does in a run: it measures passes, counts drafts, and chooses each window."""

import math
import time
import warnings
from typing import cast

from parallel_decode._costs import LOCK
from parallel_decode.adapters.causal_lm.learnt import save
from parallel_decode.adapters.causal_lm.memory import WIDTHS, Memory, RowCosts
from parallel_decode.adapters.causal_lm.system import CausalLM
from parallel_decode.system import TriangularSystem

URGENCY = 4  # how much more a row counts that has more left to do: the batch is done when its last row is
MARGIN = 1.1  # what a window has to promise over a single token: what is expected of drafts is uncertain
OPENING = 4  # passes of a run that read single tokens, where windows live on predictions: they gain nothing yet, and this tells what single ones cost now
PROMISED = 0.3  # of what windows promise to save, as long as they may not be tried: is lent to them
KEEPS = 0.9  # of the best rate, down to which a width is kept
CHECK = 9.0  # single tokens that windows have to promise to save before the model is checked, which takes six or seven
NOTHING = 4  # passes without any saving that are added to those of a run, so that a lucky beginning proves little


class Tuner:
    """Chooses the windows of one run.

    Attributes:
        ragged: whether rows have windows of their own in the next pass.
        name: under which to keep what is known at the end, for other processes.
    """

    correction = None

    def __init__(
        self,
        system: CausalLM,
        costs: dict[int, RowCosts],
        memory: Memory,
        most: int,
        per_row: bool = False,
        name: str | None = None,
    ) -> None:
        self.system, self.drafting, self.costs, self.memory = system, system.drafting, costs, memory
        self.most, self.per_row = most, per_row
        self.trusted = False  # whether it is known what the model can do
        self.paid = 0.0  # what it took, since the last window, to keep rows apart
        self.saves = 0.0  # of a single pass, by the window that was chosen
        self.missed = 0.0  # passes that windows would have saved, had the model been checked
        self.name = name
        self.ragged = self.apart = False
        self.read = self.size = self.passes = 0  # the last window, and the columns of that pass
        self.began = self.before = 0.0
        self.rows = self._rows()
        self.dull: set[tuple[int | None, ...]] = set()  # kinds of drafts that were not worth reading of late

    def _rows(self) -> RowCosts:
        rows = len(self.drafting.texts)
        if rows not in self.costs:
            self.costs[rows] = RowCosts(rows)
        return self.costs[rows]

    def window(self, front: int, length: int) -> range:
        now = time.perf_counter()
        with LOCK:
            left = self._left()
            distance = _distance(left)
            if self.passes > 1:  # the first reads the prompt
                self.rows.add(self.size, self.apart, now - self.began)
                self._settle(self.before - distance, now - self.began)
                if not self._early(left):
                    self.memory.pace.add(self.read, self.before - distance)
            self.rows, self.before = self._rows(), distance
            self.passes += 1
            came = any(outcome.accepted for outcome in self.drafting.outcomes)
            if came or self.read > 1 or not self.passes % 16:  # something may have changed
                self.dull.clear()
            width = self._best(left, distance)
        if width > 1 and not (self.trusted or self._trust(distance)):
            width, self.ragged = 1, False
        self.read = self.size = min(width, length - front)
        if self.ragged and not self.apart:
            self.size += _spread(left)
        self.began = time.perf_counter()
        return range(front, front + self.read)

    def after_pass(self, system: TriangularSystem) -> None:
        """Count what came true of the drafts."""
        system = cast(CausalLM, system)
        self.system, self.drafting, self.apart = system, system.drafting, system.apart
        with LOCK:
            for kind, accepted, read in self.drafting.outcomes:
                self.memory.record(kind).add(accepted, read)

    def finish(self, front: int, length: int) -> None:
        """Settle the last pass, and keep what is known."""
        accepted = [outcome.accepted for outcome in self.drafting.outcomes if self.read > 1]
        gained = 1 + min(accepted, default=0)
        with LOCK:
            if self.passes > 1:
                self._settle(min(gained, self.before))
            self.memory.allowance.end_run()
            if self.name is not None:
                save(self.name, self.costs, self.memory)

    def _settle(self, gained: float, seconds: float | None = None) -> None:
        if self.rows.ready:
            cost = self.rows.of(self.size, self.apart, seconds) / self.rows.tables[False][1]
            self.memory.allowance.settle(cost, gained)

    def _left(self) -> dict[int, int]:
        """How many positions each row has to do that goes on."""
        drafting = self.drafting
        return {row: left for row in drafting.going() if (left := drafting.length - drafting.final(row)) > 0}

    def _early(self, left: dict[int, int]) -> bool:
        """Whether all are in the first eighth, which is the hardest: the first rows of a picture, with nothing above them."""
        return 8 * max(left.values(), default=0) > 7 * self.drafting.length

    def _best(self, left: dict[int, int], distance: float) -> int:
        """The width for the drafts that there are now; notes whether rows have windows of their own."""
        costs, allowance, kinds = self.rows, self.memory.allowance, tuple(self.drafting.kinds)
        spread, self.ragged = _spread(left), False
        if kinds in self.dull and not spread:
            return 1
        apart = self.per_row and spread > 0
        again = spread if apart and not self.apart else 0  # columns that the rows ahead would have to read again
        owed = self._keep_lead(max(left.values()), distance, again) if apart else 0.0
        if not costs.ready or self._opening(left):
            return 1
        table = costs.tables[apart]
        if again:
            table = {width: costs.seconds(width + again, True) if width > 1 else table[1] for width in WIDTHS}
        rates = self._rates(left, distance, table)
        slow = self.memory.pace.k if self.drafting.fresh else 1.0  # passes before a window gains what it will
        affordable = [1]
        for width in rates:
            dearer = table[width] / costs.tables[False][1] - 1
            if width > 1 and allowance.covers(owed + dearer * (1 if width == self.read else slow)):
                affordable.append(width)
        best, promising = (max(widths, key=rates.__getitem__) for widths in (affordable, rates))
        margin = 1.0 if self.drafting.fresh and self.read > 1 else MARGIN  # its predictions are worth more
        promises = rates[promising] > margin * rates[1]
        if promises and best != promising and not self.drafting.fresh:
            allowance.lend(PROMISED * (1 - margin * rates[1] / rates[promising]))
        if rates[best] <= margin * rates[1]:
            if not promises:
                self.dull.add(kinds)
            return 1
        self.ragged, self.saves, self.paid = self.per_row, 1 - rates[1] / rates[best], 0.0
        keeps = self.drafting.fresh and rates.get(self.read, 0.0) > KEEPS * rates[best]
        return self.read if keeps else best

    def _keep_lead(self, most: int, distance: float, again: int) -> float:
        """Rows are apart: notes whether they stay so where single tokens are read; returns the passes that a window risks by that.

        A lead that is given up has to be read again, so it is kept until that took as much as the lead is worth.
        """
        tables, lead = self.rows.tables, most - distance  # worth nothing, if rows wait for the slowest
        single = tables[False][1]
        dearer = tables[True][1] / single - 1
        takes = most * dearer + (self.rows.seconds(1 + again, True) / single - 1 if again else 0.0)
        self.ragged = takes < lead or (self.apart and self.paid < lead)
        self.paid += dearer
        return min(lead, takes)

    def _opening(self, left: dict[int, int]) -> bool:
        """Whether windows that live on predictions have to wait: a run begins, or nothing is known of them and these are the hardest positions."""
        return self.drafting.fresh and (self.passes <= OPENING or (not self.memory.pace.known and self._early(left)))

    def _rates(self, left: dict[int, int], distance: float, table: dict[int, float]) -> dict[int, float]:
        """Positions a second by width, as expected; of single tokens alone where no window can be worth it."""
        widths = [width for width in WIDTHS if width <= self.most]
        if self.drafting.fresh:
            return {width: 1 / (self.memory.pace(width) * table[width]) for width in widths}
        terms = self._terms(left, distance)
        if _gain(terms, self.most) / table[2] <= MARGIN * _gain(terms, 1) / table[1]:  # if the widest cost no more
            widths = [1]
        return {width: _gain(terms, width) / table[width] for width in widths}

    def _trust(self, distance: float) -> bool:
        """Whether the model may be read in windows; one that was never checked is checked where that pays, with so many passes to go."""
        system = self.system
        self.missed += self.saves
        likely = distance * self.missed / (self.passes + NOTHING) * self.memory.runs
        early = self.passes == 1 or likely < CHECK  # the first pass refuses what nobody can read
        if early and system.model_check.recalled is None:
            return False
        if why := system.trust.no_windows:
            warnings.warn(f"{why}: tokens are decoded one by one", stacklevel=2)
            self.most = 1
        self.trusted, self.per_row = True, self.per_row and system.ragged
        self.ragged = self.ragged and self.per_row
        return not why

    def _terms(self, left: dict[int, int], distance: float) -> list[tuple[float, float, float]]:
        """What windows gain: weights, and the chances of the first draft and of each further one."""
        kinds = self.drafting.kinds
        chances = [(left[row], self.memory.record(kind).chances) for row in left if (kind := kinds[row]) is not None]
        if not self.per_row:  # all wait for the slowest
            return [(1.0, math.prod(first for _, (first, _) in chances), math.prod(more for _, (_, more) in chances))]
        return [((rest / distance) ** URGENCY / len(chances), first, more) for rest, (first, more) in chances]


def _gain(terms: list[tuple[float, float, float]], width: int) -> float:
    """By how much a window lessens the distance."""
    return sum(
        weight * (1 + (first * (1 - further ** (width - 1)) / (1 - further) if further < 1 else first * (width - 1)))
        for weight, first, further in terms
    )


def _spread(left: dict[int, int]) -> int:
    """By how much the first row is ahead of the last."""
    return max(left.values(), default=0) - min(left.values(), default=0)


def _distance(left: dict[int, int]) -> float:
    """Passes of sequential decoding to the end: what the slowest row has left, if the others have as much, and less as long as they may yet be the slower ones."""
    power = URGENCY + 1
    return float((sum(rest**power for rest in left.values()) / max(1, len(left))) ** (1 / power))
