"""Data and training of the digits."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from paper_repro.__main__ import app
from paper_repro.data import Digits, Photographs
from paper_repro.train import _batch, _seed, held_out_loss, rate, train
from parallel_decode.adapters.tarflow import TarFlow

CONFIG = dict(
    in_channels=1, img_size=16, patch_size=4, channels=64, num_blocks=2, layers_per_block=1, num_classes=10, noise_std=0.1
)  # fmt: skip
ROOT = Path(__file__).parent.parent
OPTIONS: dict[str, Any] = dict(steps=6, batch_size=8, lr=1e-3, save_every=2)


def test_digits_are_drawn_in_range_and_held_out() -> None:
    data = Digits()
    assert len(data.labels) + len(data.held_out_labels) == 1797 and len(data.held_out_labels) == 179
    x, y = data.batch(500, torch.Generator().manual_seed(0))
    assert x.shape == (500, 1, 16, 16) and x.min() == -1 and 0.9 < x.max() <= 1 and set(y.tolist()) == set(range(10))
    upright, _ = data.held_out()
    small = torch.nn.functional.avg_pool2d(upright, 2)
    assert (small - data.held_out_images).abs().mean() < 0.15


def test_photographs_are_cropped_in_range_and_held_out() -> None:
    data = Photographs()
    x, y = data.batch(64, torch.Generator().manual_seed(0))
    assert x.shape == (64, 3, 32, 32) and y is None and -1 <= x.min() < -0.9 and 0.9 < x.max() <= 1
    again, _ = data.batch(64, torch.Generator().manual_seed(0))
    assert torch.equal(x, again) and x.std((1, 2, 3)).min() > 0
    held_out, _ = data.held_out()
    assert held_out.shape == (256, 3, 32, 32) and torch.equal(held_out, data.held_out()[0])


def test_a_flow_without_classes_trains(tmp_path: Path) -> None:
    config = CONFIG | {"in_channels": 3, "img_size": 32, "patch_size": 8, "num_classes": 0}
    lines = list(train(tmp_path, Photographs(), config, **OPTIONS | {"lr": 1e-2}))
    assert lines[-1]["held_out"] < lines[0]["held_out"]


def test_rate_rises_then_falls_to_zero() -> None:
    rates = [rate(step, 1000) for step in range(1001)]
    assert rates[0] == pytest.approx(0.01) and max(rates) > 0.97 and rates[-1] == 0
    assert rates.index(max(rates)) in range(90, 110)


def test_training_learns_and_resumes_where_it_stopped(tmp_path: Path) -> None:
    data = Digits()
    whole = list(train(tmp_path / "whole", data, CONFIG, **OPTIONS))
    assert [line["step"] for line in whole] == [2, 4, 6] and whole[-1]["held_out"] < whole[0]["held_out"]
    for _ in train(tmp_path / "parts", data, CONFIG, **OPTIONS):
        break  # stopped after the first save
    list(train(tmp_path / "parts", data, CONFIG, **OPTIONS, resume=True))
    first, second = (TarFlow.from_checkpoint(tmp_path / name) for name in ("whole", "parts"))
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))
    assert held_out_loss(first, data, 0.1) == whole[-1]["held_out"]


def test_an_average_of_the_weights_is_what_is_saved_and_resumed(tmp_path: Path) -> None:
    options = OPTIONS | {"ema": 0.5, "lr": 1e-2}
    whole = list(train(tmp_path / "whole", Digits(), CONFIG, **options))
    plain = list(train(tmp_path / "plain", Digits(), CONFIG, **options | {"ema": 0.0}))
    assert whole[-1]["loss"] == plain[-1]["loss"] and whole[-1]["held_out"] != plain[-1]["held_out"]
    for _ in train(tmp_path / "parts", Digits(), CONFIG, **options):
        break
    list(train(tmp_path / "parts", Digits(), CONFIG, **options, resume=True))
    first, second, third = (TarFlow.from_checkpoint(tmp_path / name) for name in ("whole", "parts", "plain"))
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))
    assert not all(torch.equal(p, q) for p, q in zip(first.parameters(), third.parameters(), strict=True))
    with pytest.raises(ValueError, match="with ema: resume as it was begun"):
        next(train(tmp_path / "parts", Digits(), CONFIG, **OPTIONS, resume=True))


def test_seeds_and_steps_have_batches_of_their_own() -> None:
    batches = [
        _batch(Digits(), 4, 0.1, 0.1, _seed(seed, step))[0]
        for seed, step in ((0, 0), (0, 1), (1, 0), (1, 1), (2**20, 1))
    ]
    for index, one in enumerate(batches):
        assert not any(torch.equal(one, other) for other in batches[:index])


def test_processes_share_a_batch(tmp_path: Path) -> None:
    """Two learn what one learns, up to rounding (in bfloat16, over half batches)."""
    words = [
        "-m",
        "paper_repro",
        "train",
        "--patch-size",
        "4",
        "--channels",
        "64",
        "--blocks",
        "2",
        "--layers",
        "1",
        "--steps",
        "6",
        "--batch-size",
        "8",
        "--save-every",
        "2",
    ]
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29511"]
    accelerate = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    accelerate += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "29512"]
    logs = []
    for number, launcher in enumerate(([], torchrun, accelerate)):
        out = tmp_path / str(number)
        subprocess.run(
            [sys.executable, *launcher, *words, "--out", str(out)], check=True, capture_output=True, cwd=ROOT
        )
        logs.append([json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()])
    assert [line["step"] for line in logs[0]] == [2, 4, 6]
    for log in logs[1:]:
        for one, other in zip(logs[0], log, strict=True):
            assert other["loss"] == pytest.approx(one["loss"], rel=5e-3)
            assert other["held_out"] == pytest.approx(one["held_out"], rel=5e-3)


def test_a_flow_that_only_shifts_learns_its_prior(tmp_path: Path) -> None:
    list(train(tmp_path, Digits(), CONFIG | {"nvp": False}, **OPTIONS))
    assert (TarFlow.from_checkpoint(tmp_path).var != 1).all()


def test_nothing_is_overwritten_unasked(tmp_path: Path) -> None:
    list(train(tmp_path / "done", Digits(), CONFIG, **OPTIONS))
    for words, message in (
        (["--out", str(tmp_path / "done")], "pass --resume to go on with it"),
        (["--out", str(tmp_path / "new"), "--resume"], "there is nothing to resume"),
    ):
        result = CliRunner().invoke(app, ["train", *words], env={"COLUMNS": "200"})
        assert result.exit_code == 2 and message in result.output
