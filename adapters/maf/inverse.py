"""What the drop-ins of all libraries share: the inverse through `pd.solve`.

Shapes: B batch rows, D features.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from parallel_decode.adapters.maf.order import Order, generations
from parallel_decode.adapters.maf.system import MaskedSystem, Sweep
from parallel_decode.schedules import Jacobi
from parallel_decode.solution import Solution
from parallel_decode.solver import solve

SHALLOW = 3  # an inverse of so few passes has nothing to gain


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

    def invert(self, sweep: Sweep, fewer: Callable[[Tensor], Sweep], y: Tensor, context: Tensor | None) -> Tensor:
        """x (B, D) of y (B, D), with a gradient if anything that it comes from asks for one."""
        tol, order = self.options.tol, self.order()
        exact = tol == 0
        system = MaskedSystem(sweep, y.detach(), order, None if exact else fewer)
        gradient = self.needs_gradient(y, context)
        # Unfrozen sweeps are the library's own, and once two are equal all further ones would be. Frozen ones keep 0 * inf of a
        # tail from what is before it.
        solution = solve(system, Jacobi(freeze=not exact), tol=tol, differentiable=gradient)
        if exact and not all(status.succeeded for status in solution.status):
            guarded = solve(system, Jacobi(), tol=tol, differentiable=gradient)
            lost = torch.tensor([not status.succeeded for status in solution.status], device=y.device)
            lost = lost.view(-1, *(1,) * (guarded.value.dim() - 1))
            value = torch.where(lost, guarded.value, solution.value)
            solution = replace(guarded, value=value)
        self.last_solution = replace(solution, value=solution.value.detach())
        return order.original(solution.value)

    def needs_gradient(self, *inputs: Tensor | None) -> bool:
        """Whether gradients are enabled, and one of these or of the parameters wants one."""
        leaves = (*inputs, *self.parameters())
        return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in leaves)


def order_of(depends: Tensor) -> Order | str:
    """The order that a dependency matrix (D, D) gives, or why there is nothing to be done with it."""
    generation = generations(depends)
    if generation is None:
        return "its masks have a cycle: it is not autoregressive"
    order = Order(generation)
    return order if order.length > SHALLOW else f"its inverse takes {order.length} passes: there is nothing to gain"


def is_random(module: nn.Module) -> bool:
    """Whether every call of the module gives something else, or changes it."""
    kinds = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)
    return any(part.training and isinstance(part, kinds) and getattr(part, "p", 1) > 0 for part in module.modules())
