"""nflows, and normflows, which has its transforms: those that invert by D passes of an autoregressive network."""

import sys
from typing import Any

import torch
from torch import Tensor, nn

from parallel_decode.adapters.maf.inverse import Parallel, is_random, order_of
from parallel_decode.adapters.maf.order import reach
from parallel_decode.adapters.maf.system import Sweep
from parallel_decode.adapters.maf.view import with_products


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
    order = order_of(dependencies(module))
    return order if isinstance(order, str) else ParallelNflows


def dependencies(module: Any) -> Tensor:
    """Which features depend on which, shape (D, D)."""
    network = module.autoregressive_net
    chain: list[nn.Module] = [network.initial_layer]
    for block in network.blocks:
        chain.append(nn.Sequential(*block.linear_layers) if hasattr(block, "linear_layers") else block.linear)
    features = network.initial_layer.in_features
    return reach([*chain, network.final_layer], features).view(features, -1, features).amax(1)


class ParallelNflows(Parallel):
    """Mixed in before an autoregressive transform."""

    def depends(self) -> Tensor:
        return dependencies(self)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if is_random(self) or inputs.dim() != 2:
            return super().inverse(inputs, context)  # type: ignore[misc, no-any-return]
        transform: Any = self
        with torch.no_grad():
            known: Any = with_products(self, _made(self).MaskedLinear)
        logabsdet: Tensor | None = None

        def sweep(x: Tensor) -> Tensor:
            nonlocal logabsdet
            of = transform if torch.is_grad_enabled() else known
            outputs, logabsdet = of._elementwise_inverse(inputs, of.autoregressive_net(x, context))
            return outputs

        def fewer(rows: Tensor) -> Sweep:
            y, c = inputs[rows], None if context is None else context[rows]
            return lambda x: known._elementwise_inverse(y, known.autoregressive_net(x, c))[0]  # type: ignore[no-any-return]

        x = self.invert(sweep, fewer, inputs, context)
        assert self.last_solution is not None
        if (
            logabsdet is None
            or self.options.tol > 0
            or x.requires_grad
            or not all(status.succeeded for status in self.last_solution.status)
        ):
            logabsdet = transform._elementwise_inverse(inputs, transform.autoregressive_net(x, context))[1]
        return x, logabsdet
