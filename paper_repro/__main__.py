"""The experiments of Selective Jacobi Decoding (arXiv 2505.24791), one command each, and `all`."""

from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Annotated

import typer

from paper_repro import report
from paper_repro.catalogue import APART, EXPERIMENTS
from paper_repro.commands import train
from paper_repro.data import DATA
from paper_repro.image_tokens_command import image_tokens
from paper_repro.measure import CORES, measure, measure_on, side_by_side
from paper_repro.setup import obtain
from paper_repro.successors_command import itarflow, starflow
from parallel_decode._command_line import Command, Group
from parallel_decode.adapters.tarflow.cli import sample

app = typer.Typer(cls=Group, help=__doc__, no_args_is_help=True)
for _each in (train, image_tokens, itarflow, starflow, sample):
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
        side_by_side(wanted)
    else:
        for job in chain(*wanted.values()):
            measure_on(*job)
    report.write(out, names)
    typer.echo(f"the report: {out / 'report.html'}")


if __name__ == "__main__":
    app()
