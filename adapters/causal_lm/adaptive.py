"""`Adaptive`: windows as wide as the present draft is good for."""

import time
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from parallel_decode.adapters.causal_lm.system import CausalLM
from parallel_decode.schedules import Chooser, Schedule
from parallel_decode.system import TriangularSystem

WIDTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
SLOWER = 0.03  # for each further token of a window, as long as nothing was measured
KEPT = 15  # samples of what a pass costs


@dataclass(frozen=True, repr=False)
class Adaptive(Schedule):
    """For each pass the width that promises the most tokens per second, 1 where no draft is worth reading.

    What a pass costs by its width is measured as it runs and remembered within the process; how often drafts of each kind come true
    is counted in each generation (the first token, and each further one given those before it).

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
        return _Pilot(system, _COSTS.setdefault((system.cost_key, torch.get_num_threads()), _Costs()), most)


class _Costs:
    """Seconds of a pass by width: the least of the last samples."""

    def __init__(self) -> None:
        self.samples: dict[int, deque[float]] = {}

    def add(self, width: int, seconds: float) -> None:
        self.samples.setdefault(width, deque(maxlen=KEPT)).append(seconds)

    def ratio(self, width: int) -> float:
        """Against a window of one; between what is known on a straight line, and beyond it by the last slope."""
        known = {w: min(samples) for w, samples in self.samples.items() if len(samples) > 1}
        if 1 not in known:
            return 1 + SLOWER * (width - 1)
        if width in known:
            return known[width] / known[1]
        below, above = max(w for w in known if w < width), min((w for w in known if w > width), default=None)
        if above is None:
            slope = max(SLOWER, (known[below] / known[1] - 1) / below) if below > 1 else SLOWER
            return known[below] / known[1] + slope * (width - below)
        return (known[below] + (known[above] - known[below]) * (width - below) / (above - below)) / known[1]


_COSTS: dict[Hashable, _Costs] = {}


class _Record:
    """How often drafts of a kind came true."""

    def __init__(self, kind: int) -> None:
        first, further = (0.1, 0.4) if kind == 0 else (min(0.3 + 0.1 * kind, 0.8), 0.8)
        self.first, self.further = [4 * first, 4.0], [4 * further, 4.0]

    def add(self, accepted: int, drafted: int) -> None:
        """Of so many drafts so many came true, without a gap."""
        for counts, came, tried in (
            (self.first, min(accepted, 1), 1),
            (self.further, max(accepted - 1, 0), min(accepted, drafted - 1)),
        ):
            counts[0], counts[1] = counts[0] + came, counts[1] + tried
            if counts[1] > 64:  # the text may change its kind
                counts[0], counts[1] = counts[0] / 2, counts[1] / 2

    def expected(self, drafted: int) -> float:
        """How many of so many drafts come true."""
        a, b = self.first[0] / self.first[1], self.further[0] / self.further[1]
        return a * (1 - b**drafted) / (1 - b) if b < 1 else a * drafted


class _Pilot:
    correction = None

    def __init__(self, system: CausalLM, costs: _Costs, most: int) -> None:
        self.system, self.costs, self.most = system, costs, most
        self.records: dict[int, _Record] = {}
        system.listeners.append(self.heard)
        self.width, self.began, self.passes = 0, 0.0, 0

    def heard(self, kind: int, accepted: int, drafted: int) -> None:
        self.records.setdefault(kind, _Record(kind)).add(accepted, drafted)

    def window(self, front: int, length: int) -> range:
        now = time.perf_counter()
        if self.passes > 1:  # the first reads the prompt
            self.costs.add(self.width, now - self.began)
        self.passes += 1
        records = [self.records.setdefault(kind, _Record(kind)) for kind in self.system.kinds.values()]
        most = min(self.most, length - front)
        widths = [w for w in WIDTHS if w <= most] or [1]
        gains = {w: sum(1 + r.expected(w - 1) for r in records) / self.costs.ratio(w) for w in widths}
        self.width = max(gains, key=gains.__getitem__)
        self.began = time.perf_counter()
        return range(front, front + self.width)

    def finish(self, front: int, length: int) -> None:
        self.system.listeners.clear()
