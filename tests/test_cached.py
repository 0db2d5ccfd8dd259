"""What cached adapters share: every reading of every window, and storage that is never stale."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import parallel_decode as pd
from parallel_decode._claims import Claim
from parallel_decode.cached import KeyValueStorage, Reads, RowReads
from parallel_decode.testing import check_system
from tests.systems import SCHEDULES


def load_example(name: str) -> Any:
    path = Path(__file__).parent.parent / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def seen(reads: Reads) -> Tensor:
    """Which keys each query sees, shape (B or 1, T, stop)."""
    if reads.mask is not None:
        return reads.mask.reshape(-1, reads.size, reads.stop)
    if reads.causal:
        return torch.ones(1, reads.size, reads.stop).tril().bool()
    return torch.ones(1, reads.size, reads.stop, dtype=torch.bool)


def check_reads(reads: Reads, positions: Tensor, must_read: Tensor, length: int, prefix: int) -> None:
    """Against the definition: position l is computed at input prefix + l - 1, which sees the inputs up to its own.

    Args:
        reads: of a window.
        positions: of each row, shape (B, W).
        must_read: inputs of each row that the cache does not hold, shape (B, P + L) of bool.
    """
    batch = len(positions)
    inputs = reads.take(torch.arange(prefix + length).expand(batch, -1))
    assert inputs.shape == (batch, reads.size)
    assert torch.equal(reads.inputs().expand(batch, -1), inputs) and (inputs >= reads.first).all()
    visible = seen(reads).expand(batch, -1, -1)
    assert torch.equal(reads.visible().expand(batch, 1, -1, -1)[:, 0], visible)
    assert torch.equal(visible, torch.arange(reads.stop) <= inputs[..., None])
    assert torch.equal(reads.embedding(torch.arange(prefix + length)).expand(batch, -1), inputs)
    computed = [[p for p in row if prefix or p] for row in positions.tolist()]
    at, expected = reads.outputs(inputs[..., None])[..., 0], torch.full_like(positions, -1)
    targets = reads.targets(torch.arange(length).expand(batch, -1))
    whole = reads.complete(at[..., None], expected.new_full((batch, length, 1), -7))[..., 0]
    for row, wanted in enumerate(computed):
        assert at[row, -len(wanted) :].tolist() == [prefix + p - 1 for p in wanted] or not wanted
        assert targets[row, -len(wanted) :].tolist() == wanted or not wanted
        given = [prefix + p - 1 if prefix or p else -7 for p in positions[row].tolist()]
        assert whole[row].tolist() == given
        needed = must_read[row].clone()
        needed[reads.stop :] = False
        assert set(needed.nonzero()[:, 0].tolist()) <= set(inputs[row].tolist())
    storage = torch.zeros(batch, prefix + length)
    reads.write(storage, torch.ones(batch, reads.size))
    assert torch.equal(storage.nonzero()[:, 1].view(batch, -1), inputs)


@pytest.mark.parametrize("prefix", [0, 1, 3])
@pytest.mark.parametrize("length", [1, 2, 5])
def test_reads_of_every_window(prefix: int, length: int) -> None:
    for start, width, step in product(range(length), range(1, length + 1), (1, 2, 3)):
        p = range(start, min(length, start + width), step)
        for changed, known in product(range(start + 1), range(prefix + start + 1)):
            reads = Reads.of(pd.Window(p, changed), length, prefix, known)
            must = torch.zeros(2, prefix + length, dtype=torch.bool)
            must[:, min(prefix + changed, known) :] = True
            check_reads(reads, torch.tensor([list(p)] * 2), must, length, prefix)


@pytest.mark.parametrize("prefix", [0, 1, 3])
@pytest.mark.parametrize("length", [2, 6])
def test_reads_of_rows_with_windows_of_their_own(prefix: int, length: int) -> None:
    for width, start in product(range(1, length + 1), range(length)):
        room = length - width - start
        if room < 0:
            continue
        shift = torch.tensor([0, room // 2, room])
        for changed, known in product(range(start + 1), (0, prefix + start)):
            window = pd.Window(range(start, start + width), changed, shift)
            reads = Reads.of(window, length, prefix, known)
            assert isinstance(reads, RowReads)
            at = torch.arange(prefix + length)
            # each row has what is before its own first change, unless the cache is new
            row_known = prefix + changed + shift if known >= prefix + changed else torch.full_like(shift, known)
            must = at >= row_known[:, None]
            must &= at < prefix + start + shift[:, None] + width - 1
            check_reads(reads, window.indices(), must, length, prefix)
            check_reads(reads.repeat(2), window.indices().repeat(2, 1), must.repeat(2, 1), length, prefix)


@pytest.mark.parametrize("shift", [None, torch.tensor([0, 1])], ids=["shared", "of its own"])
def test_too_few_inputs_are_refused_not_sliced(shift: Tensor | None) -> None:
    reads = Reads.of(pd.Window(range(3, 5), 2, shift), length=8, prefix=10, known=12)
    assert reads.take(torch.zeros(2, 17)).shape == reads.take(torch.zeros(2, 18)).shape == (2, reads.size)
    short: Callable[[], Tensor]
    for short in (lambda: reads.take(torch.zeros(2, 16)), lambda: reads.embedding(torch.zeros(16, 3))):
        with pytest.raises(ValueError, match=r"16 inputs.*expected at least 17"):
            short()
    storage = KeyValueStorage()
    storage.claim("me", inputs=12)
    with pytest.raises(ValueError, match="claim P"):
        storage.update(0, torch.zeros(2, reads.size, 2, 1, 1), reads)


def test_values_that_are_not_finite_are_not_kept_where_rows_differ() -> None:
    reads = RowReads(torch.tensor([[1], [2]]), width=2, before=1, stop=4, length=5)
    storage = torch.zeros(2, 5)
    reads.write(storage, torch.tensor([[1.0, torch.nan], [torch.inf, 2.0]]))
    assert storage.isfinite().all()


@dataclass(frozen=True)
class Claimed:
    """What changes between two evaluations, and whether the cache is still known then."""

    what: str
    known: bool


CASES = [Claimed("nothing", True), Claimed("owner", False), Claimed("inputs", False), Claimed("solve", False), Claimed("released", False)]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.what)
def test_what_is_known_after(case: Claimed) -> None:
    storage, me = KeyValueStorage(), object()
    with Claim(storage) as claim:
        claim.evaluating = True
        assert storage.claim(me, inputs=4) == 0
        keys, _ = storage.update(0, torch.ones(2, 3, 2, 1, 2), Reads(pd.Window(range(4), 0), 4))
        assert keys.shape == (2, 1, 3, 2) and storage.kv[0].sum() == 2 * 3 * 2 * 2
        if case.what == "released":
            storage.release()
        if case.what != "solve":
            known = storage.claim(object() if case.what == "owner" else me, inputs=5 if case.what == "inputs" else 4)
    if case.what == "solve":
        with Claim(storage) as claim:
            claim.evaluating = True
            known = storage.claim(me, inputs=4)
    assert known == (3 if case.known else 0)
    assert bool(storage.kv[0].any()) == case.known


@pytest.mark.parametrize("kv", [torch.ones(3, 3, 2, 1, 2), torch.ones(2, 3, 2, 1, 2).double()], ids=["batch", "dtype"])
def test_another_batch_or_dtype_is_not_mixed_with_what_is_known(kv: Tensor) -> None:
    storage, reads = KeyValueStorage(), Reads(pd.Window(range(4), 0), 4)
    for values in (torch.ones(2, 3, 2, 1, 2), kv):
        storage.claim(values, inputs=4)
        storage.update(0, values, reads)  # another owner may have another shape
        assert storage.kv[0].shape[0] == len(values) and storage.kv[0].dtype == values.dtype
    storage.claim(kv, inputs=4)
    with pytest.raises(RuntimeError, match=r"release\(\) it first"):
        storage.update(0, torch.ones(2, 3, 2, 1, 2), reads)


def test_gradients_are_not_cut_off_silently() -> None:
    storage = KeyValueStorage()
    storage.claim("me", inputs=4)
    with pytest.raises(RuntimeError, match="need a gradient"):
        storage.update(0, torch.ones(2, 3, 2, 1, 2, requires_grad=True), Reads(pd.Window(range(4), 0), 4))


def test_rows_that_remain_take_the_cache_along() -> None:
    storage, reads = KeyValueStorage(), Reads(pd.Window(range(3), 0), 3)
    storage.claim("all", inputs=3)
    for layer in range(2):
        storage.update(layer, torch.arange(3.0)[:, None, None, None, None].expand(3, 2, 2, 1, 1), reads)
    storage.select(torch.tensor([2, 0]), "another", "subset")
    assert len(storage.kv[0]) == 3, "it was not the other's to give away"
    storage.select(torch.tensor([2, 0]), "all", "subset")
    assert storage.claim("subset", inputs=3) == 2
    assert [layer[:, 0, 0, 0, 0].tolist() for layer in storage.kv] == [[2, 0], [2, 0]]


def test_rows_that_remain_may_be_of_fewer_layers_than_an_owner_before_had() -> None:
    """Whose deeper layers hold rows of another batch."""
    storage, reads = KeyValueStorage(), Reads(pd.Window.full(3), 3)
    for owner, layers, rows in (("deep", 2, 1), ("shallow", 1, 4)):
        storage.claim(owner, inputs=3)
        for layer in range(layers):
            storage.update(layer, torch.ones(rows, 2, 2, 1, 4), reads)
    storage.select(torch.tensor([1, 3]), "shallow", "subset")
    assert [len(kv) for kv in storage.kv] == [2, 1]


# the worked example


def continuation(batch: int = 3, prompt: int = 5, length: int = 20) -> Any:
    module = load_example("cached_transformer")
    torch.manual_seed(0)
    model = module.Transformer(vocabulary=16).double()
    return module.Continuation(model, torch.randint(16, (batch, prompt)), length)


def test_the_cached_transformer_keeps_the_promises_of_a_system() -> None:
    system = continuation()
    check_system(system, points=torch.randint(16, (3, 20), generator=torch.Generator().manual_seed(1)))


@torch.no_grad()
def test_the_cached_transformer_by_every_schedule() -> None:
    system = continuation()
    text = system.prompt
    for _ in range(system.length):  # without a window or a cache
        storage, reads = KeyValueStorage(), Reads(pd.Window(range(1), 0), 1, text.shape[1])
        storage.claim(text, inputs=text.shape[1] + 1)
        text = torch.cat([text, system.model(text, reads, storage).argmax(-1)], 1)
    for schedule in (*SCHEDULES, pd.Sliding(3, per_row=True), "auto"):
        assert torch.equal(pd.solve(system, schedule).value, text[:, 5:]), schedule


def test_weights_that_changed_between_solves_are_seen() -> None:
    system = continuation()
    pd.solve(system, pd.Sliding(4))
    with torch.no_grad():
        for parameter in system.model.parameters():
            parameter.mul_(1.5)
    assert torch.equal(pd.solve(system, pd.Sliding(4)).value, pd.solve(continuation_with(system), "sequential").value)


def continuation_with(system: Any) -> Any:
    return type(system)(system.model, system.prompt, system.length)
