"""`Auto`, on a clock of our own: a pass takes what the test says, so nothing depends on the machine."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import parallel_decode as pd
from parallel_decode import _costs, _tuner
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
