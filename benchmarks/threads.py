"""Threads, where the cores are free and where another process takes one of them.

    PYTHONPATH=. python benchmarks/threads.py [--runs 5] [--out benchmarks/results/threads_cpu.json]

Processes with other settings of OpenMP draw the digits that ship, one and sixteen at a time; each tells the median seconds of its runs.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SETTINGS: dict[str, dict[str, str]] = {
    "1 thread": {"OMP_NUM_THREADS": "1"},
    "2 threads": {"OMP_NUM_THREADS": "2"},
    "2 threads, OMP_WAIT_POLICY=passive": {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"},
}
CASES = [(1, "sequential"), (1, "jacobi"), (16, "sequential"), (16, "jacobi")]


def one(runs: int) -> dict[str, float]:
    """In a process of its own: seconds of each case."""
    import torch

    from parallel_decode.adapters.tarflow import digits

    flow, found = digits(), {}
    for batch, schedule in CASES:
        seconds = []
        for number in range(runs + 1):
            z = torch.randn(batch, *flow.var.shape, generator=torch.Generator().manual_seed(number))
            began = time.perf_counter()
            flow.sample(z=z, y=torch.arange(batch) % 10, schedule=schedule)
            seconds.append(time.perf_counter() - began)
        found[f"{schedule}, batch {batch}"] = statistics.median(seconds[1:])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(options.runs)))
        return
    from parallel_decode.adapters.tarflow.bench.record import write

    rows: list[dict[str, Any]] = []
    for load in ("free", "one core taken"):
        busy = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if load != "free" else None
        try:
            for name, environment in SETTINGS.items():
                command = [sys.executable, __file__, "--one", "--runs", str(options.runs)]
                done = subprocess.run(command, env={**os.environ, **environment}, check=True, capture_output=True)
                rows.append({"cores": load, "threads": name, "seconds": json.loads(done.stdout)})
                each = "  ".join(f"{case} {seconds:6.2f} s" for case, seconds in rows[-1]["seconds"].items())
                print(f"{load:16}{name:38}{each}", flush=True)
        finally:
            if busy is not None:
                busy.kill()
    if options.out:
        write(options.out, {"runs": options.runs, "rows": rows})


if __name__ == "__main__":
    main()
