"""Damaged files are refused by one error that names them, quickly, in little memory, and without running what they hold."""

import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import parallel_decode as pd
from parallel_decode.adapters.tarflow import TarFlow
from tests.flows import flow

ROOT = Path(__file__).parents[1]


def fuzz(count: int, plans: int, stride: int) -> None:
    words = ["--count", count, "--plans", plans, "--stride", stride]
    command = [sys.executable, "-m", "tests.fuzz_files", *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0 and f"{count + plans} files" in done.stdout, done.stdout[-5000:] + done.stderr[-5000:]


def test_no_damaged_file_gives_a_raw_error_hangs_or_takes_memory() -> None:
    fuzz(150, 60, stride=13)


@pytest.mark.slow
def test_no_damaged_file_of_thousands_does() -> None:
    fuzz(2000, 500, stride=1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_of_other_precisions_are_converted(tmp_path: Path, dtype: torch.dtype, suffix: str) -> None:
    made, path = flow(num_classes=3), tmp_path / f"model{suffix}"
    state = {name: value.to(dtype) for name, value in made.state_dict().items()}
    if suffix == ".pth":
        torch.save(state, path)
    else:
        save_file(state, path)
    loaded = TarFlow.from_checkpoint(path).state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(value, state[name].float()) for name, value in loaded.items())


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_flow_does_not_change_with_the_file_it_came_from(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"model{suffix}"
    state = flow().float().state_dict()
    if suffix == ".pth":
        torch.save(state, path)
    else:
        save_file(state, path)
    loaded = TarFlow.from_checkpoint(path)
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    assert all(p.requires_grad for p in loaded.parameters())
    loaded.log_prob(torch.zeros(1, 1, 8, 8)).sum().backward()  # type: ignore[no-untyped-call]  # trains as one that was made


def test_parameters_that_were_saved_as_such_load(tmp_path: Path) -> None:
    made = flow().float()
    torch.save(made.state_dict(keep_vars=True), tmp_path / "model.pth")
    assert torch.equal(TarFlow.from_checkpoint(tmp_path / "model.pth").var, made.var)


def test_a_file_of_more_than_weights_says_what_to_do(tmp_path: Path) -> None:
    torch.save({"state_dict": flow().state_dict(), "epoch": 3}, tmp_path / "training.pth")
    with pytest.raises(ValueError, match=r"holds a \w+ as 'state_dict', expected .* save the state dict alone"):
        TarFlow.from_checkpoint(tmp_path / "training.pth")


def test_a_compressed_checkpoint_is_refused_by_that_reason(tmp_path: Path) -> None:
    torch.save(flow().state_dict(), tmp_path / "model.pth")
    with zipfile.ZipFile(tmp_path / "model.pth") as stored, zipfile.ZipFile(tmp_path / "small.pth", "w", 8) as small:
        for name in stored.namelist():
            small.writestr(name, stored.read(name))
    with pytest.raises(ValueError, match=r"small.pth .* is compressed, which torch.save never does"):
        TarFlow.from_checkpoint(tmp_path / "small.pth")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"img_size": -8}, ValueError, "img_size is -8, expected at least 1"),
        ({"num_blocks": 0}, ValueError, "num_blocks is 0"),
        ({"channels": "64"}, TypeError, "channels is '64', expected a whole number"),
        ({"nvp": 1}, TypeError, "nvp is 1, expected True or False"),
        ({"num_classes": -1}, ValueError, "num_classes is -1"),
        ({"noise_std": torch.inf}, ValueError, "noise_std is inf, expected a finite number"),
        ({"noise_std": torch.nan}, ValueError, "noise_std is nan"),
        ({"noise_std": True}, TypeError, "noise_std is True"),
    ],
)
def test_a_flow_of_impossible_arguments_is_refused(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    sizes = dict(in_channels=1, img_size=8, patch_size=2, channels=64, num_blocks=1, layers_per_block=1)
    with pytest.raises(error, match=message):
        TarFlow(**sizes | options)


def test_a_plan_that_cannot_be_written_leaves_the_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.json"
    pd.Plan(("jacobi",)).save(path)
    (tmp_path / "link.json").symlink_to(path)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space left"):
        patched.setattr(Path, "write_text", full)
        pd.Plan(("sequential",)).save(path)
    assert pd.Plan.load(path).layers == (pd.Jacobi(),)
    pd.Plan(("sequential",)).save(tmp_path / "link.json")
    assert (tmp_path / "link.json").is_symlink() and pd.Plan.load(path).layers == (pd.Sequential(),)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["link.json", "plan.json"]
    with pytest.raises(ValueError, match="expected at most"):
        pd.Plan(("jacobi",) * 100_000).save(path)
    assert pd.Plan.load(path).layers == (pd.Sequential(),)
