"""What the drop-ins of all libraries share: the inverse through `pd.solve`.

Shapes: B batch rows, D features.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from parallel_decode._adjoint import attach
from parallel_decode._guard import NotFinite
from parallel_decode.adapters.maf.order import Order, generations
from parallel_decode.adapters.maf.system import MaskedSystem, Sweep, Sweeps
from parallel_decode.schedules import Jacobi
from parallel_decode.solution import Solution
from parallel_decode.solver import solve

SHALLOW = 3  # an inverse of so few passes has nothing to gain
MANY = 2**18  # numbers in a batch, from which it pays that rows leave it


@dataclass(frozen=True)
class Options:
    """How a drop-in solves; see `parallel`."""

    tol: float = 0.0


class Parallel(nn.Module):
    """A transform whose inverse goes through `pd.solve`; mixed in before the class of a library.

    Attributes:
        options: how.
        last_solution: of the last call; its value has the features as positions.
    """

    options: Options
    last_solution: Solution | None = None
    last_order: tuple[object, Order] | None = None

    def depends(self) -> Tensor:
        """Which features' parameters depend on which features, shape (D, D)."""
        raise NotImplementedError

    def order(self) -> Order:
        """The order of the features, read off the masks again if these have changed (a state was loaded, say)."""
        masks = [b for name, b in self.named_buffers() if name.endswith("mask")]
        key = [(mask.data_ptr(), 0 if mask.is_inference() else mask._version) for mask in masks]
        if self.last_order is None or self.last_order[0] != key:
            order = order_of(self.depends())
            if isinstance(order, str):
                raise ValueError(
                    f"the masks of this {type(self).__name__} have changed: {order}; call parallel(...) again"
                )
            self.last_order = key, order.to(masks[0].device)
        return self.last_order[1]

    def invert(
        self, sweep: Sweep, of_rows: Callable[[Tensor], Sweep], y: Tensor, context: Tensor | None, passes: int
    ) -> tuple[Tensor, bool]:
        """x (B, D) of y (B, D), with a gradient if anything that it comes from asks for one.

        Args:
            sweep: parameters and inverse of all features, from x (B, D).
            of_rows: the same for some rows, from their indices.
            y: what to invert.
            context: that of y, or None.
            passes: what the library's own inverse takes.

        Returns:
            x, and whether the last call of `sweep` was the one that found it.
        """
        tol = self.options.tol
        with torch.no_grad():
            left: Tensor | None
            if tol == 0 or y.numel() < MANY:  # sweeps in the library's own order cost the least
                x, left, self.last_solution = _swept(Sweeps(sweep, y, passes), tol)
            else:
                x, left = torch.empty_like(y), torch.ones(len(y), dtype=torch.bool, device=y.device)
            if left is not None:  # in order, what overflows beyond the front of a row can be told from what is genuine
                rest, order = left.nonzero()[:, 0], self.order()
                select = (lambda some: of_rows(rest[some])) if tol > 0 else None
                solution = solve(MaskedSystem(of_rows(rest), y[rest], order, select), Jacobi(), tol=tol)
                x[rest], self.last_solution = order.original(solution.value), solution
        if not self.needs_gradient(y, context):
            return x, left is None
        order = self.order()
        system = MaskedSystem(sweep, y, order)
        return order.original(attach(system, order.positions(x), exact=tol == 0)), False

    def needs_gradient(self, *inputs: Tensor | None) -> bool:
        """Whether gradients are enabled, and one of these or of the parameters wants one."""
        if not torch.is_grad_enabled():
            return False
        return any(t is not None and t.requires_grad for t in (*inputs, *self.parameters()))


def _swept(system: Sweeps, tol: float) -> tuple[Tensor, Tensor | None, Solution]:
    """x (B, D) by sweeps, the rows (B,) that overflowed and have none (None if all have), and the solution."""
    initial = system.initial()
    while True:
        try:
            solution = solve(system, Jacobi(freeze=False), tol=tol, initial=initial)
            return solution.value.view(system.like.shape), system.left_out, solution
        except NotFinite as overflow:
            system.leave_out(overflow.new)
            initial = overflow.x


def order_of(depends: Tensor) -> Order | str:
    """The order that a dependency matrix (D, D) gives, or why there is nothing to be done with it."""
    generation = generations(depends)
    if generation is None:
        return "its masks have a cycle: it is not autoregressive"
    order = Order(generation)
    return order if order.depth > SHALLOW else f"its inverse takes {order.depth} passes: there is nothing to gain"


def is_random(module: nn.Module) -> bool:
    """Whether every call of the module gives something else, or changes it."""
    kinds = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)
    return any(part.training and isinstance(part, kinds) and getattr(part, "p", 1) > 0 for part in module.modules())
