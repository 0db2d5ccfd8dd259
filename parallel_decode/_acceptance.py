"""Where a position becomes final: after each pass an acceptance says how far the front of each row moves (theorem 1).

Shapes: B batch rows, L positions, W positions of the window, *E the event.
"""

import math
from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from parallel_decode._fronts import Fronts
from parallel_decode._tolerance import Tolerance, all_finite
from parallel_decode.window import Window


class Accepted(NamedTuple):
    """What became final.

    Attributes:
        fronts: of each row, shape (B,), on the host; or one for all.
        residual: the largest change of each row, shape (B,), on the host, or of all; NaN if none was measured.
        finite: whether all new values are. If not, nothing of this holds, and `_guard` takes over.
        on_device: the fronts on the device, where they are there already.
    """

    fronts: Tensor | int
    residual: Tensor | float
    finite: bool = True
    on_device: Tensor | None = None

    @classmethod
    def of(cls, front: Tensor, change: Tensor) -> "Accepted":
        """From fronts (B,) and changes (B, W) on the device."""
        host, residual = _to_host(front, change.amax(1))
        return cls(host, residual, bool(residual.isfinite().all()), front)


class Acceptance(ABC):
    """How the fronts follow from a pass.

    Attributes:
        freezes: whether final positions keep their values, whatever a later pass computes for them.
        watches: whether it has to be told what the system writes.
    """

    freezes = True
    watches = False

    @abstractmethod
    def accept(
        self, window: Window, new: Tensor, old: Tensor, fronts: Fronts, tol: Tolerance, usable: Tensor | None = None
    ) -> Accepted:
        """The fronts after a pass.

        Args:
            window: of the pass.
            new, old: the values at its positions, shape (B, W, *E); equal where they were final before.
            fronts: before the pass.
            tol: when a position is settled.
            usable: which positions take their new value, shape (B, W); the others keep their old one, and are not settled. None for all.
        """

    def guarded(self) -> "Acceptance":
        """The acceptance that goes on where a value is not finite; it relies on no earlier pass."""
        return self

    def select(self, keep: Tensor) -> None:  # noqa: B027
        """Only these rows from now on; indices on the device."""

    def written(self, moved: Tensor | None) -> None:  # noqa: B027
        """After the pass the system wrote other values, where `moved` (B, L) is True; None if it held rows back."""


class Prefix(Acceptance):
    """Contiguous windows: final are the settled positions that follow the front, and one more.

    That next position was computed from final values alone. (So was the position of a window of one: there is nothing to compare.)
    """

    def accept(
        self, window: Window, new: Tensor, old: Tensor, fronts: Fronts, tol: Tolerance, usable: Tensor | None = None
    ) -> Accepted:
        change, settled = tol.compare(new, old)
        if usable is not None:
            settled &= usable
        lead = settled[:, :-1].cumprod(1).sum(1)
        further = 1 if usable is None else usable.gather(1, lead[:, None])[:, 0]
        front = lead + window.start + further
        if not (fronts.uniform and window.positions.start == fronts.min):
            front = torch.maximum(front, fronts.device)
        return Accepted.of(front, change)


class Consistent(Acceptance):
    """Strided windows: a position is consistent if it was evaluated and nothing before it has moved since; final are the leading ones."""

    watches = True

    def __init__(self) -> None:
        self.marks: Tensor | None = None  # (B, L)

    def guarded(self) -> Acceptance:
        return Consistent()

    def accept(
        self, window: Window, new: Tensor, old: Tensor, fronts: Fronts, tol: Tolerance, usable: Tensor | None = None
    ) -> Accepted:
        change, settled = tol.compare(new, old)
        if usable is not None:
            settled &= usable
        marks = self.marks
        if marks is None:
            marks = torch.arange(fronts.length, device=new.device) < fronts.device[:, None]
        moved = torch.zeros_like(marks)
        moved[:, window.slice] = ~settled
        marks[:, window.slice] = True if usable is None else usable
        self.marks = marks & (moved.cumsum(1) <= moved)
        front = self.marks.cumprod(1).sum(1)
        return Accepted.of(front if fronts.uniform else torch.maximum(front, fronts.device), change)

    def select(self, keep: Tensor) -> None:
        self.marks = None if self.marks is None else self.marks[keep]

    def written(self, moved: Tensor | None) -> None:
        if moved is None or self.marks is None:
            self.marks = None
        else:
            self.marks &= moved.cumsum(1) == 0


class Whole(Acceptance):
    """The whole iterate at every pass: everything is final once all of it has settled; until then one position more after each pass.

    The cheapest, and the paper's UJD to the letter (arXiv 2505.24791). A value that is not finite hands over to `Prefix`.
    """

    freezes = False
    watches = True

    def __init__(self) -> None:
        self.size: float | None = None  # at least the largest |x|

    def guarded(self) -> Acceptance:
        return Prefix()

    def accept(
        self, window: Window, new: Tensor, old: Tensor, fronts: Fronts, tol: Tolerance, usable: Tensor | None = None
    ) -> Accepted:
        if self.size is None:
            self.size = old.abs().max().item() if tol.tol > 0 else 0.0
        settled, change = tol.all_settled(new, old, self.size)
        self.size += change
        front = fronts.length if settled else fronts.min + 1
        finite = math.isfinite(change) or all_finite(new)
        return Accepted(front if fronts.uniform else fronts.host.clamp(min=front), change, finite)

    def written(self, moved: Tensor | None) -> None:
        self.size = None


def _to_host(front: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Both on the host, shape (B,) each, by one transfer, the only one of a pass."""
    if front.device.type == "cpu":
        return front, residual
    return _unpack(_pack(front, residual).cpu(), residual.dtype)


def _pack(front: Tensor, residual: Tensor) -> Tensor:
    """Integers and the bits of floats as one tensor of integers: floats do not hold every integer."""
    wide = residual if residual.dtype == torch.float64 else residual.float()
    return torch.stack((front, wide.view(torch.int64 if wide.dtype == torch.float64 else torch.int32).long()))


def _unpack(both: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    floats = both[1].view(torch.float64) if dtype == torch.float64 else both[1].int().view(torch.float32)
    return both[0], floats
