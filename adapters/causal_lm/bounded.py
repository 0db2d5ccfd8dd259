"""Windows that stay on one side of a boundary, and single positions beyond it."""

from dataclasses import dataclass

from torch import Tensor

from parallel_decode.correction import Correction
from parallel_decode.schedules import Chooser, Schedule
from parallel_decode.system import TriangularSystem


@dataclass(frozen=True, repr=False)
class Until(Schedule):
    """Another schedule's windows up to a position, and one position at a time from there on.

    Attributes:
        schedule: the other; one that freezes.
        end: that position.
    """

    schedule: Schedule
    end: int

    @property
    def tolerance_is_absolute(self) -> bool:
        return self.schedule.tolerance_is_absolute

    def window(self, front: int, length: int) -> range:
        return _bounded(self.schedule, self.end, front, length)

    def begin(self, system: TriangularSystem, x: Tensor, tol: float) -> Chooser:
        return _Bounded(self.schedule.begin(system, x, tol), self.end)


class _Bounded:
    def __init__(self, chooser: Chooser, end: int) -> None:
        self.chooser, self.end = chooser, end

    @property
    def correction(self) -> Correction | None:
        return self.chooser.correction

    @property
    def ragged(self) -> bool:
        return self.chooser.ragged

    def window(self, front: int, length: int) -> range:
        return _bounded(self.chooser, self.end, front, length)

    def after_pass(self, system: TriangularSystem) -> None:
        self.chooser.after_pass(system)

    def finish(self, front: int, length: int) -> None:
        self.chooser.finish(front, length)


def _bounded(chooser: Chooser, end: int, front: int, length: int) -> range:
    return range(front, front + 1) if front >= end else chooser.window(front, min(length, end))
