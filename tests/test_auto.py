"""`Auto`, on a clock of our own: a pass takes what the test says, so nothing depends on the machine."""

import json
import os
from collections import OrderedDict
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import parallel_decode as pd
from parallel_decode import _costs, _gains, _timer, _tuner
from parallel_decode._costs import ENOUGH, FORGET, Arm, Costs, recall
from parallel_decode._gains import Count, Gains, gains_of
from tests.systems import Rows, theorem

Cost = Callable[[int], float]
COSTS: dict[str, Cost] = {
    "a pass takes as long as its positions": lambda n: 1.0 * n,
    "a small machine": lambda n: 1.0 if n == 1 else 2.0 + 0.03 * n,
    "a full machine": lambda n: 1.0 if n == 1 else 2.0 + 0.2 * n,
    "an idle machine": lambda n: 1.0 if n == 1 else 1.2,
    "an expensive window": lambda n: 1.0 if n == 1 else 100.0,
}


def fast_singles(n: int) -> float:
    """A CPU whose single positions are fast beside windows."""
    return 1.0 if n == 1 else 2.4 + 0.038 * n


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
    _gains.GAINS.clear()
    return made


def seconds(clock: Clock, system: Timed, schedule: pd.Schedule | str) -> float:
    began = clock.now
    solution = pd.solve(system, schedule, tol=1e-6)
    assert (solution.value - pd.solve(Rows(system.f, system.guess), "sequential").value).abs().max() < 1e-4
    return clock.now - began


@pytest.mark.parametrize("cost", COSTS.values(), ids=COSTS)
@pytest.mark.parametrize("rate", [0.1, 0.3, 0.5])
def test_auto_comes_near_the_best_fixed_width_and_loses_little_on_the_way(
    clock: Clock, cost: Cost, rate: float
) -> None:
    widths = (1, 8, 16, 32, 64, 128, 256)
    best = min(seconds(clock, Timed(clock, cost, rate, 256), pd.Sliding(width)) for width in widths)
    first, *later = times = [seconds(clock, Timed(clock, cost, rate, 256), pd.Auto(secant=False)) for _ in range(12)]
    print(best, times)
    assert sorted(later)[len(later) // 2] <= 1.45 * best
    assert first <= 256 * 1.09 + (2 * cost(8) if cost(8) > 8 else 0), "and the first two passes of the first window"


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
    assert not _costs.COSTS and not _gains.GAINS


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
    costs = Costs(256)
    for _ in range(ENOUGH):
        costs.add(Arm(1), 1, 2.0)
    assert costs.ready and not costs.knows_windows() and costs.sequential() == 2.0
    for seconds in (10.0, 8.0, 12.0):
        costs.add(Arm(64), 64, seconds)
    assert costs.knows_windows() and costs.of(1) == 1.0
    assert costs.of(64) == 4.0, "what disturbs a pass only adds: the smallest of a few counts"
    assert costs.of(32) == 3.25 and costs.of(128) == 5.5  # 2.5 sequential passes, and 1.5 for each 64
    assert costs.of(32, True) == 3.25, "as without, as long as nothing else is known"
    for _ in range(ENOUGH):
        costs.add(Arm(128), 128, 16.0)
        costs.add(Arm(64, True), 64, 10.0)
    assert costs.of(96) == 6.0 and costs.of(128) == 8.0 and costs.of(256) == 13.5
    assert costs.of(64, True) == 5.0 and costs.of(128, True) == 10.0, "a correction is as much dearer as elsewhere"
    small = Costs(256)
    for arm, size, seconds in ((Arm(1), 1, 10.0), (Arm(64), 64, 5.0)):
        for _ in range(ENOUGH):
            small.add(arm, size, seconds)
    assert small.of(32) == pytest.approx(0.4625)  # at most 0.85 of a pass is taken to be fixed
    costs.add(Arm(8, True), 1, 0.1)
    assert costs.sequential() == 2.0, "a window that ends with one position is no sequential pass"


def test_what_no_run_measured_of_late_is_measured_anew() -> None:
    costs = Costs(256)
    for arm, size in ((Arm(1), 1), (Arm(8), 8), (Arm(64), 64)):
        for _ in range(ENOUGH):
            costs.add(arm, size, float(size))
    for _ in range(8):
        costs.begin_run()
    costs.add(Arm(8), 8, 8.0)
    assert len(costs.windows[False].measured()) == 2
    for _ in range(8):
        costs.begin_run()
    assert not costs.ready, "sequential passes too, where windows have taken their place"
    for _ in range(ENOUGH):
        costs.add(Arm(1), 1, 1.0)
    assert [size for size, _ in costs.windows[False].measured()] == [8]
    for run in range(17, 8 * FORGET):
        costs.begin_run()
        if run % FORGET == 1:
            costs.add(Arm(1), 1, 1.0)
            costs.add(Arm(8), 8, 8.0)
    assert costs.ready and costs.windows[False].knows(8), "once in so many runs is enough"
    for seconds in [1.0] + [2.0] * 31:
        costs.add(Arm(8), 8, seconds)
    assert costs.windows[False].seconds(8) == 2.0, "of the last 31"


def test_a_bad_moment_of_the_machine_is_outlived(clock: Clock) -> None:
    """Windows that seemed hopeless in the first run are tried again after few others, and ever more seldom."""
    busy = [True]
    system = Timed(clock, lambda n: 1.0 if n == 1 else (20.0 if busy[0] else 1.2), 0.1, 256)
    assert seconds(clock, system, pd.Auto(secant=False)) > 240
    busy[0] = False
    times = [seconds(clock, system, pd.Auto(secant=False)) for _ in range(16)]
    assert times[0] > 240 and max(times[14:]) < 80


def test_what_is_owed_is_earned_again_before_windows_are_used_again(clock: Clock) -> None:
    """Else every layer begins with a window, which gains little at first, and what sequential passes earn is lost again: for ever."""
    system = Timed(clock, COSTS["a small machine"], 0.1, 256)
    best = min(seconds(clock, system, pd.Auto(secant=False)) for _ in range(8))
    (costs,) = _costs.COSTS.values()
    costs.allowance.settle(165, 0)
    assert costs.allowance.closed and seconds(clock, system, pd.Auto(secant=False)) == pytest.approx(256)
    times = [seconds(clock, system, pd.Auto(secant=False)) for _ in range(24)]
    assert max(times[-4:]) < 1.1 * best < 128 and not costs.allowance.closed


def test_windows_are_found_where_the_smallest_costs_much(clock: Clock) -> None:
    """As on a CPU whose single positions are fast: a window of 8 is worth nothing there, one of 64 is."""
    system = Timed(clock, fast_singles, 0.1, 256)
    times = [seconds(clock, system, pd.Auto(secant=False)) for _ in range(8)]
    assert times[0] < 1.1 * 256 and max(times[-3:]) < 0.8 * 256


def test_one_pass_that_stalls_costs_no_more_than_passes_of_its_size(clock: Clock) -> None:
    system = Timed(clock, COSTS["a small machine"], 0.1, 256)
    for _ in range(8):
        seconds(clock, system, pd.Auto(secant=False))
    usual = system.cost
    system.cost = lambda n: 500.0 if n > 1 and not stalled and not stalled.append(True) else usual(n)  # type: ignore[func-returns-value]
    stalled: list[bool] = []
    assert seconds(clock, system, pd.Auto(secant=False)) < 500 + 128 and stalled
    assert seconds(clock, system, pd.Auto(secant=False)) < 128


def test_windows_are_found_on_a_core_that_others_use(clock: Clock) -> None:
    """Of the first windows two are disturbed, and later every third: that neither makes them seem hopeless nor spends what trials may cost."""
    count = [0]

    def cost(n: int) -> float:
        count[0] += n > 1
        return 1.0 if n == 1 else 2.0 + 0.03 * n + 12.0 * (count[0] <= 2 or count[0] % 3 == 0)

    times = [seconds(clock, Timed(clock, cost, 0.1, 256), pd.Auto(secant=False)) for _ in range(12)]
    assert max(times[:2]) < 1.15 * 256 and max(times[-3:]) < 0.8 * 256


def test_windows_lose_no_more_in_a_layer_than_they_take_to_begin_and_promised_to_gain(clock: Clock) -> None:
    system = Timed(clock, lambda n: 1.0 if n == 1 else 2.0 + 0.05 * n, 0.1, 256)
    *_, last = (seconds(clock, system, pd.Auto(secant=False)) for _ in range(8))
    system.f = lambda x: system.guess + torch.sin(2 * before(x, 1))  # now it is hard
    hard = seconds(clock, system, pd.Auto(secant=False))
    begins = _gains.TURN * (system.cost(64) - 1)
    assert last < 220 and 256 < hard < 1.1 * (256 + 256 - last + begins)
    assert not next(iter(_costs.COSTS.values())).allowance.closed


def decode(tuner: _tuner.Tuner, clock: Clock, length: int, cost: Cost, gained: list[int]) -> float:
    """The time of a layer of which pass number i gains `gained[i]` positions, if it is a window's."""
    front = passes = 0
    began = clock.now
    while front < length:
        size = len(tuner.window(front, length))
        clock.now += cost(size)
        front += 1 if size == 1 else min(gained[passes], size)
        passes += 1
    tuner.finish(front, length)
    return clock.now - began


def test_windows_that_begin_slowly_are_not_broken_off(clock: Clock) -> None:
    """A window of 128 gains 1 for 6 to 13 passes and 13 from then on: it falls behind by up to 80 sequential passes, and is a quarter faster in the end."""
    table, gains, times = Costs(256), Gains(), []
    for run in range(40):
        table.begin_run()
        gains.begin_run()
        tuner = _tuner.Tuner(None, table, gains, [Arm(1), Arm(128)], False)
        gains_of_passes = [1] * (6 + 5 * run % 8) + [13] * 256
        times.append(decode(tuner, clock, 256, fast_singles, gains_of_passes))
    print(times)
    assert times[0] < 1.1 * 256 and sorted(times[20:])[10] < 0.85 * 256


def test_passes_that_are_timed_together_count_as_they_would_alone(clock: Clock) -> None:
    """On a core that others use their mean, beside the least of single windows, would let windows seem to cost half."""
    timer = _timer.Timer()
    timer.begin(1, 32)
    for lap in range(32):
        clock.now += 21.0 if lap % 5 == 0 else 1.0  # others had their turn
        if lap < 31:
            timer.lap()
    assert timer.left == 0 and timer.each(queued=False) == 1.0
    assert timer.each(queued=True) == (7 * 21 + 25) / 32, "on a GPU nothing is known of single ones"


def test_where_every_pass_settles_its_window_the_widest_is_tried(clock: Clock) -> None:
    """The law would have it that the front cannot move so far, and that wider windows gain slowly at first."""
    system = Timed(clock, lambda n: 1.0 if n == 1 else 2.0 + 0.15 * n, 0.0, 256)
    times = [seconds(clock, system, pd.Auto(secant=False)) for _ in range(12)]
    assert sorted(times)[6] < 1.1 * seconds(clock, system, "jacobi")


def test_passes_for_a_position_by_what_was_counted_and_by_the_law() -> None:
    gains = Gains()
    assert gains.passes(Arm(1)) == 1.0 and gains.proven(Arm(1))
    assert gains.passes(Arm(8)) == pytest.approx(0.02 + 6 / 8) and not gains.proven(Arm(8))
    assert gains.passes(Arm(8, True)) == pytest.approx(0.8 * 0.77)
    for _ in range(12):
        gains.add(Arm(16), Count(1, 2, 16))
    assert gains.proven(Arm(16)), "12 passes are a trial of 16 positions"
    assert gains.passes(Arm(16)) == 0.5 and gains.passes(Arm(16, True)) == pytest.approx(0.4)
    law = {w: 0.02 + 6 / w for w in (8, 16, 64, 256)}
    assert gains.passes(Arm(8)) == pytest.approx(0.5 + law[8] - law[16]), "less than 0.5 * law[8] / law[16]"
    assert gains.passes(Arm(256)) == pytest.approx(0.5 * law[256] / law[16])
    for _ in range(4):
        gains.add(Arm(64), Count(1, 16, 60))
    assert gains.proven(Arm(64)), "it moved by its own width"
    assert gains.passes(Arm(64)) == 1 / 16 and gains.size(Arm(64), 256) == 60 and gains.size(Arm(64), 40) == 40
    assert gains.size(Arm(128), 256) == 128 - 32 and gains.size(Arm(128), 128) == 64
    gains.add(Arm(32), Count(1, 1, 32))
    expected = 0.5 * 16 / 32  # on the line through the two nearest it would be less than where c is 0
    assert gains.passes(Arm(32)) == pytest.approx((1 + 6) / (1 + 6 / expected)), "the law counts for six passes"
    for _ in range(30):
        gains.add(Arm(256), Count(1, 256, 256))
    assert gains.passes(Arm(256)) == 1 / 256


def test_two_widths_tell_both_numbers_of_the_law() -> None:
    gains, law = Gains(), {w: 0.1 + 6 / w for w in (16, 32, 64, 256)}
    for width in (16, 32):
        gains.counts[Arm(width)] = Count(40.0, 40.0 / law[width], 40.0 * width)
    assert gains.expected(Arm(64)) == pytest.approx(law[64]) and gains.expected(Arm(256)) == pytest.approx(law[256])
    gains.counts[Arm(32)] = Count(40.0, 40.0 / 0.6, 40.0)
    assert gains.expected(Arm(64)) == 0.6, "a wider window is no worse"


def test_what_was_long_ago_counts_for_less() -> None:
    gains = Gains()
    for _ in range(200):
        gains.add(Arm(8), Count(1, 2, 8))
    gains.begin_run()
    assert gains.counts[Arm(8)] == pytest.approx((64, 128, 512))
    runs = 0
    while gains.proven(Arm(8)) and runs < 1000:
        gains.begin_run()
        runs += 1
    assert 100 < runs < 1000, "it is tried again some day"


def test_after_a_trial_that_was_broken_off_the_next_has_to_be_worth_more() -> None:
    gains = Gains()
    gains.broken_off(3)
    assert gains.turn == _gains.TURN, "that was too short to tell"
    gains.broken_off(20)
    assert gains.turn == Gains(gains).turn == 40
    for _ in range(1000):
        gains.begin_run()
    assert gains.turn == pytest.approx(_gains.TURN, abs=0.01), "some day it is tried again"


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
    first.add(Arm(8), Count(1, 4, 8))
    far.add(Arm(8), Count(1, 1, 8))
    assert gains_of("key", (), 4) is first and gains_of("key", (1,), 4) is not first
    assert gains_of("key", (), 8).counts == first.counts and gains_of("key", (), 60).counts == far.counts
    gains_of("key", (), 8).add(Arm(8), Count(1, 1, 8))
    assert first.counts[Arm(8)].passes == 1, "from there on they go their own ways"


# what may be lost


POOR = st.just([1]) | st.lists(st.integers(1, 2), min_size=1, max_size=4)


@settings(theorem, max_examples=150)
@example(costs=[1.5, 1.0, 1.0, 1.5, 3.0, 4.0], gains=[[1]] * 6, collapses=False, layers=1)  # cheap, and no gain
@example(costs=[1.5, 1.0, 1.0, 1.5, 3.0, 4.0], gains=[[6]] * 6, collapses=True, layers=4)  # good, until it is not
@example(costs=[1.5, 2.0, 5.0, 1.0, 1.0, 1.0], gains=[[1, 2], [1], [1, 2], [1], [1], [1]], collapses=False, layers=3)
@example(costs=[1.5, 1.75, 0.625, 2.75, 1, 1], gains=[[1], [5, 8], [1], [1], [1], [1]], collapses=True, layers=2)
@given(
    costs=st.lists(st.floats(0.5, 6), min_size=6, max_size=6),
    gains=st.lists(POOR | st.lists(st.integers(1, 12), min_size=1, max_size=6), min_size=6, max_size=6),
    collapses=st.booleans(),
    layers=st.integers(1, 4),
)
def test_no_costs_and_no_gains_make_it_lose_more_than_it_is_allowed(
    costs: list[float], gains: list[list[int]], collapses: bool, layers: int
) -> None:
    """Whatever windows cost and gain, and though they gain nothing from the fifth run on, all of it takes sequential decoding's time, 2% of that, and some passes."""
    length, widths, clock = 256, (8, 16, 32, 64, 128, 256), Clock()
    table, known = Costs(length), [Gains() for _ in range(layers)]
    arms = [Arm(1), *(Arm(w) for w in widths), *(Arm(w, True) for w in widths)]
    sizes = [sum(costs[: i + 1]) for i in range(6)]  # rising, by width
    taken = 0.0
    with patch("time.perf_counter", clock):
        for run in range(12):
            if collapses and run == 4:
                taken, clock.now = 0.0, 0.0  # what was gained before does not count
            for layer in range(layers):
                table.begin_run()
                known[layer].begin_run()
                tuner = _tuner.Tuner(None, table, known[layer], arms, False)
                front = passes = 0
                while front < length:
                    window = tuner.window(front, length)
                    index = next(i for i, w in enumerate(widths) if w >= len(window))
                    clock.now += 1.0 if len(window) == 1 else sizes[index]
                    pattern = [1] if collapses and run >= 4 else gains[index]
                    front += 1 if len(window) == 1 else min(pattern[passes % len(pattern)], len(window))
                    passes += 1
                tuner.finish(front, length)
                taken += length
    allowance = table.allowance
    dearest = 2 * max(sizes)  # what the pass cost that ended a trial, and a first pass of which nothing was known
    assert clock.now <= taken * (1 + allowance.share) + allowance.most + max(allowance.free, allowance.most) + dearest


def test_a_good_width_is_not_missed_for_one_slow_first_pass(clock: Clock) -> None:
    """As on a GPU that loads kernels: the first pass of each width takes as long as a layer."""
    seen: set[int] = set()

    def cost(n: int) -> float:
        first = n.bit_length() not in seen
        seen.add(n.bit_length())
        return 8.0 if first and n > 1 else 1.0 if n == 1 else 1.2

    system = Timed(clock, cost, 0.1, 256)
    times = [seconds(clock, system, pd.Auto(secant=False)) for _ in range(6)]
    assert times[0] < 1.05 * 256 and times[-1] < 0.1 * 256
