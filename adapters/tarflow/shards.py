"""Many images for evaluation, in files that any number of processes fill, and that outlive being killed.

Image i is a function of the flow, the settings and i alone: its noise is seeded by (seed, i), its class is found by i. A *shard* is a
file of the images of a fixed range of i, and a batch never reaches beyond its shard, so who draws what, when, and how often it was
interrupted leave no trace. The settings that the images depend on are in `manifest.json`, and in the checksum of every shard.

Shapes: B batch, L positions, D values of a patch, (C, H, W) an image.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from parallel_decode._options import check_at_least_one, check_tol
from parallel_decode._progress import progress_bar
from parallel_decode.adapters.tarflow.bench.measure import precision
from parallel_decode.adapters.tarflow.images import ImageFlow
from parallel_decode.adapters.tarflow.shard_files import Shards
from parallel_decode.schedules import Schedule
from parallel_decode.selective import Selective, as_schedule
from parallel_decode.solution import SolveError

ATTEMPTS = 4  # draws of an image, until one is finite
SHARD_SIZE = 256  # small, so that 64 processes share 50,000 images evenly and little is lost by a kill


def noise(flow: ImageFlow, indices: Sequence[int], *, seed: int = 0, attempt: int = 0) -> Tensor:
    """Standard normal noise of the images with these indices, each a function of (seed, index, attempt) alone.

    Args:
        flow: the flow to sample from; the noise has its device, and its type (float32 at least).
        indices: of the images.
        seed: at least 0.
        attempt: 0, or how often the image was drawn before and was not finite.

    Returns:
        shape (B, L, D).

    Raises:
        ValueError: the seed is negative.

    Example:
        >>> from parallel_decode.adapters.tarflow import digits
        >>> from parallel_decode.adapters.tarflow.shards import noise
        >>> bool((noise(digits(), [7, 8])[1] == noise(digits(), [8])[0]).all())
        True
    """
    if seed < 0:
        raise ValueError(f"seed is {seed}, expected at least 0")
    # torch's CPU generator keeps 32 bits of a seed, so that two of 50,000 hashed seeds would be equal in one run of four, and
    # their images too. SeedSequence is made for independent streams: it hashes all of the key, to 128 bits.
    keys = [np.random.SeedSequence(seed, spawn_key=(index, attempt)) for index in indices]
    rows = np.stack([np.random.default_rng(key).standard_normal(tuple(flow.var.shape)) for key in keys])
    return torch.from_numpy(rows).to(torch.promote_types(flow.var.dtype, torch.float32)).to(flow.var.device)


def draw(
    flow: ImageFlow,
    out: str | Path,
    count: int,
    *,
    seed: int = 0,
    batch_size: int = 64,
    shard_size: int = SHARD_SIZE,
    labels: Sequence[int] | None = None,
    schedule: Schedule | Selective | str = "auto",
    tol: float | None = None,
    denoise: bool = False,
    dtype: str | None = None,
    rank: int = 0,
    world: int = 1,
    progress: bool = False,
    **options: Any,
) -> list[int]:
    """Draw images into a folder of shards. Shards that are there, whole and of these settings are kept, the others drawn.

    Images that are not finite are drawn again, singly and from other noise.

    Args:
        flow: the flow to sample from.
        out: the folder.
        count: how many images the folder is to hold.
        seed: of the noise, at least 0.
        batch_size: images drawn at a time, at most `shard_size`.
        shard_size: images of a file.
        labels: classes by index, repeated to `count`; all in turn by default; negative for the unconditional branch.
        schedule, tol, denoise: see `TarFlow.sample`.
        dtype: "float32", "tf32", "bfloat16" or "float16", see `bench.measure.precision`; the type of the weights by default.
        rank: of this process, which draws the shards rank, rank + world, ...
        world: the number of processes. They need not know of one another.
        progress: show a bar.
        options: `guidance`, `compile` and others, see `TarFlow.system`.

    Returns:
        the indices, of all images in this process's shards, that had to be drawn again.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: an argument is out of its range, or the folder holds images of other settings.
        SolveError: an image was not finite in four draws. Shards that were written stay.

    Example:
        >>> import tempfile
        >>> from parallel_decode.adapters.tarflow import digits
        >>> from parallel_decode.adapters.tarflow.shards import draw, images
        >>> folder = tempfile.mkdtemp()
        >>> draw(digits(), folder, 3, schedule="sequential", batch_size=2, shard_size=2)
        []
        >>> [tuple(shard.shape) for shard in images(folder)]
        [(2, 1, 16, 16), (1, 1, 16, 16)]
    """
    for name, value in (("count", count), ("batch_size", batch_size), ("shard_size", shard_size), ("world", world)):
        check_at_least_one(name, value)
    check_tol(tol)
    if not 0 <= rank < world:
        raise ValueError(f"rank is {rank}, expected a number from 0 to world - 1, which is {world - 1}")
    if batch_size > shard_size:
        raise ValueError(f"batch_size is {batch_size}, more than a shard of {shard_size} images: raise shard_size")
    if denoise and not (flow.noise_std is not None and math.isfinite(flow.noise_std)):
        raise ValueError(
            f"denoising needs the noise_std of the training, which is {flow.noise_std}: pass it to the flow"
        )
    classes = list(range(flow.num_classes)) if labels is None else [int(label) for label in labels]
    if not classes and labels is not None:
        raise ValueError("labels is empty, expected classes, or None for all in turn")
    rule = as_schedule(schedule)
    rule = rule if isinstance(rule, Selective) else Selective((rule,))

    def sample(indices: Sequence[int], attempt: int = 0) -> Tensor:
        z = noise(flow, indices, seed=seed, attempt=attempt)
        y = torch.tensor([classes[i % len(classes)] for i in indices]) if classes else None
        return flow.sample(z=z, y=y, schedule=rule, tol=tol, denoise=denoise, return_solution=True, **options)[0]

    with precision(dtype or "float32", flow.var.device):
        largest = torch.tensor([max(classes)]) if classes else None
        identity = flow.system(noise(flow, [0], seed=seed), y=largest, **options).identity  # refuses what does not fit
        bounds = [tol if layer.tol is None else layer.tol for layer in rule.for_layers(len(flow.blocks))]
        defaults = {n: p.default for n, p in inspect.signature(flow.system).parameters.items() if n not in ("z", "y")}
        settings = {
            "count": count,
            "seed": seed,
            "shard_size": shard_size,
            "image_shape": [flow.in_channels, flow.img_size, flow.img_size],
            "value_range": [-1, 1],
            "labels": classes,
            "model": identity["model"],
            "dtype": "tf32" if dtype == "tf32" else str(identity["dtype"]).removeprefix("torch."),
            "tol": bounds[0] if len(set(bounds)) == 1 else bounds,
            "denoise": denoise,
            "noise_std": flow.noise_std if denoise or "t" in defaults else None,  # the level that t is by default
            **{name: value for name, value in (defaults | options).items() if name != "compile"},
        }
        begun = {"schedule": repr(rule), "batch_size": batch_size, "world": world, "device": identity["device"]}
        shards = Shards.begin(Path(out), settings, begun)
        mine = range(rank, len(shards), world)
        redrawn: list[int] = []
        done = 0
        with progress_bar(progress, "images", sum(len(shards.indices(number)) for number in mine), "image") as show:
            for number in mine:
                indices = shards.indices(number)
                shard = shards.read(number)
                if shard is None:
                    parts = []
                    for first in range(0, len(indices), batch_size):
                        parts.append(_finite(sample, indices[first : first + batch_size]))
                        show(done + min(first + batch_size, len(indices)))
                    shard = torch.cat([part for part, _ in parts]), [i for _, again in parts for i in again]
                    shards.write(number, *shard)
                done += len(indices)
                show(done)
                redrawn += shard[1]
    shards.tidy()
    return redrawn


def images(folder: str | Path, *, rank: int = 0, world: int = 1) -> Iterator[Tensor]:
    """The images of a folder that `draw` filled, a shard at a time and in order, as a FID computation takes them.

    Args:
        folder: the folder.
        rank, world: read the shards rank, rank + world, ... alone.

    Returns:
        an iterator over tensors (B, C, H, W) of uint8; x / 127.5 - 1 has the flow's range, [-1, 1].

    Raises:
        FileNotFoundError: shards are missing; it names them.
        ValueError: the manifest or, on the way, a shard is damaged.
    """
    shards = Shards.of(Path(folder))
    numbers = range(len(shards))[rank::world]
    missing = [shards.path(number).name for number in numbers if not shards.path(number).exists()]
    if missing:
        some = ", ".join(missing[:8]) + (", ..." if len(missing) > 8 else "")
        raise FileNotFoundError(
            f"{folder} lacks {len(missing)} of {len(numbers)} shards ({some}): draw again with the same settings, "
            "and only those that are missing are drawn"
        )

    def read(number: int) -> Tensor:
        shard = shards.read(number)
        if shard is None:
            raise ValueError(
                f"{shards.path(number)} is damaged, or of other settings than the manifest: draw again with the same "
                "settings, and only such shards are drawn"
            )
        return shard[0]

    return map(read, numbers)


def _finite(sample: Callable[..., Tensor], indices: Sequence[int]) -> tuple[Tensor, list[int]]:
    """Images of uint8, shape (B, C, H, W), and the indices of those that were drawn again."""
    x = sample(indices)
    bad = [row for row, finite in enumerate(x.isfinite().flatten(1).all(1).tolist()) if not finite]
    for row in bad:
        again = (sample([indices[row]], attempt) for attempt in range(1, ATTEMPTS))
        found = next((one for one in again if one.isfinite().all()), None)
        if found is None:
            raise SolveError(
                f"image {indices[row]} was not finite in {ATTEMPTS} draws: try a higher precision or less guidance, or check "
                "the model; the shards that were written stay"
            )
        x[row] = found[0]
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu(), [indices[row] for row in bad]
