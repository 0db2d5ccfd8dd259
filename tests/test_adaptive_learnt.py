"""What `Adaptive` learnt is kept for other processes; what is kept never changes a text, and damaged files are as if they were not there."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from parallel_decode.adapters.causal_lm import adaptive, parallel_generate
from parallel_decode.adapters.causal_lm.learnt import load, save
from parallel_decode.adapters.causal_lm.memory import Memory, RowCosts


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PARALLEL_DECODE_CACHE", str(tmp_path))
    return tmp_path / "adaptive"


def known() -> tuple[dict[int, RowCosts], Memory]:
    """Of one row, and of three, which also stood apart."""
    costs, memory = {1: RowCosts(1), 3: RowCosts(3)}, Memory()
    for width in (1, 4, 16):
        for _ in range(2):
            costs[1].add(width, False, 1 + 0.1 * width)
            costs[3].add(width, False, 2 + 0.2 * width)
            costs[3].add(width, True, 3 + 0.2 * width)
    for _ in range(50):
        memory.record(2).add(3, 4)
    memory.pace.k, memory.pace.known = 2.7, True
    memory.allowance.restore(left=1.5, lost=2.5)
    return costs, memory


def test_another_process_knows_the_same(folder: Path) -> None:
    costs, memory = known()
    save("name", costs, memory)
    found: dict[int, RowCosts] = {}
    other = Memory()
    load("name", found, other)
    assert {rows: each.tables for rows, each in found.items()} == {rows: each.tables for rows, each in costs.items()}
    assert other.record(2).chances == pytest.approx(memory.record(2).chances)
    assert (other.pace.k, other.pace.known) == (2.7, True)
    assert (other.allowance.left, other.allowance.lost) == (1.5, 2.5)
    untouched: dict[int, RowCosts] = {}
    load("another name", untouched, Memory())
    assert not untouched


def test_a_machine_that_is_slower_now_is_compared_with_itself(folder: Path) -> None:
    costs, memory = known()
    save("name", costs, memory)
    found: dict[int, RowCosts] = {}
    load("name", found, Memory())
    found[3].add(1, False, 2 * costs[3].tables[False][1])
    for apart in (False, True):
        assert found[3].tables[apart][16] == pytest.approx(2 * costs[3].tables[apart][16])


@pytest.mark.parametrize(
    "change",
    [
        {"costs": 3},
        {"costs": [[1, [[1, -1.0]], []]]},
        {"costs": [[1, [[1, math.nan]], []]]},
        {"costs": [["one", [[1, 1.0]], []]]},
        {"records": [[2, 9.0, 4.0, 1.0, 4.0]]},
        {"records": [[2, 1.0]]},
        {"pace": "fast"},
        {"pace": -1},
        {"allowance": [1.0]},
        {"allowance": [math.nan, 0.0]},
        None,
    ],
    ids=str,
)
def test_a_damaged_file_is_as_if_it_was_not_there(folder: Path, change: dict[str, Any] | None) -> None:
    costs, memory = known()
    save("name", costs, memory)
    (path,) = folder.iterdir()
    content = json.loads(path.read_text())
    content["value"] = None if change is None else {**content["value"], **change}
    path.write_text(json.dumps(content))
    found, other = dict[int, RowCosts](), Memory()
    load("name", found, other)
    assert not found and not other.records and not other.pace.known and other.allowance.left == Memory().allowance.left


def test_texts_are_the_same_with_what_another_process_learnt(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=31, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    model = LlamaForCausalLM(config)
    model.train(False)
    ids = torch.randint(1, 31, (2, 12))
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 40, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    for process in range(3):
        costs, memories = dict[Any, Any](), dict[Any, Any]()
        monkeypatch.setattr(adaptive, "_COSTS", costs)
        monkeypatch.setattr(adaptive, "_MEMORIES", memories)
        text = model.generate(ids, attention_mask=torch.ones_like(ids), custom_generate=parallel_generate, **options)
        assert torch.equal(text, expected)
        assert len(list(folder.iterdir())) == 1, "one file for one model and way of choosing"
        ((memory,), (tables,)) = memories.values(), costs.values()
        assert memory.runs == 1 and tables[2].timings[False].knows(1)
        assert tables[2].added < 60 and (process == 0 or len(memory.records) > 0)
