"""What `scaling` says of the paper's flows: why UJD is slower than sequential decoding on AFHQ, and faster on CIFAR-10."""

import math
from typing import Any

from paper_repro.experiments.methods import TAU
from paper_repro.experiments.scaling_sizes import FACTORS
from paper_repro.experiments.scaling_text import FIRST, PRICE, beyond, cost, laws_of, speed_up
from paper_repro.experiments.table import table
from paper_repro.paper import COSTS, FIRST_UJD, SHAPES, SWEEPS, TABLE_1

SMALL, LARGE = "cifar10", "afhq"
PER_POSITION, SWEEP = "the passes for a position", "the cost of a sweep"


def cause(factors: dict[str, float]) -> str:
    """What slows UJD.

    Args:
        factors: two names, and how many times its time grows by each.

    Example:
        >>> cause({"the passes": 0.5, "the cost": 8.0})
        'UJD becomes 0.25 times as fast, by the cost alone (the cost 8 times, the passes 0.5 times)'
        >>> cause({"the passes": 8.0, "the cost": 2.0})
        'UJD becomes 0.062 times as fast, mostly by the passes (the passes 8 times, the cost 2 times)'
    """
    (more, most), (less, least) = sorted(factors.items(), key=lambda item: item[1], reverse=True)
    listed = f"({more} {most:.2g} times, {less} {least:.2g} times)"
    slower = most * least
    if slower <= 1:
        return f"UJD does not become slower, but {1 / slower:.2g} times as fast {listed}"
    how = f"mostly by {more}" if least > 1 else f"by {more} alone"
    return f"UJD becomes {1 / slower:.2g} times as fast, {how} {listed}"


def passes_of(name: str) -> float:
    """The paper's passes of a block under UJD, the mean over the blocks."""
    sweeps = (FIRST_UJD[name], *SWEEPS[name][1:])
    return sum(sweeps) / len(sweeps)


def cost_of(name: str) -> float:
    """The paper's seconds of a sweep over those of a sequential step."""
    step, sweep = COSTS[name]
    return sweep / step


def paper(figures: dict[str, Any]) -> str:
    """The step from CIFAR-10 to AFHQ, factor by factor, and what of it is the flow's and what the machine's."""
    laws = laws_of(figures)
    passes, price = laws[FIRST], laws[PRICE]
    length = {name: SHAPES[name][1] for name in (SMALL, LARGE)}
    longer = length[LARGE] / length[SMALL]
    rows, parts = [], []
    for index, factor in enumerate(FACTORS):
        ratio = SHAPES[LARGE][index] / SHAPES[SMALL][index]
        exponents = passes.exponents[index] - (factor == "length"), price.exponents[index]
        errors = [None if law.errors is None else law.errors[index] for law in (passes, price)]
        part = tuple(ratio**exponent for exponent in exponents)
        cells = [_spread(ratio, *of) for of in zip(exponents, errors, strict=True)]
        rows.append([f"{factor}, {ratio:.0f} times", *cells, math.prod(part)])
        parts.append(part)
    ours = tuple(math.prod(of) for of in zip(*parts, strict=True))
    theirs = passes_of(LARGE) / passes_of(SMALL) / longer, cost_of(LARGE) / cost_of(SMALL)
    rows.append(["all three, by the laws of the flows here", *ours, math.prod(ours)])
    rows.append(["the paper's flows on its GPUs", *theirs, math.prod(theirs)])
    strongest = [FACTORS[max(range(3), key=lambda i, of=of: abs(math.log(of[i])))] for of in zip(*parts, strict=True)]  # type: ignore[misc]
    header = ["from CIFAR-10 to AFHQ", f"{PER_POSITION}, times", f"{SWEEP}, times", "UJD slower, times"]

    named = [dict(zip((PER_POSITION, SWEEP), of, strict=True)) for of in (theirs, ours)]
    without = {"the passes of a block": theirs[0] * longer, f"{SWEEP} for a position": theirs[1] / longer}
    said = (
        f"From CIFAR-10 to AFHQ, by the paper's own figures (derived from its tables): {cause(named[0])}. The length is in both and cancels, as sequential decoding takes L passes too; without it, {cause(without)}.",
        f"By the laws of the flows here, on this machine: {cause(named[1])}. {PER_POSITION.capitalize()} change most by the {strongest[0]}, {SWEEP} by the {strongest[1]}. The direction of {_agreed(ours, theirs)} as in the paper.",
        _flow_and_machine(figures),
        f"That is extrapolated from flows that were trained for {figures['steps']} steps and measured at batch {figures['batch']}, to AFHQ, {beyond(figures, SHAPES[LARGE])}, and to CIFAR-10, {beyond(figures, SHAPES[SMALL])}. The paper's have other numbers of blocks and layers, other images and batches of 256, which no law here takes in.",
    )
    return "\n\n".join([table(header, rows), *said])


def _spread(ratio: float, exponent: float, error: float | None) -> str:
    """A factor, and what it is at one standard error less and more."""
    if error is None:
        return f"{ratio**exponent:.2g}"
    return f"{ratio**exponent:.2g} [{ratio ** (exponent - error):.2g}, {ratio ** (exponent + error):.2g}]"


def _agreed(ours: tuple[float, ...], theirs: tuple[float, ...]) -> str:
    """Which of the two factors grow, or fall, in both."""
    alike = [(one > 1) == (other > 1) for one, other in zip(ours, theirs, strict=True)]
    if all(alike):
        return "both is"
    return "neither is" if not any(alike) else f"{(PER_POSITION, SWEEP)[alike.index(True)]} alone is"


def _flow_and_machine(figures: dict[str, Any]) -> str:
    """The passes are the flow's, and the cost the machine's: each with the paper's figure of the other."""
    law = laws_of(figures)[FIRST]
    here = [cost(row) / row["length"] for row in figures["rows"]]
    there, taken, mixed = [], [], []
    for name in (SMALL, LARGE):
        length, own = SHAPES[name][1], law(*SHAPES[name])
        there.append(f"{cost_of(name) / length:.1%} ({name})")
        taken.append(f"{own:.3g} ({name}; {passes_of(name):.3g} in the paper)")
        mixed.append(
            f"{speed_up(length, own, cost_of(name)):.2g} ({name}; {TABLE_1[name]['UJD'].speed_up} in the paper)"
        )
    return (
        f"The passes are the flow's, at tau = {TAU}; the cost of a sweep is the machine's as well: a sweep computes L positions, and costs L single passes where a single pass keeps the machine as busy as a sweep does. "
        f"Here it costs {min(here):.0%} to {max(here):.0%} of that, on the paper's GPUs {' and '.join(there)}. The laws give {' and '.join(taken)} passes of a block, "
        f"and with them, at the costs of the paper's GPUs, a speed-up of {' and '.join(mixed)}."
    )
