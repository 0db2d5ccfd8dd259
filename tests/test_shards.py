"""Shards of images: the same whatever draws them, and nothing lost by kills, damage or values that are not finite."""

import json
import math
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import parallel_decode as pd
from parallel_decode.adapters.tarflow import TarFlow, digits
from parallel_decode.adapters.tarflow import shards as module
from parallel_decode.adapters.tarflow.shards import draw, images, noise
from parallel_decode.cli import app
from tests.flows import flow

FIXED: dict[str, Any] = dict(schedule="sequential", batch_size=3, shard_size=4, guidance=0.5)
CONTEXT = multiprocessing.get_context("forkserver")  # real processes, which import torch once
CONTEXT.set_forkserver_preload(["tests.test_shards"])


@pytest.fixture(scope="module")
def made() -> TarFlow:
    return flow(num_classes=3).float()


def files(folder: Path) -> dict[str, bytes]:
    """Everything but the manifest, which says how the first process drew."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}


def manifest(folder: Path) -> Any:
    return json.loads((folder / "manifest.json").read_bytes())


def levels(a: Path, b: Path) -> int:
    """The largest difference of two sets, in levels of 8 bits."""
    first, second = (torch.cat(list(images(folder))).int() for folder in (a, b))
    return int((first - second).abs().max())


def in_a_process(out: Path, count: int, options: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    draw(flow(num_classes=3).float(), out, count, **options)


def start(*arguments: Any) -> Any:
    process = CONTEXT.Process(target=in_a_process, args=arguments)
    process.start()
    return process


def test_two_processes_draw_the_bytes_that_one_draws(made: TarFlow, tmp_path: Path) -> None:
    made.save_pretrained(tmp_path / "flow")
    words = ["--n", "70", "--shard-size", "16", "--batch-size", "8", "--schedule", "jacobi", "--guidance", "0.5"]
    words = ["sample", "--checkpoint", str(tmp_path / "flow"), *words]
    alone = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "one")])
    assert alone.exit_code == 0 and "process 0 of 1 is done" in alone.output
    command = [
        sys.executable,
        "-c",
        "from parallel_decode.cli import app; app()",
        *words,
        "--out",
        str(tmp_path / "two"),
    ]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    both = [
        subprocess.Popen(
            command, env=os.environ | threads | {"RANK": str(rank), "WORLD_SIZE": "2"}, text=True, stderr=-1
        )
        for rank in range(2)
    ]
    for process in both:
        assert process.wait() == 0, process.communicate()[1]
        process.communicate()
    assert files(tmp_path / "one") == files(tmp_path / "two")
    assert set(files(tmp_path / "one")) == {"grid.png", *(f"shard-{number:05d}.safetensors" for number in range(5))}
    assert manifest(tmp_path / "one")["settings"] == manifest(tmp_path / "two")["settings"]
    assert [len(shard) for shard in images(tmp_path / "two")] == [16, 16, 16, 16, 6]


@pytest.mark.parametrize(("kills", "shards"), [(3, 30), pytest.param(20, 150, marks=pytest.mark.slow)])
def test_killed_processes_leave_the_full_set_and_nothing_is_drawn_twice(
    kills: int, shards: int, made: TarFlow, tmp_path: Path
) -> None:
    options: dict[str, Any] = dict(schedule="sequential", batch_size=1, shard_size=2)
    began = time.perf_counter()
    in_a_process(tmp_path / "calm", 2 * shards, options)
    each, chance = (time.perf_counter() - began) / shards, random.Random(0)
    out = tmp_path / "killed"
    written: dict[Path, int] = {}
    for _ in range(kills):
        process = start(out, 2 * shards, options)
        while len(list(out.glob("*.safetensors"))) == len(written) and process.is_alive():
            time.sleep(each / 10)
        time.sleep(chance.uniform(0, 3 * each))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "it was done before it was killed"
        for path, when in written.items():
            assert path.stat().st_mtime_ns == when, f"{path.name} was there, and was drawn again"
        written = {path: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
    assert 0 < len(written) < shards
    in_a_process(out, 2 * shards, options)
    assert files(out) == files(tmp_path / "calm")
    assert sum(map(len, images(out))) == 2 * shards


def test_processes_that_draw_the_same_shards_at_once_do_no_harm(tmp_path: Path) -> None:
    processes = [start(tmp_path / "raced", 40, FIXED) for _ in range(2)]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    in_a_process(tmp_path / "calm", 40, FIXED)
    assert files(tmp_path / "raced") == files(tmp_path / "calm")


@pytest.mark.parametrize("damage", ["truncated", "flipped", "of another shard"])
def test_a_damaged_shard_is_refused_and_drawn_anew(damage: str, made: TarFlow, tmp_path: Path) -> None:
    draw(made, tmp_path, 10, **FIXED)
    before, path = files(tmp_path), tmp_path / "shard-00001.safetensors"
    content = before[path.name]
    path.write_bytes(
        {
            "truncated": content[:-1],
            "flipped": content[:-1] + bytes([content[-1] ^ 1]),
            "of another shard": before["shard-00000.safetensors"],
        }[damage]
    )
    with pytest.raises(ValueError, match=r"shard-00001.safetensors is damaged, or of other settings"):
        list(images(tmp_path))
    kept = (tmp_path / "shard-00000.safetensors").stat().st_mtime_ns
    (tmp_path / "shard-00002.safetensors.abc.part").write_bytes(content[:100])  # a process was killed over it
    draw(made, tmp_path, 10, **FIXED)
    assert files(tmp_path) == before
    assert (tmp_path / "shard-00000.safetensors").stat().st_mtime_ns == kept


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed is 0 there and 1 here"),
        ({"count": 12}, "count is 10 there and 12 here"),
        ({"guidance": 1.0}, "guidance is 0.5 there and 1.0 here"),
        ({"attn_temp": 0.5}, "attn_temp is 1.0 there and 0.5 here"),
        ({"annealed_guidance": True}, "annealed_guidance is False there and True here"),
        ({"labels": [1]}, r"labels is \[0, 1, 2\] there and \[1\] here"),
        ({"tol": 0.1}, "tol is None there and 0.1 here"),
        ({"schedule": pd.Selective.sejd()}, r"tol is None there and \[None, 0.5, 0.5\] here"),
        ({"shard_size": 5}, "shard_size is 4 there and 5 here"),
        ({"denoise": True}, "denoise is False there and True here, noise_std is None there and 0.1 here"),
        ({"dtype": "bfloat16"}, "dtype is float32 there and bfloat16 here"),
    ],
    ids=str,
)
def test_other_settings_are_refused_by_name(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    made = flow(num_classes=3, noise_std=0.1).float()
    draw(made, tmp_path, 10, **FIXED)
    before = files(tmp_path), manifest(tmp_path)
    with pytest.raises(ValueError, match=f"holds images of other settings: {message}; repeat its settings"):
        draw(made, tmp_path, **{"count": 10, **FIXED, **change})
    assert (files(tmp_path), manifest(tmp_path)) == before


def test_other_weights_are_refused(made: TarFlow, tmp_path: Path) -> None:
    draw(made, tmp_path, 10, **FIXED)
    other = flow(num_classes=3).float()
    other.var += 1
    with pytest.raises(ValueError, match=f"model is {made.fingerprint()} there and {other.fingerprint()} here"):
        draw(other, tmp_path, 10, **FIXED)


def test_another_batch_size_schedule_and_number_of_processes_may_go_on(
    made: TarFlow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw(made, tmp_path, 10, **FIXED)
    monkeypatch.setattr(TarFlow, "sample", lambda *_, **__: pytest.fail("it was drawn again"))
    draw(made, tmp_path, 10, **FIXED | {"batch_size": 2, "schedule": "auto", "guidance": np.float64(0.5)}, world=2)


def test_batch_sizes_and_schedules_agree_within_a_level(tmp_path: Path) -> None:
    options: list[dict[str, Any]] = [
        dict(schedule="sequential", batch_size=4),
        dict(schedule="sequential", batch_size=3),
        dict(schedule="sliding", batch_size=4),
        dict(schedule="auto", batch_size=2),
    ]
    for index, how in enumerate(options):
        draw(digits(), tmp_path / str(index), 4, shard_size=4, **how)
    assert max(levels(tmp_path / "0", tmp_path / str(index)) for index in range(1, 4)) <= 1


def test_an_image_does_not_depend_on_how_many_there_are_or_on_the_size_of_shards(made: TarFlow, tmp_path: Path) -> None:
    assert torch.equal(noise(made, range(4, 9)), noise(made, range(9))[4:])
    draw(made, tmp_path / "few", 5, **FIXED)
    draw(made, tmp_path / "many", 50, **FIXED | {"shard_size": 7})
    few, many = (torch.cat(list(images(tmp_path / name))).int() for name in ("few", "many"))
    assert (few - many[:5]).abs().max() <= 1
    assert len({row.numpy().tobytes() for row in many}) == 50


def replace_rows(monkeypatch: pytest.MonkeyPatch, bad: Tensor) -> None:
    """Let images whose noise is among `bad`, shape (N, L, D), come out as NaN."""
    whole = TarFlow.sample

    def sample(self: TarFlow, *, z: Tensor, **options: Any) -> Any:
        x, solution = whole(self, z=z, **options)
        hit = (z[:, None] == bad).flatten(2).all(2).any(1)
        return torch.where(hit[:, None, None, None], math.nan, x), solution

    monkeypatch.setattr(TarFlow, "sample", sample)


def test_images_that_are_not_finite_are_drawn_again_and_counted(
    made: TarFlow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw(made, tmp_path / "calm", 10, **FIXED)
    expected = torch.cat(list(images(tmp_path / "calm")))
    replace_rows(monkeypatch, torch.cat([noise(made, [5]), noise(made, [8]), noise(made, [8], attempt=1)]))
    assert draw(made, tmp_path / "again", 10, **FIXED) == [5, 8]
    assert draw(made, tmp_path / "again", 10, **FIXED) == [5, 8], "the count was not kept with the shards"
    got = torch.cat(list(images(tmp_path / "again")))
    assert torch.equal((got != expected).flatten(1).any(1).nonzero()[:, 0], torch.tensor([5, 8]))
    for index, attempt in ((5, 1), (8, 2)):
        x = made.sample(
            z=noise(made, [index], attempt=attempt),
            y=index % 3,
            schedule="sequential",
            guidance=0.5,
            return_solution=True,
        )[0]
        assert torch.equal(got[index], ((x[0].clamp(-1, 1) + 1) * 127.5).round().byte())


def test_an_image_that_is_never_finite_is_an_error_that_keeps_what_was_written(
    made: TarFlow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw(made, tmp_path / "calm", 10, **FIXED)
    replace_rows(monkeypatch, torch.cat([noise(made, [5], attempt=attempt) for attempt in range(module.ATTEMPTS)]))
    with pytest.raises(pd.SolveError, match="image 5 was not finite in 4 draws: try a higher precision"):
        draw(made, tmp_path / "again", 10, **FIXED)
    first = "shard-00000.safetensors"
    assert files(tmp_path / "again") == {first: files(tmp_path / "calm")[first]}


def test_noise_is_normal_and_uncorrelated_between_indices_seeds_and_attempts(made: TarFlow) -> None:
    z = noise(made, range(4000)).flatten(1).double()  # (4000, 64)
    count = z.numel()
    assert abs(z.mean()) < 5 / math.sqrt(count)
    assert abs(z.square().mean() - 1) < 5 * math.sqrt(2 / count)
    assert abs(z.pow(4).mean() - 3) < 5 * math.sqrt(96 / count)
    for lag in (1, 2, 3, 64, 256, 1024):
        assert abs((z[lag:] * z[:-lag]).mean()) < 5 / math.sqrt(count - 64 * lag), f"of indices {lag} apart"
    products = (z @ z.T).fill_diagonal_(0) / 8  # nearly standard normal for each pair
    assert abs(products.square().sum() / (4000 * 3999) - 1) < 0.01
    assert products.abs().max() < 0.9 * 8, "two images have nearly the same noise"
    for other in (noise(made, range(4000), seed=1), noise(made, range(4000), attempt=1)):
        flat = other.flatten(1).double()
        assert max(abs((a * b).mean()) for a, b in ((z, flat), (z[1:], flat[:-1]))) < 5 / math.sqrt(count - 64)


def test_no_two_of_many_images_have_one_noise() -> None:
    """With seeds of 32 bits, about five pairs would."""
    first = TarFlow(1, 1, 1, 64, 1, 1)  # an image of one pixel
    assert len(set(noise(first.double(), range(200_000))[:, 0, 0].tolist())) == 200_000


def test_an_incomplete_set_names_what_is_missing(made: TarFlow, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"manifest.json does not exist, expected a folder that shards"):
        images(tmp_path)
    draw(made, tmp_path, 20, **FIXED, rank=0, world=2)
    with pytest.raises(
        FileNotFoundError, match=r"lacks 2 of 5 shards \(shard-00001.safetensors, shard-00003.safetensors\): draw again"
    ):
        images(tmp_path)
    assert [len(shard) for shard in images(tmp_path, rank=0, world=2)] == [4, 4, 4]
    draw(made, tmp_path, 20, **FIXED, rank=1, world=2)
    shards = list(images(tmp_path))
    assert all(shard.dtype == torch.uint8 and shard.shape == (4, 1, 8, 8) for shard in shards)
    assert all(not torch.equal(a, b) for a, b in pairwise(shards))
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest.json cannot be read, it may be damaged"):
        images(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 0}, "count is 0"),
        ({"seed": -1}, "seed is -1, expected at least 0"),
        ({"rank": 2, "world": 2}, "rank is 2, expected a number from 0 to world - 1, which is 1"),
        ({"batch_size": 5}, "batch_size is 5, more than a shard of 4 images"),
        ({"labels": [0, 3]}, "y holds class 3, expected numbers below 3"),
        ({"labels": []}, "labels is empty"),
        ({"guidance": math.nan}, "guidance is nan"),
        ({"tol": -1.0}, "tol is -1.0"),
        ({"schedule": "fast"}, "schedule is 'fast'"),
        ({"dtype": "int8"}, "dtype is 'int8', expected float32"),
        ({"denoise": True}, "denoising needs the noise_std of the training, which is None"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused_before_anything_is_written(
    options: dict[str, Any], message: str, made: TarFlow, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        draw(made, tmp_path / "out", **{"count": 10, **FIXED, **options})
    assert not (tmp_path / "out").exists()


def test_images_are_denoised_and_drawn_in_the_precision_that_the_manifest_says(tmp_path: Path) -> None:
    made = flow(num_classes=3, noise_std=0.3).float()
    cases: dict[str, dict[str, Any]] = {
        "plain": {},
        "denoised": {"denoise": True},
        "half": {"denoise": True, "dtype": "bfloat16"},
    }
    for name, options in cases.items():
        draw(made, tmp_path / name, 4, **FIXED, **options)
    assert manifest(tmp_path / "half")["settings"]["dtype"] == "bfloat16"
    assert levels(tmp_path / "plain", tmp_path / "denoised") > 3 >= levels(tmp_path / "denoised", tmp_path / "half") > 0
    x = made.sample(
        z=noise(made, range(3)),
        y=torch.arange(3),
        schedule="sequential",
        guidance=0.5,
        denoise=True,
        return_solution=True,
    )[0]
    first = next(images(tmp_path / "denoised"))[:3] / 127.5 - 1
    assert (first - x.clamp(-1, 1)).abs().max() <= 1.01 / 255


def test_the_command_refuses_noise_and_images_that_are_not_finite(tmp_path: Path) -> None:
    made = flow(num_classes=3).float()
    torch.nn.init.constant_(made.get_parameter("blocks.0.proj_out.bias"), 1e30)  # finite, and too large to exponentiate
    made.save_pretrained(tmp_path / "flow")
    words = ["sample", "--out", str(tmp_path / "out"), "--n", "2"]
    for more, message in (
        (["--noise-std", "nan"], "--noise-std is nan, expected a finite number"),
        (["--checkpoint", str(tmp_path / "flow")], "rows 0, 1: non-finite"),
    ):
        result = CliRunner().invoke(app, words + more, env={"COLUMNS": "120"})
        assert result.exit_code == 2 and message in result.output.replace("\n", " ")
        assert not (tmp_path / "out").exists()
    result = CliRunner().invoke(app, [*words, "--checkpoint", str(tmp_path / "flow"), "--shard-size", "64"])
    assert result.exit_code == 2 and "image 0 was not finite in 4 draws" in result.output.replace("\n", " ")
