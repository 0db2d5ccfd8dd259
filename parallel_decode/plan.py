"""Plans: the best schedule of each layer, measured once and kept in a file."""

import json
import statistics
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from parallel_decode.correction import Correction
from parallel_decode.schedules import NAMES, Jacobi, Schedule, Selective, Sequential, Sliding, as_schedule
from parallel_decode.secant import SecantCorrection
from parallel_decode.solver import progress_bar, solve
from parallel_decode.system import LayeredSystem, TriangularSystem

_FORMAT = "parallel_decode plan 1"
_NUMBERS = ("seconds", "passes", "deviation")
MARGIN = 0.97  # of the time of sequential decoding, which a schedule has to stay below to be chosen
_CORRECTIONS: dict[str, type[Correction]] = {"secant": SecantCorrection}


class Drawable(Protocol):
    """A model that can be calibrated, such as a TarFlow."""

    def example(self, batch_size: int, **options: Any) -> LayeredSystem:
        """A system such as sampling solves, from noise of its own."""


@dataclass(frozen=True)
class Measurement:
    """What one schedule took for one layer.

    Attributes:
        schedule: the schedule.
        seconds: the median time.
        passes: its passes.
        deviation: the largest from what sequential decoding gives, on the layer's own scale.
    """

    schedule: Schedule
    seconds: float
    passes: int
    deviation: float


@dataclass(frozen=True)
class Plan(Selective):
    """The fastest schedule of each layer, as `calibrate` found it: a schedule for `solve` and `sample`.

    Attributes:
        layers: schedules, in the order of solving.
        made_for: the model, device, type and batch that it was measured on. For others it is as right, but may not be as
            fast: using it there warns.
        measurements: for each layer what every schedule that was tried took.

    Example:
        >>> import parallel_decode as pd
        >>> from parallel_decode.adapters.tarflow import TarFlow
        >>> flow = TarFlow(1, 8, 2, 64, num_blocks=2, layers_per_block=1)
        >>> plan = pd.calibrate(flow, batch_size=2, runs=1, progress=False)
        >>> len(plan.layers), plan.made_for["batch"]
        (2, 2)
        >>> flow.sample(2, schedule=plan).shape
        torch.Size([2, 1, 8, 8])
    """

    made_for: Mapping[str, str | int | float] = field(default_factory=dict)
    measurements: tuple[tuple[Measurement, ...], ...] = ()

    def check(self, system: LayeredSystem | TriangularSystem) -> None:
        """Warn where the plan was made for something else."""
        given = system.identity
        other = [k for k, v in self.made_for.items() if given.get(k) != v]
        if other:
            made, used = (", ".join(f"{k} {what.get(k)}" for k in other) for what in (self.made_for, given))
            warnings.warn(
                f"this plan was made for {made}, and is used for {used}: the samples are as right, but other schedules "
                "may be faster; parallel_decode.calibrate makes a plan for these, and schedule='auto' needs none",
                stacklevel=4,
            )

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON."""
        measurements = [
            [{"schedule": _encode(m.schedule)} | {name: getattr(m, name) for name in _NUMBERS} for m in layer]
            for layer in self.measurements
        ]
        layers = [_encode(as_schedule(schedule)) for schedule in self.layers]
        content = {"format": _FORMAT, "made_for": dict(self.made_for), "layers": layers, "measurements": measurements}
        Path(path).write_text(json.dumps(content, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "Plan":
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged, or is no plan.
        """
        try:
            content = json.loads(Path(path).read_text())
            if not isinstance(content, dict) or content.get("format") != _FORMAT:
                raise ValueError(f"its format is not {_FORMAT!r}")
            measurements = tuple(
                tuple(Measurement(_decode(m["schedule"]), *(m[name] for name in _NUMBERS)) for m in layer)
                for layer in content["measurements"]
            )
            return cls(tuple(map(_decode, content["layers"])), content["made_for"], measurements)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} cannot be read as a plan, it may be damaged or something else: {error}") from None


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
    if runs < 1 or batch_size < 1:
        raise ValueError(f"runs is {runs} and batch_size {batch_size}, expected at least 1 each")
    if isinstance(model, LayeredSystem):
        system = model
    elif hasattr(model, "example"):
        system = model.example(batch_size, **options)
    else:
        raise TypeError(f"model is a {type(model).__name__}, expected a LayeredSystem, or a model with `example`")
    given = None if schedules is None else [_one(schedule) for schedule in schedules]
    chosen, measured, value = [], [], None
    with progress_bar(progress, "calibrate", system.depth, unit="layer") as show:
        for index in range(system.depth):
            trial = _Trial(system, index, value, tol, runs)
            layer = trial.measure([Sequential(), *(_windows(trial.length) if given is None else given)])
            if given is None:
                best = min(layer[1:], key=_seconds).schedule
                varied = [replace(best, start="zeros"), replace(best, correction=SecantCorrection())]
                layer += trial.measure(varied if trial.truth.is_floating_point() else varied[:1])
            measured.append(tuple(layer))
            fastest = min(layer, key=_seconds)
            chosen.append((fastest if fastest.seconds < MARGIN * layer[0].seconds else layer[0]).schedule)
            value = trial.truth
            show(index + 1)
    return Plan(tuple(chosen), dict(system.identity), tuple(measured))


class _Trial:
    """One layer, to be solved by one schedule and another."""

    def __init__(self, system: LayeredSystem, index: int, value: Tensor | None, tol: float | None, runs: int) -> None:
        self.make: Callable[[], TriangularSystem] = lambda: system.layer(index, value)
        self.tol, self.runs = tol, runs
        self.length = self.make().length
        self.truth = solve(self.make(), "sequential").value

    def measure(self, schedules: Sequence[Schedule]) -> list[Measurement]:
        """What each takes; they are run in turn, once more to warm up."""
        rounds = [[solve(self.make(), s, tol=self.tol) for s in schedules] for _ in range(self.runs + 1)]
        seconds = [statistics.median(end.layers[0].seconds for end in ends[1:]) for ends in zip(*rounds, strict=True)]
        return [
            Measurement(schedule, time, end.passes, float((end.value - self.truth).abs().max()))
            for schedule, time, end in zip(schedules, seconds, rounds[-1], strict=True)
        ]


def _seconds(measurement: Measurement) -> float:
    return measurement.seconds


def _windows(length: int) -> list[Schedule]:
    return [*(Sliding(2**i) for i in range(3, 20) if 2**i < length), Jacobi()]


def _one(schedule: Schedule | str) -> Schedule:
    plain = as_schedule(schedule)
    if isinstance(plain, Selective):
        raise TypeError(f"{plain!r} is for several layers: give schedules for a single one")
    return plain


def _encode(schedule: Any) -> dict[str, Any]:
    """A schedule, or a correction, as JSON: its name, and the options that are not the default."""
    kinds: dict[str, type] = {**NAMES, **_CORRECTIONS}
    name = next((name for name, kind in kinds.items() if kind is type(schedule)), None)
    if name is None:
        raise ValueError(f"{schedule!r} is not one of {', '.join(kinds)}: a plan cannot keep it")
    options = {f.name: getattr(schedule, f.name) for f in fields(schedule) if getattr(schedule, f.name) != f.default}
    return {"name": name} | {k: _encode(v) if isinstance(v, Correction) else v for k, v in options.items()}


def _decode(entry: dict[str, Any]) -> Any:
    options: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in entry.items() if k != "name"}
    if "correction" in options:
        options["correction"] = _decode(options["correction"])
    kinds: dict[str, type] = {**NAMES, **_CORRECTIONS}
    return kinds[entry["name"]](**options)
