"""When a position counts as settled: one rule for all schedules.

Shapes: B batch rows, W positions of a window, *E the event.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Tolerance(NamedTuple):
    """A position is settled once max|new - old| <= tol (1 + max|old|), the maxima over its event; at tol = 0 once its bits are equal.

    Attributes:
        tol: finite, not negative.
        unit: in place of the 1; shape (B, L) where it differs between positions, for windows over everything alone.
        relative: False leaves out the max|old|, as the paper's UJD does.
    """

    tol: float
    unit: float | Tensor = 1.0
    relative: bool = True

    @classmethod
    def of(cls, tol: float | None, dtype: torch.dtype, absolute_alone: bool = False) -> "Tolerance":
        """The tolerance that was asked for; None stands for eps^(2/3) of floats, and for equality of integers."""
        if not dtype.is_floating_point:
            if tol:
                raise ValueError(f"tol is {tol} for {dtype} values, which are equal or not: leave it out, or pass 0")
            return cls(0.0)
        return cls(torch.finfo(dtype).eps ** (2 / 3) if tol is None else float(tol), relative=not absolute_alone)

    def compare(self, new: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
        """How far each position moved, and whether it is settled: both (B, W)."""
        if not new.is_floating_point():
            moved = event_any(new != old)
            return moved.float(), ~moved
        change = event_max((new - old).abs_())
        if self.tol == 0:
            return change, ~event_any(bits(new) != bits(old))
        return change, change <= self.allowed(old)

    def allowed(self, old: Tensor) -> Tensor | float:
        """How far a position may move and count as settled: (B, W), or one number for all."""
        if not self.relative:
            return self.tol * self.unit
        return (event_max(old.abs()) + self.unit).mul_(self.tol)

    def all_settled(self, new: Tensor, old: Tensor, size: float) -> tuple[bool, float]:
        """Of all positions together: whether all are settled, and the largest change.

        Args:
            new, old: shape (B, L, *E).
            size: at least the largest |old|; the smaller, the cheaper.
        """
        if self.tol == 0:
            same = torch.equal(new, old) and torch.equal(bits(new), bits(old))
            return same, 0.0 if same else math.nan
        change = (new - old).abs_()
        largest = change.max().item()
        if isinstance(self.unit, float):  # most passes are decided by that number alone
            least = self.tol * self.unit
            if not least < largest <= least + self.tol * size * self.relative:
                return largest <= least, largest
        return bool((event_max(change) <= self.allowed(old)).all()), largest


def bits(x: Tensor) -> Tensor:
    """Floats as integers: -0.0 differs from 0.0, and NaN equals itself."""
    return x.view(_INTEGERS[x.element_size()]) if x.is_floating_point() else x


def all_finite(x: Tensor) -> bool:
    """Whether no value is infinite or NaN."""
    if not x.is_floating_point():
        return True
    total = x.sum().item()  # cheap; it is not finite if some value is not, or if it overflows
    return total - total == 0 or bool(x.isfinite().all())


def event_max(x: Tensor) -> Tensor:
    """(B, W, *E) to (B, W)."""
    if x.dim() == 2:
        return x
    x = x.flatten(2)
    return x[..., 0] if x.shape[2] == 1 else x.amax(2)  # a reduction over nothing is slow


def event_any(x: Tensor) -> Tensor:
    """(B, W, *E) to (B, W)."""
    if x.dim() == 2:
        return x
    x = x.flatten(2)
    return x[..., 0] if x.shape[2] == 1 else x.any(2)


def event_all(x: Tensor) -> Tensor:
    """(B, W, *E) to (B, W)."""
    return x.flatten(2).all(2) if x.dim() > 2 else x


def like(mask: Tensor, x: Tensor) -> Tensor:
    """A mask (B, W) that broadcasts over x (B, W, *E)."""
    return mask.view(mask.shape + (1,) * (x.dim() - 2))
