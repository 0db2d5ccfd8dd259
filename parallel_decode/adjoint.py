"""Exact gradients of a solution, by the adjoint system: triangular too, and solved by the same loop run backwards.

Shapes: B batch rows, L positions, *E the event.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from parallel_decode.loop import Loop
from parallel_decode.schedules import Jacobi
from parallel_decode.solution import Status
from parallel_decode.system import TriangularSystem, Window


def attach(system: TriangularSystem, solution: Tensor) -> Tensor:
    """A solution as a differentiable function of what the system was made from.

    The system is evaluated once, with gradients; the memory is that of one pass, whatever the passes were.

    Args:
        system: with an `evaluate` that can be differentiated.
        solution: of the system, shape (B, L, *E), floating.

    Returns:
        The same values. Its backward pass solves v = g + J^T v, the adjoint of x = f(x), and hands v to f. (It can be
        differentiated once: a second time is an error of PyTorch's that says so.)

    Raises:
        TypeError: the system is not of floats.
        ValueError: `evaluate` does not depend on x by operations that can be differentiated.
    """
    if not solution.is_floating_point():
        raise TypeError(
            f"the system is {solution.dtype}, and only floats have gradients: leave out differentiable=True"
        )
    with torch.enable_grad():
        x = solution.detach().requires_grad_()
        y = system.evaluate(x, Window.full(system.length)) if solution.numel() else x * 1
    if not y.requires_grad:
        if system.length < 2:  # nothing depends on anything
            return solution
        raise ValueError(
            f"{type(system).__name__}.evaluate returned what has no gradient: differentiable=True needs an evaluate without no_grad"
        )
    return _Attached.apply(y, x, solution)  # type: ignore[no-any-return, no-untyped-call]


class _Attached(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, solution: Tensor) -> Tensor:
        ctx.save_for_backward(y, x)
        return solution.view_as(solution)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        y, x = ctx.saved_tensors
        size = (
            grad.flatten(1).abs().amax(1).view(-1, *(1,) * (grad.dim() - 1))
        )  # the tolerance is relative to each row's own
        size = torch.where(size > 0, size, 1)
        adjoint, tol = Adjoint(y, x, grad / size), 4 * torch.finfo(grad.dtype).eps
        for freeze in (False, True):  # sweeps that freeze nothing cost less, the others keep 0 * inf apart
            loop = Loop(adjoint, Jacobi(freeze=freeze), tol, None)
            while loop.least < loop.length:
                loop.step()
            v, status, _ = loop.result(verify=False)
            if Status.NON_FINITE not in status:
                break
        return v.flip(1) * size, None, None


class Adjoint(TriangularSystem):
    """v = g + J^T v for the Jacobian J of y = f(x), its positions in reverse: v_l depends on the v of later positions.

    Args:
        y: f(x), shape (B, L, *E), with its graph.
        x: of the same shape, a leaf of that graph.
        grad: g, of the same shape.
    """

    def __init__(self, y: Tensor, x: Tensor, grad: Tensor) -> None:
        self.y, self.x, self.grad = y, x, grad.flip(1)

    @property
    def length(self) -> int:
        return self.x.shape[1]

    def initial(self) -> Tensor:
        return self.grad

    def evaluate(self, x: Tensor, window: Window) -> Tensor:
        v = x.clone()
        v[:, window.positions[-1] :] = 0  # not needed, and 0 * inf inside the graph would spoil what is
        (product,) = torch.autograd.grad(self.y, self.x, v.flip(1), retain_graph=True, allow_unused=True)
        return (self.grad if product is None else self.grad + product.flip(1))[:, window.at]
