"""The experiments of Selective Jacobi Decoding (arXiv 2505.24791), one command each, and `all`."""

import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from paper_repro import report
from paper_repro.catalogue import APART, EXPERIMENTS
from paper_repro.commands import train
from paper_repro.data import DATA
from paper_repro.image_tokens_command import image_tokens
from paper_repro.setup import Setup, obtain
from parallel_decode._command_line import Command, Group
from parallel_decode.adapters.tarflow.bench.record import write
from parallel_decode.adapters.tarflow.cli import sample

app = typer.Typer(cls=Group, help=__doc__, no_args_is_help=True)
for _each in (train, image_tokens, sample):
    app.command(cls=Command)(_each)

Out = Annotated[Path, typer.Option(help="folder for figures, plots and the report", file_okay=False)]
Root = Annotated[Path | None, typer.Option(help="folder of the data set, where it does not ship with a dependency")]
Checkpoint = Annotated[Path | None, typer.Option(help="a file of weights, or a folder; trained now if left out")]
Device = Annotated[str, typer.Option(help="cpu, cuda")]
Quick = Annotated[
    bool, typer.Option("--quick", help="what two CPU cores do in minutes, in place of the paper's batch and runs")
]
Smoke = Annotated[bool, typer.Option("--smoke", help="the least that runs, in seconds, on tiny flows")]
Inception = Annotated[
    Path | None,
    typer.Option(help="the weights of FID's network; without them distances are no FID", exists=True, dir_okay=False),
]
FidStats = Annotated[Path | None, typer.Option(help="FID's statistics of the data, such as Apple's; with --inception")]
Steps = Annotated[int | None, typer.Option(help="of training, where a flow has to be trained", min=1)]
Again = Annotated[bool, typer.Option(help="measure again what is there already")]
OUT = Path("runs/paper")
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def measure(setup: Setup, name: str, again: bool = False) -> Path:
    """Run an experiment and write its figures; nothing is done where they are there already.

    Raises:
        ValueError: what is there is of another flow, scale or seed.
    """
    path = setup.out / f"{name}.json"
    about = {"data": setup.data, "scale": setup.scale, "seed": setup.seed, "model": setup.flow.fingerprint()}
    if path.exists() and not again:
        try:
            there = json.loads(path.read_bytes())
            there["machine"], there["versions"], there["seconds"]
        except (ValueError, TypeError, KeyError):
            raise ValueError(f"{path} is damaged, or holds no figures: pass --again to replace it") from None
        if other := [
            f"{key} {there.get(key)} in place of {value}" for key, value in about.items() if there.get(key) != value
        ]:
            raise ValueError(f"{path} is of {', '.join(other)}: pass --again to replace it, or another --out")
        typer.echo(f"{setup.data}, {name}: there already")
        return path
    typer.echo(f"{setup.data}, {name} ...")
    began = time.perf_counter()
    setup.out.mkdir(parents=True, exist_ok=True)
    found = EXPERIMENTS[name].run(setup)
    seconds = time.perf_counter() - began
    write(path, {**about, "seconds": round(seconds, 1), **found})
    typer.echo(f"{setup.data}, {name}: {seconds:.1f} s")
    return path


def scale_of(quick: bool, smoke: bool) -> str:
    """The scale of a `Setup`."""
    return "smoke" if smoke else "quick" if quick else "full"


def _command(name: str) -> Callable[..., None]:
    def command(
        data: Annotated[str, typer.Option(help="see paper_repro.data.DATA")] = "digits",
        root: Root = None,
        checkpoint: Checkpoint = None,
        device: Device = "cpu",
        quick: Quick = False,
        smoke: Smoke = False,
        steps: Steps = None,
        inception: Inception = None,
        fid_stats: FidStats = None,
        again: Again = False,
        out: Out = OUT,
    ) -> None:
        if fid_stats is not None and inception is None:
            raise ValueError("--fid-stats are statistics of FID's features, which need --inception")
        if fid_stats is not None and not fid_stats.is_file():
            raise FileNotFoundError(f"--fid-stats is {fid_stats}, which is not a file")
        setup = obtain(data, out / data, root, checkpoint, device, scale_of(quick, smoke), steps)
        setup = replace(setup, inception=inception, fid_stats=fid_stats)
        measure(setup, name, again)
        typer.echo(f"the report: {report.write(out, [data])}")

    command.__doc__ = f"{EXPERIMENTS[name].TITLE}."
    return command


for _name in EXPERIMENTS:
    app.command(_name, cls=Command)(_command(_name))


@app.command("all", cls=Command)
def everything(
    data: Annotated[str, typer.Option(help="data sets, with commas between them")] = "digits,photos",
    root: Root = None,
    device: Device = "cpu",
    quick: Quick = False,
    smoke: Smoke = False,
    steps: Steps = None,
    inception: Inception = None,
    again: Again = False,
    skip: Annotated[str, typer.Option(help="experiments to leave out, with commas between them")] = "",
    out: Out = OUT,
) -> None:
    """Every experiment on every data set, and the report. What is there already is kept, so that it goes on where it was stopped.

    On a CPU as many experiments as there are data sets are done side by side, if there is a core for each.
    """
    names, left_out = data.split(","), skip.split(",") if skip else []
    for option, given, known in (("--data", names, DATA), ("--skip", left_out, EXPERIMENTS)):
        if unknown := [each for each in given if each not in known]:
            raise ValueError(f"{option} has {unknown[0]!r}, expected some of {','.join(known)}")
    wanted = {}
    for each in names:
        flow = (each, out / each, root, None, device, scale_of(quick, smoke), steps)
        of_it = [name for name in EXPERIMENTS if name not in left_out and (each == names[0] or name not in APART)]
        wanted[flow] = [(flow, inception, name, again) for name in of_it]
    if device == "cpu" and 1 < len(names) <= CORES:
        _side_by_side(wanted)
    else:
        for job in chain(*wanted.values()):
            _measure(*job)
    report.write(out, names)
    typer.echo(f"the report: {out / 'report.html'}")


def _measure(flow: tuple[Any, ...], inception: Path | None, name: str, again: bool) -> None:
    """An experiment; `flow` is what `obtain` is given."""
    measure(replace(obtain(*flow), inception=inception), name, again)


def _train(flow: tuple[Any, ...]) -> None:
    obtain(*flow)


def _side_by_side(wanted: dict[tuple[Any, ...], list[tuple[Any, ...]]]) -> None:
    """The jobs of each flow, as soon as it is there, in as many processes as there are flows, which share out the cores.

    Raises:
        ValueError: one of the processes was killed.
    """
    workers = len(wanted)
    with ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (CORES // workers,)) as pool:
        trained = {pool.submit(_train, flow): jobs for flow, jobs in wanted.items()}
        try:
            started = []
            for flow in as_completed(trained):
                flow.result()
                started += [pool.submit(_measure, *job) for job in trained[flow]]
            for job in started:
                job.result()
        except BrokenProcessPool:
            raise ValueError(
                "a process was killed, perhaps for want of memory: what is done is kept, run it again"
            ) from None


if __name__ == "__main__":
    app()
