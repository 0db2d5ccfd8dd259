"""`parallel`: a flow's drop-in, and what was done to it."""

import sys
from collections import OrderedDict
from dataclasses import dataclass
from math import isfinite
from typing import Any, TypeVar

from torch import nn

from parallel_decode.adapters.maf.inverse import Inverse, Parallel
from parallel_decode.adapters.maf.view import mixed, view

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Report:
    """What `parallel` did to a flow.

    Attributes:
        transforms: for each autoregressive transform its name in the flow, its class, and what was done: "parallel", followed by
            what the last call took, or "as it was" and why.
    """

    transforms: tuple[tuple[str, str, str], ...]

    def __str__(self) -> str:
        if not self.transforms:
            return "no autoregressive transform of zuko, nflows or normflows in it: as it was"
        return "\n".join(f"{name or '(itself)'}: {kind}: {what}" for name, kind, what in self.transforms)


class _Parallel:
    """The function `parallel`, with `report`."""

    def __call__(self, flow: M, *, tol: float = 0.0) -> M:
        """A flow whose autoregressive inverses go through `pd.solve`; everything else is as it was.

        It has the classes, methods, parameters and state of the given flow, which stays as it is. Both share their
        parameters and buffers: training, moving or loading either affects both (`copy.deepcopy` separates them). A transform that
        cannot be solved faster is left to its library; `parallel.report` says which, and why.

        Without gradients an inverse is a Jacobi iteration that stops when nothing changes. With gradients it is the same,
        followed by one evaluation: gradients are exact at the solution, by the adjoint system, in the memory of one pass
        (and can be taken once: `create_graph=True` and batched gradients raise a NotImplementedError). Under torch.func,
        forward-mode differentiation, torch.compile and tracing the inverse is the library's own.

        Args:
            flow: of zuko (a flow or lazy transform), nflows (a flow or transform), normflows (a model or flow), or any module
                that holds such ones (an estimator of sbi).
            tol: 0 for the library's own samples, to the last bit; else a feature counts as settled once
                |new - old| <= tol * (1 + |old|), and rows that are done leave the batch.

        Raises:
            TypeError: flow is no module.
            ValueError: tol is negative or not finite.

        References:
            Papamakarios et al., Masked Autoregressive Flow for Density Estimation (arXiv 1705.07057).
            Song et al., Accelerating Feedforward Computation via Parallel Nonlinear Equation Solving (arXiv 2002.03629).

        Example:
            >>> import torch, zuko
            >>> from parallel_decode.adapters.maf import parallel
            >>> flow = zuko.flows.MAF(features=16, context=2)
            >>> fast = parallel(flow)
            >>> fast(torch.zeros(2)).sample((100,)).shape
            torch.Size([100, 16])
        """
        if not isinstance(flow, nn.Module):
            raise TypeError(f"flow is a {type(flow).__name__}, expected a module of zuko, nflows or normflows")
        if isinstance(tol, bool) or not isinstance(tol, (int, float)) or not isfinite(tol) or tol < 0:
            raise ValueError(f"tol is {tol!r}, expected a number >= 0")

        def instead(module: nn.Module) -> tuple[type[nn.Module], dict[str, Any]] | None:
            inverse = {"parallel_inverse": Inverse(float(tol))}
            if isinstance(module, Parallel):  # it was parallel before, perhaps with another tolerance
                return type(module), inverse
            mixin, kind = _consider(module), type(module)
            return (mixed(mixin, kind), inverse) if isinstance(mixin, type) else None  # type: ignore[arg-type]

        fast = view(flow, instead)
        for module in fast.modules():  # hooks are not shared
            module.__dict__.update(
                {
                    key: value.copy()
                    for key, value in module.__dict__.items()
                    if isinstance(value, OrderedDict) and "hooks" in key
                }
            )
        return fast  # type: ignore[return-value]

    def report(self, flow: nn.Module) -> Report:
        """What `parallel` did to a flow, and what the last call took.

        Example:
            >>> import zuko
            >>> from parallel_decode.adapters.maf import parallel
            >>> print(parallel.report(parallel(zuko.flows.MAF(features=16, transforms=1))))
            transform.transforms.0: MaskedAutoregressiveTransform: parallel
        """
        found = []
        for name, module in flow.named_modules():
            if isinstance(module, Parallel):
                kind, what = type(module).__bases__[1].__name__, "parallel"
                last = module.parallel_inverse.last_solution
                if last is not None:
                    stats, length = last.layers[0], last.value.shape[1]
                    what += f", {stats.passes} passes in place of {length}, {stats.seconds:.2g} s"
            else:
                why = _consider(module)
                if why is None:
                    continue
                kind = type(module).__name__
                what = f"as it was: {why if isinstance(why, str) else 'not given to parallel'}"
            found.append((name, kind, what))
        return Report(tuple(found))


def _consider(module: nn.Module) -> type[Parallel] | str | None:
    """The mixin for a module, why it has none, or None if it is nothing of ours. A library is asked if it was imported."""
    if "zuko" in sys.modules:
        from parallel_decode.adapters.maf import zuko

        found = zuko.consider(module)
        if found is not None:
            return found
    from parallel_decode.adapters.maf import nflows

    return nflows.consider(module)


parallel = _Parallel()
