"""The positions that one pass evaluates.

Shapes: B batch rows, L positions, W positions of the window, *E the event.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Window(NamedTuple):
    """The positions that one pass evaluates.

    Attributes:
        positions: what to evaluate, in rising order. Its step is 1 but for Jacobi-Gauss-Seidel.
        changed_from: the first position where the iterate may differ from what the system last read. Cached state (a key-value cache)
            before `changed_from` is valid; the system has to read again from there to the last of `positions`. 0 on the first pass.
        shift: shape (B,), where every row has a window of its own: how many positions further on than `positions`, and
            `changed_from`, those of each row are (never past the end). None where all rows have the same window. Only a
            system that says it is `ragged` is given one.
    """

    positions: range
    changed_from: int
    shift: Tensor | None = None

    @property
    def slice(self) -> "slice":
        """The positions as an index into dimension 1, where all rows have the same."""
        p = self.positions
        return slice(p.start, p.stop) if p.step == 1 else slice(p.start, p.stop, p.step)

    @property
    def start(self) -> Tensor | int:
        """The first position: of each row, shape (B,), where rows have windows of their own."""
        return self.positions.start if self.shift is None else self.positions.start + self.shift

    def indices(self, device: torch.device | None = None) -> Tensor:
        """The positions of each row, shape (B, W); (1, W) where all rows have the same."""
        p = self.positions
        index = torch.arange(p.start, p.stop, p.step, device=device)[None]
        return index if self.shift is None else index + self.shift[:, None]

    def take(self, x: Tensor) -> Tensor:
        """The values at the window's positions: (B, L, *E) to (B, W, *E)."""
        if self.shift is None:
            return x if len(self.positions) == x.shape[1] else x[:, self.slice]
        return x[torch.arange(len(x), device=x.device)[:, None], self.indices(x.device)]

    def put(self, x: Tensor, values: Tensor) -> None:
        """Write values, shape (B, W, *E), to the window's positions of x, shape (B, L, *E)."""
        if self.shift is None and len(self.positions) == x.shape[1]:
            x.copy_(values)
        elif self.shift is None:
            x[:, self.slice] = values
        else:
            x[torch.arange(len(x), device=x.device)[:, None], self.indices(x.device)] = values

    @classmethod
    def full(cls, length: int) -> "Window":
        """Every position, with nothing known from before."""
        return cls(range(length), 0)
