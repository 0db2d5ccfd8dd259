"""nflows, and normflows, which has its transforms: those that invert by D passes of an autoregressive network."""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel_decode.adapters.maf.inverse import Parallel, is_plain, library_inverts, order_of
from parallel_decode.adapters.maf.order import UnknownLayer, reach
from parallel_decode.adapters.maf.system import Sweep


def _made(module: nn.Module) -> Any:
    """The library's module `made`, of whichever library the network is from; None for another network."""
    network = getattr(module, "autoregressive_net", None)
    made = sys.modules.get(type(network).__module__)
    return made if made is not None and made.__name__ in MADES and type(network) is made.MADE else None


MADES = ("nflows.transforms.made", "normflows.nets.made")
TRANSFORMS = (
    ("nflows.transforms.autoregressive", "AutoregressiveTransform"),
    ("normflows.flows.affine.autoregressive", "Autoregressive"),
)

AFFINE = ("MaskedAffineAutoregressiveTransform", "MaskedAffineAutoregressive")  # of these
REPLACED = ("_elementwise_inverse", "_unconstrained_scale_and_shift")  # methods of theirs that `_scale` stands for


def consider(module: nn.Module) -> type[Parallel] | str | None:
    """The mixin for a module, or why it has none; None for a module that is no autoregressive transform."""
    kinds = tuple(getattr(sys.modules[name], kind) for name, kind in TRANSFORMS if name in sys.modules)
    if not isinstance(module, kinds):
        return None
    if type(module).inverse not in [kind.inverse for kind in kinds]:
        return "it has an inverse of its own"
    if _made(module) is None:
        network = getattr(module, "autoregressive_net", None)
        return f"its network is a {type(network).__name__}, expected a MADE: its order is not known"
    order = order_of(dependencies, module)
    return order if isinstance(order, str) else ParallelNflows


def dependencies(module: Any) -> Tensor:
    """Which features depend on which, shape (D, D)."""
    network = module.autoregressive_net
    chain: list[nn.Module] = [network.initial_layer]
    for block in network.blocks:
        chain.append(nn.Sequential(*block.linear_layers) if hasattr(block, "linear_layers") else block.linear)
    if not isinstance(chain[0], nn.Linear):
        raise UnknownLayer(chain[0])
    features = chain[0].in_features
    return reach([*chain, network.final_layer], features).view(features, -1, features).amax(1)


class ParallelNflows(Parallel):
    """Mixed in before an autoregressive transform."""

    parallel_depends = dependencies

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if inputs.dim() != 2 or library_inverts(self, inputs):
            return super().inverse(inputs, context)  # type: ignore[misc, no-any-return]
        transform: Any = self
        scale, features = _scale(transform), inputs.shape[1]
        apart = scale is not None and self.parallel_inverse.tol > 0
        last: Tensor | None = None  # the scale (B, D) of an affine transform, or the log determinant (B,) of another
        with torch.no_grad():
            prepared = _network(transform.autoregressive_net, context, apart)

        def inverse(parameters: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            if scale is None:
                return transform._elementwise_inverse(y, parameters)  # type: ignore[no-any-return]
            if apart:
                u, shift = parameters.view(y.shape[0], 2, features).unbind(1)
            else:
                u, shift = parameters.view(*y.shape, 2).unbind(2)
            by = scale(u)
            return (y - shift) / by, by

        def sweep(x: Tensor) -> Tensor:
            nonlocal last
            if torch.is_grad_enabled():
                return transform._elementwise_inverse(inputs, transform.autoregressive_net(x, context))[0]  # type: ignore[no-any-return]
            outputs, last = inverse(prepared(x), inputs)
            return outputs

        def of_rows(rows: Tensor) -> Sweep:
            y = inputs[rows]
            network = _network(transform.autoregressive_net, None if context is None else context[rows], apart)
            return lambda x: inverse(network(x), y)[0]

        x, found = self.parallel_inverse.solve(self, sweep, of_rows, inputs, context, features)
        if not found or last is None:
            return x, transform._elementwise_inverse(inputs, transform.autoregressive_net(x, context))[1]
        return x, last if scale is None else -last.log().sum(1)


def _scale(transform: Any) -> Callable[[Tensor], Tensor] | None:
    """The scale of an affine transform, a function of one of its two parameters; None for other transforms.

    The library's own function also takes its logarithm, at every pass.
    """
    for (library, _), kind in zip(TRANSFORMS, AFFINE, strict=True):
        affine = getattr(sys.modules.get(library), kind, None)
        methods = [getattr(getattr(transform, name, None), "__func__", None) for name in REPLACED]
        if affine is not None and methods == [getattr(affine, name) for name in REPLACED]:
            nflows = library.startswith("nflows.")
            return lambda u: F.softplus(u) + transform._epsilon if nflows else torch.sigmoid(u + 2.0) + 1e-3
    return None


def _network(made: Any, context: Tensor | None, apart: bool) -> Callable[[Tensor], Tensor]:
    """`made(x, context)` by the same operations on the same numbers, with what does not depend on x formed once.

    Args:
        made: the network.
        context: of all rows, or None.
        apart: let the two parameters of each feature come apart (B, 2 * D), not (B, D * 2): elementwise functions are several times as
            fast on what is contiguous, and round otherwise in the last bit.
    """
    blocks = list(made.blocks)
    library = sys.modules[made.__module__]
    residual = all(type(block) is library.MaskedResidualBlock for block in blocks)
    normed = any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in made.modules())
    known = _is_librarys(made, library)
    if not known or normed or not is_plain(made) or not (residual or context is None):
        return lambda x: _apart(made(x, context), 1) if apart else made(x, context)

    def linear(layer: Any, apart: bool = False) -> Callable[[Tensor], Tensor]:
        weight, bias = layer.mask * layer.weight, layer.bias
        return (
            partial(F.linear, weight=_apart(weight, 0), bias=_apart(bias, 0))
            if apart
            else partial(F.linear, weight=weight, bias=bias)
        )

    nflows = made.__module__.startswith("nflows")
    prepare = None if nflows or type(made.preprocessing) is nn.Identity else made.preprocessing
    first, last = linear(made.initial_layer), linear(made.final_layer, apart)
    added = None if context is None else made.context_layer(context)
    if nflows and added is not None:
        added = made.activation(added)
    parts = [
        (
            block.activation,
            [linear(layer) for layer in (block.linear_layers if residual else [block.linear])],
            None if context is None else block.context_layer(context),
        )
        for block in blocks
    ]

    def run(x: Tensor) -> Tensor:
        h = first(x if prepare is None else prepare(x))
        if added is not None:
            h = h + added
        if nflows and not made.use_residual_blocks:
            h = made.activation(h)
        for activation, layers, of_context in parts:
            if not residual:
                h = activation(layers[0](h))
                continue
            t = layers[0](activation(h))
            if nflows and of_context is not None:
                t = t + of_context
            t = layers[1](F.relu_(t) if activation is F.relu else activation(t))
            if not nflows and of_context is not None:
                t = F.glu(torch.cat((t, of_context), 1), 1)
            h = h.add_(t)
        return last(h)

    return run


def _is_librarys(made: Any, library: Any) -> bool:
    """Whether the network's blocks and masked layers are the library's, and none was replaced."""
    kinds = (library.MaskedResidualBlock, library.MaskedFeedforwardBlock)
    blocks = list(made.blocks)
    linears = [
        layer for b in blocks for layer in (b.linear_layers if type(b) is kinds[0] else [getattr(b, "linear", None)])
    ]
    layers = (made.initial_layer, *linears, made.final_layer)
    return all(type(block) in kinds for block in blocks) and all(
        type(layer) is library.MaskedLinear for layer in layers
    )


def _apart(x: Tensor, dim: int) -> Tensor:
    """a b a b a b to a a a b b b."""
    return x.view(*x.shape[:dim], -1, 2, *x.shape[dim + 1 :]).transpose(dim, dim + 1).reshape(x.shape)
