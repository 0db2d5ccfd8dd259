"""zuko: lazy `MaskedAutoregressiveTransform`s, whatever their univariate transform."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zuko.flows.autoregressive import MaskedAutoregressiveTransform
from zuko.nn import MaskedLinear, MaskedMLP
from zuko.transforms import AutoregressiveTransform
from zuko.utils import unpack

from parallel_decode.adapters.maf.inverse import Parallel, is_random, order_of
from parallel_decode.adapters.maf.order import reach
from parallel_decode.adapters.maf.system import Sweep


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
        if c is not None:  # samples and contexts are broadcast
            shape = torch.broadcast_shapes(y.shape[:-1], c.shape[:-1])
            y, c = y.expand(*shape, y.shape[-1]), c.expand(*shape, c.shape[-1])
        flat = y.reshape(-1, y.shape[-1])
        with torch.no_grad():
            known = _chain(lazy.hyper)

        def sweep(x: Tensor) -> Tensor:
            network = lazy.hyper if torch.is_grad_enabled() else known
            return _inverse(lazy, network, c, x.view(y.shape), y).reshape(x.shape)

        def fewer(rows: Tensor) -> Sweep:
            some, values = None if c is None else c.reshape(-1, c.shape[-1])[rows], flat[rows]
            return lambda x: _inverse(lazy, known, some, x, values)

        x, _ = lazy.invert(sweep, fewer, flat, c, self.passes)
        return x.view(y.shape)  # type: ignore[no-any-return]


def _inverse(lazy: Any, network: Callable[[Tensor], Tensor], c: Tensor | None, x: Tensor, y: Tensor) -> Tensor:
    """`lazy.meta(c, x).inv(y)` by the same operations on the same numbers, without the objects around them."""
    if type(lazy).meta is not MaskedAutoregressiveTransform.meta:
        return lazy.meta(c, x).inv(y)  # type: ignore[no-any-return]
    parameters = network(x if c is None else torch.cat((x, c), -1)).unflatten(-1, (-1, lazy.total))
    each = unpack(parameters, lazy.shapes) if any(lazy.shapes) else parameters.unbind(-1)
    return lazy.univariate(*each)._inv_call(y)  # type: ignore[no-any-return]


def _chain(layers: nn.Sequential) -> Callable[[Tensor], Tensor]:
    """What `layers` does, with the products of masks and weights formed once."""
    steps: list[Callable[[Tensor], Tensor]] = []
    for layer in layers:
        if type(layer) is MaskedLinear and not layer._forward_hooks and not layer._forward_pre_hooks:
            steps.append(partial(F.linear, weight=layer.mask * layer.weight, bias=layer.bias))
        else:
            steps.append(layer)

    def run(x: Tensor) -> Tensor:
        for step in steps:
            x = step(x)
        return x

    return run
