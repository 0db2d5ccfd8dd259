"""Exact gradients of a solution, by the adjoint system: triangular too, and solved by the same loop run backwards (theorem 6).

Shapes: B batch rows, L positions, *E the event.
"""

from typing import Any

import torch
from torch import Tensor

from parallel_decode._claims import Claim
from parallel_decode._iterate import iterate
from parallel_decode._outcome import outcome
from parallel_decode._tolerance import Tolerance, event_max
from parallel_decode.schedules import Jacobi
from parallel_decode.system import TriangularSystem
from parallel_decode.window import Window


def attach(system: TriangularSystem, solution: Tensor, exact: bool = False) -> Tensor:
    """A solution as a differentiable function of what the system was made from.

    The system is evaluated once, with gradients; the memory is that of one pass, whatever the passes were.

    Args:
        system: with an `evaluate` that can be differentiated.
        solution: of the system, shape (B, L, *E), floating.
        exact: sweep until nothing changes to the last bit; else until no position v_l changes by more than 4 machine
            epsilons of |g_l| + |v_l|.

    Returns:
        The same values. Its backward pass solves v = g + J^T v, the adjoint of x = f(x), and hands v to f. A backward pass that
        is itself to be differentiated (`create_graph=True`) raises a RuntimeError.

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
        y = system.evaluate(x, Window.full(system.length)) if system.length else x * 1
    if not y.requires_grad:
        if system.length < 2:  # nothing depends on anything
            return solution
        raise ValueError(
            f"{type(system).__name__}.evaluate returned what has no gradient: differentiable=True needs an evaluate without no_grad"
        )
    return _Attached.apply(y, x, solution, exact)  # type: ignore[no-any-return, no-untyped-call]


class _Attached(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, solution: Tensor, exact: bool) -> Tensor:
        ctx.save_for_backward(y, x)
        ctx.exact = exact
        return solution.view_as(solution)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a solution cannot be differentiated twice, and create_graph=True asks for a gradient that can be differentiated "
                "again (hessian and gradient penalties do): leave it out, or differentiate sequential decoding itself"
            )
        if not grad.numel():
            return grad, None, None, None
        y, x = ctx.saved_tensors
        adjoint = Adjoint(y, x, grad)
        # Relative to each position, not to the largest: slopes may make small ones large.
        tol = Tolerance(0.0 if ctx.exact else 4 * torch.finfo(grad.dtype).eps, unit=event_max(adjoint.grad.abs()))
        guess = torch.where(adjoint.grad.isfinite(), adjoint.grad, 0).contiguous()
        run = iterate(adjoint, Jacobi(freeze=False), tol, guess, Claim(None))
        v, _ = outcome(run, tol, deterministic=True)
        return v.flip(1), None, None, None


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
        return (self.grad if product is None else self.grad + product.flip(1))[:, window.slice]

    def resource(self) -> None:
        return None
