"""`python -m paper_repro itarflow` and `python -m paper_repro starflow`."""

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from paper_repro.crop_command import extras, train
from parallel_decode._command_line import Seed

# The modules that need diffusers and transformers are imported when they are asked for: the other commands do not need them.

Out = Annotated[
    Path, typer.Option(help="folder of the flow and the training; one that was begun goes on", file_okay=False)
]
Number = Annotated[int, typer.Option(min=1)]
Channels = Annotated[int, typer.Option(help="of the transformers, a multiple of 64", min=64, max=8192)]
Layers = Annotated[str, typer.Option(help="of each block, with commas between them; the last block is decoded first")]
MOST = 1024  # layers of a block


def itarflow(
    out: Out,
    steps: Number = 1500,
    channels: Channels = 128,
    layers: Layers = "1,1,1,5",
    batch: Number = 16,
    seed: Seed = 0,
) -> None:
    """Train an iTARFlow on crops of ten photographs: half an hour on one core.

    A picture is 32 x 32 pixels or 256 positions.
    """
    with extras():
        from paper_repro.data.crops import crops, photographs
        from paper_repro.successors import LEVELS, ITarFlowTraining
        from parallel_decode.adapters.itarflow import ITarFlow
    pictures = photographs()
    shape: dict[str, Any] = {"in_channels": 3, "img_size": 32, "patch_sizes": 2, "num_classes": len(pictures)}
    torch.manual_seed(seed)
    flow = ITarFlow(**shape, channels=channels, **_blocks(layers), noise_std=LEVELS[1])
    train(ITarFlowTraining(flow), crops(pictures, 32), out / "flow.pt", steps, batch, seed)
    flow.eval().save_pretrained(out / "flow")
    typer.echo(f"the flow: {out / 'flow'}")


def starflow(
    out: Out,
    autoencoder_steps: Number = 1000,
    steps: Number = 1500,
    channels: Channels = 128,
    layers: Layers = "1,1,1,5",
    batch: Number = 16,
    seed: Seed = 0,
) -> None:
    """Train a STARFlow on crops of ten photographs and their captions, and before it the autoencoder: 40 minutes on one core.

    A picture is 64 x 64 pixels or 256 latents. The encoder of the captions has random weights.
    """
    with extras():
        from safetensors.torch import save_file
        from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

        from paper_repro.data.crops import NAMES, crops, photographs
        from paper_repro.successors import LATENTS, AutoencoderTraining, StarFlowTraining
        from parallel_decode.adapters.starflow import Pipeline, StarFlow
    torch.manual_seed(seed)
    config = T5Config(vocab_size=384, d_model=64, d_kv=32, d_ff=128, num_layers=2, num_heads=2)
    encoder: Any = T5EncoderModel(config)
    shape: dict[str, Any] = {"in_channels": 4, "img_size": 16, "patch_size": 1, "rope": True, "sos": True}
    shape |= {"txt_size": 32, "txt_dim": 64, "cond_top_only": True, "seq_order": "L2R"}
    shape |= {"use_softplus": True, "use_final_norm": True, "soft_clip": 4}
    flow = StarFlow(**shape, channels=channels, **_blocks(layers), noise_std=LATENTS)
    torch.manual_seed(seed)
    autoencoder = AutoencoderTraining()
    pictures = photographs()
    draw = crops(pictures)
    train(autoencoder, draw, out / "autoencoder.pt", autoencoder_steps, batch, seed)
    autoencoder.scale(draw(64, torch.Generator().manual_seed(seed))[0])
    vae = autoencoder.vae.eval()
    texts = Pipeline(flow, vae, ByT5Tokenizer(), encoder.eval()).encode(
        [*(f"a photograph of {name}" for name in NAMES), ""]
    )
    train(StarFlowTraining(flow, vae, texts), draw, out / "flow.pt", steps, batch, seed)
    flow.eval().save_pretrained(out / "flow")
    vae.save_pretrained(out / "vae")
    encoder.save_pretrained(out / "text_encoder")
    save_file({"text": texts[:-1], "text_unconditional": texts[-1:]}, out / "texts.safetensors")
    typer.echo(f"the flow: {out / 'flow'}, its captions: {out / 'texts.safetensors'}")


def _blocks(layers: str) -> dict[str, Any]:
    try:
        counts = [int(part) for part in layers.split(",")]
    except ValueError:
        counts = [0]
    if not all(1 <= count <= MOST for count in counts):
        raise ValueError(
            f"--layers is {layers!r}, expected numbers from 1 to {MOST} with commas between them, as 1,1,1,5"
        )
    return {"num_blocks": len(counts), "layers_per_block": counts}
