"""The inverse of a masked autoregressive transform as a triangular system.

Shapes: B batch rows, D features, L positions (generations of features), C context features.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from parallel_decode.adapters.maf.order import Order
from parallel_decode.system import TriangularSystem
from parallel_decode.window import Window

Sweep = Callable[[Tensor], Tensor]  # x (B, D) to the inverse under the parameters that x gives, (B, D)


class Sweeps(TriangularSystem):
    """x = inverse(y; parameters(x)), for sweeps over everything, which need not know the features' order.

    Args:
        sweep: one call of the library's own network on all features.
        like: y or any tensor of its shape (B, D), dtype and device.
        enough: how many sweeps always suffice. (That is the number of positions; which features each holds does not matter here.)

    Attributes:
        left_out: rows that stay as they are, shape (B,): those that overflowed. None if none did.
    """

    ordered = False

    def __init__(self, sweep: Sweep, like: Tensor, enough: int) -> None:
        self.sweep, self.like = sweep, like
        self.left_out: Tensor | None = None
        features = like.shape[1]
        self.shape = (len(like), enough, features // enough) if features % enough == 0 else (len(like), features, 1)

    @property
    def length(self) -> int:
        return self.shape[1]

    def initial(self) -> Tensor:
        return self.like.new_zeros(self.shape)  # the libraries' own first guess

    def evaluate(self, x: Tensor, window: Window) -> Tensor:
        flat = x.view(self.like.shape)
        new = self.sweep(flat)
        return (new if self.left_out is None else torch.where(self.left_out[:, None], flat, new)).view(self.shape)

    def leave_out(self, new: Tensor) -> None:
        """From now on the rows stay as they are where a sweep gave `new` (B, L, *E) with values that are not finite."""
        overflowed = ~new.flatten(1).isfinite().all(1)
        self.left_out = overflowed if self.left_out is None else self.left_out | overflowed

    def resource(self) -> None:
        return None


class MaskedSystem(TriangularSystem):
    """The same with generations of features as positions, for all schedules; each pass still sweeps over everything.

    Args:
        sweep, like: as above.
        order: of the features.
        of_rows: the sweep of some rows alone, from their indices; None where rows cannot leave.
    """

    def __init__(
        self, sweep: Sweep, like: Tensor, order: Order, of_rows: Callable[[Tensor], Sweep] | None = None
    ) -> None:
        self.sweep, self.like, self.order, self.of_rows = sweep, like, order, of_rows

    @property
    def length(self) -> int:
        return self.order.length

    def initial(self) -> Tensor:
        return self.order.positions(torch.zeros_like(self.like))

    def evaluate(self, x: Tensor, window: Window) -> Tensor:
        if not torch.is_grad_enabled():
            x = x.clone()
            x[:, window.positions[-1] :] = 0  # not needed, and 0 * inf inside the network would spoil what is
        return self.order.positions(self.sweep(self.order.original(x)))[:, window.slice]

    def select(self, rows: Tensor) -> "MaskedSystem | None":
        if self.of_rows is None:
            return None
        of_rows = self.of_rows
        return MaskedSystem(of_rows(rows), self.like[rows], self.order, lambda some: of_rows(rows[some]))

    def resource(self) -> None:
        return None
