"""What the experiment `devices` says of its figures."""

from typing import Any

from paper_repro.experiments.table import table
from paper_repro.gpus import CAPTURED, EAGER, EFFICIENCY, GPUS, PAPER
from paper_repro.paper import TABLE_1

TARGET = 0.25  # relative error


def error(row: dict[str, Any], key: str = "predicted") -> float:
    """Relative, of a prediction.

    Example:
        >>> error({"measured": 2.0, "predicted": 1.5})
        -0.25
    """
    return float(row[key] / row["measured"] - 1)


def here(figures: dict[str, Any]) -> str:
    """Predicted and measured seconds on this machine."""
    prices, (middle, largest) = figures["prices"], figures["single_errors"]
    cells = {(row["method"], row["batch"]): row for row in figures["schedules"]}
    names, batches = list(dict.fromkeys(name for name, _ in cells)), list(dict.fromkeys(batch for _, batch in cells))
    header, lines = ["method"], [[name] for name in names]
    for batch in batches:
        header += [f"batch {batch}: measured (s)", "predicted (s)", "error"]
        for line in lines:
            row = cells[line[0], batch]
            line += [row["measured"], row["predicted"], f"{error(row):+.0%}"]
    outside = [f"{name} at batch {batch} ({error(row):+.0%})" for (name, batch), row in cells.items() if _misses(row)]

    def fastest(batch: int, key: str) -> float:
        """Measured seconds of the method that has the least of these."""
        return float(min((cells[name, batch] for name in names), key=lambda row: row[key])["measured"])

    lost = max(fastest(batch, "predicted") / fastest(batch, "measured") - 1 for batch in batches)
    rates = [
        f"{1e-9 / prices[key]:.3g}" if prices[key] else "more than can be seen"
        for key in ("product", "attention", "byte")
    ]
    return (
        f"Prices that were measured here, by least squares over {figures['singles']} kinds of passes of the first block (median error {middle:.0%}, largest {largest:.0%}): {1e6 * prices['call']:.2g} us for an operation of the network, "
        f"{1e6 * prices['step']:.2g} us for one of the solver; products at {rates[0]} GFLOP/s, attention at {rates[1]} GFLOP/s, memory at {rates[2]} GB/s. Seconds of schedules were not fitted: they are sums over the passes that each made.\n\n"
        + table(header, lines)
        + f"\n\n{len(cells) - len(outside)} of {len(cells)} predictions are within {TARGET:.0%}{'; not: ' + ', '.join(outside) if outside else ''}. Whoever chose the schedule by prediction would take {lost:.0%} longer than by measuring, at the worst batch."
    )


def _misses(row: dict[str, Any], key: str = "predicted") -> bool:
    return abs(error(row, key)) > TARGET


def h200(figures: dict[str, Any]) -> str:
    """The check against the one GPU that was measured."""
    rows, latencies = figures["check"], figures["latencies"]
    lines = []
    for row in rows:
        both = [cell for key in ("assumed", "calibrated") for cell in (row[key], f"{error(row, key):+.0%}")]
        lines.append([row["method"], row["measured"], *both])
    held_out = [row for row in rows if not row["method"].startswith("sequential")]
    within = {key: sum(not _misses(row, key) for row in held_out) for key in ("assumed", "calibrated")}
    worst = max(held_out, key=lambda row: abs(error(row, "calibrated")))
    return (
        f"GPUs by their data sheets ({EFFICIENCY['FLOPs']:.0%} of the dense FLOP/s and {EFFICIENCY['bandwidth']:.0%} of the bandwidth: assumed, not measured), and as a check an H200 that was measured (`benchmarks/results/gpu_h200.json`: a flow of CIFAR's size, bfloat16, batch 16):\n\n"
        + table(
            ["method", "measured (s)", "assumed latencies (s)", "error", "calibrated latencies (s)", "error"], lines
        )
        + f"\n\nAssumed are {1e6 * EAGER:.0f} us for an operation and {1e6 * CAPTURED:.0f} us for one in a CUDA graph; calibrated, {1e6 * latencies['eager']:.1f} and {1e6 * latencies['captured']:.1f} us, those at which the two sequential rows agree. "
        f"Of the other {len(held_out)} rows {within['assumed']} and {within['calibrated']} are within {TARGET:.0%}; the worst, with calibrated latencies, is {worst['method']} ({error(worst, 'calibrated'):+.0%}). All predictions below take the calibrated ones, whatever the GPU, since launches are the host's work."
    )


def paper(figures: dict[str, Any]) -> str:
    """The paper's set-ups."""
    lines: list[list[object]] = []
    own = []
    for data, one in PAPER.items():
        measured = TABLE_1[data]
        whole = measured["sequential"].seconds
        step, sweep = whole / one.blocks / (one.length - 1), measured["UJD"].seconds / (one.first + one.later)
        gains = [f"{measured[name].speed_up}x" for name in ("UJD", "SeJD")]
        lines.append([data, "**measured by the paper**, two L40S", 1e3 * step, 1e3 * sweep, whole, *gains])
        for row in figures["paper"]:
            if row["data"] != data:
                continue
            how = "fixed cache, captured" if row["ours"] else "decoding as in the paper"
            gains = [f"{row['sequential'] / row[name]:.1f}x" for name in ("UJD", "SeJD")]
            lines.append(
                [
                    data,
                    f"predicted: {row['gpu']}, {how}",
                    1e3 * row["step"],
                    1e3 * row["sweep"],
                    row["sequential"],
                    *gains,
                ]
            )
            if row["gpu"] == "L40S":
                own.append(
                    f"{gains[1]} where {measured['SeJD'].speed_up}x was measured ({data}; a step is predicted to take {row['step'] / step:.0%} of the paper's, a sweep {row['sweep'] / sweep:.0%})"
                )
    return (
        "The paper's set-ups at its passes and batch of 256, *as predictions*:\n\n"
        + table(["data", "", "step (ms)", "sweep (ms)", "sequential (s)", "UJD", "SeJD"], lines)
        + "\n\nPredictions are for one GPU and bfloat16; the paper states neither its precision nor how two GPUs share a batch. Decoding as in the paper copies keys and values at every step to append to them, as Apple's sampler does. "
        "The sweeps of the first block under UJD are derived from the paper's seconds, so that its UJD column is no independent test. "
        f"On the paper's GPU the model has SeJD gain {', '.join(own)}."
    )


def fronts(figures: dict[str, Any]) -> str:
    """This flow's own fronts on GPUs."""
    batch = max(row["batch"] for row in figures["schedules"])
    rows = {row["method"]: row for row in figures["schedules"] if row["batch"] == batch}
    first = rows["sequential"]
    lines = []
    for name, row in rows.items():
        gains = [f"{first['gpus'][gpu] / row['gpus'][gpu]:.2f}x" for gpu in GPUS]
        lines.append([name, f"{first['measured'] / row['measured']:.2f}x", *gains])
    return (
        f"This flow's own fronts at batch {batch}, speed-ups over sequential decoding (bfloat16, fixed cache, captured), *as predictions* beside what was measured here:\n\n"
        + table(["method", "measured here", *(f"{gpu}, predicted" for gpu in GPUS)], lines)
        + "\n\n`auto` chose its windows for the processor here; on a GPU it would choose others."
    )
