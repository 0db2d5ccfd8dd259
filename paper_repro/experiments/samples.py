"""Samples of every method from one noise, and how far they are from the sequential ones."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from torch import Tensor

import parallel_decode as pd
from paper_repro.experiments import methods
from paper_repro.experiments.pictures import grid
from paper_repro.experiments.table import table
from paper_repro.setup import Setup
from parallel_decode.adapters.tarflow.bench.measure import deviations

TITLE = "Samples side by side"
AMPLIFIED = 10


def run(setup: Setup) -> dict[str, Any]:
    z, y = setup.noise(setup.pick(8, 8, 2))
    system = setup.flow.system(z, y=y)
    rows: dict[str, Tensor] = {}
    found = {}
    for name, schedule in {**methods.paper(), **methods.ours()}.items():
        images = pd.solve(system, schedule).value
        rows[name] = images
        if name != "sequential":
            rows[f"{name}, difference x {AMPLIFIED}"] = AMPLIFIED * (images - rows["sequential"])
            found[name] = deviations(images, rows["sequential"])
    grid(
        rows,
        setup.out / "samples_images.png",
        f"{setup.data}: one noise, several methods; gray: no difference from sequential",
    )
    if setup.flow.noise_std is not None:
        clean = {name: setup.flow.denoised(images, y) for name, images in rows.items() if "difference" not in name}
        grid(clean, setup.out / "samples_denoised.png", f"{setup.data}: the same, denoised")
    return {"images": len(z), "deviations": found}


def tell(figures: dict[str, Any], data: str) -> str:
    rows = [
        [name, one["largest_deviation"], one["mean_deviation"], f"{one['within_one_level']:.2%}", one["psnr_db"]]
        for name, one in figures["deviations"].items()
    ]
    return table(["method", "largest", "mean", "within one level of 8 bits", "PSNR (dB)"], rows) + (
        f"\n\nDeviations of {figures['images']} images from the sequential ones, on [-1, 1]."
    )


def draw(figures: dict[str, Any], path: Path) -> None:
    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    found = figures["deviations"]
    axes.barh(list(found), [max(one["mean_deviation"], 1e-9) for one in found.values()])
    axes.axvline(2 / 255, color="gray", linewidth=0.8)
    axes.invert_yaxis()
    axes.set(
        xscale="log",
        xlabel="mean deviation from sequential (gray: one level of 8 bits)",
        title="How far each method's samples are",
    )
    figure.savefig(path, dpi=110)
