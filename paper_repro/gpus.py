"""GPUs for the device model: prices by data sheet, a check against the one that was measured, and the paper's set-ups as predictions."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from paper_repro.devices import Device, Network, Pass, sequential, sweeps, windows
from paper_repro.paper import SWEEPS

EFFICIENCY = {"FLOPs": 0.5, "bandwidth": 0.8}  # of the peaks: assumed
EAGER, CAPTURED = 10e-6, 2e-6  # seconds of a launch, by itself and in a CUDA graph: assumed
MEASURED = Path(__file__).parents[1] / "benchmarks" / "results" / "gpu_h200.json"


class Peaks(NamedTuple):
    """Of a data sheet: bytes/s, and dense FLOP/s of matrix products."""

    bandwidth: float
    bfloat16: float
    tf32: float


GPUS = {
    "H200": Peaks(4.8e12, 989e12, 495e12),  # NVIDIA H200 Tensor Core GPU Datasheet (SXM), figures with sparsity halved
    "A100": Peaks(2.0e12, 312e12, 156e12),  # NVIDIA A100 Tensor Core GPU Datasheet (80GB SXM)
    "L40S": Peaks(0.864e12, 362e12, 183e12),  # NVIDIA L40S GPU Datasheet
}


class SetUp(NamedTuple):
    """One of the paper's.

    Attributes:
        network: of a block, in bfloat16.
        length: L.
        blocks: of the flow.
        first: sweeps of the first block under UJD, derived from the paper's seconds.
        later: sweeps of all others.
    """

    network: Network
    length: int
    blocks: int
    first: float
    later: float


PAPER = {
    "cifar10": SetUp(Network(256, 6, 12, 24, 2), 256, 6, 213, sum(SWEEPS["cifar10"][1:])),
    "cifar100": SetUp(Network(256, 6, 12, 24, 2), 256, 6, 221, sum(SWEEPS["cifar100"][1:])),
    "afhq": SetUp(Network(768, 8, 192, 384, 2), 1024, 8, 515, sum(SWEEPS["afhq"][1:])),
}


def gpu(name: str, precision: str = "bfloat16", call: float = EAGER, step: float = EAGER) -> Device:
    """Prices by data sheet and the efficiencies that are assumed.

    Args:
        name: of `GPUS`.
        precision: "bfloat16" or "tf32".
        call, step: seconds of a launch, of the network's operations and of the solver's.

    Raises:
        ValueError: another name or precision.

    Example:
        >>> from paper_repro.gpus import gpu
        >>> 1 / gpu("A100", "tf32").product / 1e12
        78.0
    """
    if name not in GPUS or precision not in ("bfloat16", "tf32"):
        raise ValueError(f"{name!r} in {precision!r}, expected one of {', '.join(GPUS)} in bfloat16 or tf32")
    flop = 1 / (EFFICIENCY["FLOPs"] * getattr(GPUS[name], precision))
    return Device(call, step, flop, flop, 1 / (EFFICIENCY["bandwidth"] * GPUS[name].bandwidth))


class Latencies(NamedTuple):
    """Seconds of an operation: by itself, and in a CUDA graph."""

    eager: float
    captured: float

    def on(self, name: str, captured: bool) -> Device:
        """A GPU's prices; the solver's operations are never captured."""
        return gpu(name, call=self.captured if captured else self.eager, step=self.eager)


def check() -> tuple[list[dict[str, Any]], Latencies]:
    """What was measured on an H200 beside what is predicted: with the latencies that are assumed, and with those of its two sequential runs.

    Returns:
        A row for each method, with seconds "measured", "assumed" and "calibrated"; and the calibrated latencies.
    """
    network, length, blocks, *_ = PAPER["cifar10"]
    ((batch, measured),) = json.loads(MEASURED.read_text())["whole"]["bfloat16"].items()
    single = sequential(int(batch), length, blocks)
    found = Latencies(
        *(
            gpu("H200").calibrated(network, single, measured[name]["seconds"]).call
            for name in ("sequential", "sequential, compiled")
        )
    )
    rows = []
    for name, one in measured.items():
        if one["passes"] is None:  # another's code, which does not say
            continue
        passes = _passes(name, one, int(batch))
        devices = {
            "assumed": Latencies(EAGER, CAPTURED).on("H200", "compiled" in name),
            "calibrated": found.on("H200", "compiled" in name),
        }
        seconds = {key: device.predict(network, passes) for key, device in devices.items()}
        rows.append({"method": name, "measured": one["seconds"], **seconds})
    return rows, found


def _passes(name: str, one: dict[str, Any], batch: int) -> dict[Pass, float]:
    """Those of a row of the measurements: single positions where a block took as many passes as it has positions, and windows or sweeps elsewhere."""
    _, length, blocks, *_ = PAPER["cifar10"]
    singles = sum(passes == length for passes in one["passes"])
    times = sum(one["passes"]) - singles * length
    evaluated = (one["evaluations_per_position"] * blocks - singles) * length
    first = sequential(batch, length, singles) if singles else {}
    if not times:
        return first
    return first | (sweeps(batch, length, times) if "tau" in name else windows(batch, length, times, evaluated))


def paper(latencies: Latencies, batch: int = 256) -> list[dict[str, Any]]:
    """The paper's set-ups at its passes: as it decodes (the cache is copied at each step, nothing is captured), and as this library does.

    Returns:
        For each set-up and GPU the seconds of a sequential step, of a sweep, and of the methods.
    """
    rows = []
    for data, one in PAPER.items():
        for name, ours in (("L40S", False), ("A100", False), ("H200", False), ("A100", True), ("H200", True)):
            device = latencies.on(name, captured=ours)
            network = replace(one.network, concatenates=not ours)
            block = device.predict(network, sequential(batch, one.length))
            sweep = device.predict(one.network, sweeps(batch, one.length, 1))
            row = {"data": data, "gpu": name, "ours": ours, "step": block / (one.length - 1), "sweep": sweep}
            row |= {"sequential": one.blocks * block, "UJD": (one.first + one.later) * sweep}
            rows.append(row | {"SeJD": block + one.later * sweep})
    return rows
