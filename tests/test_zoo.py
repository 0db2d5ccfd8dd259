"""Every decoder architecture of the installed transformers has the text of `generate`, or is refused."""

from typing import Any

import pytest
import transformers
from packaging import version

from tests import zoo

KNOWN = {
    "equal": "bloom falcon gpt2 gpt_neox llama olmo2 opt phi qwen2 qwen2_5_vl qwen3 qwen3_moe stablelm",
    "in step": "bart bigbird_pegasus blenderbot-small gemma3 gpt_neo marian mbart mistral mpt mvp pegasus plbart roformer trocr whisper",
    "one by one": "kosmos-2.5 moshi paligemma",
    "refused": "cpmant mamba openai-gpt prophetnet reformer xlm xlnet",
}


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
    known = [outcome for outcome, members in KNOWN.items() if name in members.split()]
    assert what in (known or KNOWN), why


def test_a_model_that_counts_the_columns_of_its_cache_is_found_out(monkeypatch: Any) -> None:
    """The check is what keeps MPT right: without it the text is another."""
    from parallel_decode.adapters.causal_lm import model_check

    assert zoo.outcome("mpt")[0] == "in step"
    monkeypatch.setattr(model_check.ModelCheck, "result", lambda self: model_check.Trust())
    assert zoo.outcome("mpt")[0] == "OTHER TEXT"
