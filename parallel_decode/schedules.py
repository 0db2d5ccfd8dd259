"""Which positions a pass evaluates: every schedule is a choice of window, and none has a loop of its own."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from typing import TYPE_CHECKING, Literal, Protocol

from torch import Tensor

from parallel_decode.correction import Correction
from parallel_decode.system import LayeredSystem, TriangularSystem

if TYPE_CHECKING:
    from parallel_decode.plan import Plan


def _at_least_one(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} is {value!r}, expected a whole number of positions")
    if value < 1:
        raise ValueError(f"{name} is {value}, expected at least 1")


def check_tol(tol: float | None) -> None:
    """Raise unless `tol` is None or a finite number that is not negative."""
    if tol is None:
        return
    if isinstance(tol, bool) or not isinstance(tol, Real):
        raise TypeError(f"tol is {tol!r}, expected a number or None")
    if not (0 <= tol < math.inf):
        raise ValueError(f"tol is {tol}, expected a finite number >= 0 (0 asks for exact equality)")


class Chooser(Protocol):
    """What a run asks before each pass."""

    @property
    def correction(self) -> Correction | None:
        """The correction of this pass."""

    def window(self, front: int, length: int) -> range:
        """See `Schedule.window`."""

    def finish(self, front: int, length: int) -> None:
        """See `Schedule.finish`."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Schedule(ABC):
    """A choice of window, with the options of a layer that it solves.

    Attributes:
        tol: the tolerance of this layer; None takes that of `solve`.
        start: the first guess: the system's own, or zeros.
        correction: a causal correction of every pass, or None.
    """

    tol: float | None = None
    start: Literal["system", "zeros"] = "system"
    correction: Correction | None = None

    def __post_init__(self) -> None:
        check_tol(self.tol)
        if self.start not in ("system", "zeros"):
            raise ValueError(f"start is {self.start!r}, expected 'system' or 'zeros'")

    def __repr__(self) -> str:
        shown = (f for f in fields(self) if not f.kw_only or getattr(self, f.name) != f.default)
        return f"{type(self).__name__}({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in shown)})"

    @property
    def ragged(self) -> bool:
        """Whether every row gets a window of its own, at its own front, from systems that offer it."""
        return False

    @property
    def freezes(self) -> bool:
        """Whether positions become final one by one; if not, none is final before the whole iterate has settled."""
        return True

    @abstractmethod
    def window(self, front: int, length: int) -> range:
        """The positions of the next pass, rising, the first of them `front`.

        Args:
            front: the first position that is not final, the least over the rows still at work; less than `length`.
            length: L.
        """

    def begin(self, system: TriangularSystem, x: Tensor, tol: float) -> "Chooser":
        """What chooses the windows of one run, from the guess x, shape (B, L, *E): the schedule itself, if it has nothing to learn."""
        return self

    def finish(self, front: int, length: int) -> None:  # noqa: B027
        """Called at the end of a run, with the least front that was reached."""


@dataclass(frozen=True, repr=False)
class Sequential(Schedule):
    """One position at a time (Gauss-Seidel on single positions): ordinary autoregressive decoding."""

    def window(self, front: int, length: int) -> range:
        return range(front, front + 1)


@dataclass(frozen=True, repr=False)
class Jacobi(Schedule):
    """Every position from the front on (Song et al. 2021, arXiv 2002.03629).

    Attributes:
        freeze: False is the paper's uniform Jacobi decoding (UJD, arXiv 2505.24791) to the letter: every pass evaluates
            everything, and nothing is final before the largest change of the whole iterate, over the batch, is
            at most `tol`, which is absolute there. It is for comparison, and has no guard against a guess that overflows.
    """

    freeze: bool = field(default=True, kw_only=True)

    @property
    def freezes(self) -> bool:
        return self.freeze

    def window(self, front: int, length: int) -> range:
        return range(front, length) if self.freeze else range(length)


@dataclass(frozen=True, repr=False)
class GaussSeidelJacobi(Schedule):
    """Blocks in turn, Jacobi within each: the rest of the current block (arXiv 2002.03629; 2505.12849 for flows)."""

    block: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least_one("block", self.block)

    def window(self, front: int, length: int) -> range:
        return range(front, min(length, (front // self.block + 1) * self.block))


@dataclass(frozen=True, repr=False)
class JacobiGaussSeidel(Schedule):
    """One position of each block in turn, all blocks at once: a strided window from the front (arXiv 2002.03629)."""

    block: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least_one("block", self.block)

    def window(self, front: int, length: int) -> range:
        return range(front, length, self.block)


@dataclass(frozen=True, repr=False)
class Sliding(Schedule):
    """`width` positions from the front.

    Attributes:
        width: W.
        per_row: let every row have a window of its own, at its own front, where the system offers it; else
            all have the window of the slowest. Fewer passes, each somewhat dearer.
    """

    width: int = 64
    per_row: bool = field(default=False, kw_only=True)

    @property
    def ragged(self) -> bool:
        return self.per_row

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least_one("width", self.width)

    def window(self, front: int, length: int) -> range:
        return range(front, min(length, front + self.width))


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
        if isinstance(self.layers, str) or not self.layers:
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
        """Called before a system is solved; a `Plan` warns if it was made for another."""

    @classmethod
    def from_measurements(
        cls, plan: "Plan", among: Sequence["Schedule | str"] = ("sequential", "jacobi")
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
        layers = []
        for measurements in plan.measurements:
            seconds = {m.schedule: m.seconds for m in measurements if m.schedule in wanted}
            if len(seconds) < len(set(wanted)):
                raise ValueError(f"the plan has no measurements of {[s for s in wanted if s not in seconds]}")
            layers.append(min(seconds, key=seconds.__getitem__))
        return cls(tuple(layers))

    @classmethod
    def sejd(cls, tau: float = 0.5) -> "Selective":
        """The paper's method to the letter: the first layer sequential, then UJD from zeros with threshold `tau`."""
        return cls((Sequential(), Jacobi(freeze=False, tol=tau, start="zeros")))


NAMES: dict[str, type[Schedule] | type[Selective]] = {
    "sequential": Sequential,
    "gauss-seidel": Sequential,
    "jacobi": Jacobi,
    "gs-jacobi": GaussSeidelJacobi,
    "jacobi-gs": JacobiGaussSeidel,
    "sliding": Sliding,
    "selective": Selective,
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
