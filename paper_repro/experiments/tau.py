"""Time and deviation against the threshold at which sweeps stop (the paper's ablation of tau)."""

import statistics
import time
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

import parallel_decode as pd
from paper_repro.experiments import methods
from paper_repro.experiments.table import table
from paper_repro.setup import Setup
from parallel_decode.adapters.tarflow.bench.measure import deviations

TITLE = "The threshold tau"
TAUS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
WINDOW = 64


def run(setup: Setup) -> dict[str, Any]:
    z, y = setup.noise()
    system = setup.flow.system(z, y=y)
    schedules: dict[str, pd.Schedule | pd.Selective] = {"sequential": pd.Sequential()}
    for tau in TAUS:
        schedules[f"SeJD, {tau}"] = methods.paper(tau)["SeJD"]
        schedules[f"window of {WINDOW}, {tau}"] = pd.Sliding(WINDOW, tol=tau)
    seconds: dict[str, list[float]] = {name: [] for name in schedules}
    values = {}
    for turn in range(setup.runs + 1):
        for name, schedule in schedules.items():
            began = time.perf_counter()
            values[name] = pd.solve(system, schedule)
            if turn:  # the first warms up
                seconds[name].append(time.perf_counter() - began)
    truth = values["sequential"].value

    def row(name: str) -> dict[str, Any]:
        ratios = [s / t for s, t in zip(seconds["sequential"], seconds[name], strict=True)]
        found = deviations(values[name].value, truth)
        return {"speed_up": statistics.median(ratios), "passes": values[name].passes, **found}

    ways = ("SeJD", f"window of {WINDOW}")
    return {"batch": setup.batch, "methods": {way: {str(tau): row(f"{way}, {tau}") for tau in TAUS} for way in ways}}


def tell(figures: dict[str, Any], data: str) -> str:
    found = figures["methods"]
    header = ["tau", *(f"{way}: {what}" for way in found for what in ("speed-up", "largest", "mean", "PSNR (dB)"))]
    rows = [
        [
            tau,
            *(
                one[tau][key]
                for one in found.values()
                for key in ("speed_up", "largest_deviation", "mean_deviation", "psnr_db")
            ),
        ]
        for tau in map(str, TAUS)
    ]
    return (
        table(header, rows)
        + f"\n\nDeviation from the sequential images, on [-1, 1] (a level of 8 bits is 7.8e-3), batch {figures['batch']}. Under SeJD tau bounds the change of all positions of all rows in a sweep; "
        "in a window a position is final once it changes by no more than tau (1 + |x|), so that errors enter sooner. The paper chooses 0.5 and finds that FID rises slowly below 1."
    )


def draw(figures: dict[str, Any], path: Path) -> None:
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for way, one in figures["methods"].items():
        taus = [float(tau) for tau in one]
        left.plot(taus, [row["speed_up"] for row in one.values()], marker="o", label=way)
        right.loglog(taus, [row["mean_deviation"] for row in one.values()], marker="o", label=f"{way}, mean")
        right.loglog(
            taus, [row["largest_deviation"] for row in one.values()], marker=".", linestyle=":", label=f"{way}, largest"
        )
    left.set(xscale="log", xlabel="tau", ylabel="speed-up over sequential", title="speed")
    right.axhline(2 / 255, color="gray", linewidth=0.8)
    right.set(xlabel="tau", ylabel="deviation (gray: one level of 8 bits)", title="deviation from sequential")
    for axes in (left, right):
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=110)
