"""`python -m paper_repro train`."""

from pathlib import Path
from typing import Annotated

import typer

from paper_repro.data import DATA
from paper_repro.train import train as run_training
from parallel_decode._command_line import Seed, as_device


def train(
    out: Annotated[
        Path, typer.Option(help="folder for the checkpoint and the state that --resume goes on from", file_okay=False)
    ],
    data: Annotated[str, typer.Option(help="see paper_repro.data.DATA")] = "digits",
    patch_size: Annotated[int, typer.Option(min=1)] = 1,
    channels: Annotated[int, typer.Option(min=1, max=65_536)] = 128,
    blocks: Annotated[int, typer.Option(min=1, max=1024)] = 4,
    layers: Annotated[int, typer.Option(min=1, max=1024)] = 2,
    nvp: bool = True,
    noise_std: Annotated[float, typer.Option(help="standard deviation of the noise added to the images", min=0)] = 0.1,
    steps: Annotated[int, typer.Option(min=1)] = 4500,
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    lr: float = 1e-3,
    drop_label: Annotated[float, typer.Option(help="share of labels left out, for guidance", min=0, max=1)] = 0.1,
    ema: Annotated[
        float, typer.Option(help="decay of a moving average of the weights, 0 for none", min=0, max=1)
    ] = 0.0,
    seed: Seed = 0,
    save_every: Annotated[int, typer.Option(min=1)] = 250,
    root: Annotated[
        Path | None, typer.Option(help="folder of the data set, where it does not ship with a dependency")
    ] = None,
    device: str = "cpu",
    resume: Annotated[bool, typer.Option(help="go on with the training in --out")] = False,
) -> None:
    """Train a TarFlow; by default on scikit-learn's digits at 16 x 16 (patch 1, so 256 positions)."""
    if data not in DATA:
        raise ValueError(f"--data is {data!r}, expected one of {', '.join(DATA)}")
    as_device(device)
    images = DATA[data](root)
    config = {
        "in_channels": images.in_channels,
        "img_size": images.img_size,
        "patch_size": patch_size,
        "channels": channels,
        "num_blocks": blocks,
        "layers_per_block": layers,
        "nvp": nvp,
        "num_classes": images.num_classes,
        "noise_std": noise_std,
    }
    for line in run_training(
        out,
        images,
        config,
        steps=steps,
        batch_size=batch_size,
        lr=lr,
        drop_label=drop_label,
        ema=ema,
        seed=seed,
        save_every=save_every,
        device=device,
        resume=resume,
    ):
        typer.echo(f"step {line['step']:>6}  loss {line['loss']:.4f}  held out {line['held_out']:.4f}")
