"""What `scaling` says of its figures: each function gives a table and sentences, in Markdown."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from paper_repro.experiments.methods import TAU
from paper_repro.experiments.scaling_law import Law, fit
from paper_repro.experiments.scaling_sizes import FACTORS
from paper_repro.experiments.table import table

TIGHT = 0.001  # tau below a level of 8 bits
Row = dict[str, Any]
Value = Callable[[Row], float]


def passes(row: Row, tau: float = TAU) -> float:
    """UJD's passes of a block, the mean over the blocks."""
    of: list[float] = row["passes"][str(tau)]
    return sum(of) / len(of)


def cost(row: Row) -> float:
    """Seconds of a sweep over those of a single pass."""
    return float(row["sweep"] / row["single"])


def speed_up(length: float, passes: float, cost: float) -> float:
    """Of UJD over sequential decoding."""
    return length / (passes * cost)


def point(row: Row) -> tuple[float, float, float]:
    """Resolution, length and width: the factors of a law."""
    return row["side"], row["length"], row["width"]


PASSES: dict[str, Value] = {f"passes of a block, tau = {tau}": partial(passes, tau=tau) for tau in (TAU, TIGHT)}
COST: dict[str, Value] = {"sweep / single pass": cost}
FIRST, PRICE = next(iter(PASSES)), next(iter(COST))  # what the speed-up is made of


def laws_of(figures: dict[str, Any]) -> dict[str, Law]:
    """The law of each value, from all rows but the last, which is held out."""
    rows = figures["rows"][:-1]
    points = [point(row) for row in rows]
    return {name: fit(points, [of(row) for row in rows]) for name, of in (PASSES | COST).items()}


def measured(figures: dict[str, Any]) -> str:
    header = ["varied", "side", "patch", "L", "width", *(f"passes of blocks, tau = {tau}" for tau in (TAU, TIGHT))]
    header += ["passes / L", "single pass (ms)", "sweep (ms)", "sweep / single pass", "speed-up, product", "measured"]
    rows, apart = [], []
    for row in figures["rows"]:
        product = speed_up(row["length"], passes(row), cost(row))
        apart.append(abs(product / row["speed_up"] - 1))
        blocks = [", ".join(f"{of:.3g}" for of in row["passes"][str(tau)]) for tau in (TAU, TIGHT)]
        about = [row[name] for name in ("varied", "side", "patch", "length", "width")]
        share, milliseconds = passes(row) / row["length"], [1000 * row[name] for name in ("single", "sweep")]
        rows.append([*about, *blocks, share, *milliseconds, cost(row), f"{product:.2f}x", f"{row['speed_up']:.2f}x"])
    return table(header, rows) + (
        f"\n\nUJD on flows that were trained here for {figures['steps']} steps, batch {figures['batch']}; blocks in the order of generation. Resolution is varied at constant L (the patches grow with the image), length "
        f"by the patches at constant resolution. UJD's speed-up at tau = {TAU} is L over its passes of a block and over the cost of a sweep in single passes; that product and the speed-up of "
        f"whole images, measured apart, differ by {max(apart):.0%} at most (the product has mean passes of several batches, the other those of one)."
    )


def laws(figures: dict[str, Any]) -> str:
    rows, said = [], []
    for name, law in laws_of(figures).items():
        errors = law.errors or (None,) * len(law.exponents)
        shown = [f"{a:+.2f}" + ("" if e is None else f" ({e:.2f})") for a, e in zip(law.exponents, errors, strict=True)]
        rows.append([name, *shown, None if law.misfit is None else f"{law.misfit - 1:.0%}"])
        unclear = [f for f, a, e in zip(FACTORS, law.exponents, errors, strict=True) if e and abs(a) < 2 * e]
        if unclear:
            said.append(f"{' and '.join(unclear)} for {name}")
    length = laws_of(figures)[FIRST].exponents[1]
    grows = "grow" if length > 0 else "fall"
    per = "fall" if length < 1 else "grow"
    return table(["exponent of", *FACTORS, "misfit"], rows) + (
        f"\n\nPower laws fitted to the rows above but the last; in brackets standard errors. Passes {grows} with the length as L^{length:.2f} at tau = {TAU}, so that the passes for a position {per}, as L^{length - 1:.2f}."
        + (f" Within two standard errors of no effect at all: {'; '.join(said)}." if said else "")
        + " tau bounds the largest change of any value of the batch, which is one cause of more passes where there are more values."
    )


def held_out(figures: dict[str, Any]) -> str:
    row, found = figures["rows"][-1], laws_of(figures)
    predicted = {name: law(*point(row)) for name, law in found.items()}
    truth = {name: of(row) for name, of in (PASSES | COST).items()}
    predicted["speed-up"] = speed_up(row["length"], predicted[FIRST], predicted[PRICE])
    truth["speed-up"] = row["speed_up"]
    errors = {name: predicted[name] / truth[name] - 1 for name in predicted}
    rows = [[name, predicted[name], truth[name], f"{errors[name]:+.0%}"] for name in predicted]
    worst = max(errors, key=lambda name: abs(math.log1p(errors[name])))
    bound = {name: law.misfit for name, law in found.items() if law.misfit is not None}
    off = [name for name, misfit in bound.items() if abs(math.log1p(errors[name])) > 2 * math.log(misfit)]
    header = [f"held out: side {row['side']}, L = {row['length']}, width {row['width']}", "predicted", "measured"]
    return table([*header, "error"], rows) + (
        f"\n\nA flow that no law has seen, {beyond(figures, point(row))}, trained and measured like the others. The error is largest for {worst}: {errors[worst]:+.0%}. "
        + (
            f"Off by more than twice the misfit of its law: {', '.join(off)}."
            if off
            else "No law is off by more than twice its misfit, as far as that is known."
        )
    )


def beyond(figures: dict[str, Any], to: tuple[float, ...]) -> str:
    """Where a point lies, seen from the largest factors that were fitted."""
    largest = [max(of) for of in zip(*map(point, figures["rows"][:-1]), strict=True)]
    ratios = zip(FACTORS, to, largest, strict=True)
    return f"at {', '.join(f'{factor} {value / most:.2g}' for factor, value, most in ratios)} times the largest that was fitted"
