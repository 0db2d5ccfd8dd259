"""tol = 0 is the sequential answer bit by bit: signs of zero, denormals, strides, long systems; and one rule for every tolerance."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

import parallel_decode as pd
from parallel_decode._acceptance import _pack, _unpack
from parallel_decode._tolerance import Tolerance, all_finite, bits
from tests.systems import SCHEDULES, every_schedule, shift


def sequential(f: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
    """x_l = f_l(x_<l), one position after the other, without the library."""
    x = torch.zeros_like(like, memory_format=torch.contiguous_format)
    for position in range(like.shape[1]):
        x[:, position] = f(x)[:, position]
    return x


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(bits(a), bits(b))


@dataclass(frozen=True)
class Case:
    """A system whose answer depends on what a comparison of numbers overlooks."""

    name: str
    f: Callable[[Tensor], Tensor]
    guess: Tensor


def _signs(x: Tensor) -> Tensor:
    y = torch.copysign(torch.ones_like(x), shift(x))  # 1 after 0.0, -1 after -0.0
    y[:, 1] = -0.0
    y[:, 3] = -0.0 * (y[:, 2] + 3)
    return y


def _reciprocals(x: Tensor) -> Tensor:
    y = (1 / shift(x)).clamp(-2, 2)
    y[:, ::3] = -0.0
    return y


def _tiny(x: Tensor) -> Tensor:
    smallest = torch.finfo(x.dtype).tiny
    before = shift(x) / smallest
    return smallest * (1.25 + (before > 1.3).to(x) / 4 + (before > 1.45).to(x) / 4)


ZEROS = torch.zeros(2, 9, dtype=torch.float64)
CASES = [
    Case("copysign", _signs, ZEROS),
    Case("reciprocal of zero", _reciprocals, ZEROS),
    Case("differences that are denormal", _tiny, torch.full_like(ZEROS, 1.5 * torch.finfo(torch.float64).tiny)),
]


@pytest.fixture
def flush_denormal() -> Iterator[None]:
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    yield
    torch.set_flush_denormal(False)


@every_schedule
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("secant", [False, True])
def test_what_a_comparison_of_numbers_overlooks(case: Case, schedule: pd.Schedule, secant: bool) -> None:
    if secant:
        schedule = replace(schedule, correction=pd.SecantCorrection())
    solution = pd.solve(pd.from_function(case.f, case.guess), schedule, tol=0)
    assert same_bits(solution.value, sequential(case.f, case.guess))


@every_schedule
def test_a_guess_that_is_right_but_for_the_sign_of_a_zero(schedule: pd.Schedule) -> None:
    """What follows it in the guess fits the wrong sign: no number changes in the first pass."""
    guess = sequential(_signs, ZEROS)
    guess[:, 1], guess[:, 2], guess[:, 3] = 0.0, 1.0, -0.0
    solution = pd.solve(pd.from_function(_signs, ZEROS), schedule, tol=0, initial=guess)
    assert same_bits(solution.value, sequential(_signs, ZEROS))


@every_schedule
def test_flushed_denormals(schedule: pd.Schedule, flush_denormal: None) -> None:
    """Neighbouring numbers then have the difference 0."""
    case = CASES[2]
    solution = pd.solve(pd.from_function(case.f, case.guess), schedule, tol=0)
    assert same_bits(solution.value, sequential(case.f, case.guess))


@pytest.mark.parametrize("schedule", [pd.Sequential(), pd.Jacobi(), pd.Sliding(5), pd.Jacobi(freeze=False)], ids=repr)
def test_strides_of_a_guess_do_not_change_how_sums_round(schedule: pd.Schedule) -> None:
    seen: list[bool] = []

    def f(x: Tensor) -> Tensor:
        seen.append(x.is_contiguous())
        return 1 + shift(x) / 3

    guess = torch.randn(7, 3, generator=torch.Generator().manual_seed(0)).T
    assert not guess.is_contiguous()
    for initial in (None, torch.zeros(7, 3).T, torch.zeros(3, 1).expand(3, 7)):
        pd.solve(pd.from_function(f, guess), schedule, initial=initial)
    assert all(seen)


def test_fronts_beyond_what_float32_holds() -> None:
    """Positions 2^24 and 2^24 + 1 are one number there. The last three follow their neighbours, all others nothing."""
    length = 2**24 + 3

    def f(x: Tensor) -> Tensor:
        y = torch.ones_like(x)
        y[:, -3:] = x[:, -4:-1] + 1
        return y

    solution = pd.solve(pd.from_function(f, torch.zeros(1, length, dtype=torch.int8)), "jacobi", max_passes=8)
    assert solution.value[0, -4:].tolist() == [1, 2, 3, 4]
    assert solution.layers[0].fronts[:, 0].tolist() == [1, length - 2, length - 1, length]
    assert solution.status == (pd.Status.EXACT,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_fronts_and_residuals_travel_unchanged(dtype: torch.dtype) -> None:
    """What a GPU sends to the host at every pass, as one tensor of integers."""
    front = torch.tensor([0, 2**24 + 1, 2**40 + 1])
    residual = torch.tensor([0.1, float("inf"), 3e-30], dtype=torch.float64).to(dtype)
    sent = _pack(front, residual)
    assert sent.dtype == torch.int64 and sent.shape == (2, 3)
    fronts, residuals = _unpack(sent, residual.dtype)
    assert torch.equal(fronts, front) and torch.equal(residuals.to(dtype), residual)


# one rule


@dataclass(frozen=True)
class Rule:
    """Whether a move from `old` to `new`, events of two numbers, is settled."""

    tolerance: Tolerance
    old: tuple[float, float]
    new: tuple[float, float]
    settled: bool


RULES = [
    Rule(Tolerance(0.1), (0.0, 0.0), (0.0, 0.09), True),
    Rule(Tolerance(0.1), (0.0, 0.0), (0.0, 0.11), False),
    Rule(Tolerance(0.1), (0.0, 9.0), (0.9, 9.0), True),  # the maximum over the event counts, of the old value
    Rule(Tolerance(0.1), (0.0, 9.0), (1.1, 9.0), False),
    Rule(Tolerance(0.1), (0.0, -9.0), (0.9, -9.0), True),
    Rule(Tolerance(0.1), (0.0, 0.0), (0.0, 9.0), False),
    Rule(Tolerance(0.1, relative=False), (0.0, 9.0), (0.09, 9.0), True),
    Rule(Tolerance(0.1, relative=False), (0.0, 9.0), (0.11, 9.0), False),
    Rule(Tolerance(0.1, unit=0.0), (0.0, 1e-9), (0.9e-10, 1e-9), True),
    Rule(Tolerance(0.1, unit=0.0), (0.0, 1e-9), (1.1e-10, 1e-9), False),
    Rule(Tolerance(0.1, unit=0.0), (0.0, 0.0), (0.0, 0.0), True),
    Rule(Tolerance(0.0), (0.0, 1.0), (-0.0, 1.0), False),
    Rule(Tolerance(0.0), (0.0, 1.0), (0.0, 1.0), True),
]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_when_a_position_is_settled(rule: Rule) -> None:
    old, new = (
        torch.tensor([[rule.old] * 2], dtype=torch.float64),
        torch.tensor([[rule.old, rule.new]], dtype=torch.float64),
    )
    change, settled = rule.tolerance.compare(new, old)
    assert settled.tolist() == [[True, rule.settled]]
    assert change[0, 1] == max(abs(a - b) for a, b in zip(rule.old, rule.new, strict=True)) and change[0, 0] == 0
    for size in (max(map(abs, rule.old)), 1e3, math.inf):
        assert rule.tolerance.all_settled(new, old, size)[0] == rule.settled


def test_integers_are_settled_where_they_are_equal() -> None:
    old, new = torch.tensor([[[1, 2], [1, 2]]]), torch.tensor([[[1, 2], [1, 9]]])
    change, settled = Tolerance(0.0).compare(new, old)
    assert settled.tolist() == [[True, False]] and change.tolist() == [[0.0, 1.0]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_default_tolerance_and_the_one_that_is_asked_for(dtype: torch.dtype) -> None:
    assert Tolerance.of(None, dtype) == Tolerance(torch.finfo(dtype).eps ** (2 / 3))
    assert Tolerance.of(0.25, dtype, absolute_alone=True) == Tolerance(0.25, relative=False)
    assert Tolerance.of(0, torch.long) == Tolerance.of(None, torch.bool) == Tolerance(0.0)


def test_all_finite() -> None:
    large = torch.full((4,), torch.finfo(torch.float32).max)
    assert all_finite(large), "a sum that overflows is no value that does"
    for bad in (torch.inf, -torch.inf, torch.nan):
        assert not all_finite(torch.tensor([1.0, bad])) and not all_finite(torch.cat([large, torch.tensor([bad])]))
    assert all_finite(torch.tensor([torch.iinfo(torch.long).max] * 2))
    assert not all_finite(torch.tensor([torch.inf, -torch.inf]))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_every_schedule_has_the_same_rule(schedule: pd.Schedule) -> None:
    """x_l = 1000 + x_{l-1} / 2: at tol = 1e-3 a change by about 2 is settled, for every schedule."""
    system = pd.from_function(lambda x: 1000 + shift(x) / 2, torch.zeros(1, 64, dtype=torch.float64))
    if isinstance(schedule, (pd.Jacobi, pd.Sliding)) and getattr(schedule, "width", 1000) == 1000:
        solution = pd.solve(system, schedule, tol=1e-3)
        assert 9 <= solution.passes <= 13
        absolute = pd.solve(system, pd.Jacobi(freeze=False, absolute=True), tol=1e-3)
        assert 19 <= absolute.passes <= 23
    else:
        exact = pd.solve(system, "sequential").value
        assert (pd.solve(system, schedule, tol=1e-3).value - exact).abs().max() <= 8


def test_a_tolerance_however_large_takes_no_infinity() -> None:
    def f(x: Tensor) -> Tensor:
        y = shift(x) * 0 + 1
        y[:, 2] = torch.inf
        return y

    for schedule in SCHEDULES:
        solution = pd.solve(pd.from_function(f, torch.zeros(1, 6, dtype=torch.float64)), schedule, tol=1e308)
        assert solution.status == (pd.Status.NON_FINITE,), schedule
        assert solution.value[0, 2] == torch.inf and solution.value[0, 3:].isnan().all()
