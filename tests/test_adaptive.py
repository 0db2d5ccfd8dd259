"""`Adaptive`: widths by what passes cost and by how often drafts come true; on numbers of our own, so nothing depends on the machine."""

from collections.abc import Sequence
from random import Random
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import parallel_decode as pd
from parallel_decode._allowance import Allowance
from parallel_decode.adapters.causal_lm import Adaptive, adaptive
from parallel_decode.adapters.causal_lm import tuner as tuning
from parallel_decode.adapters.causal_lm.memory import APART, FORGET, KEPT, WIDTHS, Memory, Pace, Record, RowCosts
from parallel_decode.adapters.causal_lm.model_check import Trust
from parallel_decode.adapters.causal_lm.tuner import PROMISED, Tuner, _gain
from parallel_decode.tokens import Draft, Drafting, Last
from tests.systems import halves, theorem


def test_costs_between_and_beyond_the_widths_that_were_measured() -> None:
    costs = RowCosts(rows=2)
    together, apart = costs.tables[False], costs.tables[True]
    assert together[1] == 1.0 and together[4] == pytest.approx(1.18), "nothing measured: 3% a token and row"
    assert apart[4] == pytest.approx(APART * 1.18)
    for seconds in (9.0, 2.0):
        costs.add(4, False, seconds)
    together, apart = costs.tables[False], costs.tables[True]
    assert together[4] == 2.0, "what disturbs a pass only adds"
    assert together[8] == pytest.approx(2.0 * 1.42 / 1.18) and together[1] == pytest.approx(2.0 / 1.18)
    assert apart[4] == pytest.approx(APART * 2.0)
    for _ in range(2):
        costs.add(8, False, 4.0)
        costs.add(4, True, 5.0)
    assert costs.tables[False][6] == 3.0
    assert costs.tables[True][4] == 5.0
    for _ in range(32 * KEPT):
        costs.add(4, False, 3.0)
    assert costs.tables[False][4] == 3.0, "a bad moment, or a good one, is forgotten"


def test_a_bad_moment_of_the_machine_is_not_charged() -> None:
    costs = RowCosts(rows=1)
    assert costs.of(4, False, 7.0) == 7.0, "nothing else is known"
    for _ in range(2):
        costs.add(4, False, 2.0)
    assert costs.of(4, False, 7.0) == 4.0 and costs.of(4, False, 3.0) == 3.0 and costs.of(4, False) == 2.0
    for _ in range(2):
        costs.add(1, False, 1.0)
    assert costs.of(1, False, 1.5) == 1.0 and costs.ready


def test_rows_that_were_never_in_step_are_known_too() -> None:
    """Where rows leave a batch, the others are at fronts of their own."""
    costs = RowCosts(rows=2)
    for _ in range(2):
        costs.add(1, True, 2.2)
    assert costs.ready and costs.tables[True][1] == 2.2 and costs.tables[False][1] == pytest.approx(2.0)
    assert costs.seconds(11, True) == pytest.approx(2.2 * 1.6)


def test_a_bad_moment_of_the_machine_is_outlived() -> None:
    """A width that no pass of some hundred had is as if it was not measured."""
    costs = RowCosts(rows=1)
    for _ in range(2):
        costs.add(16, False, 90.0)
    for _ in range(256 + 256):
        costs.add(1, False, 1.0)
    assert costs.tables[False][16] == pytest.approx(1.45) and costs.tables[False][1] == 1.0
    for number in range(3 * FORGET):
        costs.add(16 if number % FORGET < 2 else 1, False, 1.0)
    assert costs.timings[False].knows(16), "now and then is enough"


def test_how_many_drafts_come_true() -> None:
    record = Record(2)
    assert record.chances == pytest.approx((0.3, 0.7))
    for _ in range(200):
        record.add(4, 4)
    assert min(record.chances) > 0.95
    for _ in range(200):
        record.add(0, 4)
    assert record.chances[0] < 0.1, "the text may change"
    before = record.first[1]
    record.fade(16)
    assert record.first[1] == 16 < before and record.chances[0] < 0.1
    assert (
        _gain([(1.0, 0.5, 0.5)], 3) == 1.75 and _gain([(1.0, 0.5, 1.0)], 4) == 2.5 and _gain([(2.0, 0.9, 0.9)], 1) == 2
    )


class System:
    """What the tuner asks of a system: by default its model has been tried, and nothing is wrong with it."""

    apart, ragged = False, True

    def __init__(self, drafting: Drafting, known: bool = True, result: Trust = Trust()) -> None:  # noqa: B008 - it does not change
        self.drafting, self._result, self.asked = drafting, result, 0
        self.model_check = SimpleNamespace(recalled=result if known else None)

    @property
    def trust(self) -> Trust:
        self.asked += 1
        return self._result


def tuner(
    texts: Sequence[list[int]], kinds: Sequence[int | None], slope: float, most: int = 64, per_row: bool = True
) -> Tuner:
    """With passes that take 1 + slope for each further token, drafts of kind 1 that always come true, and of kind 0 never; and all that may be lost saved up."""
    drafting = Drafting(Last(), texts, 100)
    drafting.kinds = list(kinds)
    costs, memory = RowCosts(len(texts)), Memory()
    for _ in range(100):
        memory.record(0).add(0, 8)
        memory.record(1).add(8, 8)
    for width in WIDTHS:
        for apart in (False, True):
            for _ in range(2):
                costs.add(width, apart, 1 + slope * (width - 1) + 0.05 * apart)
    memory.allowance.left = memory.allowance.most
    return Tuner(System(drafting), {len(texts): costs}, memory, most, per_row)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kinds", "slope", "most", "expected"),
    [
        ([1], 0.0, 64, 64),  # a window costs nothing
        ([1], 0.0, 16, 16),
        ([0], 0.0, 64, 1),  # and still nothing is gained, to the margin
        ([1], 1.5, 64, 1),  # each token costs more than a pass
        ([1, 0], 0.0, 64, 64),
        ([0, None], 0.0, 64, 1),
        ([1, None], 0.0, 64, 64),
    ],
)
def test_the_width_that_promises_most(kinds: list[int | None], slope: float, most: int, expected: int) -> None:
    assert tuner([[1]] * len(kinds), kinds, slope, most).window(0, 100) == range(expected)


def test_a_row_that_has_more_left_counts_more() -> None:
    made = tuner([[1], [1]], [0, 1], slope=0.5)
    assert len(made.window(0, 100)) == 1
    made.drafting.texts[0] += [2] * 80  # the row without a draft is nearly done
    made.apart = True
    assert len(made.window(0, 100)) > 1


def test_rows_in_step_gain_what_the_slowest_does() -> None:
    assert len(tuner([[1], [1]], [0, 1], slope=0.1, per_row=True).window(0, 100)) > 1
    assert len(tuner([[1], [1]], [0, 1], slope=0.1, per_row=False).window(0, 100)) == 1
    assert len(tuner([[1], [1]], [1, 1], slope=0.1, per_row=False).window(0, 100)) > 1


@pytest.mark.parametrize(
    ("lead", "apart", "paid", "ragged"),
    [(60, True, 5.0, True), (1, True, 0.0, True), (1, True, 5.0, False), (1, False, 0.0, False)],
)
def test_a_lead_is_kept_where_it_is_worth_the_mask(lead: int, apart: bool, paid: float, ragged: bool) -> None:
    """A small one until that took as much as it is worth: windows may come that build on it."""
    made = tuner([[1], [1]], [0, 0], slope=1.0)
    made.drafting.texts[0] += [2] * lead
    made.apart, made.paid = apart, paid
    assert len(made.window(0, 100)) == 1 and made.ragged is ragged


def test_windows_that_are_too_dear_to_be_lost_are_not_tried() -> None:
    made = tuner([[1]], [1], slope=0.2)
    assert len(made.window(0, 100)) > 16
    made.memory.allowance.left = 0.3
    assert len(made.window(0, 100)) == 2
    made.memory.allowance.left = 0.1
    assert len(made.window(0, 100)) == 1


def test_what_drafts_promised_may_be_lost_besides() -> None:
    """Nothing may be lost any more, and drafts come true all the time."""
    made, clock = tuner([[1]], [1], slope=0.2), [0.0]
    made.memory.allowance.left = -1.0
    widths = []
    with patch.object(tuning, "time", SimpleNamespace(perf_counter=lambda: clock[0])):
        for front in range(10):
            widths.append(len(made.window(front, 100)))
            clock[0] += 1 + 0.2 * (widths[-1] - 1)
            made.drafting.texts[0] += [2] * widths[-1]
    assert widths[:3] == [1, 1, 1] and max(widths) > 4


def test_less_is_lent_after_runs_that_lost() -> None:
    allowance, left = Allowance(free=0.0, share=0.0, most=8.0), []
    for _ in range(3):
        allowance.left = 0.0
        allowance.lend(1.0)
        left.append(allowance.left)
        allowance.settle(cost=2.0, gained=0.0)
        allowance.end_run()
    assert left == [1.0, 0.5, 0.0]
    allowance.settle(cost=1.0, gained=4.0)
    assert allowance.lost == 6.0, "a run may yet lose what it gained"
    allowance.end_run()
    assert allowance.lost == 3.0


def test_a_lead_that_is_not_in_the_cache_is_read_again() -> None:
    made = tuner([[1], [1]], [1, 1], slope=0.01)
    made.drafting.texts[0] += [2] * 30
    assert made.size == 0 and made.size == made.read
    width = len(made.window(0, 100))
    assert width > 1 and made.ragged and made.size == width + 30
    dear = tuner([[1], [1]], [0, 1], slope=0.5)
    dear.drafting.texts[0] += [2] * 80
    assert len(dear.window(0, 100)) == 1, "80 columns take longer than the window saves"


def test_windows_that_live_on_predictions_begin_where_the_hardest_part_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as nothing is known of them: the first rows of a picture have nothing above them. And single tokens are read first, for what they cost now."""

    def width(final: int, known: bool) -> int:
        made = tuner([[1]], [0], slope=0.02)
        made.drafting.fresh, made.memory.pace.known = True, known
        made.drafting.texts[0] += [2] * final
        return len(made.window(final, 100))

    assert width(0, known=True) == 1
    monkeypatch.setattr(tuning, "OPENING", 0)
    assert width(0, known=False) == 1
    assert width(13, known=False) > 4 and width(0, known=True) > 4


def untried(kind: int, runs: int = 1, result: Trust = Trust()) -> Tuner:  # noqa: B008 - it does not change
    """Of a model that was never tried, with drafts of a kind."""
    made = tuner([[1]], [kind], slope=0.7)
    made.system = System(made.drafting, known=False, result=result)  # type: ignore[assignment]
    made.memory.runs = runs
    return made


def singles(made: Tuner) -> int:
    """How many single tokens are read before the first window."""
    for passes in range(100):
        if len(made.window(passes, 100)) > 1:
            return passes
        made.drafting.texts[0].append(2)
    return 100


def test_a_model_is_checked_where_that_can_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "CHECK", 12.0)
    first, later, never = untried(1), untried(1, runs=4), untried(0)
    assert 1 == singles(later) < singles(first) < 100 == singles(never), "the first pass tells whether it can be read"
    tried = [made.system.asked for made in (first, later, never)]  # type: ignore[attr-defined]
    assert tried == [1, 1, 0]
    late = untried(1)
    late.drafting.texts[0] += [2] * 88
    assert len(late.window(88, 100)) == 1, "too little is left"


@pytest.mark.parametrize(
    "result", [Trust(no_windows="it cannot"), Trust("it cannot", error=NotImplementedError("it cannot"))]
)
def test_what_a_check_finds_in_the_middle_of_a_text(result: Trust) -> None:
    made = untried(1, runs=100, result=result)
    with pytest.warns(UserWarning, match="it cannot: tokens are decoded one by one"):
        assert singles(made) == 100
    assert made.system.asked == 1  # type: ignore[attr-defined]


def test_drafts_are_counted_where_single_tokens_are_read() -> None:
    drafting = Drafting(Draft(lambda text, most: [7] * 4), [[1]], 100)
    x = torch.zeros(1, 100, dtype=torch.long)
    for position, (token, outcome) in enumerate([(7, 1), (8, 0), (7, 1)]):
        drafting.write(x)
        x[0, position] = token
        drafting.accept(x, [position + 1], [position], 1)
        assert drafting.outcomes == [(1, outcome, 1)]


def test_outcomes_of_a_pass_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    made = tuner([[1]], [1], slope=0.0)
    monkeypatch.setattr(adaptive, "CausalLM", System)
    drafting = Drafting(Draft(lambda text, most: [7] * 4), [[1]], 100)
    x = torch.zeros(1, 100, dtype=torch.long)
    drafting.write(x)
    drafting.accept(x, [1], [0], 1)
    drafting.write(x)
    drafting.accept(x, [3], [1], 4)
    assert drafting.outcomes == [(1, 1, 3)]
    before = made.memory.record(1).chances
    made.after_pass(System(drafting))  # type: ignore[arg-type]
    assert made.memory.record(1).chances[1] < before[1] and made.drafting is drafting


@given(
    slope=st.floats(0, 2),
    mask=st.floats(0, 0.5),
    batch=st.integers(1, 4),
    lucky=st.lists(st.floats(0, 1), min_size=4, max_size=4),
    bluff=st.integers(1, 5),
    per_row=st.booleans(),
    fresh=st.booleans(),
    forgets=st.booleans(),
    seed=st.integers(0, 2**16),
)
@settings(theorem, max_examples=60)
def test_never_much_slower_than_one_token_at_a_time(
    slope: float,
    mask: float,
    batch: int,
    lucky: list[float],
    bluff: int,
    per_row: bool,
    fresh: bool,
    forgets: bool,
    seed: int,
) -> None:
    """Whatever passes cost and however often drafts come true, and that changes every 25 tokens: runs of 100 tokens lose 2 passes, half a percent, one window that
    was dearer than it looked, and three tenths of what drafts promised; of that no more than one run was lent, and a constant, though every run may begin
    with drafts that promise much."""
    clock, length, random, dearest = [0.0], 100, Random(seed), 0.0
    with (
        patch.object(tuning, "time", SimpleNamespace(perf_counter=lambda: clock[0])),
        patch.object(Allowance, "lend", autospec=True, side_effect=Allowance.lend) as lend,
    ):
        costs: dict[int, RowCosts] = {}
        memory, spent, done, lent = Memory(), 0.0, 0, list[float]()
        for _ in range(8):
            lend.reset_mock()
            if forgets:
                memory.records.clear()
            guess = Draft(lambda text, most: [7] * 64)
            guess.fresh = fresh
            drafting = Drafting(guess, [[1]] * batch, length)
            system = System(drafting)
            made = Tuner(system, costs, memory, 64, per_row)  # type: ignore[arg-type]
            x = torch.zeros(batch, length, dtype=torch.long)
            drafting.write(x)
            fronts = [0] * batch
            while min(fronts) < length:
                drafting.kinds = [bluff] * batch
                window = made.window(min(fronts), length)
                uneven = min(fronts) < max(fronts)
                ragged = uneven and made.ragged and per_row
                starts = [min(f, length - len(window)) if ragged else window.start for f in fronts]
                columns = len(window) + (max(fronts) - min(fronts) if ragged and not system.apart else 0)
                system.apart = ragged
                cost = 1 + slope * (columns - 1) + mask * ragged
                clock[0], dearest = clock[0] + cost, max(dearest, cost)
                for row, start in enumerate(starts):
                    came = 1
                    while came < len(window) and random.random() < lucky[start // 25]:
                        came += 1
                    fronts[row] = max(fronts[row], min(length, start + came))
                if not per_row:
                    fronts = [min(fronts)] * batch
                drafting.accept(x, fronts, starts, len(window))
                made.after_pass(system)  # type: ignore[arg-type]
                drafting._drafted = [64] * batch
            made.finish(length, length)
            done += length
            lent.append(sum(call.args[1] for call in lend.call_args_list))
            assert lent[-1] <= PROMISED * length
        spent = clock[0]
    allowed = Allowance()
    besides = min(sum(lent), 1.5 * allowed.most + max(lent))
    assert spent <= done * (1 + allowed.share) + allowed.free + besides + dearest + 3


def test_the_passes_that_a_position_takes_are_learnt_by_windows_of_one_width() -> None:
    pace = Pace()
    assert pace(1) == 1 and pace(2) == 1 and pace(16) == pytest.approx(0.12 + 2 / 16)
    for _ in range(400):
        pace.add(16, 1 / (0.12 + 3 / 16))
    assert pace(16) == pytest.approx(0.12 + 3 / 16, rel=1e-3) and pace(32) < pace(16)
    for _ in range(400):
        pace.add(8, 1.0)  # nothing is gained
    assert pace(8) == pytest.approx(1.0)


def test_it_is_for_language_models() -> None:
    with pytest.raises(TypeError, match="use 'auto'"):
        pd.solve(halves(), Adaptive())
    bad: Any = 0
    with pytest.raises(ValueError, match="most is 0"):
        Adaptive(bad)
