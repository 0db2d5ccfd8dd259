"""The most memory that decoding holds at a time, against batch and length."""

from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

import parallel_decode as pd
from paper_repro.experiments import methods
from paper_repro.experiments.table import table
from paper_repro.paper import MEMORY
from paper_repro.setup import Setup
from parallel_decode.adapters.tarflow import TarFlow
from parallel_decode.adapters.tarflow.bench.measure import Outcome, peak_memory

TITLE = "Memory"
PASSES = 3  # of a layer: what is held does not grow with them


def run(setup: Setup) -> dict[str, Any]:
    """Of the flow itself at several batch sizes, and of new flows of its width at several lengths (weights do not matter here)."""
    flow = setup.flow
    batches = {"full": (1, 16, 64, 256), "quick": (1, 4, 16), "smoke": (1, 2)}[setup.scale]
    factors = {"full": (1, 2, 4), "quick": (1, 2), "smoke": (1, 2)}[setup.scale]
    first: Any = flow.blocks[0]
    channels, layers = first.proj_in.out_features, len(first.attn_blocks)
    found = [{"batch": batch, **_peaks(flow, setup, batch)} for batch in batches]
    for factor in factors[1:]:
        size = factor * flow.img_size
        longer = TarFlow(flow.in_channels, size, flow.patch_size, channels, 2, layers, flow.nvp).to(flow.var.device)
        found.append({"batch": batches[1], **_peaks(longer, setup, batches[1])})
    return {"rows": found}


def _peaks(flow: TarFlow, setup: Setup, batch: int) -> dict[str, Any]:
    """MiB beyond weights and noise, by method."""
    z, y = setup.setting(batch).noise(flow)
    if not flow.num_classes:
        y = None
    schedules = methods.paper() | {"window of 64": pd.Sliding(64)}

    def decode(schedule: pd.Schedule | pd.Selective) -> Outcome:
        return Outcome(pd.solve(flow.system(z, y=y), schedule, max_passes=PASSES).value)

    peaks = {
        name: round(peak_memory(partial(decode, schedule), z.device) / 2**20, 3) for name, schedule in schedules.items()
    }
    return {"length": len(flow.var), "mib": peaks}


def tell(figures: dict[str, Any], data: str) -> str:
    names = list(figures["rows"][0]["mib"])
    rows = [[row["batch"], row["length"], *(row["mib"][name] for name in names)] for row in figures["rows"]]
    return table(["batch", "L", *(f"{name} (MiB)" for name in names)], rows) + (
        f"\n\nBeyond weights and noise; each layer was stopped after {PASSES} passes, since more hold no more. The cache has fixed storage and is shared by all blocks; sweeps read everything at once, which takes "
        f"more than the cache alone. The paper: {MEMORY['sequential']} GB for its cached baseline and {MEMORY['SeJD']} GB for SeJD (AFHQ, batch 16), which keeps no cache in its sweeps."
    )


def draw(figures: dict[str, Any], path: Path) -> None:
    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axes = figure.subplots()
    first = figures["rows"][0]["length"]
    rows = [row for row in figures["rows"] if row["length"] == first]
    for name in rows[0]["mib"]:
        axes.loglog(
            [row["batch"] for row in rows], [max(row["mib"][name], 1e-3) for row in rows], marker="o", label=name
        )
    axes.set(title=f"peak memory at {first} positions", xlabel="batch", ylabel="MiB beyond weights and noise")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
