"""`python -m paper_repro image-tokens`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from paper_repro.crop_command import extras, train
from parallel_decode._command_line import Seed

# The modules that need diffusers and transformers are imported when they are asked for: the other commands do not need them.


def image_tokens(
    out: Annotated[
        Path,
        typer.Option(
            help="folder of the model, its pictures and the training; one that was begun goes on", file_okay=False
        ),
    ],
    tokenizer_steps: Annotated[int, typer.Option(min=1)] = 2600,
    prior_steps: Annotated[int, typer.Option(min=1)] = 2000,
    channels: Annotated[int, typer.Option(help="of the tokenizer, a multiple of 8", min=8, max=8192)] = 32,
    codes: Annotated[int, typer.Option(help="of the tokenizer", min=2, max=65_536)] = 512,
    width: Annotated[int, typer.Option(help="of the prior, a multiple of 48", min=48, max=9600)] = 192,
    layers: Annotated[int, typer.Option(help="of the prior", min=1, max=1024)] = 4,
    batch: Annotated[int, typer.Option(min=1)] = 8,
    seed: Seed = 0,
    half: Annotated[bool, typer.Option("--half", help="save in float16")] = False,
) -> None:
    """Train a class-conditional model of image tokens on crops of ten photographs: half an hour on one core.

    A picture is 64 x 64 pixels or 16 x 16 tokens.
    """
    with extras():
        import torch
        import torch.nn.functional as F
        from transformers import LlamaConfig

        from paper_repro.data.crops import crops, photographs
        from paper_repro.image_tokens import PriorTraining, TokenizerTraining
        from parallel_decode.adapters.image_tokens import generate_images
        from parallel_decode.adapters.image_tokens.class_conditional import ClassConditional
        from parallel_decode.adapters.image_tokens.cli import save_grid
        from parallel_decode.adapters.image_tokens.prior import Prior
    if width % 48 or channels % 8:
        raise ValueError(f"--width is {width} and --channels {channels}, expected multiples of 48 and of 8")

    pictures = photographs()
    seen, unseen = crops(pictures), crops(pictures, held_out=True)
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"hidden_size": width, "intermediate_size": 8 * width // 3, "num_hidden_layers": layers}
    sizes |= {"num_attention_heads": width // 48, "num_classes": len(pictures), "rows": 16, "columns": 16}
    config = LlamaConfig(vocab_size=codes, bos_token_id=None, eos_token_id=None, **sizes)
    tokenizer = TokenizerTraining((channels, channels, 2 * channels), codes)
    prior = PriorTraining(Prior(config), tokenizer)
    train(tokenizer, seen, out / "tokenizer.pt", tokenizer_steps, batch, seed)
    train(prior, seen, out / "prior.pt", prior_steps, batch, seed, lr=2e-3)
    for where, draw in (("seen", seen), ("held out", unseen)):
        typer.echo(f"{where}: " + ", ".join(f"{name} {figure:.2f}" for name, figure in prior.judged(draw).items()))

    pixels = unseen(16, torch.Generator().manual_seed(1))[0]
    codes_of = tokenizer.codes(pixels)[1]
    model = ClassConditional(prior.model.model, tokenizer.vq).eval()
    (model.half() if half else model).save_pretrained(out / "model")
    model = ClassConditional.from_pretrained(out / "model")
    with torch.no_grad():
        again = model.pixels(codes_of)
    assert again is not None
    pixels = pixels / 2 + 0.5
    typer.echo(f"held-out reconstructions: {-10 * torch.log10(F.mse_loss(again, pixels)):.1f} dB")
    save_grid(torch.cat([pixels, again]), out / "reconstructions.png", 8)
    images = generate_images(model, {"labels": torch.arange(len(pictures))}, num_images=8)
    assert images.pixels is not None
    save_grid(images.pixels, out / "samples.png", 8)
    typer.echo(f"the model: {out / 'model'}, its pictures: {out / 'samples.png'}")
