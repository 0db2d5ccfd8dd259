"""The inverse of a masked autoregressive transform as a triangular system.

Shapes: B batch rows, D features, L positions (generations of features), C context features.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from parallel_decode.adapters.maf.order import Order
from parallel_decode.system import TriangularSystem, Window

Sweep = Callable[[Tensor], Tensor]  # x (B, D) to the inverse under the parameters that x gives, (B, D)


class Sweeps(TriangularSystem):
    """x = inverse(y; parameters(x)), for schedules that sweep over everything and so need not know the features' order.

    Args:
        sweep: one call of the library's own network on all features.
        like: y or any tensor of its shape (B, D), dtype and device.
        enough: how many sweeps always suffice. (That is the number of positions; which features each holds does not matter here.)
    """

    def __init__(self, sweep: Sweep, like: Tensor, enough: int) -> None:
        self.sweep, self.like = sweep, like
        features = like.shape[1]
        self.shape = (len(like), enough, features // enough) if features % enough == 0 else (len(like), features, 1)

    @property
    def length(self) -> int:
        return self.shape[1]

    def initial(self) -> Tensor:
        return self.like.new_zeros(self.shape)  # the libraries' own first guess

    def evaluate(self, x: Tensor, window: Window) -> Tensor:
        return self.sweep(x.view(self.like.shape)).view(self.shape)


class MaskedSystem(TriangularSystem):
    """The same with generations of features as positions, for all schedules; each pass still sweeps over everything.

    Args:
        sweep, like: as above.
        order: of the features.
        fewer: a sweep for some rows alone, from rows (fewer,); None where rows cannot leave.
    """

    def __init__(
        self, sweep: Sweep, like: Tensor, order: Order, fewer: Callable[[Tensor], Sweep] | None = None
    ) -> None:
        self.sweep, self.like, self.order, self.fewer = sweep, like, order, fewer

    @property
    def length(self) -> int:
        return self.order.length

    def initial(self) -> Tensor:
        return self.order.positions(torch.zeros_like(self.like))

    def evaluate(self, x: Tensor, window: Window) -> Tensor:
        if not torch.is_grad_enabled():
            x = x.clone()
            x[:, window.positions[-1] :] = 0  # not needed, and 0 * inf inside the network would spoil what is
        return self.order.positions(self.sweep(self.order.original(x)))[:, window.at]

    def select(self, rows: Tensor) -> "MaskedSystem | None":
        if self.fewer is None:
            return None
        fewer = self.fewer
        return MaskedSystem(fewer(rows), self.like[rows], self.order, lambda some: fewer(rows[some]))
