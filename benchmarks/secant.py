"""Passes of each block of a trained TarFlow with and without the secant correction, at two tolerances.

    python benchmarks/secant.py [--checkpoint FOLDER_OR_FILE] [--batches 1 4 16] [--out results.json]

Deviations are from the sequential samples. `above` adds the patch above as a second lag.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import parallel_decode as pd
from parallel_decode.adapters.tarflow import TarFlow, digits
from parallel_decode.adapters.tarflow.bench.record import write

SCHEDULES: tuple[pd.Schedule, ...] = (pd.Jacobi(), pd.Sliding(128), pd.Sliding(64), pd.Sliding(32))


def measure(flow: TarFlow, batch: int, seed: int) -> list[dict[str, Any]]:
    """Figures of each schedule, tolerance and correction at one batch size."""
    width = flow.img_size // flow.patch_size
    corrections = {"plain": None, "secant": pd.SecantCorrection(), "above": pd.SecantCorrection(lags=(1, width))}
    z = torch.randn(batch, *flow.var.shape, generator=torch.Generator().manual_seed(seed))
    y = torch.arange(batch) % flow.num_classes if flow.num_classes else None
    truth = pd.solve(flow.system(z, y=y), "sequential").value
    rows = []
    for schedule in SCHEDULES:
        for tol in (None, 1e-3):
            for name, correction in corrections.items():
                solution = pd.solve(flow.system(z, y=y), replace(schedule, correction=correction), tol=tol)
                row = {
                    "schedule": repr(schedule),
                    "tol": tol,
                    "correction": name,
                    "passes": [layer.passes for layer in solution.layers],
                    "largest_deviation": float(f"{(solution.value - truth).abs().max():.2g}"),
                }
                shown = "default" if tol is None else f"{tol:g}"
                print(
                    f"{batch:5}  {row['schedule']:18}{shown:>8}  {name:7}"
                    f"{solution.passes:5}{row['largest_deviation']:9.1e}  {row['passes']}",
                    flush=True,
                )
                rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="a TarFlow; the digits that come with the package if left out")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    flow = digits() if options.checkpoint is None else TarFlow.from_checkpoint(options.checkpoint)
    print("batch  schedule               tol  with     passes  deviation  of each block")
    figures = {str(batch): measure(flow, batch, options.seed) for batch in options.batches}
    if options.out:
        write(options.out, {"checkpoint": str(options.checkpoint or "digits"), "batches": figures})


if __name__ == "__main__":
    main()
