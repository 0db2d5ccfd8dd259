"""Every decoder architecture of the installed transformers has the text of `generate`, or is refused."""

from typing import Any

import pytest
import transformers
from packaging import version

from tests import zoo


def test_nothing_is_left_out_silently() -> None:
    assert len(zoo.names()) > 150 and set(zoo.names()) | set(zoo.NOT_BUILT) >= set(zoo.classes())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", zoo.names())
def test_equal_or_refused(name: str) -> None:
    try:
        zoo.build(name)
    except Exception as error:
        if version.parse(transformers.__version__) > zoo.MADE_FOR:
            pytest.skip(f"a newer transformers, and no small configuration yet: {error}")
        raise
    what, why = zoo.outcome(name)
    assert what != "OTHER TEXT", why


def test_a_model_that_counts_the_columns_of_its_cache_is_found_out(monkeypatch: Any) -> None:
    """The trial is what keeps MPT right: without it the text is another."""
    from parallel_decode.adapters.causal_lm import system, trial

    assert zoo.outcome("mpt")[0] == "in step"
    monkeypatch.setattr(system, "tried", lambda *args: trial.Trust())
    assert zoo.outcome("mpt")[0] == "OTHER TEXT"
