"""Measuring: interleaved runs, peak memory, and how far images are from the sequential ones.

Shapes: B batch, L positions, D values of a position.
"""

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

LEAST, SLOW, SLOW_ROUNDS = 5, 4.0, 3  # rounds under a budget; how many times the baseline is slow, and its rounds
LEARNS = 20  # runs of `Auto` before it is timed
LEVEL = 2 / 255  # of 8 bits, on images in [-1, 1]


class Outcome(NamedTuple):
    """What one run gave.

    Attributes:
        value: images (B, C, H, W), or a layer's solution (B, L, D).
        passes: of each layer; None where the code does not say.
        positions: evaluated by all of them, for each row; None where the code does not say.
    """

    value: Tensor
    passes: tuple[int, ...] | None = None
    positions: int | None = None


Case = Callable[[], Outcome]
Method = Callable[[Tensor, Tensor | None], Outcome]


@dataclass
class Timing:
    """The runs of one case.

    Attributes:
        outcome: of the last run.
        cold: seconds of the very first run, with what is compiled, chosen or allocated once.
        seconds: of the timed runs, one for each round that the case took part in.
    """

    outcome: Outcome
    cold: float
    seconds: list[float] = field(default_factory=list)


def interleave(
    cases: Mapping[str, Case],
    *,
    baseline: str,
    runs: int,
    budget: float | None = None,
    deadline: float | None = None,
    notify: Callable[[str], None] = lambda message: None,
) -> dict[str, Timing]:
    """Time the cases in turn, round after round (A B C A B C ...), so that what else the machine does meets all of them.

    Two runs of each warm up: the first compiles and allocates, the second says about how long the case takes; `Auto`, which
    learns for some calls, has more, and its first is noted as `cold`. Cases that
    take more than four times the baseline's time run in the first three rounds only.

    Args:
        cases: what to run, by name.
        baseline: the name of the case that others are compared with; it runs first.
        runs: the rounds.
        budget: seconds for all rounds together: fewer rounds, but five (or `runs`, if that is less).
        deadline: the `time.perf_counter()` at which to stop whatever is missing. A case is begun only if it is expected to end by
            then; one without a timed run is left out of what is returned, and `notify` says so.
        notify: called with a line of text now and then.

    Raises:
        ValueError: `runs` is less than 1, or `baseline` is not among the cases.

    Example:
        >>> import torch
        >>> cases = {"one": lambda: Outcome(torch.ones(1)), "two": lambda: Outcome(torch.ones(1) * 2)}
        >>> timings = interleave(cases, baseline="one", runs=3)
        >>> sorted(timings), len(timings["one"].seconds)
        (['one', 'two'], 3)
    """
    if runs < 1:
        raise ValueError(f"runs is {runs}, expected at least 1")
    if baseline not in cases:
        raise ValueError(f"the baseline {baseline!r} is not among {', '.join(cases)}")
    cases = {baseline: cases[baseline], **cases}

    def late(expected: float = 0.0) -> bool:
        return deadline is not None and time.perf_counter() + expected > deadline

    timings: dict[str, Timing] = {}
    expected: dict[str, float] = {}
    for name, case in cases.items():
        if late():
            break
        notify(f"{name}: warming up")
        cold, _ = _timed(case)
        for _ in range(LEARNS if name.startswith("auto") else 1):
            expected[name], outcome = _timed(case)
        timings[name] = Timing(outcome, cold)
    slow = {name for name in timings if expected[name] > SLOW * expected[baseline]}
    if budget is not None and timings:  # there are none if the deadline was over from the start
        once = sum(expected[name] for name in slow) * SLOW_ROUNDS
        fast = sum(expected[name] for name in timings if name not in slow)
        runs = max(min(LEAST, runs), min(runs, int((budget - once) / fast)))
    for number in range(runs):
        for name, timing in timings.items():
            if (name in slow and number >= SLOW_ROUNDS) or late(expected[name]):
                continue
            notify(f"{name}: round {number + 1} of {runs}")
            seconds, timing.outcome = _timed(cases[name])
            timing.seconds.append(seconds)
    for name in cases:
        if name not in timings or not timings[name].seconds:
            notify(f"{name}: left out, no time was left")
    return {name: timing for name, timing in timings.items() if timing.seconds}


def _timed(case: Case) -> tuple[float, Outcome]:
    began = time.perf_counter()
    outcome = case()
    _wait(outcome.value.device)
    return time.perf_counter() - began, outcome


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def row(timing: Timing, against: Mapping[str, Timing]) -> dict[str, Any]:
    """The timing's figures: medians over its rounds, and ratios to others' runs of the same rounds.

    Args:
        timing: whose figures.
        against: the cases to compare with, by the name that the ratio is to have: {"speed_up": baseline} gives
            `speed_up`, the median over rounds of baseline / this, and `speed_up_range`, the least and the largest.
    """
    figures: dict[str, Any] = {
        "seconds": short(statistics.median(timing.seconds)),
        "rounds": len(timing.seconds),
        "cold_seconds": short(timing.cold),
    }
    for name, other in against.items():
        ratios = [theirs / ours for theirs, ours in zip(other.seconds, timing.seconds, strict=False)]
        figures[name] = short(statistics.median(ratios))
        figures[f"{name}_range"] = [short(min(ratios)), short(max(ratios))]
    return figures


def deviations(images: Tensor, truth: Tensor) -> dict[str, float]:
    """How far images are from others, both clamped to [-1, 1]; a pixel that is not finite counts as all of the range away.

    Returns:
        `largest_deviation` and `mean_deviation` (absolute); `same_8_bit`, the share of values that are equal once they are
        rounded to 8 bits; `within_one_level`, the share no further apart than 2 / 255; `psnr_db` for the peak of 2,
        infinite for equal images.

    Example:
        >>> figures = deviations(torch.tensor([0.0, 0.5, 2.0, 0.0]), torch.tensor([0.0, 0.5, 1.0, 0.02]))
        >>> list(figures.values())
        [0.02, 0.005, 0.75, 0.75, 46.021]
    """
    images, truth = (t.double().clamp(-1, 1) for t in (images, truth))
    error = torch.where(images.isfinite() & truth.isfinite(), (images - truth).abs(), 2.0)
    error = error.masked_fill(images.isnan() & truth.isnan(), 0.0)
    equal = ((images + 1) / LEVEL).round() == ((truth + 1) / LEVEL).round()
    figures = {
        "largest_deviation": error.max().item(),
        "mean_deviation": error.mean().item(),
        "same_8_bit": (equal & (error < 2)).double().mean().item(),
        "within_one_level": (error <= LEVEL).double().mean().item(),
        "psnr_db": (20 * torch.log10(2 / error.square().mean().sqrt())).item(),
    }
    return {name: float(f"{value:.5g}") for name, value in figures.items()}


def peak_memory(case: Case, device: torch.device) -> int:
    """The most bytes that one run holds at a time, beyond what was held before it (weights, z, a compiled graph's own).

    On CUDA the allocator says it. On the CPU the run is profiled, which takes several times as long, and the sum of its
    allocations is followed.

    Raises:
        ValueError: another device.

    Example:
        >>> peak_memory(lambda: Outcome(torch.zeros(1000) + 1), torch.device("cpu")) // 1000
        8
    """
    if device.type == "cuda":
        _wait(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        case()
        _wait(device)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu":
        raise ValueError(f"the memory of a run is not known on {device.type}, only on cuda and cpu")
    gc.collect()  # what is freed while the run is followed would count as its own
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False) as profiler:
        case()
    events = profiler.profiler.kineto_results.events()
    sizes = sorted(((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"), key=lambda event: event[0])
    held = peak = 0
    for _, size in sizes:
        held += size
        peak = max(peak, held)
    return peak


@contextmanager
def precision(name: str, device: torch.device) -> Iterator[None]:
    """Compute in a precision.

    Args:
        name: "float32"; "tf32", which lets CUDA round the factors of matrix products; "bfloat16" or "float16", by autocast.
        device: where.

    Raises:
        ValueError: another name, or one that this device does not have.
    """
    if name not in ("float32", "tf32", "bfloat16", "float16"):
        raise ValueError(f"dtype is {name!r}, expected float32, tf32, bfloat16 or float16")
    if name == "tf32" and device.type != "cuda":
        raise ValueError(f"dtype is 'tf32', which {device.type} does not have: choose float32")
    half = name in ("bfloat16", "float16")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    try:
        with torch.autocast(device.type, getattr(torch, name)) if half else nullcontext():
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def short(value: float) -> float:
    """Four digits, which is more than any timing is worth."""
    return float(f"{value:.4g}")
