"""The secant correction."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import parallel_decode as pd
from parallel_decode.adapters.tarflow import digits
from tests.systems import SCHEDULES, Problem, problem, problems, theorem

SECANTS = (
    pd.SecantCorrection(),
    pd.SecantCorrection(lags=(2,), order=1, memory=1, ridge=1e-6),
    pd.SecantCorrection(lags=(1, 3, 40), order=20, ridge=1e-3),
)


def with_secant(schedule: pd.Schedule, secant: pd.Correction | None = SECANTS[0]) -> pd.Schedule:
    return replace(schedule, correction=secant)


@pytest.mark.parametrize("schedule", [s for s in SCHEDULES if s.freezes], ids=repr)
@theorem
@given(problem=problems("linear", "tanh", "event", "sparse", "badly scaled"), secant=st.sampled_from(SECANTS))
def test_every_schedule_ends_within_L_passes_at_the_sequential_answer(
    problem: Problem, secant: pd.SecantCorrection, schedule: pd.Schedule
) -> None:
    solution = pd.solve(problem.system(), with_secant(schedule, secant), tol=0)
    assert torch.equal(solution.value, problem.truth())
    fronts = solution.layers[0].fronts
    assert len(fronts) <= problem.length
    assert (fronts >= torch.arange(1, len(fronts) + 1)[:, None]).all()


@theorem
@given(problem=problems("overflowing"), secant=st.sampled_from(SECANTS))
def test_values_that_overflow_spoil_nothing(problem: Problem, secant: pd.SecantCorrection) -> None:
    solution = pd.solve(problem.system(), pd.Jacobi(correction=secant), tol=0)
    truth = problem.truth()
    assert torch.equal(solution.value.nan_to_num(), truth.nan_to_num())
    assert torch.equal(solution.value.isfinite(), truth.isfinite())


def lagged(jacobian: Tensor, lags: tuple[int, ...], length: int, batch: int = 2) -> pd.TriangularSystem:
    """x_l = b_l + sum_k J x_{l-k}, J of shape (E, E)."""
    g = torch.Generator().manual_seed(0)
    b = torch.randn(batch, length, len(jacobian), generator=g, dtype=jacobian.dtype)

    def f(x: Tensor) -> Tensor:
        return b + sum(torch.nn.functional.pad(x, (0, 0, lag, -lag)) @ jacobian.mT for lag in lags)

    return pd.from_function(f, torch.zeros_like(b))


@pytest.mark.parametrize("lags", [(1,), (3,), (1, 16)])
def test_a_linear_system_of_these_lags_is_solved_once_its_jacobian_is_known(lags: tuple[int, ...]) -> None:
    jacobian = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64))[0]
    system = lagged(jacobian * 0.9 / len(lags), lags, 256)
    secant = pd.SecantCorrection(lags=lags, order=256, ridge=1e-9)
    plain, corrected = (pd.solve(system, pd.Jacobi(correction=c), tol=1e-6) for c in (None, secant))
    exact = pd.solve(system, "sequential").value
    assert (corrected.value - exact).abs().max() < 1e-5
    assert corrected.passes <= 6 < plain.passes / 5


def test_links_of_neighbours_are_the_sequential_recurrence() -> None:
    """With the Jacobian of the memory, the new values are those of c_l = r_l + sum_k J_k c_{l-k}, one by one."""
    g = torch.Generator().manual_seed(0)
    x, fx, again = (torch.randn(3, 12, 2, generator=g, dtype=torch.float64) for _ in range(3))
    window, lags = pd.Window(range(2, 12), 0), (1, 3)
    secant = pd.SecantCorrection(lags=lags, order=12)
    first, memory = secant.correct(x, fx[:, 2:], window, None)
    assert torch.equal(first, fx[:, 2:]), "nothing is known on the first pass"
    y = torch.randn(3, 12, 2, generator=g, dtype=torch.float64)
    new, memory = secant.correct(y, again[:, 2:], window, memory)
    assert memory is not None
    products = memory[1]
    jacobian = torch.linalg.solve(
        products[:, :4, :4] + secant.ridge / 2 * torch.eye(4, dtype=torch.float64), products[:, :4, 4:]
    )
    change = torch.zeros_like(x)
    for position in window.positions:
        change[:, position] = again[:, position] - y[:, position]
        for j, lag in zip(jacobian.split(2, 1), lags, strict=True):
            if position >= lag:
                change[:, position] += (change[:, position - lag, None] @ j)[:, 0]
    torch.testing.assert_close(new, (y + change)[:, 2:])


def test_the_jacobian_of_a_linear_system_is_found_and_shrunk_by_the_ridge() -> None:
    """One pair, of which dX and dF are known: J = dF dX / (dX^2 + ridge (dX^2 + dF^2))."""
    secant = pd.SecantCorrection(ridge=0.5)
    window = pd.Window(range(1, 3), 0)
    x = torch.zeros(1, 3, dtype=torch.float64)
    _, memory = secant.correct(x, torch.zeros(1, 2, dtype=torch.float64), window, None)
    x[0, 0] = 1.0
    new, _ = secant.correct(x, torch.tensor([[2.0, 0.0]], dtype=torch.float64), window, memory)
    slope = 2 / (1 + 0.5 * (1 + 4))
    torch.testing.assert_close(new, torch.tensor([[2.0, slope * 2.0]], dtype=torch.float64))


def test_lags_beyond_the_end_say_nothing() -> None:
    system = lagged(torch.eye(2, dtype=torch.float64) * 0.9, (1,), 12)
    passes = [
        pd.solve(system, pd.Jacobi(correction=pd.SecantCorrection(lags=lags)), tol=1e-6).passes
        for lags in ((1,), (12, 1), (12,))
    ]
    assert passes[0] == passes[1] < passes[2] == 12


@pytest.mark.parametrize("schedule", [pd.Jacobi(), pd.Sliding(64)], ids=repr)
def test_a_trained_flow_takes_fewer_passes(schedule: pd.Schedule) -> None:
    flow = digits()
    labels = torch.arange(2)
    z = torch.randn(2, 256, 1, generator=torch.Generator().manual_seed(0))
    truth = pd.solve(flow.system(z, y=labels), "sequential").value
    plain, secant = (pd.solve(flow.system(z, y=labels), s, tol=1e-3) for s in (schedule, with_secant(schedule)))
    assert secant.passes < 0.95 * plain.passes
    assert all(s.passes <= p.passes + 2 for s, p in zip(secant.layers, plain.layers, strict=True))
    assert (secant.value - truth).abs().max() < 0.02


@pytest.mark.parametrize("schedule", [pd.Jacobi(), pd.Sliding(5), pd.JacobiGaussSeidel(3)], ids=repr)
def test_a_row_alone_is_the_row_in_the_batch(schedule: pd.Schedule) -> None:
    batch = problem("event", 4, 14, 3)

    def iterates(system: pd.TriangularSystem) -> list[Tensor]:
        seen: list[Tensor] = []
        pd.solve(system, with_secant(schedule), tol=0, max_passes=3, callback=lambda p: seen.append(p.x.clone()))
        return seen

    together = iterates(batch.system())
    for row in range(4):

        def f(x: Tensor, row: int = row) -> Tensor:
            return batch.f(x.expand(4, -1, -1))[row : row + 1]

        alone = iterates(pd.from_function(f, batch.guess[row : row + 1]))
        for one, many in zip(alone, together, strict=True):
            torch.testing.assert_close(one[0], many[row])


def test_rows_may_leave_the_batch_between_two_passes() -> None:
    g = torch.Generator().manual_seed(0)
    passes = [(torch.randn(4, 9, 2, generator=g), torch.randn(4, 9, 2, generator=g)) for _ in range(4)]
    keep = torch.tensor([2, 0])
    secant, window = pd.SecantCorrection(), pd.Window.full(9)
    memory = kept = None
    for number, (x, fx) in enumerate(passes):
        new, memory = secant.correct(x, fx, window, memory)
        if number < 2:
            assert memory is not None
            kept = tuple(m[keep].clone() for m in memory)
        else:
            new_kept, kept = secant.correct(x[keep], fx[keep], window, kept)
            torch.testing.assert_close(new_kept, new[keep])


def test_rows_with_windows_of_their_own() -> None:
    """Every row as it would be with the others' windows where its own are."""
    g = torch.Generator().manual_seed(0)
    shifts = [torch.tensor([0, 2, 5]), torch.tensor([1, 4, 5]), torch.tensor([3, 5, 6])]
    secant = pd.SecantCorrection(lags=(1, 2))
    memory: Any = None
    alone: list[Any] = [None] * 3
    for shift in shifts:
        x, fx = torch.randn(3, 12, 2, generator=g), torch.randn(3, 6, 2, generator=g)
        new, memory = secant.correct(x, fx, pd.Window(range(6), 0, shift), memory)
        for row, by in enumerate(shift.tolist()):
            one, alone[row] = secant.correct(
                x[row : row + 1], fx[row : row + 1], pd.Window(range(by, by + 6), 0), alone[row]
            )
            torch.testing.assert_close(new[row], one[0])


def test_nothing_is_added_where_nothing_before_moved() -> None:
    g = torch.Generator().manual_seed(0)
    window, memory = pd.Window.full(10), None
    secant = pd.SecantCorrection(lags=(1, 2), order=10, ridge=1e-6)
    for _ in range(5):
        x = torch.randn(2, 10, 3, generator=g) * 1e6
        fx = torch.randn(2, 10, 3, generator=g)
        fx[:, :4] = x[:, :4]
        fx[0, 8], fx[1, 7] = math.inf, math.nan
        new, memory = secant.correct(x, fx, window, memory)
        assert torch.equal(new[:, :5], fx[:, :5])
        assert torch.equal(new.isfinite(), fx.isfinite())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_any_precision(dtype: torch.dtype) -> None:
    system = lagged(torch.tensor([[0.5, 0.25], [-0.25, 0.5]], dtype=torch.float64), (1,), 40)

    def f(x: Tensor) -> Tensor:
        return system.evaluate(x.double(), pd.Window.full(40)).to(dtype)

    small = pd.from_function(f, system.initial().to(dtype))
    exact = pd.solve(small, "sequential").value
    solution = pd.solve(small, with_secant(pd.Jacobi()), tol=0)
    assert solution.value.dtype == dtype
    assert torch.equal(solution.value, exact)


def test_under_autocast() -> None:
    system = lagged(torch.eye(2) / 2, (1,), 20)
    expected = pd.solve(system, with_secant(pd.Jacobi()), tol=0, max_passes=3).value
    secant, window = pd.SecantCorrection(), pd.Window.full(20)
    memory, x = None, system.initial()
    for _ in range(3):
        fx = system.evaluate(x, window)
        with torch.autocast("cpu", torch.bfloat16):
            x, memory = secant.correct(x, fx, window, memory)
    torch.testing.assert_close(x, expected)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lags": 1}, TypeError, "lags is 1"),
        ({"lags": ()}, ValueError, "one or more"),
        ({"lags": (0,)}, ValueError, "at least 1"),
        ({"lags": (1, 1)}, ValueError, "different"),
        ({"lags": (1.5,)}, TypeError, "1.5"),
        ({"order": True}, TypeError, "order True"),
        ({"order": 0}, ValueError, "order is 0"),
        ({"memory": 0.5}, TypeError, "memory 0.5"),
        ({"memory": 0}, ValueError, "memory 0"),
        ({"ridge": 0.0}, ValueError, "ridge is 0.0"),
        ({"ridge": math.nan}, ValueError, "ridge is nan"),
        ({"ridge": -1.0}, ValueError, "ridge is -1.0"),
        ({"ridge": True}, TypeError, "ridge is True"),
        ({"order": -1}, ValueError, "order is -1"),
    ],
)
def test_options_are_checked(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pd.SecantCorrection(**options)
