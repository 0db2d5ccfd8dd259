"""The command line, as a user types it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread
from typer.testing import CliRunner

from parallel_decode.adapters.tarflow import TarFlow, digits
from parallel_decode.cli import app


def run(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "120"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    torch.save(TarFlow(3, 8, 2, 64, 2, 1, num_classes=3).state_dict(), tmp_path / "model.pth")
    return tmp_path / "model.pth"


def test_demo(tmp_path: Path) -> None:
    code, output = run("demo", "--out", tmp_path / "demo.png", "--runs", 1, "--n", 4, "--learn", 1)
    assert code == 0 and "1 digit, " in output and "4 digits, " in output
    for row in ("as published", "sequential", "jacobi", "selective", "auto", "256 256 256 256", "1.00x", "0.0e+00"):
        assert output.count(row) >= 2, "of one digit, and of four"
    assert imread(tmp_path / "demo.png").std() > 0.1


def test_sample_writes_a_grid_and_single_images(tmp_path: Path, checkpoint: Path) -> None:
    words = ("--checkpoint", checkpoint, "--n", 3, "--schedule", "jacobi", "--classes", "2,0", "--guidance", 0.5)
    code, output = run("sample", "--out", tmp_path / "a", *words)
    assert code == 0 and "3 images in" in output and "3 x within tolerance" in output
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["0000.png", "0001.png", "0002.png", "grid.png"]
    assert imread(tmp_path / "a" / "0000.png").shape[:2] == (8, 8)
    assert imread(tmp_path / "a" / "grid.png").shape[:2] == (10, 30)
    run("sample", "--out", tmp_path / "b", *words)
    run("sample", "--out", tmp_path / "c", *words, "--seed", 1)
    images = [(tmp_path / name / "0001.png").read_bytes() for name in "abc"]
    assert images[0] == images[1] != images[2]


def test_sample_from_the_digits(tmp_path: Path) -> None:
    code, _ = run("sample", "--out", tmp_path / "out", "--n", 1, "--schedule", "sliding", "--tol", "0.1")
    assert code == 0 and (tmp_path / "out" / "grid.png").exists()


def test_clear_errors(tmp_path: Path, checkpoint: Path) -> None:
    truncated, foreign = tmp_path / "truncated.pth", tmp_path / "foreign.safetensors"
    truncated.write_bytes(checkpoint.read_bytes()[:1000])
    foreign.write_bytes(b"something else")
    for words, message in (
        (("--checkpoint", tmp_path / "missing.pth"), "missing.pth does not exist"),
        (("--checkpoint", truncated), "truncated.pth cannot be read as a checkpoint, it may be damaged"),
        (("--checkpoint", foreign), "foreign.safetensors cannot be read as a checkpoint"),
        (("--checkpoint", checkpoint, "--schedule", "fast"), "schedule is 'fast', expected one of"),
        (("--checkpoint", checkpoint, "--classes", "3"), "--classes is '3', expected numbers below 3"),
        (("--checkpoint", checkpoint, "--classes", "cat"), "--classes is 'cat', expected labels"),
        (("--checkpoint", checkpoint, "--device", "abacus"), "abacus"),
        (("--checkpoint", checkpoint, "--tol", "-1"), "tol is -1.0, expected a finite number"),
    ):
        code, output = run("sample", "--out", tmp_path / "out", *words)
        assert code == 2 and message in output.replace("\n", " ")
        assert not (tmp_path / "out").exists()


def test_the_commands_of_adapters_that_are_not_installed_are_left_out() -> None:
    """Without matplotlib there are no commands of flows, and the help says why."""
    block = "import sys; sys.modules['matplotlib'] = None; sys.argv = ['parallel-decode', '--help']; "
    done = subprocess.run(
        [sys.executable, "-c", block + "from parallel_decode.cli import app; app()"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert (
        "tarflow needs matplotlib" in " ".join(done.stdout.split()) and "demo" not in done.stdout.split("Left out")[0]
    )


def test_without_typer_the_command_line_says_what_it_needs() -> None:
    block = "import sys; sys.modules['typer'] = None; from parallel_decode.cli import app"
    done = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and 'pip install "parallel-decode[demo]"' in done.stderr


def test_adapters_without_commands_are_not_imported() -> None:
    check = "import sys, parallel_decode.cli as cli; assert not cli.LEFT_OUT; assert not {'transformers', 'zuko'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True)


def test_the_cache_is_shown_and_cleared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARALLEL_DECODE_CACHE", str(tmp_path / "kept"))
    assert run("cache") == (0, f"nothing in {tmp_path / 'kept'}\n")
    digits().sample(1, y=3)
    code, output = run("cache")
    assert code == 0 and output.startswith("auto: 4 files") and output.endswith(f"in {tmp_path / 'kept'}\n")
    assert "cleared" in run("cache", "--clear")[1]
    assert run("cache") == (0, f"nothing in {tmp_path / 'kept'}\n")
    monkeypatch.setenv("PARALLEL_DECODE_CACHE", "off")
    assert run("cache") == (0, "nothing is kept\n")
