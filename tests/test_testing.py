"""`check_system` passes what keeps its promises, and names the promise that is broken."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import parallel_decode as pd
from parallel_decode.testing import check_system
from tests.systems import KINDS, Hooked, Rows, chain, problem


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [1, 2, 17])
def test_good_systems_pass(kind: str, length: int) -> None:
    check_system(problem(kind, 3, length, 0).system())


def test_a_chain_passes() -> None:
    check_system(chain())


class CumulativeSum(pd.TriangularSystem):
    """x_l = 1 + sum of x_<l / L with a cache of sums; the subclasses below each break one promise."""

    length = 12

    def __init__(self) -> None:
        self.sums = torch.zeros(3, 13, dtype=torch.float64)

    def initial(self) -> Tensor:
        return torch.ones(3, 12, dtype=torch.float64)

    def read(self, x: Tensor, start: int, stop: int) -> None:
        for position in range(start, stop):
            self.sums[:, position + 1] = self.sums[:, position] + x[:, position]

    def evaluate(self, x: Tensor, window: pd.Window) -> Tensor:
        self.read(x, window.changed_from, window.positions[-1])
        return 1 + self.sums[:, window.slice] / 12


class SeesItself(CumulativeSum):
    def evaluate(self, x: Tensor, window: pd.Window) -> Tensor:
        return super().evaluate(x, window) + (window.positions.stop == 12) * 0.1 * x[:, window.slice]


class StaleCache(CumulativeSum):
    def read(self, x: Tensor, start: int, stop: int) -> None:
        super().read(x, start + (start > 0), stop)


class ReadsTooFar(CumulativeSum):
    def evaluate(self, x: Tensor, window: pd.Window) -> Tensor:
        return super().evaluate(x, window) + 0 * x[:, window.positions[-1] :].sum(1, keepdim=True)


class LeaksRows(CumulativeSum):
    def evaluate(self, x: Tensor, window: pd.Window) -> Tensor:
        return super().evaluate(x, window) + 0.1 * x[:, :1].mean(0) * (torch.arange(12) > 0)[window.slice]


class IgnoresWhatChanged(CumulativeSum):
    """Takes all before the window for read, but on the first pass and where windows are strided."""

    def evaluate(self, x: Tensor, window: pd.Window) -> Tensor:
        first = window.changed_from == 0 or window.positions.step > 1
        return super().evaluate(x, window if first else window._replace(changed_from=window.positions.start - 1))


class FirstRowLeaks(CumulativeSum):
    def evaluate(self, x: Tensor, window: pd.Window) -> Tensor:
        return (
            super().evaluate(x, window) + 0.1 * (x[:, :1].cumsum(0) - x[:, :1]) * (torch.arange(12) > 0)[window.slice]
        )


class WritesToTheIterate(CumulativeSum):
    def evaluate(self, x: Tensor, window: pd.Window) -> Tensor:
        x[:, 3] += 1
        return super().evaluate(x, window)


class IsRandom(CumulativeSum):
    def evaluate(self, x: Tensor, window: pd.Window) -> Tensor:
        return super().evaluate(x, window) + torch.rand(())


class ChangesItsMind(CumulativeSum):
    def initial(self) -> Tensor:
        return torch.rand(3, 12, dtype=torch.float64)


class WrongWidth(CumulativeSum):
    def evaluate(self, x: Tensor, window: pd.Window) -> Tensor:
        value = super().evaluate(x, window)
        return value if len(window.positions) in (1, 12) else value[:, :1]


def test_a_cache_passes() -> None:
    check_system(CumulativeSum())


class RoundsAnew(CumulativeSum):
    """As kernels whose rounding depends on where in memory their operands are."""

    evaluations = 0

    def evaluate(self, x: Tensor, window: pd.Window) -> Tensor:
        self.evaluations += 1
        y = super().evaluate(x, window)
        return y * (1 + torch.finfo(y.dtype).eps * (self.evaluations % 2))


def test_another_rounding_at_the_second_evaluation_passes() -> None:
    check_system(RoundsAnew())


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (SeesItself, "not triangular: a change at position 0 moves f at position 0"),
        (StaleCache, "windows disagree: over Window.*something else than over everything at position"),
        (ReadsTooFar, "not triangular|windows disagree: .*with nan at and after the last of them"),
        (LeaksRows, "rows leak: .* moves row 0 at position 1"),
        (IgnoresWhatChanged, "windows disagree"),
        (FirstRowLeaks, "rows leak: .* in row 1 moves row 2 at position 1"),
        (WritesToTheIterate, "evaluate wrote to the iterate, at position 3"),
        (IsRandom, "two evaluations of the same iterate differ"),
        (ChangesItsMind, r"initial\(\) differs between two calls"),
        (WrongWidth, "evaluate returned shape"),
    ],
)
def test_each_broken_promise_is_named(broken: Callable[[], pd.TriangularSystem], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_system(broken())


def test_points_for_values_that_mean_something() -> None:
    table = torch.randint(0, 5, (5, 5), generator=torch.Generator().manual_seed(0))  # tokens 0..4 alone are valid

    def f(x: Tensor) -> Tensor:
        return torch.nn.functional.pad(table[x[:, :-1], 2], (1, 0))

    tokens = torch.randint(0, 5, (2, 9), generator=torch.Generator().manual_seed(1))
    check_system(pd.from_function(f, tokens), points=tokens)


class RaggedOffByOne(Rows):
    def evaluate(self, x: Tensor, window: pd.Window) -> Tensor:
        if window.shift is not None:
            window = window._replace(shift=(window.shift - 1).clamp(min=0))
        return super().evaluate(x, window)


class SelectsOthers(Rows):
    def select(self, rows: Tensor) -> Rows:
        return super().select(rows - 1)


@pytest.mark.parametrize(("kind", "message"), [(RaggedOffByOne, "windows disagree"), (SelectsOthers, "select: rows")])
def test_rows_of_their_own_are_tried(kind: type[Rows], message: str) -> None:
    made = problem("tanh", 3, 17, 0)
    with pytest.raises(AssertionError, match=message):
        check_system(kind(made.f, made.guess))


class SelectsOthersOfThoseThatStay(Rows):
    """Right for rows that leave first, wrong for those that leave next."""

    def select(self, rows: Tensor) -> Rows:
        first = len(self.rows) == len(self.guess)
        return type(self)(self.f, self.guess, self.rows[rows] if first else rows, self.sizes)


def test_rows_that_leave_after_others_are_tried() -> None:
    made = problem("tanh", 5, 17, 0)
    with pytest.raises(AssertionError, match=r"select: rows \[3\] alone give something else .* of positions 11 to 17"):
        check_system(SelectsOthersOfThoseThatStay(made.f, made.guess))


# the turn after every pass


def test_good_hooks_pass() -> None:
    for seed in range(3):
        check_system(Hooked(problem("tanh", 3, 17, seed), holds=False))
        check_system(Hooked(problem("integer", 3, 17, seed), guesses=False, holds=False))


class GoesBack(Rows):
    def after_pass(self, x: Tensor, fronts: Tensor) -> Tensor:
        return torch.where(fronts > 9, 5, fronts)


class GoesAhead(Rows):
    def after_pass(self, x: Tensor, fronts: Tensor) -> Tensor:
        return (fronts + 1).clamp(max=self.length - 1)


class WritesToWhatIsFinal(Rows):
    def after_pass(self, x: Tensor, fronts: Tensor) -> Tensor:
        if int(fronts.min()) == 6:
            x[:, 2] += 1
        return fronts


class ForgetsToBeginAnew(Rows):
    """It ends rows at its tenth turn, whatever solve that is in."""

    turns = 0

    def after_pass(self, x: Tensor, fronts: Tensor) -> Tensor:
        self.turns += 1
        if self.turns != 10:
            return fronts
        x[torch.arange(self.length) >= fronts[:, None]] = 0
        return torch.full_like(fronts, self.length)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (GoesBack, "GoesBack.after_pass returned fronts"),
        (GoesAhead, "GoesAhead.after_pass returned fronts"),
        (WritesToWhatIsFinal, "a final value changed, at position 2"),
        (ForgetsToBeginAnew, r"Sequential\(\) ends elsewhere than sequential decoding"),
    ],
)
def test_broken_hooks_are_named(kind: type[Rows], message: str) -> None:
    made = problem("tanh", 3, 17, 0)
    with pytest.raises((AssertionError, ValueError), match=message):
        check_system(kind(made.f, made.guess))


def test_a_system_that_draws_anew_is_tried_for_the_rest() -> None:
    class Draws(IsRandom):
        deterministic = False

    class DrawsAndWrites(Draws):
        def evaluate(self, x: Tensor, window: pd.Window) -> Tensor:
            x[:, 3] += 1
            return super().evaluate(x, window)

    check_system(Draws())
    with pytest.raises(AssertionError, match="evaluate wrote to the iterate, at position 3"):
        check_system(DrawsAndWrites())


def test_points_are_for_one_system() -> None:
    with pytest.raises(ValueError, match="check each layer by itself"):
        check_system(chain(), points=torch.zeros(2, 20))
