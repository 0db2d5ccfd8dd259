"""The rows that are still at work: those that are done leave the batch.

Shapes: B batch rows at first, A rows at work, L positions, *E the event.
"""

import torch
from torch import Tensor

from parallel_decode.system import TriangularSystem


class Rows:
    """The system and the iterate of the rows at work.

    Attributes:
        system: of these rows.
        x: their iterate, shape (A, L, *E).
        index: which of the first rows they are, shape (A,); None for all.
        has_pass_hook: whether the system wants its turn after every pass.
    """

    def __init__(self, system: TriangularSystem, x: Tensor) -> None:
        self.system, self.x = system, x
        self.index: Tensor | None = None
        self.has_pass_hook = type(system).after_pass is not TriangularSystem.after_pass
        self._all = x
        self._offered = True

    def leave(self, done: Tensor) -> Tensor | None:
        """Let rows that are done leave, once they are a quarter of the batch and if the system offers it.

        Args:
            done: shape (A,), on the host.

        Returns:
            Which rows stay, as indices on the host; None if none left.
        """
        stay = (~done).nonzero()[:, 0]
        if not self._offered or not len(stay) or 4 * len(stay) > 3 * len(done):
            return None
        on_device = stay.to(self.x.device)
        subset = self.system.select(on_device)
        if subset is None:
            self._offered = False
            return None
        self._all = self.iterate()
        self.index = on_device if self.index is None else self.index[on_device]
        self.system, self.x = subset, self.x[on_device]
        return stay

    def iterate(self) -> Tensor:
        """The iterate of all rows, those that left included: (B, L, *E)."""
        if self.index is None:
            return self.x
        self._all[self.index] = self.x
        return self._all

    def spread(self, values: Tensor | float, others: float) -> Tensor:
        """Values of the rows at work, shape (A,) on the host or one for all, as values of all rows once some left, shape (B,)."""
        assert self.index is not None
        every = torch.full((len(self._all),), others, dtype=values.dtype if isinstance(values, Tensor) else None)
        every[self.index.cpu()] = values
        return every

    def number(self, row: int) -> int:
        """Which of the first rows a row at work is."""
        return row if self.index is None else int(self.index[row])
