"""`calibrate`: every schedule timed on every layer."""

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Protocol

from torch import Tensor

from parallel_decode._options import check_at_least_one
from parallel_decode._progress import progress_bar
from parallel_decode.plan import Measurement, Plan
from parallel_decode.schedules import Jacobi, Schedule, Sequential, Sliding
from parallel_decode.secant import SecantCorrection
from parallel_decode.selective import Selective, as_schedule
from parallel_decode.solver import solve
from parallel_decode.system import LayeredSystem, TriangularSystem

MARGIN = 0.97  # of the time of sequential decoding, which a schedule has to stay below to be chosen


class Drawable(Protocol):
    """A model that can be calibrated, such as a TarFlow."""

    def example(self, batch_size: int, **options: Any) -> LayeredSystem:
        """A system such as sampling solves, from noise of its own."""


def calibrate(
    model: Drawable | LayeredSystem,
    batch_size: int = 1,
    *,
    schedules: Iterable[Schedule | str] | None = None,
    tol: float | None = None,
    runs: int = 5,
    progress: bool = True,
    **options: Any,
) -> Plan:
    """Measure schedules on every layer, and keep the fastest of each.

    Args:
        model: what draws, such as a `TarFlow`, or the system itself.
        batch_size: rows of the batch to measure with; the plan is for this many.
        schedules: the candidates; by default sequential decoding, windows of every power of two from 8 on, Jacobi, and for the
            best of these also the start from zeros and the secant correction. Sequential decoding is always one of them.
        tol: see `solve`.
        runs: how often each is run, in turn; the median counts.
        progress: show a bar (needs tqdm).
        options: of the model's sampling (for a TarFlow: y, guidance, ...).

    Raises:
        TypeError: the model cannot be calibrated.
        ValueError: a number is out of its range.
    """
    check_at_least_one("runs", runs)
    check_at_least_one("batch_size", batch_size)
    if isinstance(model, LayeredSystem):
        system = model
    elif hasattr(model, "example"):
        system = model.example(batch_size, **options)
    else:
        raise TypeError(f"model is a {type(model).__name__}, expected a LayeredSystem, or a model with `example`")
    if schedules is not None and (isinstance(schedules, str) or not isinstance(schedules, Iterable)):
        raise TypeError(f"schedules is {schedules!r}, expected several schedules, or their names")
    given = None if schedules is None else [_one(schedule) for schedule in schedules]
    chosen: list[Schedule] = []
    measured: list[tuple[Measurement, ...]] = []
    with progress_bar(progress, "calibrate", system.depth, unit="layer") as show:

        def measure_layer(index: int, make: Callable[[], TriangularSystem]) -> Tensor:
            layer = _Layer(make, tol, runs)
            found = layer.measure([Sequential(), *(_windows(layer.length) if given is None else given)])
            if given is None:
                best = min(found[1:], key=_seconds).schedule
                varied = [replace(best, start="zeros"), replace(best, correction=SecantCorrection())]
                found += layer.measure(varied if layer.truth.is_floating_point() else varied[:1])
            measured.append(tuple(found))
            fastest = min(found, key=_seconds)
            chosen.append((fastest if fastest.seconds < MARGIN * found[0].seconds else found[0]).schedule)
            show(index + 1)
            return layer.truth

        system.walk(measure_layer)
    return Plan(tuple(chosen), dict(system.identity), tuple(measured))


class _Layer:
    """One layer, to be solved by one schedule and another."""

    def __init__(self, make: Callable[[], TriangularSystem], tol: float | None, runs: int) -> None:
        self.make, self.tol, self.runs = make, tol, runs
        self.length = make().length
        self.truth = solve(make(), "sequential").value

    def measure(self, schedules: Sequence[Schedule]) -> list[Measurement]:
        """What each takes; they are run in turn, once more to warm up."""
        rounds = [[solve(self.make(), s, tol=self.tol) for s in schedules] for _ in range(self.runs + 1)]
        seconds = [statistics.median(end.layers[0].seconds for end in ends[1:]) for ends in zip(*rounds, strict=True)]
        return [
            Measurement(schedule, time, end.passes, self.deviation(end.value))
            for schedule, time, end in zip(schedules, seconds, rounds[-1], strict=True)
        ]

    def deviation(self, value: Tensor) -> float:
        """The largest difference from sequential decoding."""
        return float((value.double() - self.truth.double()).abs().max()) if value.numel() else 0.0


def _seconds(measurement: Measurement) -> float:
    return measurement.seconds


def _windows(length: int) -> list[Schedule]:
    return [*(Sliding(2**i) for i in range(3, 20) if 2**i < length), Jacobi()]


def _one(schedule: Schedule | str) -> Schedule:
    plain = as_schedule(schedule)
    if isinstance(plain, Selective):
        raise TypeError(f"{plain!r} is for several layers: give schedules for a single one")
    return plain
