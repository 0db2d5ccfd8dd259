"""`solve`: statuses, records, options, guesses, non-finite values, layers, and what bad input is told."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import parallel_decode as pd
from tests.systems import (
    Problem,
    RandomCorrection,
    Rows,
    chain,
    every_schedule,
    halves,
    problem,
    problems,
    shift,
    theorem,
    with_guess,
)

# tolerance, status, records


def test_the_default_tolerance_is_the_machine_epsilon_to_the_power_of_two_thirds() -> None:
    for dtype in (torch.float32, torch.float64):
        tol = torch.finfo(dtype).eps ** (2 / 3)
        default, given_tol = pd.solve(halves(dtype=dtype)), pd.solve(halves(dtype=dtype), tol=tol)
        assert torch.equal(default.value, given_tol.value) and default.passes == given_tol.passes < 40
        assert set(default.status) == {pd.Status.WITHIN_TOLERANCE}


def test_tolerance_is_absolute_plus_relative_in_the_maximum_norm() -> None:
    scale = torch.tensor([1.0, 1e6], dtype=torch.float64)  # one event: its small entry rides on its large one

    def f(x: Tensor) -> Tensor:
        return scale * (1 + torch.nn.functional.pad(x / scale, (0, 0, 1, -1)) / 2)

    system = pd.from_function(f, torch.zeros(1, 60, 2, dtype=torch.float64))
    layer = pd.solve(system, tol=1e-6, verify=True).layers[0]
    assert layer.residual is not None
    assert 1e-3 < layer.residual.max() <= 1e-6 * (1 + 2e6)


@pytest.mark.parametrize("tol", [1e-2, 1e-4, 1e-8])
@pytest.mark.parametrize(
    "schedule", [pd.Jacobi(), pd.GaussSeidelJacobi(8), pd.Sliding(7), pd.JacobiGaussSeidel(3)], ids=repr
)
def test_the_deviation_follows_the_tolerance(schedule: pd.Schedule, tol: float) -> None:
    exact = pd.solve(halves(), "sequential").value
    loose = pd.solve(halves(), schedule, tol=tol)
    assert (loose.value - exact).abs().max() <= 6 * tol  # (I - C)^-1 has row sums below 2, the scale is at most 3
    assert loose.passes <= pd.solve(halves(), schedule, tol=0).passes


def test_rows_settle_on_their_own() -> None:
    rate = torch.tensor([[0.0], [0.3], [0.9]], dtype=torch.float64)
    system = pd.from_function(lambda x: 1 + rate * shift(x), torch.zeros(3, 60, dtype=torch.float64))
    fronts = pd.solve(system, tol=1e-6).layers[0].fronts
    finished = (fronts < 60).sum(0)
    assert finished[0] < finished[1] < finished[2]


def test_records_of_a_layer() -> None:
    (layer,) = pd.solve(halves(), pd.Sliding(8), tol=0).layers
    assert layer.fronts.shape == layer.residuals.shape == (layer.passes, 2)
    assert layer.fronts[-1].tolist() == [40, 40]
    assert layer.positions == sum(min(8, 40 - front) for front in [0, *layer.fronts[:-1, 0].tolist()])
    assert layer.seconds > 0 and layer.schedule == pd.Sliding(8)
    assert layer.residuals[:-1].isfinite().all()  # the last pass has a single position
    (sequential,) = pd.solve(halves(), "sequential").layers
    assert sequential.fronts[:, 0].tolist() == list(range(1, 41)) and sequential.residuals.isnan().all()
    assert sequential.positions == 40


def test_the_pass_limit_is_told_for_the_rows_that_met_it() -> None:
    rate = torch.tensor([[0.0], [0.9]], dtype=torch.float64)
    system = pd.from_function(lambda x: 1 + rate * shift(x), torch.zeros(2, 60, dtype=torch.float64))
    solution = pd.solve(system, tol=0, max_passes=10)
    assert solution.status == (pd.Status.EXACT, pd.Status.PASS_LIMIT) and solution.passes == 10
    with pytest.raises(pd.SolveError, match=r"rows 1: pass limit: .*raise it"):
        solution.raise_for_status()
    assert pd.solve(system).raise_for_status().passes > 10


def test_verify_measures_the_residual_of_the_value() -> None:
    loose = pd.solve(halves(), tol=1e-3, verify=True).layers[0]
    exact = pd.solve(halves(), tol=0, verify=True).layers[0]
    assert loose.residual is not None and 0 < loose.residual.max() <= 3e-3 and loose.bound is None
    assert exact.residual is not None and exact.residual.max() == 0
    solution = pd.solve(chain(), tol=1e-3, verify=True)
    largest = torch.stack([layer.residual for layer in solution.layers if layer.residual is not None]).amax((0, 2))
    assert solution.residual is not None and torch.equal(solution.residual, largest)
    assert pd.solve(chain()).residual is None


def test_callback_and_progress(capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[pd.Pass] = []
    solution = pd.solve(halves(), pd.Sliding(8), tol=0, callback=seen.append, progress=True)
    assert [p.number for p in seen] == list(range(1, solution.passes + 1))
    assert torch.equal(torch.stack([p.front for p in seen]), solution.layers[0].fronts)
    residuals = torch.stack([p.residual for p in seen])
    assert torch.equal(residuals.nan_to_num(-1), solution.layers[0].residuals.nan_to_num(-1))
    assert "40/40" in capsys.readouterr().err
    layers = pd.solve(chain(), progress=True).layers
    shown = capsys.readouterr().err
    assert all(f"layer {index}/{len(layers)}" in shown for index in range(1, len(layers) + 1))


def test_seconds_are_those_of_the_solve(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([10.0, 13.0])
    monkeypatch.setattr("parallel_decode.solver.time.perf_counter", lambda: next(times))
    assert pd.solve(halves()).layers[0].seconds == 3.0


def test_the_error_names_the_first_rows_of_many() -> None:
    status = (pd.Status.EXACT,) + (pd.Status.PASS_LIMIT,) * 8 + (pd.Status.NON_FINITE,) * 9
    with pytest.raises(
        pd.SolveError, match=r"^rows 1, 2, 3, 4, 5, 6, 7, 8: pass limit.*; rows 9, .*, 16 and 1 more: non-finite"
    ):
        pd.Solution(torch.zeros(18, 2), status, ()).raise_for_status()
    fine = pd.Solution(torch.zeros(2, 2), (pd.Status.SAMPLE, pd.Status.WITHIN_TOLERANCE), ())
    assert fine.raise_for_status() is fine


# guesses


@every_schedule
def test_a_guess_changes_the_passes_and_not_the_answer(schedule: pd.Schedule) -> None:
    tanh = problem("tanh", 3, 12, 1)
    truth = tanh.truth()
    solved = pd.solve(tanh.system(), schedule, tol=0, initial=truth)
    assert torch.equal(solved.value, truth)
    if isinstance(schedule, pd.Jacobi):
        assert solved.passes == 1
    kept = tanh.guess.clone()
    pd.solve(tanh.system(), schedule)
    assert torch.equal(tanh.guess, kept), "the caller's tensor was written to"


def test_a_guess_that_is_not_finite_is_not_kept() -> None:
    guess = torch.full((1, 8), torch.inf, dtype=torch.float64)
    limited = pd.solve(halves(1, 8), pd.Sliding(2), initial=guess, max_passes=1)
    assert limited.value.isfinite().all() and limited.status == (pd.Status.PASS_LIMIT,)


@pytest.mark.parametrize("schedule", [pd.Jacobi(), pd.Sliding(7), pd.JacobiGaussSeidel(3)], ids=repr)
def test_what_is_final_never_changes(schedule: pd.Schedule) -> None:
    """At a loose tolerance another evaluation would give another value; rows ahead of the others keep theirs."""
    rate = torch.tensor([[0.2], [0.95]], dtype=torch.float64)
    system = pd.from_function(lambda x: 1 + rate * shift(x), torch.zeros(2, 60, dtype=torch.float64))
    final: list[tuple[int, int, Tensor]] = []

    def look(p: pd.Pass) -> None:
        for row, front, values in final:
            assert torch.equal(p.x[row, :front], values)
        final.extend((row, int(front), p.x[row, : int(front)].clone()) for row, front in enumerate(p.front))

    pd.solve(system, schedule, tol=0.05, callback=look)


def test_start_zeros() -> None:
    system = with_guess(problem("linear", 1, 5, 0), 7.0).system()
    seen: list[Tensor] = []
    pd.solve(system, pd.Jacobi(start="zeros"), max_passes=1, callback=lambda p: seen.append(p.x.clone()))
    expected = system.evaluate(torch.zeros(1, 5, dtype=torch.float64), pd.Window.full(5))
    assert torch.equal(seen[0], expected)


# non-finite values


@every_schedule
@theorem
@given(problem=problems("overflowing"))
def test_overflow_ends_as_in_sequential_decoding(problem: Problem, schedule: pd.Schedule) -> None:
    truth = problem.truth()
    solution = pd.solve(problem.system(), schedule, tol=0)
    assert torch.equal(solution.value.nan_to_num(3.0), truth.nan_to_num(3.0))
    for status, row in zip(solution.status, truth, strict=True):
        assert status is (pd.Status.EXACT if row.isfinite().all() else pd.Status.NON_FINITE)
    assert solution.passes <= problem.length


@every_schedule
@theorem
@given(problem=problems("tanh"), seed=st.integers(0, 1000))
def test_infinity_inside_the_tail_does_not_reach_the_front(problem: Problem, seed: int, schedule: pd.Schedule) -> None:
    """0 * inf is NaN: a masked product over a tail that overflows spoils every position, though the solution is finite."""

    def f(x: Tensor) -> Tensor:  # on the solution |x| <= 5: only a guess beyond it overflows
        return problem.f(torch.where(x.abs() > 8, torch.exp(x.abs() * 100), x)).clamp(-5, 5)

    guess = torch.full_like(problem.guess, 50.0)
    guess[0] = torch.nan
    system = pd.from_function(f, guess)
    truth = Problem("", f, guess, problem.weights).truth()
    solution = pd.solve(system, schedule, tol=0)
    assert torch.equal(solution.value, truth) and set(solution.status) == {pd.Status.EXACT}
    fronts = solution.layers[0].fronts
    assert (fronts >= torch.arange(1, len(fronts) + 1)[:, None]).all()


@every_schedule
def test_a_lost_row_leaves_the_others_alone(schedule: pd.Schedule) -> None:
    def f(x: Tensor) -> Tensor:
        y = 1 + shift(x) / 2
        y[1, 5] = torch.inf
        return y

    clean = pd.solve(halves(3), schedule, tol=0)
    solution = pd.solve(pd.from_function(f, torch.zeros(3, 40, dtype=torch.float64)), schedule, tol=0)
    assert solution.status == (pd.Status.EXACT, pd.Status.NON_FINITE, pd.Status.EXACT)
    assert torch.equal(solution.value[::2], clean.value[::2])
    assert solution.value[1, 5] == torch.inf and solution.value[1, 6:].isnan().all()
    assert torch.equal(solution.value[1, :5], clean.value[1, :5])
    assert solution.passes <= clean.passes + 1
    with pytest.raises(pd.SolveError, match="rows 1: non-finite"):
        solution.raise_for_status()


# rows


def uneven(rows: int = 4) -> Rows:
    """Rows that need 1, 2, 3, ... passes: their longest chains have so many links."""
    reach = torch.arange(rows)[:, None]

    def f(x: Tensor) -> Tensor:
        return 1 + torch.where(torch.arange(x.shape[1]) <= reach, shift(x), 0)

    return Rows(f, torch.zeros(rows, 30, dtype=torch.float64))


@pytest.mark.parametrize(
    "schedule", [pd.Jacobi(), pd.Sliding(28), pd.Sliding(20, per_row=True), pd.JacobiGaussSeidel(3)], ids=repr
)
def test_rows_that_are_done_leave_the_batch(schedule: pd.Schedule) -> None:
    system, seen = uneven(), []
    solution = pd.solve(system, schedule, tol=0, callback=lambda p: seen.append(p))
    truth = pd.solve(uneven(), "sequential").value
    assert torch.equal(solution.value, truth) and set(solution.status) == {pd.Status.EXACT}
    assert system.sizes[0] == 4 and system.sizes[-1] < 4 and system.sizes == sorted(system.sizes, reverse=True)
    assert all(p.x.shape == (4, 30) and p.front.shape == (4,) for p in seen)
    fronts = solution.layers[0].fronts
    assert fronts[-1].tolist() == [30] * 4 and (fronts.diff(dim=0) >= 0).all()
    assert torch.equal(pd.solve(system, schedule, tol=0, verify=True).value, truth), "solving spoilt the system"


def test_a_system_that_cannot_let_rows_go_is_asked_once() -> None:
    class Asked(Rows):
        asked = 0

        def select(self, rows: Tensor) -> None:  # type: ignore[override]
            Asked.asked += 1

    solution = pd.solve(Asked(uneven().f, uneven().guess), tol=0)
    assert Asked.asked == 1 and torch.equal(solution.value, pd.solve(uneven(), tol=0).value)


def test_windows_of_their_own_take_fewer_passes() -> None:
    """One row is slow at the start and the other at the end: a common window waits for both."""
    slow = torch.zeros(2, 80, dtype=torch.float64)
    slow[0, :40] = slow[1, 40:] = 0.9

    def f(x: Tensor) -> Tensor:
        return 1 + slow * shift(x)

    own, common = (
        pd.solve(Rows(f, torch.zeros_like(slow)), pd.Sliding(16, per_row=per_row), tol=1e-8)
        for per_row in (True, False)
    )
    assert own.passes < 0.8 * common.passes
    assert (own.value - common.value).abs().max() < 1e-6


def test_a_lost_row_leaves_the_batch() -> None:
    def f(x: Tensor) -> Tensor:
        y = 1 + 0.9 * shift(x)
        y[1, 5] = torch.inf
        return y

    system = Rows(f, torch.zeros(3, 40, dtype=torch.float64))
    for schedule in (pd.Jacobi(), pd.Sliding(8, per_row=True)):
        solution = pd.solve(system, schedule, tol=0)
        assert solution.status == (pd.Status.EXACT, pd.Status.NON_FINITE, pd.Status.EXACT)
        assert solution.value[1, 5] == torch.inf and solution.value[1, 6:].isnan().all()


# layers


@every_schedule
def test_a_chain_of_layers(schedule: pd.Schedule) -> None:
    x = chain().z
    for index in range(3):
        z, x = x if index == 0 else x.flip(1), torch.zeros_like(x)
        for position in range(20):
            x[:, position] = (z + torch.tanh(shift(x)))[:, position]
    solution = pd.solve(chain(), schedule, tol=0)
    assert torch.equal(solution.value, 2 * x)
    assert len(solution.layers) == 3 and solution.passes == sum(layer.passes for layer in solution.layers)


def test_selective_gives_each_layer_its_schedule() -> None:
    solution = pd.solve(chain(), "selective")
    assert [layer.schedule for layer in solution.layers] == [pd.Sequential(), pd.Jacobi(), pd.Jacobi()]
    assert solution.layers[0].passes == 20 > solution.layers[1].passes
    (layer,) = pd.solve(halves(), "selective").layers
    assert layer.schedule == pd.Jacobi()


def test_selective_sejd_is_the_paper_to_the_letter() -> None:
    """tau = 0.5 over the whole batch, from zeros, nothing frozen."""
    solution = pd.solve(chain(), pd.Selective.sejd())
    x = chain().z.clone()
    for index in range(3):
        z = x if index == 0 else x.flip(1)
        x, passes = torch.zeros_like(z), 0
        while True:
            new, passes = z + torch.tanh(shift(x)), passes + 1
            change, x = (new - x).abs().max(), new
            if (index > 0 and change <= 0.5) or passes == 20:
                break
        assert solution.layers[index].passes == passes
    assert torch.equal(solution.value, 2 * x)


def test_a_status_is_the_worst_of_the_layers_and_a_pass_limit_holds_for_each() -> None:
    solution = pd.solve(chain(), pd.Selective(("sequential", pd.Jacobi(tol=1e-3), "sequential")))
    assert set(solution.status) == {pd.Status.WITHIN_TOLERANCE}
    limited = pd.solve(chain(), "jacobi", max_passes=2)
    assert [layer.passes for layer in limited.layers] == [2, 2, 2] and set(limited.status) == {pd.Status.PASS_LIMIT}


def test_a_guess_for_each_layer() -> None:
    values: list[Tensor] = []
    pd.solve(chain(), "jacobi", tol=0, callback=lambda p: values.append(p.x.clone()) if p.front.min() == 20 else None)
    again = pd.solve(chain(), "jacobi", tol=0, initial=[values[0], None, values[2]])
    assert again.layers[0].passes == again.layers[2].passes == 1 < again.layers[1].passes


def test_empty_systems() -> None:
    assert pd.solve(pd.from_function(lambda x: x, torch.zeros(0, 4))).value.shape == (0, 4)
    assert pd.solve(pd.from_function(lambda x: x, torch.zeros(2, 0)), verify=True).status == (pd.Status.EXACT,) * 2


# bad input


class Returns(pd.TriangularSystem):
    """A system that returns something else than it should."""

    length = 4

    def __init__(self, guess: Tensor, value: Tensor) -> None:
        self.guess, self.value = guess, value

    def initial(self) -> Tensor:
        return self.guess

    def evaluate(self, x: Tensor, window: pd.Window) -> Tensor:
        return self.value


class FromTheEnd(pd.Schedule):
    """A schedule that leaves the front out."""

    def window(self, front: int, length: int) -> range:
        return range(length - 1, length)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"schedule": "jacoby"}, ValueError, "schedule is 'jacoby', expected one of 'sequential'"),
        ({"schedule": pd.Jacobi}, TypeError, r"expected a schedule or a name: call it, Jacobi\(...\)"),
        ({"schedule": ["jacobi"]}, TypeError, r"for one for each layer, Selective\(\(...\)\)"),
        ({"schedule": 3}, TypeError, "schedule is 3, expected a schedule or a name"),
        ({"schedule": FromTheEnd()}, ValueError, r"chose range\(39, 40\) with the front at 0 of 40"),
        ({"tol": -1.0}, ValueError, "tol is -1.0, expected a finite number >= 0"),
        ({"tol": math.nan}, ValueError, "tol is nan, expected"),
        ({"tol": "small"}, TypeError, "tol is 'small', expected a number or None"),
        ({"max_passes": 0}, ValueError, "max_passes is 0, expected at least 1"),
        (
            {"initial": torch.zeros(2, 3)},
            ValueError,
            r"initial is torch.float32 of shape \(2, 3\), expected torch.float64",
        ),
        ({"initial": [None]}, TypeError, r"initial is \[None\], expected a tensor"),
        ({"max_iters": 3}, TypeError, "max_iters"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pd.solve(halves(), **options)


@pytest.mark.parametrize(
    ("system", "options", "error", "message"),
    [
        (lambda x: x, {}, TypeError, "system is a function, expected .* try pd.from_function"),
        (pd.from_function(lambda x: x[:, 1:], torch.zeros(1, 4)), {}, ValueError, r"f returned torch.float32 of shape \(1, 3\)"),
        (Returns(torch.zeros(1, 4), torch.zeros(1, 3)), {}, ValueError, r"evaluate returned torch.float32 of shape \(1, 3\)"),
        (Returns(torch.zeros(1, 4), torch.zeros(1, 4, dtype=torch.long)), {}, ValueError, "evaluate returned torch.int64"),
        (Returns(torch.zeros(1, 5), torch.zeros(1, 5)), {}, ValueError, r"initial guess has shape \(1, 5\), expected \(batch, 4"),
        (Returns(torch.zeros(1, 4, dtype=torch.cfloat), torch.zeros(1, 4)), {}, TypeError, "expected floating or integer"),
        (problem("integer", 1, 4, 0).system(), {"tol": 1e-3}, ValueError, "tol is 0.001 for torch.int64 values"),
        (chain(), {"initial": torch.zeros(2, 20)}, ValueError, "a tensor or None for each of the 3 layers"),
        (pd.from_function(lambda x: None, torch.zeros(1, 4)), {}, TypeError, "f returned a NoneType"),  # type: ignore[arg-type,return-value]
        (pd.from_function(lambda x: x.double(), torch.zeros(1, 4)), {}, ValueError, "f returned torch.float64"),
        (chain(), {"schedule": pd.Selective(("jacobi",) * 6)}, ValueError, "6 schedules were given for 3 layers: leave out 3"),
    ],
)  # fmt: skip
def test_bad_systems(system: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pd.solve(system, **options)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: pd.Sliding(0), ValueError, "width is 0, expected at least 1"),
        (lambda: pd.Sliding(2.5), TypeError, "width is 2.5, expected a whole number"),  # type: ignore[arg-type]
        (lambda: pd.GaussSeidelJacobi(-1), ValueError, "block is -1"),
        (lambda: pd.JacobiGaussSeidel(True), TypeError, "block is True"),
        (lambda: pd.Jacobi(start="ones"), ValueError, "start is 'ones', expected 'system' or 'zeros'"),  # type: ignore[arg-type]
        (lambda: pd.Jacobi(tol=-1), ValueError, "tol is -1"),
        (lambda: pd.Selective(()), ValueError, "expected a sequence of one schedule or more"),
        (lambda: pd.Selective(("selective",)), ValueError, "cannot hold another"),
        (lambda: pd.from_function(lambda x: x, [[0.0]]), TypeError, "initial is a list"),  # type: ignore[arg-type]
        (lambda: pd.from_function(lambda x: x, torch.zeros(1, 2), lipschitz=torch.eye(2)), ValueError, "lipschitz has shape"),
        (lambda: pd.from_function(lambda x: x, torch.zeros(3)), ValueError, r"initial has shape \(3,\), expected \(batch, length"),
    ],
)  # fmt: skip
def test_bad_schedules_and_systems_are_refused_when_made(build: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build()


def test_corrections_need_floats() -> None:
    with pytest.raises(TypeError, match="corrections need floats"):
        pd.solve(problem("integer", 1, 4, 0).system(), pd.Jacobi(correction=RandomCorrection(0)))


def test_names_stand_for_schedules_with_their_defaults() -> None:
    names = {
        "sequential": pd.Sequential(),
        "gauss-seidel": pd.Sequential(),
        "jacobi": pd.Jacobi(),
        "gs-jacobi": pd.GaussSeidelJacobi(),
        "jacobi-gs": pd.JacobiGaussSeidel(),
        "sliding": pd.Sliding(),
    }
    for name, schedule in names.items():
        assert pd.solve(halves(), name).layers[0].schedule == schedule


def test_bool_systems() -> None:
    solution = pd.solve(pd.from_function(lambda x: ~shift(x), torch.zeros(1, 5, dtype=torch.bool)), "sliding")
    assert solution.value.tolist() == [[True, False, True, False, True]]


class Frames(pd.LayeredSystem):
    """A layer over whole videos, (2, 8), and one over their two frames apart, (4, 4); one frame of the second layer overflows."""

    depth = 2

    def __init__(self, frames_first: bool) -> None:
        self.frames_first = frames_first

    def layer(self, index: int, value: Tensor | None) -> pd.TriangularSystem:
        apart = self.frames_first == (index == 0)
        z = (torch.ones(2, 8) if value is None else value.nan_to_num()).view((4, 4) if apart else (2, 8)).clone()
        if apart:
            z[2, 1] = torch.inf
        return pd.from_function(lambda x: z + torch.nn.functional.pad(x, (1, -1)) / 2, torch.zeros_like(z))

    def output(self, value: Tensor) -> Tensor:
        return value.view(2, 8)


@pytest.mark.parametrize("frames_first", [True, False])
def test_the_worst_of_the_rows_that_belong_to_one_counts_for_it(frames_first: bool) -> None:
    solution = pd.solve(Frames(frames_first), "jacobi", tol=0, verify=True)
    assert solution.status == (pd.Status.EXACT, pd.Status.NON_FINITE)
    assert [len(layer.fronts[0]) for layer in solution.layers] == ([4, 2] if frames_first else [2, 4])
    assert solution.residual is not None and solution.residual.shape == (2,) and solution.residual[0] == 0
    if not frames_first:
        assert solution.residual[1].isnan(), "the residual of the frame is not that of its video"
