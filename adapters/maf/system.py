"""The inverse of a masked autoregressive transform as a triangular system.

Shapes: B batch rows, D features, L positions (generations of features), C context features.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from parallel_decode.adapters.maf.order import Order
from parallel_decode.system import TriangularSystem, Window

Sweep = Callable[[Tensor], Tensor]  # x (B, D) to the inverse under the parameters that x gives, (B, D)


class MaskedSystem(TriangularSystem):
    """x = inverse(y; parameters(x)): each pass is one call of the library's own network on all features.

    Args:
        sweep: such a call.
        like: y or any tensor of its shape (B, D), dtype and device.
        order: of the features.
        fewer: the same for some rows alone, rows (fewer,) to a sweep; None where the values of a row are to be those of
            the whole batch to the last bit (a matrix product of another size may round otherwise).
    """

    def __init__(
        self, sweep: Sweep, like: Tensor, order: Order, fewer: Callable[[Tensor], Sweep] | None = None
    ) -> None:
        self.sweep, self.like, self.order, self.fewer = sweep, like, order, fewer

    @property
    def length(self) -> int:
        return self.order.length

    def initial(self) -> Tensor:
        return self.order.positions(torch.zeros_like(self.like))  # the libraries' own first guess

    def evaluate(self, x: Tensor, window: Window) -> Tensor:
        x = x.clone()
        x[:, window.positions[-1] :] = 0  # not needed, and 0 * inf inside the network would spoil what is
        return self.order.positions(self.sweep(self.order.original(x)))[:, window.at]

    def select(self, rows: Tensor) -> "MaskedSystem | None":
        if self.fewer is None:
            return None
        fewer = self.fewer
        return MaskedSystem(fewer(rows), self.like[rows], self.order, lambda some: fewer(rows[some]))
