"""The theorems of docs/theory.md, by number, on random systems."""

import math
import random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import parallel_decode as pd
from tests.systems import KINDS, Problem, RandomCorrection, every_schedule, problem, problems, theorem


def iterates(system: pd.TriangularSystem, schedule: pd.Schedule, **options: Any) -> tuple[pd.Solution, list[Tensor]]:
    """The solution, and the iterate after each pass."""
    seen: list[Tensor] = []
    solution = pd.solve(system, schedule, callback=lambda p: seen.append(p.x.clone()), **options)
    return solution, seen


# Theorem 1: exactness


@every_schedule
@theorem
@given(problem=problems(*KINDS))
def test_1_every_schedule_ends_within_L_passes_at_the_sequential_answer(
    problem: Problem, schedule: pd.Schedule
) -> None:
    truth = problem.truth()
    solution, seen = iterates(problem.system(), schedule, tol=0)
    assert torch.equal(solution.value, truth)
    assert solution.passes <= problem.length
    assert set(solution.status) == {pd.Status.EXACT}
    for number, (x, fronts) in enumerate(zip(seen, solution.layers[0].fronts.tolist(), strict=True), start=1):
        for row, front in enumerate(fronts):
            assert torch.equal(x[row, :front], truth[row, :front]), "what is called final is not"
            assert front >= number


@theorem
@given(problem=problems("sparse", "tanh", "integer"))
def test_1_a_system_of_depth_d_is_exact_after_d_plus_1_sweeps_and_known_to_be_after_d_plus_2(problem: Problem) -> None:
    depth = problem.depth()
    solution, seen = iterates(problem.system(), pd.Jacobi(), tol=0)
    assert torch.equal(seen[min(depth + 1, len(seen)) - 1], problem.truth())
    assert solution.passes <= depth + 2


class Mixed(pd.Schedule):
    """A user's schedule: single positions, windows and strides as a seed has it."""

    def __init__(self, seed: int) -> None:
        object.__setattr__(self, "draw", random.Random(seed))

    def window(self, front: int, length: int) -> range:
        width, step = self.draw.choice([1, 2, 5, length]), self.draw.choice([1, 1, 2, 3])
        return range(front, min(length, front + width * step), step)

    draw: random.Random


@theorem
@given(problem=problems(*KINDS), seed=st.integers(0, 2**31 - 1), near=st.booleans())
def test_1_holds_for_any_mixture_of_windows(problem: Problem, seed: int, near: bool) -> None:
    truth = problem.truth()
    guess = torch.where(
        torch.rand(truth.shape, generator=torch.Generator().manual_seed(seed)) < 0.8, truth, problem.guess
    )
    solution, seen = iterates(problem.system(), Mixed(seed), tol=0, initial=guess if near else None)
    assert torch.equal(solution.value, truth)
    for number, (x, fronts) in enumerate(zip(seen, solution.layers[0].fronts.tolist(), strict=True), start=1):
        for row, front in enumerate(fronts):
            assert front >= number and torch.equal(x[row, :front], truth[row, :front])


# Theorem 2: blocks and windows


@theorem
@given(problem=problems("sparse", "tanh", "integer"), block=st.integers(1, 20))
def test_2_gauss_seidel_jacobi_spends_on_a_block_at_most_its_size_and_its_depth_plus_2(
    problem: Problem, block: int
) -> None:
    passes: dict[int, int] = {}

    def count(p: pd.Pass) -> None:
        passes[p.window.positions.start // block] = passes.get(p.window.positions.start // block, 0) + 1

    solution = pd.solve(
        problem.system(), pd.GaussSeidelJacobi(block), tol=0 if problem.kind != "integer" else None, callback=count
    )
    assert torch.equal(solution.value, problem.truth())
    for index, spent in passes.items():
        start, stop = index * block, min(problem.length, (index + 1) * block)
        assert spent <= min(stop - start, problem.depth(start, stop) + 2)


@theorem
@given(problem=problems(*KINDS), block=st.integers(1, 20))
def test_2_jacobi_gauss_seidel_is_exact_within_ceil_L_over_b_rounds(problem: Problem, block: int) -> None:
    rounds = math.ceil(problem.length / block)
    solution = pd.solve(problem.system(), pd.JacobiGaussSeidel(block), tol=0, max_passes=rounds * block)
    assert torch.equal(solution.value, problem.truth())


@theorem
@given(problem=problems(*KINDS), width=st.integers(1, 20))
def test_2_sliding_takes_between_ceil_L_over_W_and_L_passes(problem: Problem, width: int) -> None:
    solution = pd.solve(problem.system(), pd.Sliding(width), tol=0)
    assert math.ceil(problem.length / width) <= solution.passes <= problem.length


# Theorem 3: rate


@theorem
@given(problem=problems("linear", "tanh", "badly scaled"))
def test_3_errors_are_bounded_by_powers_of_C_entry_by_entry(problem: Problem) -> None:
    truth, bound = problem.truth(), None
    _, seen = iterates(problem.system(), pd.Jacobi(freeze=False), tol=0)
    constants = problem.weights.abs()  # tanh has slope at most 1
    bound = (problem.guess - truth).abs()
    for x in seen:
        bound = (constants @ bound[..., None])[..., 0]
        scale = (
            1
            + bound
            + truth.abs().amax(1, keepdim=True)
            + (constants @ truth.abs()[..., None])[..., 0].amax(1, keepdim=True)
        )
        assert ((x - truth).abs() <= bound + 1e-9 * scale).all()


@theorem
@given(c=st.floats(0.01, 3), length=st.integers(2, 14))
def test_3_the_binomial_bound_is_tight(c: float, length: int) -> None:
    def f(x: Tensor) -> Tensor:
        return c * (x.cumsum(1) - x)

    _, seen = iterates(pd.from_function(f, torch.ones(1, length, dtype=torch.float64)), pd.Jacobi(freeze=False), tol=0)
    for t, x in enumerate(seen, start=1):  # the solution is 0, the first error 1 everywhere
        expected = c**t * math.comb(length - 1, t)
        assert x.abs().max().item() == pytest.approx(expected, rel=1e-9, abs=1e-300)


@theorem
@given(scale=st.floats(1e-200, 1e200), length=st.integers(3, 30))
def test_3_convergence_is_not_Q_superlinear(scale: float, length: int) -> None:
    """x_l = 10 x_{l-1}: the error grows tenfold in the first sweep however small it is, though the spectral radius is 0."""

    def f(x: Tensor) -> Tensor:
        return 10 * torch.nn.functional.pad(x, (1, -1))

    guess = torch.zeros(1, length, dtype=torch.float64)
    guess[0, 0] = scale
    solution, seen = iterates(pd.from_function(f, guess), pd.Jacobi(freeze=False), tol=0)
    assert seen[0].abs().max().item() / scale == pytest.approx(10, rel=1e-12)
    assert not solution.value.any()


# Theorem 4: a posteriori


@theorem
@given(problem=problems("linear", "tanh"), passes=st.integers(1, 8))
def test_4_the_verified_residual_bounds_the_error(problem: Problem, passes: int) -> None:
    weights = problem.weights[:1]  # one row: Lipschitz constants belong to the system, not to a row

    def f(x: Tensor) -> Tensor:
        return problem.f(x.expand(len(problem.weights), -1))[:1]

    system = pd.from_function(f, problem.guess[:1], lipschitz=weights[0].abs())
    truth = problem.truth()[:1]
    solution = pd.solve(system, pd.Jacobi(freeze=False), tol=0, max_passes=passes, verify=True)
    (layer,) = solution.layers
    assert layer.residual is not None and layer.bound is not None
    error = (solution.value - truth).abs()
    assert (error <= layer.bound * (1 + 1e-9) + 1e-12 * (1 + truth.abs().max())).all()
    q = float(weights[0].abs().sum(1).max())
    if q < 1:
        assert error.max() <= layer.residual.max() / (1 - q) + 1e-12
    exact = int((layer.residual[0] == 0).long().cumprod(0).sum())
    assert torch.equal(solution.value[0, :exact], truth[0, :exact])


# Theorem 5: corrections


@every_schedule
@theorem
@given(problem=problems("linear", "tanh", "event", "sparse"), seed=st.integers(0, 2**31 - 1))
def test_5_any_causal_correction_keeps_the_front_moving(problem: Problem, seed: int, schedule: pd.Schedule) -> None:
    corrected = type(schedule)(**{**vars(schedule), "correction": RandomCorrection(seed)})
    solution = pd.solve(problem.system(), corrected, tol=0)
    assert torch.equal(solution.value, problem.truth())
    fronts = solution.layers[0].fronts
    assert (fronts >= torch.arange(1, len(fronts) + 1)[:, None]).all()


class Damping(pd.Correction):
    """Not causal: half of the way to f(x), at every position."""

    def correct(self, x: Tensor, fx: Tensor, window: pd.Window, memory: Any) -> tuple[Tensor, Any]:
        return x[:, window.slice] + (fx - x[:, window.slice]) / 2, memory


def test_5_damping_does_not_end_at_the_solution() -> None:
    damped = problem("tanh", 2, 12, 0)
    solution = pd.solve(damped.system(), pd.Jacobi(correction=Damping()), tol=0)
    assert not torch.allclose(solution.value, damped.truth(), atol=1e-3)
