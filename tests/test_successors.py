"""The commands that train a small iTARFlow and a small STARFlow: what they write loads and draws, and a training goes on."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from torch import Tensor
from transformers import ByT5Tokenizer, T5EncoderModel
from typer.testing import CliRunner

from paper_repro import crop_command
from paper_repro.__main__ import app
from paper_repro.crop_training import fit
from parallel_decode.adapters.itarflow import ITarFlow
from parallel_decode.adapters.starflow import Pipeline, StarFlow

LEAST = ["--channels", "64", "--layers", "1,1", "--batch", "1"]


def run(name: str, out: Path, *words: str) -> str:
    done = CliRunner().invoke(app, [name, "--out", str(out), *LEAST, *words])
    assert done.exit_code == 0, done.output
    return done.stdout


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "flow" / "model.safetensors")


def interrupted_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each training of the commands save every step, and stop the last one after so many."""

    def stopping(training: Any, draw: Any, file: Path, **options: Any) -> Any:
        for step, loss in fit(training, draw, file, save_every=1, **options):
            yield step, loss
            if file.stem == "flow" and step + 1 == steps:
                raise OSError("interrupted")

    monkeypatch.setattr(crop_command, "fit", stopping)


@pytest.mark.parametrize("name", ["itarflow", "starflow"])
def test_a_training_goes_on_as_if_it_had_not_been_interrupted(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = ["--steps", "3", *(["--autoencoder-steps", "2"] if name == "starflow" else [])]
    whole = run(name, tmp_path / "whole", *few)
    assert "flow: step     3" in whole
    with monkeypatch.context() as patched:
        interrupted_after(2, patched)
        done = CliRunner().invoke(app, [name, "--out", str(tmp_path / "parts"), *LEAST, *few])
        assert done.exit_code == 2 and "interrupted" in done.stderr
    state = torch.load(tmp_path / "parts" / "flow.pt", weights_only=True)
    assert state["step"] == 2
    rest = run(name, tmp_path / "parts", *few)
    assert rest.count("loss") == 1 and "flow: step     3" in rest  # what was trained is not trained again
    one, other = (weights(tmp_path / part) for part in ("whole", "parts"))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_the_itarflow_that_the_command_writes_draws(tmp_path: Path) -> None:
    run("itarflow", tmp_path, "--steps", "2")
    flow = ITarFlow.from_pretrained(tmp_path / "flow")
    assert flow.num_classes == 10 and flow.noise_std
    images = flow.sample(y=[3], schedule="jacobi", denoise=True)
    assert isinstance(images, Tensor) and images.shape == (1, 3, 32, 32) and images.isfinite().all()


def test_the_starflow_that_the_command_writes_draws_for_its_captions(tmp_path: Path) -> None:
    run("starflow", tmp_path, "--steps", "2", "--autoencoder-steps", "2")
    flow, texts = StarFlow.from_pretrained(tmp_path / "flow"), load_file(tmp_path / "texts.safetensors")
    drawn = flow.sample(z=torch.zeros(1, 4, 16, 16), text=texts["text"][1:2], schedule="jacobi")
    assert isinstance(drawn, Tensor) and drawn.isfinite().all()
    vae: Any = AutoencoderKL.from_pretrained(tmp_path / "vae")  # type: ignore[no-untyped-call]
    encoder = T5EncoderModel.from_pretrained(tmp_path / "text_encoder")
    pipeline = Pipeline(flow, vae, ByT5Tokenizer(), encoder)
    assert torch.equal(pipeline.encode(["a photograph of a cat"]), texts["text"][1:2])
    assert torch.equal(pipeline.encode([""]), texts["text_unconditional"])
    images = pipeline.sample(["a photograph of a cat"], guidance=1.0, schedule="jacobi")
    assert isinstance(images, Tensor) and images.shape == (1, 3, 64, 64)
    assert not torch.equal(texts["text"][0], texts["text"][1])


@pytest.mark.parametrize("layers", ["1,,1", "0", "-1", "1,x", "9" * 25])
def test_layers_that_cannot_be_are_named_in_one_line(layers: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["itarflow", "--out", str(tmp_path), "--steps", "1", "--layers", layers])
    assert done.exit_code == 2 and done.stderr.startswith("error: --layers is") and done.stderr.count("\n") == 1
