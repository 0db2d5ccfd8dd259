"""The experiments of Selective Jacobi Decoding (arXiv 2505.24791), one command each, and `all`."""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from paper_repro import report
from paper_repro.catalogue import APART, EXPERIMENTS
from paper_repro.commands import train
from paper_repro.image_tokens_command import image_tokens
from paper_repro.setup import Setup, obtain
from parallel_decode.adapters.tarflow.bench.record import write
from parallel_decode.adapters.tarflow.cli import sample

app = typer.Typer(help=__doc__, no_args_is_help=True)
app.command()(train)
app.command()(image_tokens)
app.command()(sample)

Out = Annotated[Path, typer.Option(help="folder for figures, plots and the report")]
Root = Annotated[Path | None, typer.Option(help="folder of the data set, where it does not ship with a dependency")]
Checkpoint = Annotated[Path | None, typer.Option(help="a file of weights, or a folder; trained now if left out")]
Device = Annotated[str, typer.Option(help="cpu, cuda")]
Quick = Annotated[
    bool, typer.Option("--quick", help="what two CPU cores do in minutes, in place of the paper's batch and runs")
]
Smoke = Annotated[bool, typer.Option("--smoke", help="the least that runs, in seconds, on tiny flows")]
Inception = Annotated[Path | None, typer.Option(help="the weights of FID's network; without them distances are no FID")]
FidStats = Annotated[Path | None, typer.Option(help="FID's statistics of the data, such as Apple's; with --inception")]
Steps = Annotated[int | None, typer.Option(help="of training, where a flow has to be trained", min=1)]
Again = Annotated[bool, typer.Option(help="measure again what is there already")]
OUT = Path("runs/paper")


def measure(setup: Setup, name: str, again: bool = False) -> Path:
    """Run an experiment and write its figures; nothing is done where they are there already.

    Raises:
        ValueError: what is there is of another flow, scale or seed.
    """
    path = setup.out / f"{name}.json"
    about = {"data": setup.data, "scale": setup.scale, "seed": setup.seed, "model": setup.flow.fingerprint()}
    if path.exists() and not again:
        there = json.loads(path.read_text())
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
        try:
            setup = obtain(data, out / data, root, checkpoint, device, scale_of(quick, smoke), steps)
            setup = replace(setup, inception=inception, fid_stats=fid_stats)
            measure(setup, name, again)
        except (OSError, ValueError) as error:
            raise typer.BadParameter(str(error)) from None
        typer.echo(f"the report: {report.write(out, [data])}")

    command.__doc__ = f"{EXPERIMENTS[name].TITLE}."
    return command


for _name in EXPERIMENTS:
    app.command(_name)(_command(_name))


@app.command("all")
def everything(
    data: Annotated[str, typer.Option(help="data sets, with commas between them")] = "digits,photos",
    root: Root = None,
    device: Device = "cpu",
    quick: Quick = False,
    smoke: Smoke = False,
    steps: Steps = None,
    inception: Inception = None,
    again: Again = False,
    out: Out = OUT,
) -> None:
    """Every experiment on every data set, and the report. What is there already is kept, so that it goes on where it was stopped."""
    names = data.split(",")
    try:
        for each in names:
            setup = obtain(each, out / each, root, None, device, scale_of(quick, smoke), steps)
            setup = replace(setup, inception=inception)
            for name in EXPERIMENTS:
                if each == names[0] or name not in APART:
                    measure(setup, name, again)
            report.write(out, names)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error)) from None
    typer.echo(f"the report: {out / 'report.html'}")


if __name__ == "__main__":
    app()
