"""What a run notes of its passes."""

import math

import torch
from torch import Tensor


class Trace:
    """The fronts and residuals of all passes, of all rows.

    Args:
        batch: B.

    Attributes:
        passes: their number.
        positions: evaluated so far, of each row at work.
        compared: whether some position became final by comparison.
    """

    def __init__(self, batch: int) -> None:
        self.batch = batch
        self.passes = self.positions = 0
        self.compared = False
        self._fronts: list[Tensor | float] = []
        self._residuals: list[Tensor | float] = []

    def add(self, fronts: Tensor | float, residuals: Tensor | float) -> None:
        """Another pass: one number for all rows, or shape (B,), on the host."""
        self.passes += 1
        self._fronts.append(fronts)
        self._residuals.append(residuals)

    def fronts(self, first: int = 0) -> Tensor:
        """Shape (passes, B), from a pass on."""
        return self._table(self._fronts[first:], torch.int64)

    def residuals(self, first: int = 0) -> Tensor:
        """Shape (passes, B), from a pass on; NaN where nothing was measured."""
        return self._table(self._residuals[first:], torch.float64)

    def _table(self, entries: list[Tensor | float], dtype: torch.dtype) -> Tensor:
        table = torch.full((len(entries), self.batch), 0 if dtype == torch.int64 else math.nan, dtype=dtype)
        for row, entry in zip(table, entries, strict=True):
            row[:] = entry
        return table
