"""All that ten minutes of a GPU can say about a flow of the paper's CIFAR size, by one call that a kill does not empty.

    PYTHONPATH=. python benchmarks/gpu.py --out FOLDER [--minutes 9.5] [--peer-tarflow DIR] [--peer-gs-jacobi DIR]

It trains a flow (6 blocks of 6 layers, width 256, patches of 2, L = 256) on 32 x 32 crops of photographs, or loads the one
of an earlier call; checks it against float64 and Apple's sampler; and measures batch after batch in bfloat16 and tf32, and each block
alone. FOLDER/gpu.json is written after every stage, and says what was left out for lack of time.
"""

import copy
import time
from pathlib import Path
from typing import Annotated, Any

import peers
import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from torch import Tensor

import parallel_decode as pd
from paper_repro.train import held_out_loss, loss, rate
from parallel_decode.adapters.tarflow import TarFlow
from parallel_decode.adapters.tarflow.bench import report, suite
from parallel_decode.adapters.tarflow.bench.measure import deviations, precision
from parallel_decode.adapters.tarflow.bench.record import write

CONFIG = dict(
    in_channels=3, img_size=32, patch_size=2, channels=256, num_blocks=6, layers_per_block=6, noise_std=0.05
)  # fmt: skip
TINY = CONFIG | dict(patch_size=4, channels=64, num_blocks=2, layers_per_block=1)
COMPILED = ("sequential", "auto", "sliding 32", "sliding 64")  # the schedules that are measured compiled, too


class Smooth:
    """Random smooth images, where the photographs are not installed."""

    img_size, in_channels, num_classes = 32, 3, 0

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, None]:
        """`size` images (size, 3, 32, 32): noise of four scales."""
        noise = [torch.randn(size, 3, n, n, generator=generator) / n**0.5 for n in (4, 8, 16, 32)]
        return torch.stack([F.interpolate(x, 32, mode="bicubic") for x in noise]).sum(0).tanh(), None

    def held_out(self) -> tuple[Tensor, None]:
        """256 others."""
        return self.batch(256, torch.Generator().manual_seed(2**31))


def obtain(folder: Path, config: dict[str, Any], seconds: float, device: str) -> tuple[TarFlow, dict[str, Any]]:
    """The flow in `folder`, or one trained for so many seconds and saved there; and how it came about.

    The rate of learning follows the clock, so that its cosine ends where the time does.
    """
    if (folder / "model.safetensors").exists():
        return TarFlow.from_checkpoint(folder).to(device), {"loaded": str(folder)}
    try:
        from paper_repro.data import Photographs

        data: Any = Photographs()
    except (ImportError, OSError) as error:
        Console(stderr=True).print(f"no photographs ({error}): smooth random images take their place")
        data = Smooth()
    torch.manual_seed(0)
    flow = TarFlow(**config).to(device)
    optimizer = torch.optim.AdamW(flow.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=1e-4)
    generator = torch.Generator().manual_seed(0)
    size = 128 if device == "cuda" else 8
    began, step, share = time.perf_counter(), 0, 0.0
    while share < 1:
        x, _ = data.batch(size, generator)
        x = x + config["noise_std"] * torch.randn(x.shape, generator=generator)
        for group in optimizer.param_groups:
            group["lr"] = 5e-4 * rate(round(2000 * share), 2000)
        value, _ = loss(flow, x.to(device), None)
        optimizer.zero_grad()
        value.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(flow.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 10 == 1 and device == "cuda":  # the clock counts what is done, not what waits to be
            torch.cuda.synchronize()
        share = (time.perf_counter() - began) / seconds
    flow.save_pretrained(folder)
    held_out = held_out_loss(flow, data, config["noise_std"])
    how = {"data": type(data).__name__, "steps": step, "batch": size, "seconds": round(seconds), "held_out": held_out}
    return flow.eval(), how


def check(flow: TarFlow, apple: Path | None) -> dict[str, Any]:
    """Deviations of schedules from sequential decoding in float64 at tol=0, and of ours from float64 and from Apple's."""
    flow = flow.eval()
    z, _ = suite.Setting(2).noise(flow)
    wide = copy.deepcopy(flow).double()
    truth = pd.solve(wide.system(z.double()), "sequential").value
    found: dict[str, Any] = {}
    for schedule in (pd.Jacobi(), pd.Selective(), pd.Sliding(32)):
        value = pd.solve(wide.system(z.double()), schedule, tol=0).value
        found[f"float64, {schedule!r}, tol=0, from sequential"] = deviations(value, truth)
    value = pd.solve(flow.system(z), "sequential").value
    found["float32 sequential from float64"] = deviations(value, truth)
    if apple is not None:
        theirs = peers.methods(flow, {"tarflow": apple})[suite.APPLE](z, None).value
        found["float32 sequential from Apple's"] = deviations(value, theirs)
        found["Apple's in float32 from float64"] = deviations(theirs, truth)
    return found


def main(
    out: Annotated[Path, typer.Option(help="folder for gpu.json and the plots")],
    minutes: Annotated[float, typer.Option(help="for everything")] = 9.5,
    train_minutes: Annotated[float, typer.Option(help="of them for training, where there is no flow yet")] = 3.0,
    checkpoint: Annotated[Path, typer.Option(help="folder of the flow: loaded, or trained and saved")] = Path(
        "runs/gpu"
    ),
    batches: Annotated[str, typer.Option(help="in the order of measuring")] = "16,1,64,4,256",
    dtypes: Annotated[str, typer.Option(help="likewise, at each batch")] = "bfloat16,tf32",
    blocks: Annotated[int, typer.Option(help="the batch at which blocks are timed alone, 0 for none")] = 16,
    methods: Annotated[str | None, typer.Option(help="parts of names; see parallel-decode bench")] = None,
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="compiled variants, too")] = True,
    runs: Annotated[int, typer.Option(help="interleaved rounds; never fewer than 5 but for lack of time")] = 7,
    peer_tarflow: Annotated[Path | None, typer.Option(help="a checkout; this runs its Python code")] = None,
    peer_gs_jacobi: Annotated[Path | None, typer.Option(help="a checkout; this runs its Python code")] = None,
    tiny: Annotated[bool, typer.Option("--tiny", help="a tiny flow, for a try on the CPU")] = False,
) -> None:
    """Train, check and measure, and write gpu.json after every stage."""
    began = time.perf_counter()
    deadline = began + 60 * minutes
    console = Console(width=160)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kinds = [kind for kind in dtypes.split(",") if kind != "tf32" or device == "cuda"]
    sizes = [int(size) for size in batches.split(",")]
    if tiny:
        sizes, blocks, runs, train_minutes = [1, 2], min(blocks, 2), 1, 0.02
        checkpoint = checkpoint / "tiny"  # beside the large one, and not in its place
    figures: dict[str, Any] = {"stages": {}, "left_out": []}

    def done(stage: str) -> None:
        figures["stages"][stage] = round(time.perf_counter() - began, 1)
        write(out / "gpu.json", figures)
        console.print(f"{figures['stages'][stage]:7.1f} s  {stage}")

    with precision("tf32" if device == "cuda" else "float32", torch.device(device)):
        flow, figures["flow"] = obtain(checkpoint, TINY if tiny else CONFIG, 60 * train_minutes, device)
    done("flow")
    figures["checks"] = check(flow, peer_tarflow)
    done("checks")

    available = suite.methods(flow, compiled=compiled)
    keep = [n for n in available if not n.endswith(suite.COMPILED) or n.removesuffix(suite.COMPILED) in COMPILED]
    jobs = [("whole", size, kind) for size in sizes for kind in kinds]
    jobs[1:1] = [("blocks", blocks, kinds[0])] * bool(blocks)
    segments, caps = (8, 1), (32, 10)
    for index, (what, size, kind) in enumerate(jobs):
        name = f"{what}, batch {size}, {kind}"
        left = deadline - time.perf_counter()
        setting = suite.Setting(
            size, kind, runs=runs, budget=left / (len(jobs) - index), deadline=deadline, memory=device == "cuda"
        )
        if what == "blocks":
            names = [n for n in suite.block_names(flow, compiled) if n in keep or "," not in n]
            parts = [p for p in (methods or "").split(",") if p and any(p.strip().lower() in n.lower() for n in names)]
            rows: Any = suite.blocks(flow, suite.choose(names, ",".join(parts) or None), setting)
            drawn = report.block_table(name, rows)
        else:
            available = suite.methods(flow, setting.tolerance, compiled=compiled, segments=segments, caps=caps)
            ours = {n: available[n] for n in keep}
            ours |= peers.methods(flow, {"tarflow": peer_tarflow, "gs-jacobi": peer_gs_jacobi}, segments, caps)
            rows = suite.whole(flow, {n: ours[n] for n in suite.choose(list(ours), methods)}, setting)
            drawn = report.table(name, rows)
        if not rows:
            figures["left_out"].append(f"{name}: no time was left")
        else:
            figures.setdefault(what, {}).setdefault(kind, {})[str(size)] = rows
            console.print(drawn)
            if what == "whole":
                report.plot(out / f"gpu_{kind}.png", figures[what][kind], f"CIFAR-sized flow, {kind} on {device}")
        done(name)


if __name__ == "__main__":
    typer.run(main)
