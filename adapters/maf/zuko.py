"""zuko: lazy `MaskedAutoregressiveTransform`s, whatever their univariate transform."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from zuko.flows.autoregressive import MaskedAutoregressiveTransform
from zuko.nn import MaskedLinear, MaskedMLP
from zuko.transforms import AutoregressiveTransform

from parallel_decode.adapters.maf.inverse import Parallel, is_random, order_of
from parallel_decode.adapters.maf.order import reach
from parallel_decode.adapters.maf.system import Sweep
from parallel_decode.adapters.maf.view import with_products


def consider(module: nn.Module) -> type[Parallel] | str | None:
    """The mixin for a module, or why it has none; None for a module that is no autoregressive transform."""
    if not isinstance(module, MaskedAutoregressiveTransform):
        return None
    if type(module.hyper) is not MaskedMLP:
        return f"its network is a {type(module.hyper).__name__}, expected a MaskedMLP: its order is not known"
    order = order_of(dependencies(module))
    return order if isinstance(order, str) else ParallelZuko


def dependencies(module: Any) -> Tensor:
    """Which features depend on which, shape (D, D)."""
    outputs = [layer for layer in module.hyper if isinstance(layer, MaskedLinear)][-1].out_features
    features = outputs // module.total
    return reach(module.hyper, features).view(features, module.total, features).amax(1)


class ParallelZuko(Parallel):
    """Mixed in before `MaskedAutoregressiveTransform`."""

    def depends(self) -> Tensor:
        return dependencies(self)

    def forward(self, c: Tensor | None = None) -> Any:
        transform = super().forward(c)
        if type(transform) is not AutoregressiveTransform or is_random(self):
            return transform
        return _Transform(self, c, transform)


class _Transform(AutoregressiveTransform):  # type: ignore[misc]
    """An `AutoregressiveTransform` with another inverse."""

    def __init__(self, lazy: Any, c: Tensor | None, like: AutoregressiveTransform) -> None:
        super().__init__(like.meta, like.passes)
        self.lazy, self.c = lazy, c

    def _inverse(self, y: Tensor) -> Tensor:
        lazy: Any = self.lazy
        c = self.c
        if c is not None:  # the samples' shape is the broadcast of both
            y = y.expand(torch.broadcast_shapes(y.shape[:-1], c.shape[:-1]) + y.shape[-1:])
        with torch.no_grad():
            known: Any = with_products(lazy, MaskedLinear)

        def sweep(x: Tensor) -> Tensor:
            meta = lazy.meta if torch.is_grad_enabled() else known.meta
            return meta(c, x.view(y.shape)).inv(y).reshape(x.shape)  # type: ignore[no-any-return]

        flat = y.reshape(-1, y.shape[-1])

        def fewer(rows: Tensor) -> Sweep:
            some = None if c is None else c.expand(*y.shape[:-1], c.shape[-1]).reshape(len(flat), -1)[rows]
            meta, values = partial(known.meta, some), flat[rows]
            return lambda x: meta(x).inv(values)  # type: ignore[no-any-return]

        return lazy.invert(sweep, fewer, flat, c).view(y.shape)  # type: ignore[no-any-return]
