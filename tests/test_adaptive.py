"""`Adaptive`: widths by what passes cost and by how often drafts come true; on numbers of our own, so nothing depends on the machine."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

import parallel_decode as pd
from parallel_decode.adapters.causal_lm import Adaptive, adaptive
from parallel_decode.adapters.causal_lm.adaptive import KEPT, WIDTHS, _Costs, _Record, _Tuner
from parallel_decode.tokens import Draft, Drafting, Last
from tests.systems import halves


def test_costs_between_and_beyond_the_widths_that_were_measured() -> None:
    costs = _Costs(rows=2)
    assert costs.table[1] == 1.0 and costs.table[4] == pytest.approx(1.18), "nothing measured: 3% a token and row"
    for seconds in (9.0, 2.0):
        costs.add(4, seconds)
    assert costs.table[4] == 2.0, "what disturbs a pass only adds"
    assert costs.table[8] == pytest.approx(2.0 * 1.42 / 1.18) and costs.table[1] == pytest.approx(2.0 / 1.18)
    for _ in range(2):
        costs.add(8, 4.0)
    assert costs.table[6] == 3.0
    for _ in range(8 * KEPT):
        costs.add(4, 3.0)
    assert costs.table[4] == 3.0, "a bad moment, or a good one, is forgotten"


def test_how_many_drafts_come_true() -> None:
    record = _Record(2)
    assert record.expected(1) == pytest.approx(0.3)
    for _ in range(200):
        record.add(4, 4)
    assert record.expected(1) > 0.95 and record.expected(10) > 5
    for _ in range(200):
        record.add(0, 4)
    assert record.expected(1) < 0.1, "the text may change"
    before = record.first[1]
    record.fade(16)
    assert record.first[1] == 16 < before and record.expected(1) < 0.1
    certain = _Record(1)
    certain.further = [4.0, 4.0]
    assert certain.expected(3) == pytest.approx(3 * certain.expected(1))


class System:
    """What the tuner asks of a system."""

    def __init__(self, drafting: Drafting) -> None:
        self.drafting = drafting


def tuner(texts: Sequence[list[int]], kinds: Sequence[int | None], slope: float, most: int = 64) -> _Tuner:
    """With passes that take 1 + slope for each further token, drafts of kind 1 that always come true, and of kind 0 never."""
    drafting = Drafting(Last(), texts, 100)
    drafting.kinds = list(kinds)
    costs, records = _Costs(len(texts)), {0: _Record(0), 1: _Record(1)}
    for _ in range(100):
        records[0].add(0, 8)
        records[1].add(8, 8)
    for width in WIDTHS:
        for _ in range(2):
            costs.add(width, 1 + slope * (width - 1))
    return _Tuner(System(drafting), {len(texts): costs}, records, most)  # type: ignore[arg-type]


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
    assert len(made.window(0, 100)) > 1


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
    before = made.records[1].expected(4)
    made.after_pass(System(drafting))  # type: ignore[arg-type]
    assert made.records[1].expected(4) < before and made.drafting is drafting


def test_it_is_for_language_models() -> None:
    with pytest.raises(TypeError, match="use 'auto'"):
        pd.solve(halves(), Adaptive())
    bad: Any = 0
    with pytest.raises(ValueError, match="most is 0"):
        Adaptive(bad)
