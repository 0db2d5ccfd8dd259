"""A device model: seconds of the schedules here from the passes that they made, checked, and on GPUs predicted."""

import statistics
import time
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

import parallel_decode as pd
from paper_repro import gpus
from paper_repro.devices import SWEEP_STEPS, WINDOW_STEPS, Network, Pass, fit
from paper_repro.experiments import devices_text, methods
from paper_repro.experiments.devices_text import TARGET
from paper_repro.experiments.layers import LEARNS
from paper_repro.gpus import GPUS, PAPER
from paper_repro.paper import TABLE_1
from paper_repro.setup import Setup
from parallel_decode.adapters.tarflow.decoding import BlockSystem, FlowSystem
from parallel_decode.cached import KeyValueStorage, Reads

TITLE = "A device model"
WIDTHS = (4, 16, 32, 64, 128)  # of the windows whose passes the prices are measured by


class Noting(KeyValueStorage):
    """Notes rows, positions read and keys of every pass."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[tuple[int, int, int]] = []

    def update(self, layer: int, kv: Tensor, reads: Reads) -> tuple[Tensor, Tensor]:
        if layer == 0:
            self.noted.append((len(kv), reads.size, reads.stop))
        return super().update(layer, kv, reads)

    def passes(self, steps: int) -> list[Pass]:
        return [Pass(*one, steps if one[1] > 1 else 0) for one in self.noted]


@dataclass(frozen=True, repr=False)
class Stamped(pd.Schedule):
    """Windows of one width, which note when each pass begins."""

    width: int
    stamps: list[float] = field(default_factory=list)

    def window(self, front: int, length: int) -> range:
        self.stamps.append(_now())
        return range(front, min(length, front + self.width))


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def run(setup: Setup) -> dict[str, Any]:
    network = Network.of(setup.flow)
    half = replace(network, itemsize=2)
    batches = {"full": (1, 16, 256), "quick": (1, 4, 16), "smoke": (1, 2)}[setup.scale]
    singles = [single for batch in batches for single in _singles(setup, batch)]
    works, seconds = [network.work(one) for one, _ in singles], [taken for _, taken in singles]
    here = fit(works, seconds)
    errors = [abs(here.seconds(work) / taken - 1) for work, taken in zip(works, seconds, strict=True)]
    check, latencies = gpus.check()
    rows: list[dict[str, Any]] = []
    for batch in batches:
        for name, (taken, passes) in _schedules(setup, batch).items():
            elsewhere = {gpu: latencies.on(gpu, captured=True).predict(half, passes) for gpu in GPUS}
            predicted = here.predict(network, passes)
            rows.append({"batch": batch, "method": name, "measured": taken, "predicted": predicted, "gpus": elsewhere})
    return {
        "prices": asdict(here),
        "singles": len(singles),
        "single_errors": [statistics.median(errors), max(errors)],
        "schedules": rows,
        "latencies": latencies._asdict(),
        "check": check,
        "paper": gpus.paper(latencies),
    }


def _singles(setup: Setup, batch: int) -> list[tuple[Pass, float]]:
    """Passes of the first block over windows of fixed widths, and their seconds: single positions in five groups by the keys they see."""
    z, y = setup.noise(batch)
    layer = setup.flow.system(z, y=y).layer(0, None)
    assert isinstance(layer, BlockSystem)
    length = layer.length
    found: list[tuple[Pass, float]] = []
    for width in (1, *(width for width in WIDTHS if width < length), length):
        storage = layer.storage = Noting()
        count = length if width == 1 else min(setup.pick(24, 12, 4), length)
        times = []
        for _ in range(setup.pick(10, 4, 2)):
            storage.noted.clear()
            schedule = Stamped(width, [])
            pd.solve(layer, schedule, tol=0, max_passes=count)
            times.append([end - begin for begin, end in zip(schedule.stamps, schedule.stamps[1:], strict=False)])
        passes = storage.passes(WINDOW_STEPS)[: len(times[0])]
        groups = 5 if width == 1 else 1
        for group in range(groups):
            part = slice(group * len(passes) // groups, (group + 1) * len(passes) // groups)
            middle = passes[part][len(passes[part]) // 2]
            found.append((middle, statistics.median(one for run in times for one in run[part])))
    return found


def _schedules(setup: Setup, batch: int) -> dict[str, tuple[float, dict[Pass, float]]]:
    """Seconds of each schedule, the median of interleaved rounds, and the passes of the last of them."""
    z, y = setup.noise(batch)
    system = setup.flow.system(z, y=y)
    assert isinstance(system, FlowSystem)
    storage = system.storage = Noting()
    schedules = methods.paper() | {f"window of {w}": pd.Sliding(w) for w in (16, 64)} | {"auto": pd.Auto()}
    seconds: dict[str, list[float]] = {name: [] for name in schedules}
    passes: dict[str, dict[Pass, float]] = {}
    for turn in range(setup.runs + 1):
        for name, schedule in schedules.items():
            for _ in range(setup.pick(LEARNS, LEARNS, 1) if name == "auto" and not turn else 1):
                storage.noted.clear()
                began = _now()
                pd.solve(system, schedule)
                taken = _now() - began
            if turn:  # the first warms up
                seconds[name].append(taken)
            steps = SWEEP_STEPS if name in ("UJD", "SeJD") else WINDOW_STEPS
            passes[name] = dict(Counter(storage.passes(steps)))
    return {name: (statistics.median(taken), passes[name]) for name, taken in seconds.items()}


def tell(figures: dict[str, Any], data: str) -> str:
    return "\n\n".join(
        part(figures) for part in (devices_text.here, devices_text.h200, devices_text.paper, devices_text.fronts)
    )


def draw(figures: dict[str, Any], path: Path) -> None:
    figure = Figure(figsize=(14, 4.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=[1, 1, 1.5])
    for batch in dict.fromkeys(row["batch"] for row in figures["schedules"]):
        _scatter(left, [row for row in figures["schedules"] if row["batch"] == batch], "predicted", f"batch {batch}")
    for key in ("assumed", "calibrated"):
        _scatter(middle, figures["check"], key, f"latencies {key}")
    for axes, title in ((left, "schedules, here"), (middle, "an H200, batch 16")):
        ends = axes.get_xlim()
        for factor, style in ((1, "-"), (1 + TARGET, ":"), (1 - TARGET, ":")):
            axes.plot(ends, [factor * end for end in ends], style, color="gray", linewidth=0.8)
        axes.set(title=title, xlabel="measured (s)", ylabel=f"predicted (s); dotted: {TARGET:.0%}", xlim=ends)
        axes.legend(fontsize=8)
    kinds = list(dict.fromkeys((row["gpu"], row["ours"]) for row in figures["paper"]))
    for place, (gpu, ours) in enumerate(kinds):
        gains = [
            row["sequential"] / row["SeJD"] for row in figures["paper"] if (row["gpu"], row["ours"]) == (gpu, ours)
        ]
        label = f"{gpu}, {'fixed cache, captured' if ours else 'as in the paper'}"
        right.bar([index + 0.14 * (place + 1) for index in range(len(gains))], gains, 0.13, label=label)
    gains = [TABLE_1[data]["SeJD"].speed_up for data in PAPER]
    right.bar(range(len(gains)), gains, 0.13, color="black", label="measured by the paper, two L40S")
    right.set(title="SeJD at batch 256: predictions", ylabel="speed-up over sequential decoding")
    right.set_xticks([index + 0.35 for index in range(len(PAPER))], PAPER)
    right.set_ylim(0, 1.5 * right.get_ylim()[1])
    right.legend(fontsize=7, ncols=2)
    figure.savefig(path, dpi=110)


def _scatter(axes: Any, rows: list[dict[str, Any]], key: str, label: str) -> None:
    axes.loglog([row["measured"] for row in rows], [row[key] for row in rows], "o", markersize=4, label=label)
