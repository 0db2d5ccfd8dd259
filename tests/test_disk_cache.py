"""What is kept for other processes: nothing that is damaged, half written or meant for something else is ever recalled."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from parallel_decode import _disk_cache
from parallel_decode._fingerprint import fingerprint
from parallel_decode.adapters.causal_lm import model_check
from parallel_decode.adapters.causal_lm.prompt import Prompt


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PARALLEL_DECODE_CACHE", str(tmp_path / "kept"))
    return tmp_path / "kept"


def test_a_value_comes_back_under_its_kind_and_key_alone() -> None:
    _disk_cache.remember("kind", "key", ["a", None, 3])
    assert _disk_cache.recall("kind", "key") == ["a", None, 3]
    assert _disk_cache.recall("kind", "other") is _disk_cache.recall("other", "key") is None
    _disk_cache.remember("kind", "key", 4)
    assert _disk_cache.recall("kind", "key") == 4


@pytest.mark.parametrize("content", [b"", b"\xff", b"3", b"[]", b"{}", b'{"name": 1, "value": 2}', b"[" * 100_000])
def test_damaged_files_are_not_recalled_and_written_anew(folder: Path, content: bytes) -> None:
    _disk_cache.remember("kind", "key", 1)
    (file,) = folder.rglob("*.json")
    file.write_bytes(content)
    assert _disk_cache.recall("kind", "key") is None
    _disk_cache.remember("kind", "key", 2)
    assert _disk_cache.recall("kind", "key") == 2


def test_every_cut_of_a_file_is_noticed(folder: Path) -> None:
    _disk_cache.remember("kind", "key", "value")
    (file,) = folder.rglob("*.json")
    whole = file.read_bytes()
    for size in range(len(whole)):
        file.write_bytes(whole[:size])
        assert _disk_cache.recall("kind", "key") is None


def test_off_and_unwritable_folders_are_silent(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARALLEL_DECODE_CACHE", "off")
    _disk_cache.remember("kind", "key", 1)
    assert not folder.exists() and _disk_cache.recall("kind", "key") is None
    folder.write_text("a file where the folder would be")
    monkeypatch.setenv("PARALLEL_DECODE_CACHE", str(folder))
    _disk_cache.remember("kind", "key", 1)
    assert _disk_cache.recall("kind", "key") is None


def test_the_folder_is_the_users_and_without_platformdirs_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PARALLEL_DECODE_CACHE")
    found = _disk_cache.folder()
    assert found is not None and found.name == "parallel_decode"
    monkeypatch.setitem(sys.modules, "platformdirs", None)
    assert _disk_cache.folder() is None


def test_the_oldest_files_go(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_disk_cache, "MOST", 5)
    for number in range(12):
        _disk_cache.remember("kind", str(number), number)
    assert len(list(folder.rglob("*"))) <= 6  # the folder of the kind, too
    assert _disk_cache.recall("kind", "11") == 11 and _disk_cache.recall("kind", "0") is None


def test_processes_that_write_at_once_leave_one_whole_value(folder: Path) -> None:
    text = "import sys; from parallel_decode import _disk_cache\nfor _ in range(200): _disk_cache.remember('kind', 'key', sys.argv[1] * 1000)"
    writers = [subprocess.Popen([sys.executable, "-c", text, letter]) for letter in "abc"]
    while any(writer.poll() is None for writer in writers):
        value = _disk_cache.recall("kind", "key")
        assert value is None or value in ("a" * 1000, "b" * 1000, "c" * 1000)
    assert [writer.returncode for writer in writers] == [0, 0, 0]
    assert [file.suffix for file in (folder / "kind").iterdir()] == [".json"]


# Trials of language models --------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Grows by every check that is made; what this process knows is forgotten before each."""
    made: list[Any] = []
    original = model_check._check

    def counted(*args: Any) -> model_check.Trust:
        made.append(args)
        return original(*args)

    monkeypatch.setattr(model_check, "_check", counted)
    yield made


def checked(model: Any, padded: bool = False) -> model_check.Trust:
    model_check._KNOWN.clear()
    return model_check.ModelCheck(model, Prompt(torch.arange(3, 15)[None], 0), {}, padded).result()


def model(seed: int = 0, kind: str = "Llama", **more: Any) -> Any:
    torch.manual_seed(seed)
    small = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = getattr(transformers, f"{kind}Config")(**small, num_attention_heads=4, **more)
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


@pytest.mark.filterwarnings("ignore:.*quantize:UserWarning", "ignore:torch.ao.quantization:DeprecationWarning")
def test_any_model_has_a_fingerprint() -> None:
    """Also of weights that are no tensors, or elsewhere, and not the same for other weights."""
    quantize: Any = torch.ao.quantization.quantize_dynamic
    offloaded, sparse = model(), torch.nn.Embedding(3, 4)
    offloaded.model.layers[0].mlp.to("meta")
    sparse.weight = torch.nn.Parameter(sparse.weight.detach().to_sparse())
    models = [model(), model(1), model().to(torch.bfloat16), offloaded, sparse, quantize(model(), {torch.nn.Linear})]
    assert len({fingerprint(each) for each in models}) == len(models)
    assert fingerprint(model()) == fingerprint(model())


def test_another_process_recalls_a_check(forwards: list[Any]) -> None:
    found = checked(model())
    assert checked(model()) == found == model_check.Trust() and len(forwards) == 1


def test_what_a_check_found_wrong_is_recalled_too(forwards: list[Any]) -> None:
    mpt: Any = transformers.MptForCausalLM(transformers.MptConfig(d_model=32, n_heads=4, n_layers=2, vocab_size=64))
    first, again = checked(mpt.eval()), checked(mpt)
    assert first == again and first.no_rows and len(forwards) == 1


def test_whatever_could_change_the_answer_is_checked_anew(forwards: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of these is another model as far as a check goes."""

    def patched(self: Any, *args: Any, **kwargs: Any) -> Any:
        return original(self, *args, **kwargs)

    def double() -> Any:
        return model().double()

    def eager() -> Any:
        made = model()
        made.set_attn_implementation("eager")
        return made

    def training() -> Any:
        return model(attention_dropout=0.0).train()

    checked(model())
    others = [
        lambda: model(seed=1),
        lambda: model(num_key_value_heads=2),
        lambda: model(kind="Mistral", num_key_value_heads=4),
        double,
        eager,
        training,
    ]
    for number, other in enumerate(others, 2):
        checked(other())
        assert len(forwards) == number, other
    checked(model(), padded=True)
    assert len(forwards) == number + 1
    theirs = vars(model_check)["transformers"]  # diffusers may have put another module in its place for us
    monkeypatch.setattr(theirs, "__version__", "another")
    checked(model())
    assert len(forwards) == number + 2
    attention = type(model().model.layers[0].self_attn)
    original = attention.forward
    monkeypatch.setattr(attention, "forward", patched)  # as libraries of faster kernels do
    checked(model())
    assert len(forwards) == number + 3


def test_hooks_and_modules_of_ones_own_are_not_remembered(forwards: list[Any], folder: Path) -> None:
    class Own(torch.nn.Linear):
        """With code that no version tells anything about."""

    hooked, replaced, own, broken = (model() for _ in range(4))
    own.model.layers[0].mlp.up_proj.__class__ = Own
    with torch.no_grad():
        broken.model.norm.weight.fill_(torch.nan)
    hooked.model.layers[0].register_forward_hook(lambda *args: None)
    mlp = replaced.model.layers[0].mlp
    mlp.forward = lambda x, forward=mlp.forward: forward(x)
    for number, other in enumerate((hooked, hooked, replaced, replaced, own, own, broken, broken), 1):
        checked(other)
        assert len(forwards) == number
    assert not folder.exists()


@pytest.mark.parametrize("value", [None, 3, [], ["", ""], ["", "", 3], [1, "", None], ["", "", None, None], {"a": 1}])
def test_what_is_no_answer_is_not_believed(value: Any, forwards: list[Any], folder: Path) -> None:
    checked(model())
    (file,) = folder.rglob("*.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"value": value}))
    assert checked(model()) == model_check.Trust() and len(forwards) == 2
