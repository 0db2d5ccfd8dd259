"""The loop's own time: microseconds per pass on a system whose evaluation costs next to nothing.

python benchmarks/overhead.py [--out results.json]
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor

import parallel_decode as pd
from parallel_decode.adapters.tarflow.bench.record import write


class Free(pd.TriangularSystem):
    """Returns a slice of what it holds. It moves away from the guess everywhere, so that no schedule ends early."""

    def __init__(self, batch: int, length: int) -> None:
        self.guess, self.values = torch.zeros(batch, length, 1), torch.ones(batch, length, 1)
        self.calls, self.seconds = 0, 0.0

    @property
    def length(self) -> int:
        return self.guess.shape[1]

    def initial(self) -> Tensor:
        return self.guess

    def evaluate(self, x: Tensor, window: pd.Window) -> Tensor:
        began = time.perf_counter()
        self.calls += 1
        value = self.values[:, window.slice] * self.calls
        self.seconds += time.perf_counter() - began
        return value


def measure(schedule: pd.Schedule, batch: int, length: int) -> float:
    """Microseconds per pass, less the evaluation."""
    system = Free(batch, length)
    began = time.perf_counter()
    solution = pd.solve(system, schedule, tol=1e-6)
    return (time.perf_counter() - began - system.seconds) / solution.passes * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    schedules = [pd.Sequential(), pd.Jacobi(), pd.GaussSeidelJacobi(64), pd.JacobiGaussSeidel(8), pd.Sliding(64)]
    batches = [1, 16, 256]
    times: dict[tuple[str, int], list[float]] = {(repr(s), b): [] for s in schedules for b in batches}
    for _ in range(options.runs):
        for schedule in schedules:
            for batch in batches:
                times[repr(schedule), batch].append(measure(schedule, batch, options.length))
    rows = {repr(s): {str(b): round(statistics.median(times[repr(s), b]), 1) for b in batches} for s in schedules}

    print(f"microseconds per pass, L = {options.length}, median of {options.runs} interleaved runs")
    print(f"{'schedule':30}" + "".join(f"  batch {b:>3}" for b in batches))
    for name, row in rows.items():
        print(f"{name:30}" + "".join(f"{value:11.1f}" for value in row.values()))
    if options.out:
        write(options.out, {"length": options.length, "runs": options.runs, "us_per_pass": rows})


if __name__ == "__main__":
    main()
