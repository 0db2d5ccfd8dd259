"""What the drop-ins of all libraries share: the inverse through `pd.solve`.

Shapes: B batch rows, D features.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as modules

from parallel_decode._adjoint import attach
from parallel_decode._guard import NotFinite
from parallel_decode.adapters.maf.order import Order, UnknownLayer, generations
from parallel_decode.adapters.maf.system import MaskedSystem, Sweep, Sweeps
from parallel_decode.schedules import Jacobi
from parallel_decode.solution import Solution
from parallel_decode.solver import solve

SHALLOW = 3  # an inverse of so few passes has nothing to gain
MANY = 2**18  # numbers in a batch, from which it pays that rows leave it


class Inverse:
    """The inverse of a transform through `pd.solve`.

    Args:
        tol: see `parallel`.

    Attributes:
        last_solution: of the last call; its value has the features as positions.
    """

    def __init__(self, tol: float) -> None:
        self.tol = tol
        self.last_solution: Solution | None = None
        self._last_order: tuple[object, Order] | None = None

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"last_solution": None, "_last_order": None}

    def order(self, transform: "Parallel") -> Order:
        """The order of the features, read off the masks again if these have changed (a state was loaded, say)."""
        masks = [b for name, b in transform.named_buffers() if name.endswith("mask")]
        # inference tensors count no versions, and may have changed
        key = [(mask.data_ptr(), object() if mask.is_inference() else mask._version) for mask in masks]
        last = self._last_order  # threads may replace it (nn.DataParallel)
        if last is None or last[0] != key:
            order = order_of(type(transform).parallel_depends, transform)
            if isinstance(order, str):
                raise ValueError(
                    f"the masks of this {type(transform).__name__} have changed: {order}; call parallel(...) again"
                )
            last = self._last_order = key, order.to(masks[0].device)
        return last[1]

    def solve(
        self,
        transform: "Parallel",
        sweep: Sweep,
        of_rows: Callable[[Tensor], Sweep],
        y: Tensor,
        context: Tensor | None,
        passes: int,
    ) -> tuple[Tensor, bool]:
        """x (B, D) of y (B, D), with a gradient if anything that it comes from asks for one.

        Args:
            transform: whose inverse it is.
            sweep: parameters and inverse of all features, from x (B, D).
            of_rows: the same for some rows, from their indices.
            y: what to invert.
            context: that of y, or None.
            passes: what the library's own inverse takes.

        Returns:
            x, and whether the last call of `sweep` was the one that found it.
        """
        tol = self.tol
        with torch.no_grad():
            left: Tensor | None
            if tol == 0 or y.numel() < MANY:  # sweeps in the library's own order cost the least
                x, left, self.last_solution = _swept(Sweeps(sweep, y, passes), tol)
            else:
                x, left = torch.empty_like(y), torch.ones(len(y), dtype=torch.bool, device=y.device)
            if left is not None:  # in order, what overflows beyond the front of a row can be told from what is genuine
                rest, order = left.nonzero()[:, 0], self.order(transform)
                select = (lambda some: of_rows(rest[some])) if tol > 0 else None
                solution = solve(MaskedSystem(of_rows(rest), y[rest], order, select), Jacobi(), tol=tol)
                x[rest], self.last_solution = order.original(solution.value), solution
        inputs = (y, context, *transform.parameters())
        if not torch.is_grad_enabled() or not (
            any(t is not None and t.requires_grad for t in inputs)
            or sweep(
                x
            ).requires_grad  # by what a hook adds, or by the copies of parameters in a replica (nn.DataParallel)
        ):
            return x, left is None
        order = self.order(transform)
        solved = attach(MaskedSystem(sweep, y, order), order.positions(x), exact=tol == 0)
        if solved.requires_grad:
            solved.register_hook(_check_derivative)  # type: ignore[no-untyped-call]
        return order.original(solved), False


class Parallel(nn.Module):
    """Mixed in before the class of a library, and so hides what has the name of an attribute of its own there.

    Attributes:
        parallel_inverse: its inverse.
    """

    parallel_inverse: Inverse

    def parallel_depends(self) -> Tensor:
        """Which features' parameters depend on which features, shape (D, D)."""
        raise NotImplementedError

    @property
    def last_solution(self) -> Solution | None:
        """Of the last call of the inverse; its value has the features as positions."""
        return self.parallel_inverse.last_solution


def library_inverts(transform: nn.Module, y: Tensor) -> bool:
    """Whether a call is left to the library's own inverse, of as many sweeps whatever the values are.

    So is what is random, what has no values, what is only recorded (torch.compile, torch.jit.trace, make_fx), and
    derivatives that pass through the sweeps themselves (torch.func, forward mode).
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or y.is_meta
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or any(torch._C._get_dispatch_mode(mode) is not None for mode in _RECORDERS)
        or is_random(transform)
    )


_RECORDERS = (torch._C._TorchDispatchModeKey.FAKE, torch._C._TorchDispatchModeKey.PROXY)


def is_plain(network: nn.Module) -> bool:
    """Whether a call of the network is what its classes say: nothing is hooked to its parts, or in place of their `forward`."""
    return not (modules._global_forward_hooks or modules._global_forward_pre_hooks) and not any(
        part._forward_hooks or part._forward_pre_hooks or "forward" in part.__dict__ for part in network.modules()
    )


def _check_derivative(grad: Tensor | None) -> None:
    """Refuse by name what the adjoint system cannot give."""
    asked = ""
    if grad is not None and (
        torch._C._functorch.is_legacy_batchedtensor(grad) or torch._C._functorch.is_batchedtensor(grad)
    ):
        asked = "batched gradients (is_grads_batched=True, jacobian(vectorize=True))"
    elif torch.is_grad_enabled():
        asked = "a second derivative (create_graph=True)"
    if asked:
        raise NotImplementedError(
            f"{asked} of an inverse by `parallel`, which has first derivatives one at a time: take it of the flow that was "
            "given to `parallel`, which has the same parameters, or by torch.func (jacrev, hessian), which works on both"
        )


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


def order_of(depends: Callable[[Any], Tensor], transform: nn.Module) -> Order | str:
    """The order that a transform's dependency matrix (D, D) gives, or why there is nothing to be done with it."""
    if any(mask.is_meta for mask in transform.buffers()):
        return "it is on the meta device: its order is not known"
    try:
        generation = generations(depends(transform))
    except UnknownLayer as unknown:
        return str(unknown)
    if generation is None:
        return "its masks have a cycle: it is not autoregressive"
    order = Order(generation)
    return order if order.depth > SHALLOW else f"its inverse takes {order.depth} passes: there is nothing to gain"


def is_random(module: nn.Module) -> bool:
    """Whether every call of the module gives something else, or changes it."""
    kinds = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)
    return any(part.training and isinstance(part, kinds) and getattr(part, "p", 1) > 0 for part in module.modules())
