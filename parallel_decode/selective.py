"""A schedule for each layer, and schedules by name."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from parallel_decode.auto import Auto
from parallel_decode.schedules import GaussSeidelJacobi, Jacobi, JacobiGaussSeidel, Schedule, Sequential, Sliding
from parallel_decode.system import LayeredSystem, TriangularSystem


class Measured(Protocol):
    """What one schedule took for one layer."""

    @property
    def schedule(self) -> Schedule: ...

    @property
    def seconds(self) -> float: ...


class Measurements(Protocol):
    """What schedules took for each layer: a `Plan`, say."""

    @property
    def measurements(self) -> Sequence[Sequence[Measured]]: ...


@dataclass(frozen=True)
class Selective:
    """A schedule for each layer (Selective Jacobi Decoding, arXiv 2505.24791).

    Attributes:
        layers: schedules, or their names, in the order of solving; the last one serves all layers that remain. The default is the
            paper's rule: the first layer sequential, every later one Jacobi. A system without layers takes the last.

    Example:
        >>> import parallel_decode as pd
        >>> pd.Selective(("sequential", pd.Sliding(32))).for_layers(3)
        (Sequential(), Sliding(width=32), Sliding(width=32))
    """

    layers: tuple["Schedule | str", ...] = ("sequential", "jacobi")

    def __post_init__(self) -> None:
        if not isinstance(self.layers, (tuple, list)) or not self.layers:
            raise ValueError(f"layers is {self.layers!r}, expected a sequence of one schedule or more")
        schedules = tuple(as_schedule(layer) for layer in self.layers)
        if any(isinstance(schedule, Selective) for schedule in schedules):
            raise ValueError("a Selective cannot hold another: give one schedule for each layer")
        object.__setattr__(self, "layers", schedules)

    def for_layers(self, depth: int | None) -> tuple[Schedule, ...]:
        """One schedule for each of `depth` layers; None stands for a system without layers."""
        schedules: tuple[Schedule, ...] = self.layers  # type: ignore[assignment]
        if depth is None:
            return schedules[-1:]
        if depth < 1:
            raise ValueError(f"the system has {depth} layers, expected at least one")
        if len(schedules) > max(depth, 2):  # two are a rule: the first, and all that remain
            raise ValueError(
                f"{len(schedules)} schedules were given for {depth} layers: leave out {len(schedules) - depth}"
            )
        return (schedules + schedules[-1:] * (depth - len(schedules)))[:depth]

    def check(self, system: LayeredSystem | TriangularSystem) -> None:
        """Called before a system is solved; a `Plan` warns if it was made for another one."""

    @classmethod
    def from_measurements(
        cls, plan: Measurements, among: Sequence["Schedule | str"] = ("sequential", "jacobi")
    ) -> "Selective":
        """The paper's rule from measurements instead of from the order of layers: for each layer the faster of the two.

        The layer that is hard for Jacobi is not the first in every flow (GS-Jacobi, arXiv 2505.12849).

        Args:
            plan: what `calibrate` returned.
            among: the schedules to choose from.

        Raises:
            ValueError: one of them was not measured.
        """
        wanted = [as_schedule(schedule) for schedule in among]
        if not plan.measurements:
            raise ValueError("the plan has no measurements: pd.calibrate makes one that has")
        layers = []
        for measurements in plan.measurements:
            seconds = {m.schedule: m.seconds for m in measurements if m.schedule in wanted}
            if len(seconds) < len(set(wanted)):
                raise ValueError(f"the plan has no measurements of {[s for s in wanted if s not in seconds]}")
            layers.append(min(seconds, key=seconds.__getitem__))
        return cls(tuple(layers))

    @classmethod
    def sejd(cls, tau: float = 0.5) -> "Selective":
        """The paper's method to the letter: the first layer sequential, then UJD from zeros with the absolute threshold `tau`."""
        return cls((Sequential(), Jacobi(freeze=False, absolute=True, tol=tau, start="zeros")))


NAMES: dict[str, type[Schedule] | type[Selective]] = {
    "sequential": Sequential,
    "gauss-seidel": Sequential,
    "jacobi": Jacobi,
    "gs-jacobi": GaussSeidelJacobi,
    "jacobi-gs": JacobiGaussSeidel,
    "sliding": Sliding,
    "selective": Selective,
    "auto": Auto,
}


def as_schedule(schedule: "Schedule | Selective | str") -> "Schedule | Selective":
    """A schedule from itself or from its name, which stands for one with its defaults.

    Raises:
        ValueError: no schedule has this name.
        TypeError: neither a schedule nor a name.
    """
    if isinstance(schedule, (Schedule, Selective)):
        return schedule
    if not isinstance(schedule, str):
        hint = f": call it, {schedule.__name__}(...)" if isinstance(schedule, type) else ""
        hint = ": for one for each layer, Selective((...))" if isinstance(schedule, (list, tuple)) else hint
        raise TypeError(f"schedule is {schedule!r}, expected a schedule or a name{hint}")
    if schedule not in NAMES:
        raise ValueError(f"schedule is {schedule!r}, expected one of {', '.join(map(repr, NAMES))}")
    return NAMES[schedule]()
