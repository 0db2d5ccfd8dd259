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
            shape = torch.broadcast_shapes(y.shape[:-1], c.shape[:-1])  # type: ignore[no-untyped-call]
            y, c = y.expand(*shape, y.shape[-1]), c.expand(*shape, c.shape[-1]).reshape(-1, c.shape[-1])
        flat = y.reshape(-1, y.shape[-1])
        with torch.no_grad():
            prepared = _Chain(lazy.hyper, lazy.total if lazy.options.tol > 0 and not any(lazy.shapes) else 1)

        def sweep(x: Tensor) -> Tensor:
            network = None if torch.is_grad_enabled() else prepared
            return _inverse(lazy, network, c, x, flat)

        def of_rows(rows: Tensor) -> Sweep:
            some, values = None if c is None else c[rows], flat[rows]
            return lambda x: _inverse(lazy, prepared, some, x, values)

        x, _ = lazy.invert(sweep, of_rows, flat, c, self.passes)
        return x.view(y.shape)  # type: ignore[no-any-return]


class _Chain:
    """What a `MaskedMLP` does, with the products of masks and weights formed once.

    Args:
        layers: of the network.
        total: more than 1 if the outputs are so many numbers of each feature that are to come apart (..., total, D), not (..., D, total):
            elementwise functions are several times as fast on what is contiguous, and round otherwise in the last bit.
    """

    def __init__(self, layers: nn.Sequential, total: int) -> None:
        self.steps: list[Callable[[Tensor], Tensor]] = []
        last = len(layers) - 1
        self.apart = total > 1 and _plain(layers[last])
        layer: Any
        for index, layer in enumerate(layers):
            if not _plain(layer):
                self.steps.append(layer)
                continue
            weight, bias = layer.mask * layer.weight, layer.bias
            if self.apart and index == last:
                weight, bias = (t.unflatten(0, (-1, total)).transpose(0, 1).flatten(0, 1) for t in (weight, bias))
            self.steps.append(partial(F.linear, weight=weight, bias=bias))

    def __call__(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(x)
        return x


def _plain(layer: Any) -> bool:
    """Whether a layer is a masked one that nothing is hooked to."""
    return type(layer) is MaskedLinear and not layer._forward_hooks and not layer._forward_pre_hooks


def _inverse(lazy: Any, prepared: _Chain | None, c: Tensor | None, x: Tensor, y: Tensor) -> Tensor:
    """`lazy.meta(c, x).inv(y)` by the same operations on the same numbers, without the objects around them."""
    if type(lazy).meta is not MaskedAutoregressiveTransform.meta:
        return lazy.meta(c, x).inv(y)  # type: ignore[no-any-return]
    x = x if c is None else torch.cat((x, c), -1)
    if prepared is not None and prepared.apart:
        each = prepared(x).view(*x.shape[:-1], lazy.total, -1).unbind(-2)
    else:
        parameters = (prepared or lazy.hyper)(x).unflatten(-1, (-1, lazy.total))
        each = unpack(parameters, lazy.shapes) if any(lazy.shapes) else parameters.unbind(-1)
    return lazy.univariate(*each)._inv_call(y)  # type: ignore[no-any-return]
