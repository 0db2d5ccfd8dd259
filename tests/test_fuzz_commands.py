"""Bad command lines end in one line, and neither kills nor full disks leave anything half-written."""

import multiprocessing
import random
import resource
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from paper_repro import training_state
from paper_repro.__main__ import app as paper
from parallel_decode._command_line import Command
from parallel_decode._outputs import check_output
from parallel_decode.adapters.tarflow import TarFlow
from parallel_decode.adapters.tarflow import cli as tarflow
from parallel_decode.cli import app
from tests.fuzz_commands import LEAST, QUICK, Case, cases, complaint, prepare, train

FILES = ("config.json", "model.safetensors", "log.jsonl")
TRAIN = ["train", *LEAST["train"].format(out="done").split()]


@pytest.fixture
def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    prepare(images=False)
    return tmp_path


def invoke(*words: str) -> Any:
    program = paper if words[0] == "train" else app
    return CliRunner().invoke(program, words)


def says(result: Any, part: str, code: int = 2) -> bool:
    return result.exit_code == code and part in result.stderr.splitlines()[-1]


def test_bad_command_lines_end_in_one_line(prepared: Path) -> None:
    chosen = random.Random(0).sample(list(cases(QUICK)), 80)
    assert [f"{case.words}: {what}" for case in chosen if (what := complaint(case))] == []


@pytest.mark.slow
def test_all_bad_command_lines_end_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    prepare(images=True)
    everything = list(cases())
    assert len(everything) > 900
    assert [f"{case.words}: {what}" for case in everything if (what := complaint(case))] == []


def test_the_fuzzer_sees_tracebacks_silence_and_files_left_behind(
    prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case("parallel-decode", ("sample", *LEAST["sample"].format(out="out").split()))
    assert complaint(case) is None

    def fails(error: Exception) -> Any:
        def files(out: Path, n: int) -> list[Path]:
            Path("left").write_text("")
            raise error

        return files

    monkeypatch.setattr(tarflow, "_files", fails(KeyError("a bug")))
    assert "raised KeyError" in (complaint(case) or "")
    monkeypatch.setattr(tarflow, "_files", fails(RuntimeError("a bug")))
    assert "raised RuntimeError" in (complaint(case) or "")
    monkeypatch.setattr(tarflow, "_files", fails(ValueError("an error of the user")))
    assert "left ['left']" in (complaint(case) or "")
    monkeypatch.setattr(tarflow, "_files", fails(ValueError("")))
    assert "exit code 2 and stderr" in (complaint(case) or "")


def test_every_command_is_checked() -> None:
    for commands in (app, paper):
        assert commands.registered_commands
        for command in commands.registered_commands:
            assert command.cls is Command


def test_outputs_are_checked_before_the_work(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TarFlow, "from_checkpoint", None)  # would be a TypeError
    Path("taken/grid.png").mkdir(parents=True)
    Path("taken/bench.json").mkdir()
    Path("taken/probe.png").mkdir()
    for command in ("sample", "bench", "probe"):
        for out, part in (("file/x", "cannot be written: file is not a folder"), ("taken", "is a folder, expected")):
            result = invoke(command, "--checkpoint", "a.pth", "--out", out)
            assert says(result, part), result.output
    with pytest.raises(ValueError, match="would take 1,000,000,000,000,000,000 bytes"):
        check_output(Path("new/folder"), 10**18)


def test_images_of_another_run_are_not_mixed_with_new_ones(prepared: Path) -> None:
    words = ["sample", "--out", "out", "--checkpoint", "a.pth", "--schedule", "sequential"]
    assert invoke(*words, "--n", "3").exit_code == 0
    assert says(invoke(*words, "--n", "2"), "holds 0002.png of another run")
    assert says(invoke(*words, "--n", "2", "--shard-size", "64"), "holds 0000.png of another run")
    assert invoke(*words, "--n", "3").exit_code == 0
    assert invoke(*words[:2], "shards", *words[3:], "--n", "2", "--shard-size", "64").exit_code == 0
    assert says(invoke(*words[:2], "shards", *words[3:], "--n", "2"), "holds manifest.json of another run")
    assert says(invoke(*words[:2], "new", *words[3:], "--n", str(10**14)), "bytes, and")
    assert not Path("new").exists()


@pytest.mark.parametrize("command", ["sample", "bench", "probe", "train"])
def test_a_full_disk_leaves_no_file_half_written(command: str, prepared: Path) -> None:
    words = f"{command} {LEAST[command]}".format(out="out").split()
    words += ["--out", "out"] * (command == "bench")
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, most))
    try:
        result = invoke(*words)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    assert says(result, "File too large"), result.output
    assert not Path("out").exists() or not any(Path("out").iterdir())


@pytest.mark.parametrize("command", ["sample", "train"])
def test_an_interrupt_ends_in_one_line(command: str, prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tarflow, "save", interrupted)
    monkeypatch.setattr(training_state, "publish", interrupted)
    result = invoke(*f"{command} {LEAST[command]}".format(out="out").split())
    assert says(result, "interrupted: the files that were written are whole", code=130), result.output
    assert [file.name for file in Path("out").iterdir()] == (["state.pt"] if command == "train" else [])


def damaged(content: bytes) -> list[bytes]:
    """A state cut off, with a byte changed, or of somebody else."""
    cuts = [content[: len(content) * part // 16] for part in range(16)]
    places = random.Random(0).sample(range(len(content)), 12)
    changed = [content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :] for at in places]
    return [*cuts, *changed, content + b"\0", content[:-32], b"something else", b"PK\3\4" + bytes(100), bytes(100)]


def test_damaged_states_are_refused_in_one_line(prepared: Path) -> None:
    assert invoke(*TRAIN).exit_code == 0
    state = Path("done/state.pt")
    content = state.read_bytes()
    for other in damaged(content):
        state.write_bytes(other)
        assert says(invoke(*TRAIN, "--resume"), "state.pt is damaged, or of another version")
    state.unlink()
    state.mkdir()
    assert says(invoke(*TRAIN, "--resume"), "state.pt")


def test_states_of_other_settings_are_refused_in_one_line(prepared: Path) -> None:
    assert invoke(*TRAIN).exit_code == 0
    for option, value, name in (
        ("--channels", "128", "config"),
        ("--no-nvp", "", "config"),
        ("--noise-std", "0.2", "config"),
        ("--data", "leaves", "data"),
        ("--batch-size", "4", "batch_size"),
        ("--drop-label", "0.5", "drop_label"),
        ("--ema", "0.5", "ema"),
        ("--seed", "1", "seed"),
    ):
        result = invoke(*TRAIN, "--resume", option, *[value] * bool(value))
        assert says(result, "does not go with") and name in result.stderr.splitlines()[-1]
    assert says(invoke(*TRAIN), "pass --resume to go on with it")
    assert says(invoke(*TRAIN[:2], "new", *TRAIN[3:], "--noise-std", "1e25"), "the loss is")
    assert not Path("new/state.pt").exists()


def begin(context: Any, folder: Path, *, resume: bool, replacements: int | None = None) -> Any:
    process = context.Process(target=train, args=(str(folder), resume, replacements))
    process.start()
    return process


def whole(context: Any, folder: Path) -> dict[str, bytes]:
    """The files of a training that is gone on with to its end."""
    process = begin(context, folder, resume=(folder / "state.pt").exists())
    process.join()
    assert process.exitcode == 0
    assert sorted(file.name for file in folder.iterdir()) == sorted([*FILES, "state.pt"])
    return {name: (folder / name).read_bytes() for name in FILES}


@pytest.fixture(scope="module")
def context() -> Any:
    """Processes that have imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.fuzz_commands", "sklearn.datasets", "torch._dynamo"])
    return context


@pytest.fixture(scope="module")
def unkilled(context: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    files = whole(context, tmp_path_factory.mktemp("unkilled") / "out")
    assert files["log.jsonl"].count(b"\n") == 6
    return files


@pytest.mark.parametrize("replacements", [1, 2, 7])
def test_a_kill_between_two_files_of_a_training_loses_nothing(
    replacements: int, context: Any, unkilled: dict[str, bytes], tmp_path: Path
) -> None:
    process = begin(context, tmp_path / "out", resume=False, replacements=replacements)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert whole(context, tmp_path / "out") == unkilled


@pytest.mark.slow
def test_thirty_kills_of_a_training_lose_nothing(context: Any, unkilled: dict[str, bytes], tmp_path: Path) -> None:
    draws, kills = random.Random(0), 0
    began = time.perf_counter()
    whole(context, tmp_path / "timed")
    seconds = time.perf_counter() - began
    while kills < 30:
        folder = tmp_path / str(kills)
        process = begin(context, folder, resume=False)
        time.sleep(draws.uniform(0, seconds))
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        assert whole(context, folder) == unkilled, f"kill {kills}"
