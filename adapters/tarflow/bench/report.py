"""Tables and the plot of what was measured."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import pyplot as plt
from rich.table import Table

from parallel_decode._outputs import aside

Rows = Mapping[str, Mapping[str, Any]]
EXACT = 1e-9  # where the plot draws a deviation of zero


def table(title: str, rows: Rows) -> Table:
    """One line for each method at one batch size, from the figures of `suite.whole`."""
    apple = any("against_apple" in figures for figures in rows.values())
    low = any("from_float32" in figures for figures in rows.values())
    memory = any("peak_memory_mib" in figures for figures in rows.values())
    columns = ["method", "seconds", "speed-up", *["of Apple's"] * apple, "passes", "evals", "largest", "mean"]
    columns += ["same", "1 level", "PSNR", *["of float32"] * low, *["MiB"] * memory]
    rounds = max((figures["rounds"] for figures in rows.values()), default=0)
    fewer = [f"{name}: {f['rounds']}" for name, f in rows.items() if f["rounds"] < rounds]
    caption = f"{rounds} interleaved rounds" + f"; fewer of the slow ones, {', '.join(fewer)}" * bool(fewer)
    drawn = Table(title=title, caption=caption)
    for column in columns:
        wraps = column in ("method", "passes")
        drawn.add_column(column, justify="left" if column == "method" else "right", no_wrap=not wraps)
    for name, figures in rows.items():
        passes = figures["passes"]
        evaluations = figures["evaluations_per_position"]
        drawn.add_row(
            name,
            f"{figures['seconds']:.3g}",
            _ratio(figures, "speed_up"),
            *[_ratio(figures, "against_apple")] * apple,
            "-" if passes is None else " ".join(map(str, passes)),
            "-" if evaluations is None else f"{evaluations:.3g}",
            f"{figures['largest_deviation']:.1e}",
            f"{figures['mean_deviation']:.1e}",
            f"{figures['same_8_bit']:.2%}",
            f"{figures['within_one_level']:.2%}",
            f"{figures['psnr_db']:.1f}",
            *[f"{figures.get('from_float32', {}).get('largest_deviation', math.nan):.1e}"] * low,
            *[f"{figures.get('peak_memory_mib', 0):.1f}"] * memory,
        )
    return drawn


LEGEND = (
    "seconds: the median of interleaved runs. speed-up: over our sequential decoding, the median over the rounds, with the least "
    "and the largest; of Apple's: the same over Apple's sampler. passes: of each block. evals: evaluations per position. "
    "largest, mean: deviation from the sequential images, on [-1, 1]. same: values equal in 8 bits; 1 level: no further apart than "
    "one level, 7.8e-3. of float32: the largest deviation from sequential decoding in float32. MiB: the most memory held at a time, beyond weights and noise."
)


BLOCK_LEGEND = (
    "seconds, speed-up over sequential, and passes of each block, given the sequential solution of the one before."
)


def block_table(title: str, blocks: Sequence[Rows]) -> Table:
    """One line for each schedule and one column for each block, from the figures of `suite.blocks`."""
    drawn = Table(title=title)
    drawn.add_column("schedule", no_wrap=True)
    for number in range(1, len(blocks) + 1):
        drawn.add_column(f"block {number}", justify="right")
    for name in dict.fromkeys(name for rows in blocks for name in rows):
        drawn.add_row(name, *[_block_cell(rows[name]) if name in rows else "-" for rows in blocks])
    return drawn


def _block_cell(figures: Mapping[str, Any]) -> str:
    return f"{figures['seconds']:.3g} s  {figures['speed_up']:.2f}x  {figures['passes'][0]}"


def _ratio(figures: Mapping[str, Any], name: str) -> str:
    if name not in figures:
        return "-"
    least, largest = figures[f"{name}_range"]
    return f"{figures[name]:.2f}x ({least:.2f}-{largest:.2f})"


def plot(path: Path, batches: Mapping[str, Rows], title: str) -> None:
    """Draw speed-up against largest deviation, one line for each method over the batch sizes (larger dots)."""
    matplotlib.use("agg")
    figure, axes = plt.subplots(figsize=(10, 6), layout="constrained")
    names = dict.fromkeys(name for rows in batches.values() for name in rows)
    for number, name in enumerate(names):
        points = [rows[name] for rows in batches.values() if name in rows]
        deviation = [max(figures["largest_deviation"], EXACT) for figures in points]
        speed_up = [figures["speed_up"] for figures in points]
        color, marker = plt.get_cmap("tab20")(number % 20), "osD^vP"[number // 20 % 6]
        axes.plot(deviation, speed_up, linewidth=1, color=color)
        sizes = [20 + 20 * index for index in range(len(points))]
        axes.scatter(deviation, speed_up, s=sizes, color=color, marker=marker, label=name)
    axes.axhline(1, color="gray", linewidth=0.8, zorder=0)
    axes.axvline(2 / 255, color="gray", linewidth=0.8, linestyle=":", zorder=0)
    axes.set(xscale="log", yscale="log")
    axes.set_title(f"{title}; batch {', '.join(batches)}: larger dots", parse_math=False)  # a path may hold dollars
    axes.set(xlabel=f"largest deviation from sequential (0 drawn at {EXACT:.0e}; dotted: one level of 8 bits)")
    axes.set(ylabel="speed-up over sequential")
    axes.legend(fontsize=7, bbox_to_anchor=(1.01, 1), loc="upper left")
    with aside(path) as part:
        figure.savefig(part, format="png", dpi=120)
    plt.close(figure)
