"""`python -m paper_repro itarflow` and `python -m paper_repro starflow`."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from parallel_decode._command_line import Seed

# The modules that need diffusers, transformers and scikit-image are imported when they are asked for: the other commands do not need them.

Out = Annotated[Path, typer.Option(help="folder of the flow and the training; one that was begun goes on", file_okay=False)]
Steps = Annotated[int, typer.Option(min=1)]
Channels = Annotated[int, typer.Option(help="of the transformers, a multiple of 64", min=64, max=8192)]
Layers = Annotated[str, typer.Option(help="of each block, with commas between them; the last block is decoded first")]


def itarflow(
    out: Out, steps: Steps = 1500, channels: Channels = 128, layers: Layers = "1,1,1,5", batch: Steps = 16, seed: Seed = 0
) -> None:
    """Train an iTARFlow on crops of ten photographs, 32 x 32 pixels or 256 positions: 30 minutes on one core."""
    with _extras():
        from paper_repro.data.crops import crops, photographs
        from paper_repro.successors import LEVELS, ITarFlowTraining
        from parallel_decode.adapters.itarflow import ITarFlow
    counts = _layers(layers)
    pictures = photographs()
    shape: dict[str, Any] = {"in_channels": 3, "img_size": 32, "patch_sizes": 2, "channels": channels}
    torch.manual_seed(seed)
    flow = ITarFlow(**shape, num_blocks=len(counts), layers_per_block=counts, num_classes=len(pictures), noise_std=LEVELS[1])
    training = ITarFlowTraining(flow)
    _fit(training, pictures, out / "flow.pt", crops, 32, steps, batch, 1e-3, seed)
    flow.eval().save_pretrained(out / "flow")
    typer.echo(f"the flow: {out / 'flow'}")


def starflow(
    out: Out,
    autoencoder_steps: Steps = 1000,
    steps: Steps = 1500,
    channels: Channels = 128,
    layers: Layers = "1,1,1,5",
    batch: Steps = 16,
    seed: Seed = 0,
) -> None:
    """Train a STARFlow on crops of ten photographs, 64 x 64 pixels or 256 latents, and their captions: 40 minutes on one core.

    The autoencoder of the latents is trained before it. The encoder of the captions has random weights.
    """
    with _extras():
        from safetensors.torch import save_file
        from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

        from paper_repro.data.crops import NAMES, crops, photographs
        from paper_repro.successors import LATENTS, AutoencoderTraining, StarFlowTraining
        from parallel_decode.adapters.starflow import Pipeline, StarFlow
    counts = _layers(layers)
    pictures = photographs()
    torch.manual_seed(seed)
    autoencoder = AutoencoderTraining()
    _fit(autoencoder, pictures, out / "autoencoder.pt", crops, 64, autoencoder_steps, batch, 1e-3, seed)
    vae = autoencoder.vae.eval()
    autoencoder.scale(crops(pictures)(64, torch.Generator().manual_seed(seed))[0])
    torch.manual_seed(seed)
    encoder = T5EncoderModel(T5Config(vocab_size=384, d_model=64, d_kv=32, d_ff=128, num_layers=2, num_heads=2)).eval()
    shape: dict[str, Any] = {"in_channels": 4, "img_size": 16, "patch_size": 1, "channels": channels, "seq_order": "L2R"}
    shape |= {"rope": True, "sos": True, "txt_size": 32, "txt_dim": 64, "cond_top_only": True, "use_softplus": True}
    shape |= {"use_final_norm": True, "soft_clip": 4, "noise_std": LATENTS}
    flow = StarFlow(**shape, num_blocks=len(counts), layers_per_block=counts)
    starflow = Pipeline(flow, vae, ByT5Tokenizer(), encoder)
    texts = starflow.encode([*(f"a photograph of {name}" for name in NAMES), ""])
    training = StarFlowTraining(flow, vae, texts)
    _fit(training, pictures, out / "flow.pt", crops, 64, steps, batch, 1e-3, seed)
    flow.eval().save_pretrained(out / "flow")
    vae.save_pretrained(out / "vae")
    encoder.save_pretrained(out / "text_encoder")
    save_file({"text": texts[:-1], "text_unconditional": texts[-1:]}, out / "texts.safetensors")
    typer.echo(f"the flow: {out / 'flow'}, its captions: {out / 'texts.safetensors'}")


@contextmanager
def _extras() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        hint = 'pip install "parallel-decode[repro,transformers,diffusers]"'
        raise ModuleNotFoundError(f"{error.name} is missing: {hint}") from None


def _layers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--layers is {text!r}, expected numbers with commas between them, as 1,1,1,5") from None


def _fit(
    training: nn.Module, pictures: Any, file: Path, crops: Any, size: int, steps: int, batch: int, lr: float, seed: int
) -> None:
    from paper_repro.image_tokens import fit

    file.parent.mkdir(parents=True, exist_ok=True)
    for step, loss in fit(training, crops(pictures, size), file, steps=steps, batch=batch, lr=lr, seed=seed):
        if (step + 1) % 50 == 0 or step + 1 == steps:
            typer.echo(f"{file.stem}: step {step + 1:>5}  loss {loss:.4f}")
