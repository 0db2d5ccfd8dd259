"""`Auto`, on a clock of our own: a pass takes what the test says, so nothing depends on the machine."""

import json
import math
import os
from collections import OrderedDict, deque
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import parallel_decode as pd
from parallel_decode import _costs, _tuner
from parallel_decode._costs import ENOUGH, FORGET, Arm, Costs, Gains, gains_of, recall
from tests.systems import Rows

Cost = Callable[[int], float]
COSTS: dict[str, Cost] = {
    "a pass takes as long as its positions": lambda n: 1.0 * n,
    "a small machine": lambda n: 1.0 if n == 1 else 2.0 + 0.03 * n,
    "a full machine": lambda n: 1.0 if n == 1 else 2.0 + 0.2 * n,
    "an idle machine": lambda n: 1.0 if n == 1 else 1.2,
    "an expensive window": lambda n: 1.0 if n == 1 else 100.0,
}


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def before(x: Tensor, lag: int) -> Tensor:
    return torch.nn.functional.pad(x, (lag, -lag))


class Timed(Rows):
    """x_l = 1 + sum of rate_k x_{l-k}, whose evaluations move the clock."""

    def __init__(self, clock: Clock, cost: Cost, rate: float, length: int, seed: int = 0) -> None:
        self.clock, self.cost = clock, cost
        z = torch.randn(2, length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

        def f(x: Tensor) -> Tensor:
            return z + torch.sin(rate * (before(x, 1) + before(x, 2) / 2 + before(x, 3) / 3))

        super().__init__(f, z)
        self.cost_key, self.gain_key = ("timed", cost, length), ("timed", rate, length)

    def evaluate(self, x: Tensor, window: pd.Window) -> Tensor:
        self.clock.now += self.cost(len(window.positions))
        return super().evaluate(x, window)

    def select(self, rows: Tensor) -> Any:
        return None


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr("time.perf_counter", made)
    _costs.COSTS.clear()
    _costs.GAINS.clear()
    return made


def seconds(clock: Clock, system: Timed, schedule: pd.Schedule | str) -> float:
    began = clock.now
    solution = pd.solve(system, schedule, tol=1e-6)
    assert (solution.value - pd.solve(Rows(system.f, system.guess), "sequential").value).abs().max() < 1e-4
    return clock.now - began


@pytest.mark.parametrize("cost", COSTS.values(), ids=COSTS)
@pytest.mark.parametrize("rate", [0.1, 0.3, 0.5])
def test_auto_is_within_5_percent_of_the_best_fixed_width_once_it_has_seen_a_few_runs(
    clock: Clock, cost: Cost, rate: float
) -> None:
    widths = (1, 8, 16, 32, 64, 128, 256)
    best = min(seconds(clock, Timed(clock, cost, rate, 256), pd.Sliding(width)) for width in widths)
    first, *later = times = [seconds(clock, Timed(clock, cost, rate, 256), pd.Auto(secant=False)) for _ in range(12)]
    print(best, times)
    assert sorted(later)[len(later) // 2] <= 1.05 * best
    assert first <= 2.3 * max(best, 256.0)


def test_auto_learns_within_one_long_run(clock: Clock) -> None:
    long = Timed(clock, COSTS["a small machine"], 0.1, 4000)
    sequential = seconds(clock, long, "sequential")
    assert seconds(clock, long, "auto") < 0.5 * sequential


def test_auto_corrects_where_it_pays(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    corrections: list[pd.Correction | None] = []
    window = _tuner.Tuner.window

    def look(self: _tuner.Tuner, front: int, length: int) -> range:
        chosen = window(self, front, length)
        corrections.append(self.correction)
        return chosen

    monkeypatch.setattr(_tuner.Tuner, "window", look)
    for _ in range(12):
        corrections.clear()
        seconds(clock, Timed(clock, COSTS["an idle machine"], 0.5, 256), "auto")
    assert any(corrections)
    corrections.clear()
    seconds(clock, Timed(clock, COSTS["an idle machine"], 0.5, 256), pd.Auto(secant=False))
    assert not any(corrections)


def test_what_one_batch_size_told_is_where_another_begins(clock: Clock) -> None:
    class Twice(Timed):
        def __init__(self, *options: Any) -> None:
            super().__init__(*options)
            self.guess = self.guess.repeat(2, 1)
            self.rows = torch.arange(4)
            f, half = self.f, len(self.guess) // 2
            self.f = lambda x: torch.cat([f(x[:half]), f(x[half:])])

    options = (clock, COSTS["a small machine"], 0.1, 256)
    for _ in range(8):
        known = seconds(clock, Timed(*options), "auto")
    assert seconds(clock, Twice(*options), "auto") < 1.1 * known


def test_a_system_without_keys_is_forgotten(clock: Clock) -> None:
    system = Timed(clock, COSTS["a small machine"], 0.1, 64)
    system.cost_key = system.gain_key = None
    seconds(clock, system, "auto")
    assert not _costs.COSTS and not _costs.GAINS


def test_tokens_and_short_systems() -> None:
    for length in (1, 2, 5):
        system = pd.from_function(
            lambda x: torch.nn.functional.pad(x, (1, -1)) + 1, torch.zeros(2, length, dtype=torch.long)
        )
        assert pd.solve(system, "auto").value.tolist() == [list(range(1, length + 1))] * 2


@pytest.mark.parametrize("widths", [(0,), 8, (2.5,), ("8",)])
def test_bad_widths(widths: Any) -> None:
    with pytest.raises(ValueError, match=r"widths is .*, expected whole numbers >= 1"):
        pd.Auto(widths)


def test_the_widths_that_are_given() -> None:
    windows: list[int] = []
    system = pd.from_function(lambda x: 1 + torch.nn.functional.pad(x, (1, -1)) / 2, torch.zeros(1, 500))
    for _ in range(3):
        pd.solve(system, pd.Auto((4, 7)), callback=lambda p: windows.append(len(p.window.positions)))
    assert set(windows) - {1, 4, 7} <= {2, 3, 5, 6} and {1} < set(windows)  # the last windows are shorter
    assert pd.Auto((4, 7)).widths == (1, 4, 7)
    with pytest.raises(RuntimeError, match="Auto chooses by what it measures"):
        pd.Auto().window(0, 4)


# what exactly it does


class Exact(Timed):
    """The same with sums and products alone, which round alike on every machine."""

    def __init__(self, clock: Clock, cost: Cost, rate: float, length: int, batch: int, seed: int) -> None:
        super().__init__(clock, cost, rate, length)
        z = torch.randint(-64, 64, (batch, length), generator=torch.Generator().manual_seed(seed)).double() / 64
        self.f = lambda x: z + (rate * (before(x, 1) + before(x, 2) / 2)).clamp(-1, 1)
        self.guess, self.rows = z, torch.arange(batch)
        self.widths: list[int] = []

    def evaluate(self, x: Tensor, window: pd.Window) -> Tensor:
        self.widths.append(len(window.positions))
        return super().evaluate(x, window)


def chosen(clock: Clock) -> dict[str, list[list[list[int]]]]:
    """For each machine the widths of all passes, run after run, each with how often it came in a row."""
    found: dict[str, list[list[list[int]]]] = {}
    names = ("a small machine", "an idle machine", "an expensive window")
    cases = [(name, rate, length, 8) for name in names for rate, length in ((0.125, 100), (0.5, 200))]
    for name, rate, length, runs in [*cases, ("a small machine", 0.25, 40, 70)]:
        for run in range(runs):
            system = Exact(clock, COSTS[name], rate, length, 2 if run < 6 else 3, run)
            pd.solve(system, "auto", tol=1e-6)
            widths = [[width, len(list(same))] for width, same in groupby(system.widths)]
            found.setdefault(f"{name}, {rate}, {length}", []).append(widths)
    return found


def test_the_windows_that_it_chooses_are_those_on_record(clock: Clock) -> None:
    """Whoever changes the choice on purpose writes it anew: PARALLEL_DECODE_RECORD=1 pytest tests/test_auto.py."""
    found, record = chosen(clock), Path(__file__).parent / "auto_windows.json"
    if os.environ.get("PARALLEL_DECODE_RECORD"):
        record.write_text(json.dumps(found) + "\n")
    assert found == json.loads(record.read_text())


def test_seconds_of_a_pass_between_and_beyond_the_sizes_that_were_measured() -> None:
    costs = Costs()
    for _ in range(ENOUGH):
        costs.add(Arm(1), 1, 1.0)
    assert costs.knows(Arm(1)) and not costs.knows(Arm(64)) and costs.sequential() == 1.0
    assert [costs.add(Arm(64), 64, seconds) for seconds in (5.0, 4.0, 6.0)] == [False, False, True]
    assert costs.knows(Arm(64)) and not costs.knows(Arm(32)) and not costs.knows(Arm(64, True))
    assert costs.seconds(64, False) == 4.0, "what disturbs a pass only adds: the smallest counts"
    assert (
        costs.seconds(32, False) == 3.0 and costs.seconds(128, False) == 6.0
    )  # 2 sequential passes, and 2 for each 64
    assert costs.seconds(32, True) == 3.0, "as without, as long as nothing else is known"
    for _ in range(ENOUGH):
        costs.add(Arm(128), 128, 8.0)
    assert costs.seconds(96, False) == 6.0 and costs.seconds(128, False) == 8.0 and costs.seconds(256, False) == 14.0
    small = Costs()
    for arm, size, seconds in ((Arm(1), 1, 10.0), (Arm(64), 64, 5.0)):
        for _ in range(ENOUGH):
            small.add(arm, size, seconds)
    assert small.seconds(32, False) == pytest.approx(4.5)  # at most 0.8 of a pass is taken to be fixed
    for _ in range(FORGET - 1):
        costs.begin_run()
    assert costs.knows(Arm(64))
    costs.begin_run()
    assert costs.knows(Arm(1)) and not costs.knows(Arm(64)) and not costs.knows(Arm(128))
    for seconds in [1.0] + [2.0] * 31:
        costs.add(Arm(8), 8, seconds)
    assert costs.seconds(8, False) == 2.0, "of the last 31"


def test_passes_for_a_position_by_what_was_measured_and_by_the_law() -> None:
    gains = Gains()
    assert gains.passes(Arm(8)) == 0.05 + 4 / 8 and gains.passes(Arm(8, True)) == math.inf
    gains.latest[Arm(16)] = 0.5
    assert gains.passes(Arm(16)) == 0.5 and gains.passes(Arm(16, True)) == 0.8 * 0.5
    assert gains.passes(Arm(8)) == 0.5 + 4 * (1 / 8 - 1 / 16) and gains.passes(Arm(64)) == 0.5 + 4 * (1 / 64 - 1 / 16)
    gains.latest[Arm(16)] = 0.1
    assert gains.passes(Arm(256)) == 1 / 256, "a pass gains at most its width"
    for passes in (0.2, 0.4, 0.3):
        gains.begin_run()
        gains.latest[Arm(16)] = passes
    gains.begin_run()
    assert not gains.latest and list(gains.measured[Arm(16)]) == [0.1, 0.2, 0.4, 0.3]
    assert gains.passes(Arm(16)) == pytest.approx(0.25), "the median"
    gains.measured[Arm(128)] = deque([0.9])
    assert gains.passes(Arm(64)) == 0.9 + 4 * (1 / 64 - 1 / 128), "from the nearest width"
    gains.latest[Arm(16)] = 0.7
    like = Gains(gains)
    assert like.measured.keys() == gains.measured.keys() and list(like.measured[Arm(16)]) == [0.1, 0.2, 0.4, 0.3, 0.7]
    assert gains.best_seconds() == 0.0
    gains.seconds |= {Arm(16): deque([3.0, 1.0, 2.0]), Arm(64): deque([1.5]), Arm(1): deque([9.0])}
    assert gains.best_seconds() == 1.5
    gains.runs = FORGET - 2
    gains.begin_run()
    assert len(gains.seconds) == 3
    gains.begin_run()
    assert gains.seconds.keys() == {Arm(64)}


def test_tables_forget_the_oldest_and_what_has_no_key() -> None:
    table: OrderedDict[Any, list[int]] = OrderedDict()
    for key in range(1025):
        recall(table, key, (), list).append(key)
    assert len(table) == 1024 and (0, ()) not in table and (1024, ()) in table
    recall(table, 1, (), list).append(7)
    assert table[1, ()] == [1, 7] and next(reversed(table)) == (1, ())
    assert recall(table, None, (), list) == [] and len(table) == 1024


def test_another_batch_size_begins_with_the_nearest(clock: Clock) -> None:
    first, far = gains_of("key", (), 4), gains_of("key", (), 64)
    first.measured[Arm(8)], far.measured[Arm(8)] = deque([0.25]), deque([0.75])
    assert gains_of("key", (), 4) is first and gains_of("key", (1,), 4) is not first
    assert list(gains_of("key", (), 8).measured[Arm(8)]) == [0.25]
    assert list(gains_of("key", (), 60).measured[Arm(8)]) == [0.75]


@pytest.mark.parametrize(
    ("width", "length", "passes", "gained", "judged"),
    [
        (1, 100, 99, 99, False),  # ordinary decoding has nothing to learn
        (8, 100, 1, 50, True),
        (8, 100, 1, 49, False),
        (8, 100, 9, 25, False),  # a trial is 8 passes and a quarter of the width
        (8, 100, 10, 25, True),
        (8, 100, 10, 24, False),
        (8, 100, 24, 24, False),
        (8, 100, 25, 24, True),
        (64, 400, 23, 100, False),
        (64, 400, 24, 100, True),
        (128, 400, 95, 100, False),
        (128, 400, 96, 100, True),
    ],
)
def test_when_an_arm_is_judged(width: int, length: int, passes: int, gained: int, judged: bool) -> None:
    gains = Gains()
    tuner = _tuner.Tuner(None, Costs(), gains, [Arm(1), Arm(width)], False)
    tuner._passes, tuner._front = passes - 1, 7
    assert tuner._note_gain(Arm(width), 7 + gained, length) == judged
    assert gains.latest == ({Arm(width): passes / gained} if judged else {})


@pytest.mark.parametrize(
    ("began", "front", "noted"),
    [(0, 100, True), (0, 75, True), (0, 74, False), (0, 30, False), (1, 100, False)],
)
def test_a_run_is_noted_if_an_arm_did_nearly_all_of_it(clock: Clock, began: int, front: int, noted: bool) -> None:
    gains = Gains()
    tuner = _tuner.Tuner(None, Costs(), gains, [Arm(1), Arm(8)], False)
    tuner._arm, tuner._front = Arm(8), began
    tuner._timer.begin(8, 1)
    clock.now += 3.0
    tuner._note_run(front, 100)
    assert gains.seconds == ({Arm(8): deque([3.0 / front])} if noted else {})
