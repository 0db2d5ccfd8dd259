"""Why uniform Jacobi decoding (UJD) is slow on AFHQ and fast on CIFAR: passes, and what a pass costs. (A question that the paper leaves open.)

UJD's speed-up over sequential decoding is L t_single / (P t_sweep), for L positions and P passes of a block: 1 over the passes for a position,
P / L, times the cost of a sweep in single passes, t_sweep / t_single. The former is the flow's; the latter the machine's, too.
"""

import statistics
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from torch import Tensor

import parallel_decode as pd
from paper_repro.experiments import methods, scaling_text
from paper_repro.experiments.scaling_law import Law
from paper_repro.experiments.scaling_paper import paper
from paper_repro.experiments.scaling_sizes import FACTORS, SIZES, Resized, Size
from paper_repro.setup import Setup, small
from paper_repro.train import held_out_loss, train
from parallel_decode.adapters.tarflow import TarFlow
from parallel_decode.adapters.tarflow.bench.measure import Case, Outcome

TITLE = "Resolution, length and width: what makes UJD slow"
SWEEPS = 8  # of a block, when a sweep is timed


def run(setup: Setup) -> dict[str, Any]:
    """Trains a flow of each size, from the same seed, and measures it."""
    sizes = SIZES[setup.scale]
    steps = setup.pick(20_000, 250, 2)
    rows = []
    for size, varied in [*sizes.fitted().items(), (sizes.held_out, "held out")]:
        images = Resized(setup.needed_images(), size.side)
        flow = _flow(images, size, setup, steps)
        loss = held_out_loss(flow, images, flow.noise_std or 0.0)
        about = {"side": size.side, "patch": size.patch, "length": size.length, "width": size.channels}
        rows.append({"varied": varied, **about, "held_out": loss, **measure(flow.eval(), setup)})
    return {"batch": setup.batch, "steps": steps, "rows": rows}


def _flow(images: Resized, size: Size, setup: Setup, steps: int) -> TarFlow:
    """The flow of this size; its training goes on where it was stopped."""
    folder = setup.out / "scaling" / size.folder
    folder.mkdir(parents=True, exist_ok=True)
    config = small(images, setup.scale) | {"patch_size": size.patch, "channels": size.channels}
    if setup.scale == "quick":
        config["layers_per_block"] = 1
    device = str(setup.flow.var.device)
    batch, resume = setup.pick(128, 16, 2), (folder / "state.pt").exists()
    options: dict[str, Any] = dict(steps=steps, batch_size=batch, lr=1e-3, seed=setup.seed, device=device)
    for _ in train(folder, images, config, resume=resume, **options):
        pass
    return TarFlow.from_checkpoint(folder).to(device)


def measure(flow: TarFlow, setup: Setup) -> dict[str, Any]:
    """UJD's passes of each block by tau, means of several batches; seconds of a single pass and of a sweep, medians; UJD's speed-up.

    Args:
        flow: in evaluation mode.
        setup: its batch, runs and seed.
    """
    z, y = setup.setting().noise(flow)
    ujd = methods.paper()["UJD"]

    def whole(schedule: pd.Schedule | pd.Selective) -> Outcome:
        return _outcome(pd.solve(flow.system(z, y=y), schedule))

    def sweeps() -> Outcome:
        tight = methods.paper(scaling_text.TIGHT)["UJD"]
        return _outcome(pd.solve(flow.system(z, y=y).layer(0, None), tight, max_passes=SWEEPS))

    cases: dict[str, Case] = {
        "sequential": partial(whole, pd.Sequential()),
        "UJD": partial(whole, ujd),
        "sweeps": sweeps,
    }
    setting = replace(setup.setting(), runs=4 * setup.runs, budget=setup.pick(60, 5, 1))  # seconds
    timings = setting.time(flow, cases, "sequential")
    seconds = {name: statistics.median(timing.seconds) for name, timing in timings.items()}
    passes = {name: sum(timing.outcome.passes or ()) for name, timing in timings.items()}
    return {
        "passes": {str(tau): _passes(flow, setup, tau) for tau in (methods.TAU, scaling_text.TIGHT)},
        "single": seconds["sequential"] / passes["sequential"],
        "sweep": seconds["sweeps"] / passes["sweeps"],
        "speed_up": seconds["sequential"] / seconds["UJD"],
    }


def _outcome(solution: pd.Solution) -> Outcome:
    value: Tensor = solution.value
    return Outcome(value, tuple(layer.passes for layer in solution.layers))


def _passes(flow: TarFlow, setup: Setup, tau: float) -> list[float]:
    draws = []
    for turn in range(setup.pick(8, 4, 1)):
        z, y = setup.setting(seed=setup.seed + turn).noise(flow)
        draws.append([layer.passes for layer in pd.solve(flow.system(z, y=y), methods.paper(tau)["UJD"]).layers])
    return [statistics.mean(block) for block in zip(*draws, strict=True)]


def tell(figures: dict[str, Any], data: str) -> str:
    parts = (scaling_text.measured, scaling_text.laws, scaling_text.held_out, paper)
    return "\n\n".join(part(figures) for part in parts)


def draw(figures: dict[str, Any], path: Path) -> None:
    figure = Figure(figsize=(14, 7), layout="constrained")
    figure.suptitle(
        "UJD on flows of several sizes: passes (above) and the cost of a pass (below); lines are power laws fitted to all dots"
    )
    labels = ("side of an image (pixels)", "positions L", "width (channels)")
    laws = scaling_text.laws_of(figures)
    wanted = {
        "UJD's passes of a block": scaling_text.PASSES,
        "seconds of a sweep / of a single pass": scaling_text.COST,
    }
    for line, (what, values) in zip(figure.subplots(2, 4, sharey="row"), wanted.items(), strict=True):
        for name, of in values.items():
            for column, factor in enumerate(FACTORS):
                _varied(line[column], figures["rows"][:-1], column, of, laws[name], name)
                line[column].set(title=f"{factor} varied", xlabel=labels[column])
            _predicted(line[3], figures["rows"], of, laws[name], name)
        ends = [*line[3].get_xlim(), *line[3].get_ylim()]
        line[3].axline((min(ends), min(ends)), (max(ends), max(ends)), color="gray", linewidth=0.8)
        line[3].set(title="measured against the law (gray: equal)", xlabel="by the law")
        line[0].set_ylabel(what)
        for axes in line:
            axes.legend(fontsize=7, loc="lower right" if axes is line[3] else "upper left")
            _plain(axes.yaxis)
            axes.margins(y=0.2)
        _plain(line[3].xaxis)
    figure.savefig(path, dpi=110)


def _plain(axis: Axis) -> None:
    """Ticks at 1, 2, 5, 10 ..., in plain numbers."""
    axis.set_minor_locator(LogLocator(subs=(2, 5)))
    for which in (axis.set_major_formatter, axis.set_minor_formatter):
        which("{x:g}")


def _varied(axes: Axes, rows: list[dict[str, Any]], column: int, of: scaling_text.Value, law: Law, name: str) -> None:
    """The rows that differ from the base in one factor alone, and the law between them."""
    shown = [row for row in rows if row["varied"] in ("base", FACTORS[column])]
    shown.sort(key=lambda row: scaling_text.point(row)[column])
    at = [scaling_text.point(row)[column] for row in shown]
    (dots,) = axes.loglog(at, [of(row) for row in shown], "o", label=name)
    axes.loglog(at, [law(*scaling_text.point(row)) for row in shown], color=dots.get_color(), linewidth=1)
    axes.set_xticks(at, map(str, at))
    axes.xaxis.set_minor_locator(NullLocator())


def _predicted(axes: Axes, rows: list[dict[str, Any]], of: scaling_text.Value, law: Law, name: str) -> None:
    """All rows against the law, the held-out one as a star."""
    points = [(law(*scaling_text.point(row)), of(row)) for row in rows]
    (dots,) = axes.loglog(*zip(*points[:-1], strict=True), "o", label=f"{name}, fitted")
    axes.loglog(*points[-1], "*", color=dots.get_color(), markersize=14, label=f"{name}, held out")
