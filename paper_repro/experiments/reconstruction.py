"""Encode images and decode them again: how exactly do they come back?"""

import math
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

import parallel_decode as pd
from paper_repro.experiments import methods
from paper_repro.experiments.pictures import grid
from paper_repro.experiments.table import table
from paper_repro.paper import RECONSTRUCTION
from paper_repro.setup import Setup

TITLE = "Reconstruction"


def psnr(error: float) -> float:
    """Decibels for a mean squared error of images in [-1, 1]."""
    return 10 * math.log10(4 / error) if error else math.inf


@torch.no_grad()
def run(setup: Setup) -> dict[str, Any]:
    """The mean squared error of held-out images (with the noise of training), encoded and decoded."""
    device, count = setup.flow.var.device, setup.batch
    x, y = (None if part is None else part[:count].to(device) for part in setup.needed_images().held_out())
    assert x is not None
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(setup.seed)).to(x)
    x = x + (setup.flow.noise_std or 0) * noise
    z, _ = setup.flow(x, y)
    system = setup.flow.system(z / setup.flow.var.sqrt(), y=y)
    errors, shown = {}, {"held-out images": x[:8]}
    for name, schedule in {**methods.paper(), **methods.ours()}.items():
        value = pd.solve(system, schedule).value
        errors[name] = float((value - x).double().square().mean())
        shown[name] = value[:8]
    grid(shown, setup.out / "reconstruction_images.png", "Held-out images, encoded and decoded")
    return {"images": len(x), "mse": errors}


def tell(figures: dict[str, Any], data: str) -> str:
    rows = [[name, f"{error:.3g}", psnr(error)] for name, error in figures["mse"].items()]
    rows += [[f"paper, SeJD, {name}", f"{error:.3g}", psnr(error)] for name, error in RECONSTRUCTION.items()]
    return table(["method", "mean squared error", "PSNR (dB)"], rows) + (
        f"\n\n{figures['images']} held-out images on [-1, 1] with the noise of training. What sequential decoding leaves is rounding; tau = 0.5 leaves what the eye sees."
    )


def draw(figures: dict[str, Any], path: Path) -> None:
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    bars = {name: psnr(error) for name, error in figures["mse"].items()}
    bars |= {f"paper, {name}": psnr(error) for name, error in RECONSTRUCTION.items()}
    axes.barh(list(bars), [min(value, 150) for value in bars.values()])
    axes.invert_yaxis()
    axes.set(xlabel="PSNR (dB)", title="Encode and decode: higher is closer")
    figure.savefig(path, dpi=110)
