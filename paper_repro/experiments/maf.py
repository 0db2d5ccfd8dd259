"""Masked autoregressive flows of eight layers: a 2-D Ising model at T = 3.0, and binary digits."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from nflows.distributions import StandardNormal
from nflows.flows import Flow
from nflows.transforms import CompositeTransform, MaskedAffineAutoregressiveTransform, ReversePermutation
from sklearn.datasets import load_digits
from torch import Tensor

from paper_repro.experiments.pictures import grid
from paper_repro.experiments.table import table
from paper_repro.paper import MAF
from paper_repro.setup import Setup
from parallel_decode.adapters.maf import parallel

TITLE = "Masked autoregressive flows"
TEMPERATURE, LAYERS, WIDTH = 3.0, 8, 128
SWEEPS = 300  # of Metropolis: at T = 3.0 correlations reach about two sites, so these forget the random beginning


def ising(n: int, side: int, generator: torch.Generator) -> Tensor:
    """Spins -1 and 1 by Metropolis' rule on a checkerboard with periodic edges, shape (n, side, side)."""
    spins = torch.randint(0, 2, (n, side, side), generator=generator).float() * 2 - 1
    parity = (torch.arange(side)[:, None] + torch.arange(side)) % 2
    for sweep in range(2 * SWEEPS):
        flip = torch.exp(-2 / TEMPERATURE * spins * _neighbours(spins))
        accepted = torch.rand(spins.shape, generator=generator) < flip
        spins = torch.where(accepted & (parity == sweep % 2), -spins, spins)
    return spins


def energy(spins: Tensor) -> float:
    """The mean energy of a site in units of the coupling, of spins (n, side, side)."""
    return float(-(spins * _neighbours(spins)).mean() / 2)


def _neighbours(spins: Tensor) -> Tensor:
    """The sum of the four neighbours of each site."""
    return torch.stack([spins.roll(shift, dim) for shift in (1, -1) for dim in (1, 2)]).sum(0)


def binary(n: int, side: int, generator: torch.Generator) -> Tensor:
    """scikit-learn's digits in black and white, -1 and 1, shape (n, side, side)."""
    images = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 8 - 1
    images = F.interpolate(images, (side, side), mode="bilinear", align_corners=False)[:, 0]
    return images[torch.randint(len(images), (n,), generator=generator)].sign() + 0.0


def run(setup: Setup) -> dict[str, Any]:
    side, count = setup.pick(16, 12, 4), setup.pick(100_000, 1000, 20)
    rows = {}
    shown: dict[str, Tensor] = {}
    cases: dict[str, Callable[[int, int, torch.Generator], Tensor]] = {"Ising": ising, "binary digits": binary}
    for name, draw_data in cases.items():
        data = draw_data(setup.pick(16384, 4096, 64), side, torch.Generator().manual_seed(setup.seed))
        flow = _trained(data, setup.pick(5000, 400, 4), setup.seed)
        z = torch.randn(count, side * side, generator=torch.Generator().manual_seed(setup.seed + 1))
        ways = {"nflows": flow, "parallel, tol 0": parallel(flow), "parallel, tol 1e-5": parallel(flow, tol=1e-5)}
        found = _timed(ways, z, setup.pick(10, 3, 1))
        own = found["nflows"][1]
        rows[name] = {
            "data": {"energy": energy(data), "magnetisation": float(data.mean((1, 2)).abs().mean())},
            "ways": {
                way: {**_facts(x, own, side), "seconds": seconds, "speed_up": found["nflows"][0] / seconds}
                for way, (seconds, x) in found.items()
            },
        }
        shown |= {f"{name}: data": data[:8, None]} | {
            f"{name}: {way}": x[:8].view(-1, 1, side, side).sign() for way, (_, x) in found.items()
        }
    grid(shown, setup.out / "maf_images.png", "Samples of masked flows: signs, from one noise")
    return {"side": side, "samples": count, "layers": LAYERS, "rows": rows}


def _trained(data: Tensor, steps: int, seed: int) -> Any:
    """A MAF by maximum likelihood, on data with uniform noise of +-1/2."""
    torch.manual_seed(seed)
    features = data[0].numel()
    parts: list[Any] = []
    for _ in range(LAYERS):
        parts += [ReversePermutation(features), MaskedAffineAutoregressiveTransform(features, WIDTH, num_blocks=1)]
    flow = Flow(CompositeTransform(parts), StandardNormal([features]))
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = data[torch.randint(len(data), (128,), generator=generator)].flatten(1)
        loss = -flow.log_prob(x + torch.rand(x.shape, generator=generator) - 0.5).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(flow.parameters(), 1.0)
        optimizer.step()
    return flow.eval()


@torch.no_grad()
def _timed(ways: dict[str, Any], z: Tensor, rounds: int) -> dict[str, tuple[float, Tensor]]:
    """Seconds, medians of interleaved rounds, and samples from the same noise."""
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    values = {}
    for _ in range(rounds):
        for way, flow in ways.items():
            began = time.perf_counter()
            values[way] = flow._transform.inverse(z)[0]
            seconds[way].append(time.perf_counter() - began)
    return {way: (statistics.median(seconds[way]), values[way]) for way in ways}


def _facts(x: Tensor, own: Tensor, side: int) -> dict[str, float]:
    spins = torch.where(x > 0, 1.0, -1.0).view(-1, side, side)
    same = (x == own) | (x.isnan() & own.isnan())
    return {
        "energy": energy(spins),
        "magnetisation": float(spins.mean((1, 2)).abs().mean()),
        "equal": float(same.all(1).double().mean()),
        "not_finite": int((~x.isfinite().all(1)).sum()),
        "largest_deviation": float((x - own).nan_to_num(0).abs().max()),
    }


def tell(figures: dict[str, Any], data: str) -> str:
    rows = []
    for name, row in figures["rows"].items():
        rows.append([name, "data", "-", "-", row["data"]["energy"], row["data"]["magnetisation"], "-", "-"])
        rows += [
            [
                name,
                way,
                one["seconds"],
                f"{one['speed_up']:.1f}x",
                one["energy"],
                one["magnetisation"],
                f"{one['equal']:.0%}",
                one["largest_deviation"],
            ]
            for way, one in row["ways"].items()
        ]
    rows += [
        [f"paper: {name}", "nflows; Jacobi", f"{own}; {ours}", f"{own / ours:.1f}x", "-", "-", "-", "-"]
        for name, (own, ours) in MAF.items()
    ]
    header = [
        "data",
        "decoding",
        "seconds",
        "speed-up",
        "energy of a site",
        "magnetisation",
        "rows with the same bits",
        "largest deviation",
    ]
    return table(header, rows) + (
        f"\n\n{figures['samples']} samples of {figures['side']} x {figures['side']} values by flows of {figures['layers']} layers, from one noise; energy and magnetisation of the signs. "
        "nflows inverts a layer by as many passes as there are values; at tolerance 0 ours stops once nothing changes any more, at the same samples."
    )


def draw(figures: dict[str, Any], path: Path) -> None:
    figure = Figure(figsize=(7, 3), layout="constrained")
    for axes, (name, row) in zip(figure.subplots(1, 2), figures["rows"].items(), strict=True):
        axes.barh(list(row["ways"]), [one["speed_up"] for one in row["ways"].values()])
        axes.invert_yaxis()
        axes.set(title=name, xlabel="speed-up over nflows' own inverse")
    figure.savefig(path, dpi=110)
