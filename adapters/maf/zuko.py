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

from parallel_decode.adapters.maf.inverse import Parallel, is_plain, library_inverts, order_of
from parallel_decode.adapters.maf.order import UnknownLayer, reach
from parallel_decode.adapters.maf.system import Sweep


def consider(module: nn.Module) -> type[Parallel] | str | None:
    """The mixin for a module, or why it has none; None for a module that is no autoregressive transform."""
    if not isinstance(module, MaskedAutoregressiveTransform):
        return None
    if type(module.hyper) is not MaskedMLP:
        return f"its network is a {type(module.hyper).__name__}, expected a MaskedMLP: its order is not known"
    order = order_of(dependencies, module)
    return order if isinstance(order, str) else ParallelZuko


def dependencies(module: Any) -> Tensor:
    """Which features depend on which, shape (D, D)."""
    last = module.hyper[-1]
    if not isinstance(last, MaskedLinear):
        raise UnknownLayer(last)
    features = last.out_features // module.total
    return reach(module.hyper, features).view(features, module.total, features).amax(1)


class ParallelZuko(Parallel):
    """Mixed in before `MaskedAutoregressiveTransform`."""

    parallel_depends = dependencies

    def forward(self, c: Tensor | None = None) -> Any:
        transform = super().forward(c)
        meta = getattr(transform, "meta", None)
        if type(transform) is AutoregressiveTransform and isinstance(meta, partial) and _is_librarys(self, meta):
            return _Transform(self, transform)
        return transform


def _is_librarys(lazy: Any, meta: partial[Any]) -> bool:
    """Whether `meta` is the library's own method of this transform with a context, and not a subclass's."""
    method: Any = meta.func
    own = getattr(method, "__func__", None) is MaskedAutoregressiveTransform.meta and method.__self__ is lazy
    return own and len(meta.args) == 1 and not meta.keywords


class _Transform(AutoregressiveTransform):  # type: ignore[misc]
    """An `AutoregressiveTransform` with another inverse."""

    def __init__(self, lazy: Any, like: AutoregressiveTransform) -> None:
        super().__init__(like.meta, like.passes)
        self.lazy = lazy

    def _inverse(self, y: Tensor) -> Tensor:
        lazy: Any = self.lazy
        if library_inverts(lazy, y):
            return super()._inverse(y)  # type: ignore[no-any-return]
        (c,) = self.meta.args
        if c is not None:  # samples and contexts are broadcast
            shape = torch.broadcast_shapes(y.shape[:-1], c.shape[:-1])  # type: ignore[no-untyped-call]
            y, c = y.expand(*shape, y.shape[-1]), c.expand(*shape, c.shape[-1]).reshape(-1, c.shape[-1])
        flat = y.reshape(-1, y.shape[-1])
        with torch.no_grad():
            apart = lazy.parallel_inverse.tol > 0 and not any(lazy.shapes)
            prepared = _Chain(lazy.hyper, lazy.total if apart else 1) if is_plain(lazy.hyper) else None

        def as_given(x: Tensor) -> Tensor:  # what is hooked to the network may depend on the shape
            return lazy.hyper(x.view(*y.shape[:-1], x.shape[-1])).view(len(x), lazy.total * y.shape[-1])  # type: ignore[no-any-return]

        def sweep(x: Tensor) -> Tensor:
            network = as_given if prepared is None or torch.is_grad_enabled() else prepared
            return _inverse(lazy, network, c, x, flat)

        def of_rows(rows: Tensor) -> Sweep:
            some, values = None if c is None else c[rows], flat[rows]
            return lambda x: _inverse(lazy, prepared or lazy.hyper, some, x, values)

        x, _ = lazy.parallel_inverse.solve(lazy, sweep, of_rows, flat, c, self.passes)
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
        self.apart = total > 1 and type(layers[last]) is MaskedLinear
        layer: Any
        for index, layer in enumerate(layers):
            if type(layer) is not MaskedLinear:
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


def _inverse(lazy: Any, network: Callable[[Tensor], Tensor], c: Tensor | None, x: Tensor, y: Tensor) -> Tensor:
    """`lazy.meta(c, x).inv(y)` by the same operations on the same numbers, without the objects around them."""
    x = x if c is None else torch.cat((x, c), -1)
    if isinstance(network, _Chain) and network.apart:
        each = network(x).view(*x.shape[:-1], lazy.total, -1).unbind(-2)
    else:
        parameters = network(x).unflatten(-1, (-1, lazy.total))  # type: ignore[no-untyped-call]
        each = unpack(parameters, lazy.shapes) if any(lazy.shapes) else parameters.unbind(-1)
    return lazy.univariate(*each)._inv_call(y)  # type: ignore[no-any-return]
