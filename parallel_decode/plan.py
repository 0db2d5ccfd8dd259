"""Plans: the fastest schedule of each layer, measured once and kept in a file."""

import json
import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from parallel_decode._json_file import LARGEST, read_json, reason
from parallel_decode._options import check_kind
from parallel_decode._outputs import aside
from parallel_decode.correction import Correction
from parallel_decode.schedules import Schedule
from parallel_decode.secant import SecantCorrection
from parallel_decode.selective import NAMES, Selective, as_schedule
from parallel_decode.system import LayeredSystem, TriangularSystem

_FORMAT = "parallel_decode plan 1"
_NUMBERS = ("seconds", "passes", "deviation")
_CORRECTIONS: dict[str, type[Correction]] = {"secant": SecantCorrection}


@dataclass(frozen=True)
class Measurement:
    """What one schedule took for one layer.

    Attributes:
        schedule: the schedule.
        seconds: the median time.
        passes: its passes.
        deviation: the largest from what sequential decoding gives, on the layer's own scale; not finite if a value is not.

    Raises:
        TypeError: an attribute is of the wrong kind.
        ValueError: a number is negative.
    """

    schedule: Schedule
    seconds: float
    passes: int
    deviation: float

    def __post_init__(self) -> None:
        check_kind("schedule", self.schedule, Schedule, "a schedule of one layer")
        for name, kind in (("seconds", Real), ("passes", Integral), ("deviation", Real)):
            number = getattr(self, name)
            check_kind(name, number, kind, "a whole number" if kind is Integral else "a number")
            if isinstance(number, bool) or number < 0:
                raise ValueError(f"{name} is {number}, expected a number >= 0")


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

    made_for: Mapping[str, str | int | float] = field(default_factory=dict, hash=False)
    measurements: tuple[tuple[Measurement, ...], ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        made_for = self.made_for
        if not isinstance(made_for, Mapping) or not all(
            isinstance(k, str) and isinstance(v, (str, int, float)) for k, v in made_for.items()
        ):
            raise TypeError(f"made_for is {made_for!r}, expected a mapping of names to strings and numbers")
        if not isinstance(self.measurements, (tuple, list)) or not all(
            isinstance(layer, (tuple, list)) and all(isinstance(m, Measurement) for m in layer)
            for layer in self.measurements
        ):
            raise TypeError(f"measurements is {self.measurements!r}, expected a tuple of Measurements for each layer")
        object.__setattr__(self, "measurements", tuple(map(tuple, self.measurements)))

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
        """Write the plan as JSON: all of it, or what was there before stays.

        Raises:
            OSError: the file cannot be written.
            ValueError: a schedule is not one of this package's, or the plan is too large for `load`.
        """
        measurements = [
            [{"schedule": _encode(m.schedule)} | {name: _number(getattr(m, name)) for name in _NUMBERS} for m in layer]
            for layer in self.measurements
        ]
        layers = [_encode(as_schedule(schedule)) for schedule in self.layers]
        content = {"format": _FORMAT, "made_for": dict(self.made_for), "layers": layers, "measurements": measurements}
        text = json.dumps(content, indent=1, allow_nan=False) + "\n"
        if len(text) > LARGEST:
            raise ValueError(f"the plan takes {len(text):,} bytes, expected at most {LARGEST:,}")
        file = Path(os.path.realpath(path))  # a link stays one
        if file.exists() and not file.is_file():  # such as /dev/stdout, which is not to be replaced
            file.write_text(text)
            return
        with aside(file) as part:
            part.write_text(text)

    @classmethod
    def load(cls, path: str | Path) -> "Plan":
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged, or is no plan.
        """
        try:
            content = read_json(Path(path))
            if not isinstance(content, dict) or content.get("format") != _FORMAT:
                found = repr(content.get("format"))[:60] if isinstance(content, dict) else type(content).__name__
                raise ValueError(f"its format is {found}, expected {_FORMAT!r}")
            measurements = tuple(
                tuple(Measurement(_decode(m["schedule"]), *(_number(m[name]) for name in _NUMBERS)) for m in layer)
                for layer in content["measurements"]
            )
            return cls(tuple(map(_decode, content["layers"])), content["made_for"], measurements)
        except (ValueError, KeyError, TypeError, ArithmeticError, RecursionError) as error:
            raise ValueError(
                f"{path} cannot be read as a plan, it may be damaged or something else: {reason(error)}"
            ) from None


def _number(value: Any) -> Any:
    """A number that is not finite as its name, which is JSON, and back."""
    if isinstance(value, str) and value in ("inf", "nan"):
        return float(value)
    return str(float(value)) if isinstance(value, float) and not math.isfinite(value) else value


def _encode(schedule: Any) -> dict[str, Any]:
    """A schedule, or a correction, as JSON: its name, and the options that are not the default."""
    kinds: dict[str, type] = {**NAMES, **_CORRECTIONS}
    name = next((name for name, kind in kinds.items() if kind is type(schedule)), None)
    if name is None:
        raise ValueError(f"{schedule!r} is not one of {', '.join(kinds)}: a plan cannot keep it")
    options = {f.name: getattr(schedule, f.name) for f in fields(schedule) if getattr(schedule, f.name) != f.default}
    return {"name": name} | {k: _encode(v) if isinstance(v, Correction) else v for k, v in options.items()}


def _decode(entry: dict[str, Any]) -> Any:
    check_kind("a schedule", entry, dict, "its name and options")
    options: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in entry.items() if k != "name"}
    if "correction" in options:
        options["correction"] = _decode(options["correction"])
    kinds: dict[str, type] = {**NAMES, **_CORRECTIONS}
    if entry["name"] not in kinds:
        raise ValueError(f"a schedule is {entry['name']!r}, expected one of {', '.join(kinds)}")
    return kinds[entry["name"]](**options)
