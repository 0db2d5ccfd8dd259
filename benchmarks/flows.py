"""Schedules of `solve` on a trained TarFlow, against our own sequential decoding, by batch size.

    python benchmarks/flows.py [--checkpoint FOLDER_OR_FILE] [--batches 1 4 16] [--out results.json]

Each figure is a median over interleaved runs in one process. The baseline is sequential decoding over a key-value cache with
fixed storage. Deviations are from the baseline's images.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from report import write

import parallel_decode as pd
from parallel_decode.adapters.tarflow import TarFlow, digits

FIXED: dict[str, pd.Schedule | pd.Selective] = {
    "sequential": pd.Sequential(),
    "jacobi": pd.Jacobi(),
    "selective": pd.Selective(),
    "SeJD to the letter (tau = 0.5)": pd.Selective.sejd(),
    "UJD to the letter (tau = 0.5)": pd.Jacobi(freeze=False, tol=0.5, start="zeros"),
}
SLIDING: dict[str, pd.Schedule | pd.Selective] = {
    f"sliding {width}": pd.Sliding(width) for width in (8, 16, 32, 64, 128)
}
SCHEDULES = FIXED | SLIDING


def measure(flow: TarFlow, batch: int, runs: int, seed: int) -> dict[str, dict[str, Any]]:
    """Figures of each schedule at one batch size."""
    z = torch.randn(batch, *flow.var.shape, generator=torch.Generator().manual_seed(seed)).to(flow.var.device)
    y = torch.arange(batch) % flow.num_classes if flow.num_classes else None
    seconds: dict[str, list[float]] = {name: [] for name in SCHEDULES}
    solutions: dict[str, pd.Solution] = {}
    for _ in range(runs + 1):  # the first run warms up
        for name, schedule in SCHEDULES.items():
            began = time.perf_counter()
            solutions[name] = pd.solve(flow.system(z, y=y), schedule)
            seconds[name].append(time.perf_counter() - began)
    truth = solutions["sequential"].value.clamp(-1, 1)
    base = statistics.median(seconds["sequential"][1:])
    rows = {}
    for name, solution in solutions.items():
        error = solution.value.clamp(-1, 1) - truth
        levels = (error * 127.5).abs()
        ratios = [s / t for s, t in zip(seconds["sequential"][1:], seconds[name][1:], strict=True)]
        rows[name] = {
            "passes": [layer.passes for layer in solution.layers],
            "positions": sum(layer.positions for layer in solution.layers),
            "seconds": round(statistics.median(seconds[name][1:]), 4),
            "speed_up": round(base / statistics.median(seconds[name][1:]), 3),
            "speed_up_range": [round(min(ratios), 3), round(max(ratios), 3)],
            "largest_deviation": float(f"{error.abs().max():.3g}"),
            "within_one_level": round((levels <= 1).double().mean().item(), 5),
            "psnr_db": round((20 * torch.log10(2 / error.square().mean().sqrt().clamp(min=1e-12))).item(), 1),
        }
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="a TarFlow; the digits that come with the package if left out")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    flow = (digits() if options.checkpoint is None else TarFlow.from_checkpoint(options.checkpoint)).to(options.device)

    figures = {}
    for batch in options.batches:
        figures[str(batch)] = rows = measure(flow, batch, options.runs, options.seed)
        print(f"\nbatch {batch}, median of {options.runs} interleaved runs")
        print(f"{'schedule':32}{'seconds':>9}{'speed-up':>10}{'deviation':>11}{'PSNR':>7}  passes of each block")
        for name, row in rows.items():
            timing = f"{row['seconds']:9.3f}{row['speed_up']:9.2f}x"
            print(f"{name:32}{timing}{row['largest_deviation']:11.1e}{row['psnr_db']:7.1f}  {row['passes']}")
    if options.out:
        write(
            options.out, {"checkpoint": str(options.checkpoint or "digits"), "runs": options.runs, "batches": figures}
        )


if __name__ == "__main__":
    main()
