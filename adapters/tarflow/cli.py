"""The commands of TarFlows: `parallel-decode demo`, `sample`, `bench` and `probe`."""

import os
import warnings
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from parallel_decode._command_line import Command, Seed, as_device
from parallel_decode._outputs import check_files
from parallel_decode.adapters.tarflow import digits
from parallel_decode.adapters.tarflow.bench import probes
from parallel_decode.adapters.tarflow.bench.command import command as bench
from parallel_decode.adapters.tarflow.bench.measure import precision
from parallel_decode.adapters.tarflow.demo import demo
from parallel_decode.adapters.tarflow.images import ImageFlow
from parallel_decode.adapters.tarflow.load import load
from parallel_decode.adapters.tarflow.pictures import save
from parallel_decode.adapters.tarflow.shard_files import MANIFEST
from parallel_decode.adapters.tarflow.shards import SHARD_SIZE, draw, images, noise
from parallel_decode.selective import as_schedule

app = typer.Typer()
app.command(cls=Command)(demo)
app.command("bench", cls=Command)(bench())
app.command("probe", cls=Command)(probes.command)


@app.command(cls=Command)
def sample(
    out: Annotated[Path, typer.Option(help="folder for grid.png, and for single images or shards", file_okay=False)],
    checkpoint: Annotated[
        Path | None,
        typer.Option(help=".pth or .safetensors file, or a folder with config.json; the digits if left out"),
    ] = None,
    n: Annotated[int, typer.Option(min=1, help="how many; more than 64 are written as shards")] = 16,
    schedule: Annotated[
        str, typer.Option(help="auto, sequential, jacobi, gs-jacobi, jacobi-gs, sliding or selective")
    ] = "auto",
    tol: Annotated[float | None, typer.Option(help="see pd.solve; 0 is exact")] = None,
    seed: Seed = 0,
    classes: Annotated[
        str | None, typer.Option(help="labels, as 3 or 0,1,2: repeated to n; all in turn if left out")
    ] = None,
    guidance: float = 0.0,
    annealed_guidance: Annotated[
        bool, typer.Option("--annealed-guidance", help="let guidance rise linearly over the positions")
    ] = False,
    attn_temp: Annotated[float, typer.Option(help="attention temperature of the unconditional branch")] = 1.0,
    noise_std: Annotated[
        float | None,
        typer.Option(help="of the training; with it the images are denoised. The level that an iTARFlow draws at"),
    ] = None,
    in_channels: Annotated[int | None, typer.Option(min=1, help="of an image, where the weights leave it open")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, mps")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32; tf32 (CUDA); bfloat16 or float16, by autocast")] = "float32",
    batch_size: Annotated[int, typer.Option(min=1, help="images of a shard that are drawn at a time")] = 64,
    shard_size: Annotated[
        int | None,
        typer.Option(min=1, help=f"images of a shard, {SHARD_SIZE} if left out; asks for shards however few images"),
    ] = None,
) -> None:
    """Draw images from any TarFlow or iTARFlow checkpoint: a grid and single PNG files or, of many, shards of uint8 images.

    Shards may be drawn by many processes (torchrun, accelerate launch), and the same command goes on where one was ended.
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    singly = n <= 64 and shard_size is None and world == 1
    files = _files(out, n if singly else 0)
    if noise_std is not None and noise_std < 0:
        raise ValueError(f"--noise-std is {noise_std}, expected a number >= 0")
    place = as_device(device)
    config = {} if in_channels is None else {"in_channels": in_channels}
    flow = digits() if checkpoint is None else load(checkpoint, **config)
    if not isinstance(flow, ImageFlow):
        raise ValueError(  # noqa: TRY004 - what the file holds is no error of type
            f"{checkpoint} is a {type(flow).__name__}, which needs an autoencoder and a text encoder: draw by its Pipeline"
        )
    flow.to(place).noise_std = flow.noise_std if noise_std is None else noise_std
    labels = _labels(classes, flow.num_classes)
    options: dict[str, Any] = dict(
        guidance=guidance,
        annealed_guidance=annealed_guidance,
        attn_temp=attn_temp,
        schedule=as_schedule(schedule),
        tol=tol,
        denoise=flow.noise_std is not None,
    )
    if singly:
        with precision(dtype, place):
            lines = _singly(flow, files, seed, labels, options)
    else:
        redrawn = draw(
            flow,
            out,
            n,
            seed=seed,
            batch_size=batch_size,
            shard_size=shard_size or SHARD_SIZE,
            labels=labels,
            dtype=dtype,
            rank=rank,
            world=world,
            progress=rank == 0,
            **options,
        )
        lines = [f"process {rank} of {world} is done: its shards of {n} images are in {out}"]
        if redrawn:
            lines.append(f"{len(redrawn)} x drawn again, as they were not finite: images {redrawn}")
        if rank == 0:
            save(files[-1], next(images(out, world=world))[:64] / 127.5 - 1, 8)
    for line in lines:
        typer.echo(line)


def _files(out: Path, n: int) -> list[Path]:
    """The files of n single images, and of the grid, in a folder that holds no others."""
    files = [*(out / f"{index:04d}.png" for index in range(n)), out / "grid.png"]
    check_files(*files)
    other = {*out.glob("[0-9][0-9][0-9][0-9].png"), *(out.glob(MANIFEST) if n else ())} - set(files)
    if other:
        raise ValueError(f"--out is {out}, which holds {min(other).name} of another run: choose another folder")
    return files


def _singly(
    flow: ImageFlow, files: list[Path], seed: int, labels: list[int] | None, options: dict[str, Any]
) -> list[str]:
    """Draw and write single images, and their grid; returns what to say of them."""
    *singles, grid = files
    y = None if labels is None else torch.tensor([labels[i % len(labels)] for i in range(len(singles))])
    z = noise(flow, range(len(singles)), seed=seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "images .* are not finite")  # it is an error here
        x, solution = flow.sample(z=z, y=y, progress=True, return_solution=True, **options)
    solution.raise_for_status()
    if not x.isfinite().all():
        raise ValueError("some images are not finite once they are denoised: check the model and --noise-std")
    grid.parent.mkdir(parents=True, exist_ok=True)
    for file, image in zip(singles, x, strict=True):
        save(file, image[None], 1)
    save(grid, x, min(len(x), 8))
    seconds = sum(layer.seconds for layer in solution.layers)
    return [
        f"{len(x)} images in {seconds:.2f} s and {solution.passes} passes: {grid}",
        *(f"{solution.status.count(status)} x {status.value}" for status in dict.fromkeys(solution.status)),
    ]


def _labels(text: str | None, num_classes: int) -> list[int] | None:
    """Classes, to be repeated; -1 for none."""
    if text is None:
        return list(range(num_classes)) or None
    try:
        labels = [max(-1, int(part)) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--classes is {text!r}, expected labels such as 3 or 0,1,2") from None
    if max(labels) >= num_classes:
        raise ValueError(f"--classes is {text!r}, expected numbers below {num_classes}, the classes of this flow")
    return labels
