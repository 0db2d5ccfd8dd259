"""The system's turn after every pass: it ends rows, holds rows back and writes guesses, and the answer stays the sequential one."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import parallel_decode as pd
from tests.systems import (
    Caching,
    Hooked,
    Problem,
    RandomCorrection,
    Rows,
    every_schedule,
    problem,
    problems,
    sampled,
    shift,
    watch_finals,
)


@every_schedule
@sampled
@given(problem=problems("linear", "tanh", "event", "integer", "sparse"), seed=st.integers(0, 2**20))
def test_rows_that_end_are_held_back_and_get_guesses(problem: Problem, seed: int, schedule: pd.Schedule) -> None:
    system = Hooked(problem, seed)
    solution = watch_finals(system, schedule, tol=0)
    assert torch.equal(solution.value, system.truth())
    assert solution.passes <= problem.length and set(solution.status) == {pd.Status.EXACT}


@every_schedule
@sampled
@given(problem=problems("linear", "tanh", "event"), seed=st.integers(0, 2**20), secant=st.booleans())
def test_the_same_with_corrections(problem: Problem, seed: int, secant: bool, schedule: pd.Schedule) -> None:
    correction: pd.Correction = pd.SecantCorrection() if secant else RandomCorrection(seed)
    system = Hooked(problem, seed)
    solution = watch_finals(system, replace(schedule, correction=correction), tol=0)
    assert torch.equal(solution.value, system.truth())


@every_schedule
@sampled
@given(problem=problems("overflowing"), seed=st.integers(0, 2**20))
def test_the_same_where_guesses_and_values_overflow(problem: Problem, seed: int, schedule: pd.Schedule) -> None:
    system = Hooked(problem, seed, holds=False)
    solution = pd.solve(system, schedule, tol=0)
    assert torch.equal(solution.value.nan_to_num(3.0), system.truth().nan_to_num(3.0))


@every_schedule
def test_a_system_can_be_solved_again(schedule: pd.Schedule) -> None:
    system = Hooked(problem("integer", 4, 15, 3), 5)
    values = [pd.solve(system, schedule).value for _ in range(3)]
    assert torch.equal(values[0], values[1]) and torch.equal(values[0], values[2])


def test_a_row_that_ends_saves_the_passes_that_it_would_have_taken() -> None:
    """Otherwise all tests of this file could pass with rows that never end."""
    made = problem("integer", 3, 40, 1)
    system = Hooked(made, holds=False, guesses=False)
    ended = (system.truth() == 7).all(0).nonzero()[0, 0].item()
    assert 0 < ended < 39
    assert pd.solve(system, "sequential").passes <= ended < 40


# What each schedule does with a guess


class Told(Rows):
    """After the first pass it writes the answer beyond the fronts."""

    def __init__(self, made: Problem, answer: Tensor) -> None:
        super().__init__(made.f, made.guess)
        self.answer = answer

    def after_pass(self, x: Tensor, fronts: Tensor) -> Tensor:
        beyond = torch.arange(self.length) >= fronts[:, None]
        x[beyond] = self.answer[self.rows][beyond]
        return fronts

    def select(self, rows: Tensor) -> None:  # type: ignore[override]
        return None


@pytest.mark.parametrize(
    ("schedule", "passes"),
    [
        (pd.Sequential(), 20),
        (pd.Jacobi(), 2),
        (pd.Jacobi(freeze=False), 2),
        (pd.GaussSeidelJacobi(5), 5),  # the first block takes two, each other one
        (pd.Sliding(5), 5),
        (pd.JacobiGaussSeidel(4), 4),  # marks of positions that were written to, and of those after them, are gone
    ],
    ids=repr,
)
def test_a_guess_that_is_right_is_accepted_and_one_pass_says_so(schedule: pd.Schedule, passes: int) -> None:
    made = problem("tanh", 2, 20, 4)
    solution = pd.solve(Told(made, made.truth()), schedule, tol=0)
    assert torch.equal(solution.value, made.truth())
    assert abs(solution.passes - passes) <= 1


# What a system may return


@dataclass(frozen=True)
class Returned:
    """What a hook returns at its third turn, of two rows with fronts 2 and 2 (of 6) where 3 and 3 were proposed."""

    what: Any
    message: str


BAD = [
    Returned(torch.tensor([1, 3]), r"returned fronts \[1, 3\] where they were \[2, 2\] before the pass"),
    Returned(torch.tensor([2, 2]), "the slowest row has to move on"),
    Returned(torch.tensor([2, 3]), "the slowest row has to move on"),
    Returned(torch.tensor([4, 3]), r"those given \(\[3, 3\]\), 6 for rows that ended"),
    Returned(torch.tensor([7, 3]), "those given"),
    Returned(torch.tensor([3]), "expected 2 whole numbers on the host"),
    Returned(torch.tensor([3.0, 3.0]), "expected 2 whole numbers on the host"),
    Returned([3, 3], "expected 2 whole numbers on the host"),
    Returned(None, "expected 2 whole numbers on the host"),
]


class Scripted(Rows):
    """At its third turn it returns what the test says."""

    def __init__(self, what: Any) -> None:
        super().__init__(lambda x: 1 + shift(x), torch.zeros(2, 6, dtype=torch.float64))
        self.what, self.turns = what, 0

    def after_pass(self, x: Tensor, fronts: Tensor) -> Tensor:
        self.turns += 1
        return self.what if self.turns == 3 else fronts


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: str(bad.what))
@pytest.mark.parametrize("schedule", [pd.Sequential(), pd.Jacobi(), pd.Jacobi(freeze=False)], ids=repr)
def test_fronts_that_break_the_promise_are_refused(bad: Returned, schedule: pd.Schedule) -> None:
    with pytest.raises(ValueError, match=bad.message):
        pd.solve(Scripted(bad.what), schedule, tol=0)


def test_a_hook_that_changes_its_argument_in_place() -> None:
    class InPlace(Rows):
        def after_pass(self, x: Tensor, fronts: Tensor) -> Tensor:
            x[:, 3:] = 9.0
            fronts[fronts >= 3] = self.length
            return fronts

    system = InPlace(lambda x: 1 + shift(x), torch.zeros(2, 8, dtype=torch.float64))
    for schedule in ("sequential", "jacobi", "jacobi-gs", pd.Jacobi(freeze=False)):
        solution = pd.solve(system, schedule, tol=0)
        assert solution.value.tolist() == [[1, 2, 3, 9, 9, 9, 9, 9]] * 2 and solution.passes == 3
        assert solution.layers[0].fronts.tolist() == [[1, 1], [2, 2], [8, 8]]


def test_a_row_that_holds_infinity_beyond_its_end_does_not_stop_strided_windows() -> None:
    """inf - inf is NaN, which is not 0: it counted as written to at every pass, and no mark stayed."""

    class Infinite(Rows):
        def after_pass(self, x: Tensor, fronts: Tensor) -> Tensor:
            x[0, 1:] = torch.inf
            fronts = fronts.clone()
            fronts[0] = self.length
            return fronts

        def select(self, rows: Tensor) -> None:  # type: ignore[override]
            return None

    system = Infinite(lambda x: 1 + shift(x) / 2, torch.zeros(3, 20, dtype=torch.float64))
    solution = pd.solve(system, pd.JacobiGaussSeidel(4), tol=0, max_passes=40)
    assert solution.passes <= 20
    assert solution.status == (pd.Status.NON_FINITE, pd.Status.EXACT, pd.Status.EXACT)


def test_fronts_are_those_that_the_hook_returned() -> None:
    """In records and callbacks, also of rows that left the batch."""

    class Ends(Rows):
        def after_pass(self, x: Tensor, fronts: Tensor) -> Tensor:
            x[self.rows == 1, 2:] = 0.0
            return torch.where((self.rows == 1) & (fronts >= 2), self.length, fronts)

    seen: list[list[int]] = []
    system = Ends(lambda x: 1 + shift(x), torch.zeros(2, 5, dtype=torch.float64))
    solution = pd.solve(system, "sequential", callback=lambda p: seen.append(p.front.tolist()))
    expected = [[1, 1], [2, 5], [3, 5], [4, 5], [5, 5]]
    assert solution.layers[0].fronts.tolist() == seen == expected
    assert system.sizes == [2, 2, 1, 1, 1]
    assert solution.value.tolist() == [[1, 2, 3, 4, 5], [1, 2, 0, 0, 0]]


@every_schedule
@sampled
@given(
    problem=problems("tanh", "event", "integer", "overflowing"),
    seed=st.integers(0, 2**20),
    tol=st.sampled_from([0.0, 0.05]),
)
def test_what_a_system_is_not_asked_to_read_again_has_not_changed(
    problem: Problem, seed: int, tol: float, schedule: pd.Schedule
) -> None:
    overflows = problem.kind == "overflowing"
    system = Caching(problem, seed, holds=not overflows, ends=not overflows)
    solution = pd.solve(system, schedule, tol=0 if problem.kind == "integer" else tol)
    if tol == 0:
        assert torch.equal(solution.value.nan_to_num(3.0), system.truth().nan_to_num(3.0))
