"""Which positions a pass evaluates: every schedule is a choice of window, and none has a loop of its own."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields
from typing import Literal, Protocol

from torch import Tensor

from parallel_decode._options import check_at_least_one, check_kind, check_tol
from parallel_decode.correction import Correction
from parallel_decode.system import TriangularSystem


class Chooser(Protocol):
    """What `solve` asks before each pass: a schedule, or what it made for one run (`Schedule.begin`)."""

    @property
    def correction(self) -> Correction | None:
        """The correction of this pass."""

    @property
    def ragged(self) -> bool:
        """Whether rows have windows of their own in this pass, if the schedule and the system are ragged."""

    def window(self, front: int, length: int) -> range:
        """See `Schedule.window`."""

    def after_pass(self, system: TriangularSystem) -> None:
        """See `Schedule.after_pass`."""

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
        if self.correction is not None:
            check_kind("correction", self.correction, Correction, "a Correction such as SecantCorrection(), or None")
        if not isinstance(self.start, str) or self.start not in ("system", "zeros"):
            raise ValueError(f"start is {self.start!r}, expected 'system' or 'zeros'")

    def __repr__(self) -> str:
        shown = (f for f in fields(self) if not f.kw_only or getattr(self, f.name) != f.default)
        return f"{type(self).__name__}({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in shown)})"

    @property
    def ragged(self) -> bool:
        """Whether rows may get windows of their own, at their own fronts, from systems that offer it."""
        return False

    @property
    def freezes(self) -> bool:
        """Whether positions become final one by one, and keep their values; if not, every pass evaluates everything."""
        return True

    @property
    def tolerance_is_absolute(self) -> bool:
        """Whether `tol` bounds |new - old| alone, whatever the size of the values."""
        return False

    @abstractmethod
    def window(self, front: int, length: int) -> range:
        """The positions of the next pass, rising, the first of them `front`.

        Args:
            front: the first position that is not final, the smallest over the rows at work; less than `length`.
            length: L.
        """

    def begin(self, system: TriangularSystem, x: Tensor, tol: float) -> "Chooser":
        """Called before a run, with the guess x, shape (B, L, *E): returns what chooses its windows, the schedule itself if it learns nothing."""
        return self

    def after_pass(self, system: TriangularSystem) -> None:  # noqa: B027
        """Called after each pass of a system that has an `after_pass` itself, with the system of the rows at work."""

    def finish(self, front: int, length: int) -> None:  # noqa: B027
        """Called at the end of a run, with the smallest front of a row."""


@dataclass(frozen=True, repr=False)
class Sequential(Schedule):
    """One position at a time (Gauss-Seidel on single positions): ordinary autoregressive decoding."""

    def window(self, front: int, length: int) -> range:
        return range(front, front + 1)


@dataclass(frozen=True, repr=False)
class Jacobi(Schedule):
    """Every position from the front on (Song et al. 2021, arXiv 2002.03629).

    Attributes:
        freeze: False evaluates everything at every pass, and stops once all of it has settled, in all rows; the passes are the cheapest that
            there are. (What overflows is solved with freezing from there on.)
        absolute: let `tol` bound |new - old| alone, not relative to the size of the values. `Jacobi(freeze=False, absolute=True,
            start="zeros", tol=0.5)` is the paper's uniform Jacobi decoding (UJD, arXiv 2505.24791) to the letter.
    """

    freeze: bool = field(default=True, kw_only=True)
    absolute: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_kind("freeze", self.freeze, bool, "True or False")
        check_kind("absolute", self.absolute, bool, "True or False")

    @property
    def freezes(self) -> bool:
        return self.freeze

    @property
    def tolerance_is_absolute(self) -> bool:
        return self.absolute

    def window(self, front: int, length: int) -> range:
        return range(front, length) if self.freeze else range(length)


@dataclass(frozen=True, repr=False)
class GaussSeidelJacobi(Schedule):
    """Blocks in turn, Jacobi within each: the rest of the current block (arXiv 2002.03629; 2505.12849 for flows)."""

    block: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least_one("block", self.block)

    def window(self, front: int, length: int) -> range:
        return range(front, min(length, (front // self.block + 1) * self.block))


@dataclass(frozen=True, repr=False)
class JacobiGaussSeidel(Schedule):
    """One position of each block in turn, all blocks at once: a strided window from the front (arXiv 2002.03629)."""

    block: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least_one("block", self.block)

    def window(self, front: int, length: int) -> range:
        return range(front, length, min(self.block, length))


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
        check_at_least_one("width", self.width)
        check_kind("per_row", self.per_row, bool, "True or False")

    def window(self, front: int, length: int) -> range:
        return range(front, min(length, front + self.width))
