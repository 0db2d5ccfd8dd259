"""The pieces of the loop, one by one: fronts, rows, acceptance, guard, trace, claims."""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import parallel_decode as pd
from parallel_decode._acceptance import Acceptance, Consistent, Prefix, Whole
from parallel_decode._claims import Claim, claim_of
from parallel_decode._fronts import Fronts
from parallel_decode._guard import guard
from parallel_decode._iterate import iterate
from parallel_decode._rows import Rows
from parallel_decode._tolerance import Tolerance
from parallel_decode._trace import Trace
from parallel_decode.window import Window
from tests import systems
from tests.systems import shift

CPU = torch.device("cpu")
nan, inf = math.nan, math.inf


def fronts_at(*at: int, length: int = 8) -> Fronts:
    fronts = Fronts(len(at), length, CPU)
    fronts.move(torch.tensor(at))
    return fronts


# windows


def test_windows_of_rows() -> None:
    x = torch.arange(20.0).view(2, 10)
    common, strided, own = (
        Window(range(2, 5), 0),
        Window(range(1, 9, 3), 0),
        Window(range(2, 5), 0, torch.tensor([0, 4])),
    )
    assert common.indices().tolist() == [[2, 3, 4]] and strided.indices().tolist() == [[1, 4, 7]]
    assert own.indices().tolist() == [[2, 3, 4], [6, 7, 8]]
    assert common.start == 2 and torch.as_tensor(own.start).tolist() == [2, 6]
    assert strided.slice == slice(1, 9, 3)
    for window in (common, strided, own):
        values = window.take(x)
        y = torch.zeros_like(x)
        window.put(y, values)
        assert values.shape == (2, 3) and (y != 0).sum() == 6 and torch.equal(window.take(y), values)
    assert own.take(x).tolist() == [[2, 3, 4], [16, 17, 18]]
    assert Window.full(3) == Window(range(3), 0, None)


# fronts


def test_fronts() -> None:
    fronts = Fronts(3, 8, CPU)
    assert (fronts.min, fronts.max, fronts.uniform, fronts.host.tolist()) == (0, 0, True, [0, 0, 0])
    fronts.move(5)
    assert (fronts.min, fronts.max, fronts.uniform, fronts.device.tolist()) == (5, 5, True, [5, 5, 5])
    fronts.move(torch.tensor([5, 8, 6]), torch.tensor([5, 8, 6]))
    assert (fronts.min, fronts.max, fronts.uniform) == (5, 8, False) and fronts.host.tolist() == [5, 8, 6]
    fronts.select(torch.tensor([0, 2]))
    assert (fronts.min, fronts.max, fronts.host.tolist(), fronts.device.tolist()) == (5, 6, [5, 6], [5, 6])
    fronts.move(7)
    assert fronts.host.tolist() == [7, 7]


def test_final_values_are_held() -> None:
    old, new = torch.zeros(2, 3, 2), torch.ones(2, 3, 2)
    held = fronts_at(2, 4).hold(new, old, Window(range(2, 5), 0))
    assert held[..., 0].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert fronts_at(2, 2).hold(new, old, Window(range(2, 5), 0)) is new
    assert fronts_at(3, 3).hold(new, old, Window(range(2, 5), 0))[..., 0].tolist() == [[0, 1, 1]] * 2
    own = fronts_at(2, 6).hold(new, old, Window(range(2, 5), 0, torch.tensor([0, 3])))
    assert own[..., 0].tolist() == [[1, 1, 1], [0, 1, 1]]


# acceptance


@dataclass(frozen=True)
class Case:
    """A pass over a window, of one row: which positions moved, and the front before and after."""

    acceptance: Acceptance
    window: range
    moved: tuple[int, ...]
    before: int
    after: int


CASES = [
    Case(Prefix(), range(2, 7), (), 2, 7),
    Case(Prefix(), range(2, 7), (2,), 2, 3),
    Case(Prefix(), range(2, 7), (4, 6), 2, 5),
    Case(Prefix(), range(2, 7), (6,), 2, 7),
    Case(Prefix(), range(2, 7), (4,), 6, 6),
    Case(Prefix(), range(8), (4,), 3, 5),
    Case(Prefix(), range(8), (), 3, 8),
    Case(Consistent(), range(0, 8, 3), (), 0, 1),
    Case(Consistent(), range(2, 8, 3), (), 2, 3),
    Case(Consistent(), range(2, 8, 3), (5,), 2, 3),
    Case(Whole(), range(8), (), 3, 8),
    Case(Whole(), range(8), (7,), 3, 4),
    Case(Whole(), range(8), (0, 7), 7, 8),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("tol", [0.0, 1e-3])
def test_how_far_the_front_moves(case: Case, tol: float) -> None:
    window = Window(case.window, 0)
    old = torch.zeros(1, len(case.window), 2)
    new = old.clone()
    for position in case.moved:
        new[0, case.window.index(position), 1] = 2.5
    accepted = case.acceptance.accept(window, new, old, fronts_at(case.before), Tolerance(tol))
    assert torch.as_tensor(accepted.fronts).flatten().tolist() == [case.after] and accepted.finite
    assert accepted.on_device is None or accepted.on_device.tolist() == [case.after]
    if not isinstance(case.acceptance, Whole):
        assert torch.as_tensor(accepted.residual).tolist() == [2.5 if case.moved else 0.0]


def test_marks_of_strided_windows() -> None:
    """All of a row become consistent stride by stride, unless something before them moves."""
    acceptance, fronts, zeros = Consistent(), fronts_at(0, 0, length=6), torch.zeros(2, 3)
    steps = [(range(0, 6, 2), ()), (range(1, 6, 2), (3,))]
    for positions, moved in steps:
        new = torch.zeros(2, len(positions))
        for position in moved:
            new[1, positions.index(position)] = 1
        accepted = acceptance.accept(Window(positions, 0), new, zeros, fronts, Tolerance(0.0))
        fronts.move(torch.as_tensor(accepted.fronts))
    assert fronts.host.tolist() == [6, 4]
    assert acceptance.marks is not None and acceptance.marks[1].tolist() == [True] * 4 + [False] * 2
    acceptance.written(torch.tensor([[False] * 6, [False] * 2 + [True] + [False] * 3]))
    assert acceptance.marks.tolist() == [[True] * 6, [True] * 2 + [False] * 4]
    acceptance.select(torch.tensor([1]))
    assert acceptance.marks.tolist() == [[True] * 2 + [False] * 4]
    acceptance.written(None)
    assert acceptance.marks is None
    assert isinstance(acceptance.guarded(), Consistent) and acceptance.guarded() is not acceptance


def test_positions_that_are_not_usable_are_not_final() -> None:
    old = torch.zeros(2, 4)
    usable = torch.tensor([[True, True, False, True], [False, True, True, True]])
    accepted = Prefix().accept(Window(range(4), 0), old.clone(), old, fronts_at(0, 0, length=4), Tolerance(0.5), usable)
    assert torch.as_tensor(accepted.fronts).tolist() == [2, 0]
    accepted = Consistent().accept(Window(range(0, 8, 2), 0), old.clone(), old, fronts_at(0, 0), Tolerance(0.5), usable)
    assert torch.as_tensor(accepted.fronts).tolist() == [1, 0]


def test_sweeps_report_what_is_not_finite() -> None:
    old, new = torch.zeros(2, 4), torch.tensor([[0.0, 0, 0, 0], [0, 0, inf, 0]])
    for tolerance in (Tolerance(0.0), Tolerance(0.1), Tolerance(0.1, relative=False)):
        assert not Whole().accept(Window.full(4), new, old, fronts_at(0, 0, length=4), tolerance).finite
    assert isinstance(Whole().guarded(), Prefix)
    ended = fronts_at(1, 4, length=4)
    accepted = Whole().accept(Window.full(4), old + 1, old, ended, Tolerance(0.0))
    assert torch.as_tensor(accepted.fronts).tolist() == [2, 4]


def test_the_largest_change_of_a_sweep_is_noted() -> None:
    old, new = torch.zeros(2, 4), torch.tensor([[0.0, 0, 0, 0], [0, -3.0, 0, 0]])
    fronts = fronts_at(0, 0, length=4)
    for tolerance in (Tolerance(0.1), Tolerance(0.1, relative=False)):
        assert Whole().accept(Window.full(4), new, old, fronts, tolerance).residual == 3
    assert math.isnan(torch.as_tensor(Whole().accept(Window.full(4), new, old, fronts, Tolerance(0.0)).residual).item())
    assert Whole().accept(Window.full(4), old, old.clone(), fronts, Tolerance(0.0)).residual == 0


@pytest.mark.parametrize("relative", [True, False])
def test_sweeps_settle_by_the_rule_whatever_came_before(relative: bool) -> None:
    """The largest value is followed from pass to pass, not measured: growing, shrinking and rewritten iterates are judged alike."""
    generator, seen = torch.Generator().manual_seed(0), set()
    tolerance = Tolerance(0.1, relative=relative)
    for _ in range(50):
        whole, x = Whole(), torch.zeros(2, 4, dtype=torch.float64)
        for step in range(10):
            scale = 10.0 ** torch.empty((), dtype=torch.float64).uniform_(-3, 1.5, generator=generator)
            change = scale * torch.randn(2, 4, generator=generator, dtype=torch.float64)
            new = x + change if step % 3 else x + 0.1 * x.abs() * torch.rand(2, 4, generator=generator)
            accepted = whole.accept(Window.full(4), new, x, fronts_at(0, 0, length=4), tolerance)
            settled = bool(tolerance.compare(new, x)[1].all())
            assert accepted.fronts == (4 if settled else 1) and accepted.finite
            seen.add(settled)
            x = new
            if step == 5:
                x = x * 100
                whole.written(None)
    assert seen == {True, False}


# the guard


def guarded(
    new: Tensor, alone: Tensor, fronts: Fronts, window: Window
) -> tuple[Tensor, Tensor, Tensor, dict[int, tuple[int, Tensor]]]:
    """The values taken, the fronts, the iterate, and the rows that ended; `alone` is what a window of one gives."""
    x = torch.full((len(new), fronts.length), 0.5)
    old = window.take(x).clone()
    asked: list[Window] = []

    def evaluate(window: Window) -> Tensor:
        asked.append(window)
        return alone

    taken, accepted, ended = guard(x, window, new, old, fronts, Tolerance(0.0), Prefix(), evaluate)
    assert not accepted.finite
    assert all(len(w.positions) == 1 and w.positions[0] == fronts.min for w in asked)
    assert all(w.changed_from == window.changed_from for w in asked)
    return taken, torch.as_tensor(accepted.fronts), x, ended


def test_beyond_the_front_what_is_not_finite_is_not_taken() -> None:
    new = torch.tensor([[1.0, nan, 3.0, inf]])
    taken, host, x, ended = guarded(new, torch.tensor([[9.0]]), fronts_at(2, length=6), Window(range(2, 6), 1))
    assert taken.tolist() == [[1.0, 0.5, 3.0, 0.5]] and host.tolist() == [3] and not ended
    assert x.tolist() == [[0.5] * 6], "nothing overflowed at the front: the tail stays"


def test_at_the_front_the_position_is_evaluated_alone() -> None:
    new = torch.tensor([[nan, nan, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0], [nan, nan, nan, nan]])
    alone = torch.tensor([[7.0], [8.0], [inf]])
    taken, host, x, ended = guarded(new, alone, fronts_at(2, 2, 2, length=6), Window(range(2, 6), 1))
    assert host.tolist() == [3, 3, 6]
    assert taken.tolist() == [[7.0, 0, 0, 0], [1, 2, 3, 4], [0, 0, 0, 0]]
    assert x.tolist() == [[0.5, 0.5, 0, 0, 0, 0], [0.5] * 6, [0.5, 0.5, 0, 0, 0, 0]]
    assert {row: (at, value.item()) for row, (at, value) in ended.items()} == {2: (2, inf)}


def test_rows_ahead_wait_until_they_are_the_slowest() -> None:
    new = torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.5, nan, nan, nan]])
    taken, host, _, ended = guarded(
        new, torch.tensor([[1.0], [inf]]), fronts_at(2, 3, length=6), Window(range(2, 6), 1)
    )
    assert host.tolist() == [3, 3] and not ended
    own = Window(range(2, 5), 1, torch.tensor([0, 1]))
    taken, host, *_ = guarded(
        new[:, 1:].contiguous() * nan, torch.tensor([[5.0], [6.0]]), fronts_at(2, 3, length=6), own
    )
    assert host.tolist() == [3, 4] and taken[:, 0].tolist() == [5.0, 6.0]


# rows, trace, claims


def test_rows_leave_once_they_are_a_quarter() -> None:
    made = systems.problem("tanh", 8, 5, 0)
    system = systems.Rows(made.f, made.guess)
    rows = Rows(system, made.guess.clone())
    assert rows.leave(torch.tensor([True] + [False] * 7)) is None and rows.index is None
    assert rows.leave(torch.tensor([True] * 8)) is None, "nobody would stay"
    stay = rows.leave(torch.tensor([True, False, False, True] + [False] * 4))
    assert stay is not None and stay.tolist() == [1, 2, 4, 5, 6, 7] and rows.x.shape == (6, 5)
    again = rows.leave(torch.tensor([False, True, True, False, True, False]))
    assert again is not None and again.tolist() == [0, 3, 5]
    assert rows.index is not None and rows.index.tolist() == [1, 5, 7] and rows.number(1) == 5
    rows.x[:] = 9
    assert (rows.iterate() == 9).all(1).tolist() == [False, True, False, False, False, True, False, True]
    assert rows.spread(torch.tensor([1, 2, 3]), 0).tolist() == [0, 1, 0, 0, 0, 2, 0, 3]
    assert rows.spread(4, 8).tolist() == [8, 4, 8, 8, 8, 4, 8, 4]


def test_traces() -> None:
    trace = Trace(2)
    trace.add(1, nan)
    trace.add(torch.tensor([2, 4]), torch.tensor([0.5, 0.25]))
    trace.add(4, 0.125)
    assert (
        trace.passes == 3
        and trace.fronts().tolist() == [[1, 1], [2, 4], [4, 4]]
        and trace.fronts().dtype == torch.int64
    )
    assert trace.residuals(1).tolist() == [[0.5, 0.25], [0.125, 0.125]] and trace.residuals()[0].isnan().all()
    assert trace.fronts(2).tolist() == [[4, 4]] and Trace(3).fronts().shape == (0, 3)


def test_claims() -> None:
    resource = object()
    claim_of(resource)
    with Claim(resource) as claim:
        with pytest.raises(RuntimeError, match="in use"), Claim(resource):
            pass
        with pytest.raises(RuntimeError, match="in use"):
            claim_of(resource)
        claim.evaluating = True
        claim_of(resource)
    claim_of(resource)
    with Claim(resource), Claim(object()), Claim(None), Claim(None):
        pass


def test_an_evaluation_that_raises_leaves_nothing_claimed() -> None:
    class Fails(systems.Rows):
        def evaluate(self, x: Tensor, window: Window) -> Tensor:
            raise KeyError("mine")

    made = systems.problem("tanh", 2, 5, 0)
    system = Fails(made.f, made.guess)
    for _ in range(2):
        with pytest.raises(KeyError, match="mine"):
            pd.solve(system)


def test_from_where_a_system_reads_again() -> None:
    """At tolerance 0 what settled has not changed; else all of the last window may have."""

    class Notes(systems.Rows):
        def evaluate(self, x: Tensor, window: Window) -> Tensor:
            seen.append((window.positions.start, window.changed_from))
            return super().evaluate(x, window)

    for tol, expected in (
        (0.0, [(0, 0), (1, 0), (2, 1), (3, 2), (4, 3), (5, 4)]),
        (1e-9, [(0, 0), (1, 0), (2, 1), (3, 2), (4, 3), (5, 4)]),
        (0.2, [(0, 0), (1, 0), (2, 1), (5, 2)]),
    ):
        seen: list[tuple[int, int]] = []
        iterate(
            Notes(lambda x: 1 + shift(x) / 2, torch.zeros(2, 6)),
            pd.Sliding(3),
            Tolerance(tol),
            torch.zeros(2, 6),
            Claim(None),
        )
        assert seen == expected
    seen = []
    pd.solve(Notes(lambda x: 1 + shift(x) / 2, torch.zeros(2, 6)), "sequential")
    assert seen == [(i, max(i - 1, 0)) for i in range(6)]
    seen = []
    pd.solve(Notes(lambda x: 1 + shift(x) / 2, torch.zeros(2, 6)), pd.Jacobi(freeze=False), tol=0)
    assert seen == [(0, 0)] * 6


def test_a_correction_begins_anew_after_a_value_that_is_not_finite() -> None:
    memories: list[int] = []

    class Counts(pd.Correction):
        def correct(
            self, x: Tensor, fx: Tensor, window: Window, memory: tuple[Tensor, ...] | None
        ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
            passes = torch.zeros(len(x)) if memory is None else memory[0] + 1
            memories.append(int(passes[0]))
            return fx, (passes,)

    def f(x: Tensor) -> Tensor:
        y = 1 + shift(x) / 2
        y[:, 5] = torch.where(x[:, 2] == 1.75, y[:, 5], inf)  # finite once position 2 is right, at the third pass
        return y

    pd.solve(pd.from_function(f, torch.zeros(1, 8, dtype=torch.float64)), pd.Jacobi(correction=Counts()), tol=0)
    assert memories == [0, 0, 0, 0, 1, 2, 3]


def test_rows_that_are_done_stay_within_the_positions_there_are() -> None:
    """Where every row has a window of its own, and one is done and has not left yet."""
    asked: list[Window] = []

    def evaluate(window: Window) -> Tensor:
        asked.append(window)
        return torch.tensor([[4.0], [5.0], [6.0]])

    fronts, x = fronts_at(2, 6, 5, length=6), torch.full((3, 6), 0.5)
    window = Window(range(2, 4), 1, torch.tensor([0, 2, 2]))
    new = torch.tensor([[nan, nan], [0.5, 0.5], [0.5, nan]])
    taken, accepted, ended = guard(x, window, new, window.take(x), fronts, Tolerance(0.0), Prefix(), evaluate)
    assert asked[0].shift is not None and asked[0].shift.tolist() == [0, 3, 3]
    assert torch.as_tensor(accepted.fronts).tolist() == [3, 6, 6] and not ended
    assert taken.tolist() == [[4.0, 0.0], [0.5, 0.5], [0.5, 6.0]]
