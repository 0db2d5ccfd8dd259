"""First calls: fresh processes of `auto` and of sequential decoding, in turn.

    PYTHONPATH=. python benchmarks/cold.py [--checkpoint FLOW] [--batches 1,4,16] [--processes 7] [--calls 20] [--threads 1] [--out benchmarks/results/cold_cpu.json]

Each process samples from the digits' flow, or from a checkpoint, and tells the seconds of each call. `auto` starts with an empty folder of what other processes learnt
("empty"), and with what two processes of twenty calls left there ("filled"). Ratios are to sequential processes of the same round, and medians over the rounds.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

LOOKS = ("first", "first five", "last")
WIDTHS = (16, 32, 64, 128)


def calls(flow: str, batch: int, schedule: str, count: int, threads: int) -> list[float]:
    """In a process of its own: seconds of each call."""
    import torch

    import parallel_decode as pd
    from parallel_decode.adapters.tarflow import TarFlow, digits

    torch.set_num_threads(threads)
    model = digits() if flow == "digits" else TarFlow.from_checkpoint(flow)
    y = torch.arange(batch) % model.num_classes if model.num_classes else None
    rule: Any = pd.Sliding(int(schedule)) if schedule.isdigit() else schedule
    seconds = []
    for number in range(count):
        z = torch.randn(batch, *model.var.shape, generator=torch.Generator().manual_seed(number))
        began = time.perf_counter()
        model.sample(z=z, y=y, schedule=rule)
        seconds.append(time.perf_counter() - began)
    return seconds


def process(flow: str, batch: int, schedule: str, count: int, threads: int, kept: str) -> list[float]:
    """The same, from here."""
    command = [sys.executable, __file__, "--one", json.dumps([flow, batch, schedule, count, threads])]
    environment = {**os.environ, "PARALLEL_DECODE_CACHE": kept, "OMP_NUM_THREADS": str(threads)}
    seconds: list[float] = json.loads(subprocess.run(command, env=environment, check=True, capture_output=True).stdout)
    return seconds


def looks(seconds: list[float]) -> dict[str, float]:
    """Of the first call, the first five and the second half."""
    last = seconds[len(seconds) // 2 :]
    return dict(zip(LOOKS, (seconds[0], statistics.mean(seconds[:5]), statistics.median(last)), strict=True))


def measure(flow: str, batch: int, rounds: int, count: int, threads: int) -> dict[str, Any]:
    """Of each way the ratio of sequential's seconds to its own, in each look: median, least and most over the rounds."""
    ways = {"sequential": ("sequential", "off"), "auto, empty": ("auto", ""), "auto, filled": ("auto", "")}
    ways |= {f"sliding {width}": (str(width), "off") for width in WIDTHS}
    ratios: dict[str, dict[str, list[float]]] = {way: {look: [] for look in LOOKS} for way in ways}
    with tempfile.TemporaryDirectory() as filled:
        for _ in range(2):
            process(flow, batch, "auto", 20, threads, filled)
        for _ in range(rounds):
            base: dict[str, float] = {}
            for way, (schedule, kept) in ways.items():
                with tempfile.TemporaryDirectory() as empty:
                    folder = kept or (filled if way.endswith("filled") else empty)
                    found = looks(process(flow, batch, schedule, count, threads, folder))
                base = base or found
                for look in LOOKS:
                    ratios[way][look].append(base[look] / found[look])
    return {
        way: {look: {"ratio": statistics.median(r), "range": [min(r), max(r)]} for look, r in each.items()}
        for way, each in ratios.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="of another flow, beside the digits'")
    parser.add_argument("--batches", default="1,4,16")
    parser.add_argument("--processes", type=int, default=7)
    parser.add_argument("--calls", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(calls(*json.loads(options.one))))
        return
    from parallel_decode.adapters.tarflow.bench.record import write

    figures: dict[str, Any] = {"processes": options.processes, "calls": options.calls, "threads": options.threads}
    for flow in ["digits"] + [str(options.checkpoint)] * bool(options.checkpoint):
        for batch in map(int, options.batches.split(",")):
            found = measure(flow, batch, options.processes, options.calls, options.threads)
            name = "digits" if flow == "digits" else "checkpoint"
            figures.setdefault("rows", []).append({"flow": name, "batch": batch, "ways": found})
            print(
                f"\n{name}, batch {batch}: time of sequential decoding over that of each, first call, first five, last"
            )
            for way, each in found.items():
                print(f"  {way:14}" + "".join(f"{each[look]['ratio']:7.2f}x" for look in LOOKS), flush=True)
            if options.out:
                write(options.out, figures)


if __name__ == "__main__":
    main()
