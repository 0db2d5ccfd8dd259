"""`Adaptive`: windows as wide as the present draft is good for."""

import time
from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from parallel_decode._costs import LOCK, Timings
from parallel_decode.adapters.causal_lm.system import CausalLM
from parallel_decode.schedules import Chooser, Schedule
from parallel_decode.system import TriangularSystem

WIDTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
SLOWER = 0.03  # for each further token of a pass, as long as nothing was measured
URGENCY = 4.0  # how much more a row counts that has more left to do: the batch is done when its last row is
MARGIN = 1.1  # what a window has to promise over a single token: what is expected of drafts is uncertain
KEPT = 15  # samples of what a pass costs


@dataclass(frozen=True, repr=False)
class Adaptive(Schedule):
    """For each pass the width that promises the most tokens per second, 1 where no draft is worth reading.

    What a pass costs by its width is measured as it runs, and how often drafts of each kind come true is counted (the first token, and each further one
    given those before it); both are remembered within the process.

    Attributes:
        most: the widest window.
        per_row: rows have windows of their own, at their own fronts, where the cache allows it.
    """

    most: int = 64
    per_row: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.most, int) or self.most < 1:
            raise ValueError(f"most is {self.most!r}, expected a whole number >= 1")

    @property
    def ragged(self) -> bool:
        return self.per_row

    def window(self, front: int, length: int) -> range:
        raise RuntimeError("Adaptive chooses by what it measures in a run: parallel_generate uses it")

    def begin(self, system: TriangularSystem, x: Tensor, tol: float) -> Chooser:
        if not isinstance(system, CausalLM):
            raise TypeError(f"Adaptive is for language models, and this is a {type(system).__name__}: use 'auto'")
        most = 1 if system.processors.unknown else self.most
        key = system.cost_key, torch.get_num_threads()
        with LOCK:
            records = _RECORDS.setdefault((key, type(system.choice), type(system.guess)), {})
            for record in records.values():
                record.fade(16)  # another text may be another matter
            return _Tuner(system, _COSTS.setdefault(key, {}), records, most)


class _Costs(Timings):
    """Seconds of a pass by width, for so many rows; where nothing was measured each further token adds `SLOWER` of a pass of one for each row."""

    def __init__(self, rows: int) -> None:
        slower = SLOWER * rows
        super().__init__(lambda size, near, t: t * (1 + slower * (size - 1)) / (1 + slower * (near - 1)), int, 2, KEPT)
        self.added = 0
        self.table = self._table()

    def add(self, size: int, seconds: float) -> bool:
        known = super().add(size, seconds)
        self.added += 1
        if known or self.added % 8 == 0:
            self.table = self._table()
        return known

    def _table(self) -> dict[int, float]:
        measured = self.measured() or [(1, 1.0)]
        return {width: self.seconds(width, measured) for width in WIDTHS}


class _Record:
    """How often drafts of a kind came true."""

    def __init__(self, kind: int) -> None:
        first, further = (0.05, 0.3) if kind == 0 else (min(0.15 * kind, 0.7), 0.7)
        self.first, self.further = [4 * first, 4.0], [4 * further, 4.0]  # how many came true, of how many

    def add(self, accepted: int, drafted: int) -> None:
        """Of so many drafts so many came true, without a gap."""
        for counts, came, tried in (
            (self.first, min(accepted, 1), 1),
            (self.further, max(accepted - 1, 0), min(accepted, drafted - 1)),
        ):
            counts[0], counts[1] = counts[0] + came, counts[1] + tried
        self.fade(64)  # the text may change

    def fade(self, most: float) -> None:
        """Let what was long ago count for less: for so many trials in all."""
        for counts in (self.first, self.further):
            scale = min(1.0, most / counts[1])
            counts[0], counts[1] = scale * counts[0], scale * counts[1]

    def expected(self, drafted: int) -> float:
        """How many of so many drafts come true."""
        a, b = self.first[0] / self.first[1], self.further[0] / self.further[1]
        return a * (1 - b**drafted) / (1 - b) if b < 1 else a * drafted


_COSTS: dict[Hashable, dict[int, _Costs]] = {}  # by rows
_RECORDS: dict[Hashable, dict[int, _Record]] = {}


class _Tuner:
    correction = None

    def __init__(self, system: CausalLM, costs: dict[int, _Costs], records: dict[int, _Record], most: int) -> None:
        self.drafting, self.costs, self.records, self.most = system.drafting, costs, records, most
        self.read = self.passes = 0
        self.began = 0.0

    def window(self, front: int, length: int) -> range:
        now = time.perf_counter()
        with LOCK:
            costs = self._costs()
            if self.passes > 1:  # the first reads the prompt
                costs.add(self.read, now - self.began)
            self.passes += 1
            self.read = min(self._best(costs), length - front)
        self.began = now
        return range(front, front + self.read)

    def after_pass(self, system: TriangularSystem) -> None:
        """Count what came true of the drafts."""
        assert isinstance(system, CausalLM)
        self.drafting = system.drafting
        with LOCK:
            for kind, accepted, read in self.drafting.outcomes:
                self.records.setdefault(kind, _Record(kind)).add(accepted, read)

    def finish(self, front: int, length: int) -> None:
        """Nothing to do: all is noted."""

    def _costs(self) -> _Costs:
        rows = len(self.drafting.texts)
        return self.costs.setdefault(rows, _Costs(rows))

    def _best(self, costs: _Costs) -> int:
        """The width for the drafts that there are now."""
        drafting = self.drafting
        left = {row: drafting.length - drafting.final(row) for row in drafting.going()}
        most = max(left.values(), default=1)
        records = [
            ((left[row] / most) ** URGENCY, self.records.setdefault(kind, _Record(kind)))
            for row in left
            if (kind := drafting.kinds[row]) is not None
        ]
        widths = [w for w in WIDTHS if w <= self.most]
        gains = {w: sum(weight * (1 + r.expected(w - 1)) for weight, r in records) / costs.table[w] for w in widths}
        best = max(gains, key=gains.__getitem__)
        return best if gains[best] > MARGIN * gains[1] else 1
