"""`python -m paper_repro train`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from paper_repro.data import DATA
from paper_repro.train import train as run_training


def train(
    out: Annotated[Path, typer.Option(help="folder for the checkpoint and the state that --resume goes on from")],
    data: Annotated[str, typer.Option(help="see paper_repro.data.DATA")] = "digits",
    patch_size: int = 1,
    channels: int = 128,
    blocks: int = 4,
    layers: int = 2,
    nvp: bool = True,
    noise_std: Annotated[float, typer.Option(help="standard deviation of the noise added to the images")] = 0.1,
    steps: int = 4500,
    batch_size: int = 64,
    lr: float = 1e-3,
    drop_label: Annotated[float, typer.Option(help="share of labels left out, for guidance")] = 0.1,
    ema: Annotated[
        float, typer.Option(help="decay of a moving average of the weights, 0 for none", min=0, max=1)
    ] = 0.0,
    seed: int = 0,
    save_every: int = 250,
    root: Annotated[
        Path | None, typer.Option(help="folder of the data set, where it does not ship with a dependency")
    ] = None,
    device: str = "cpu",
    resume: Annotated[bool, typer.Option(help="go on with the training in --out")] = False,
) -> None:
    """Train a TarFlow; by default on scikit-learn's digits at 16 x 16 (patch 1, so 256 positions)."""
    if data not in DATA:
        raise typer.BadParameter(f"--data is {data!r}, expected one of {', '.join(DATA)}")
    try:
        images = DATA[data](root)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error)) from None
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
    out.mkdir(parents=True, exist_ok=True)
    try:
        lines = run_training(
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
        )
        with (out / "log.jsonl").open("a") as log:
            for line in lines:
                print(json.dumps(line), file=log, flush=True)
                typer.echo(f"step {line['step']:>6}  loss {line['loss']:.4f}  held out {line['held_out']:.4f}")
    except (FileExistsError, FileNotFoundError, ValueError) as error:
        raise typer.BadParameter(str(error)) from None
