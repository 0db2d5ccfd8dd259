"""In which order a masked network's features follow one another, read off its masks.

Shapes: B batch rows, D features, L positions (generations of the dependency graph), G features of the largest generation.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class UnknownLayer(ValueError):
    """A network has a layer of which it is not known which outputs depend on which inputs."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(f"its network has a {type(layer).__name__}, which has no mask: its order is not known")


class Order:
    """Features as positions of a triangular system: those of one generation depend on those of earlier ones alone.

    Args:
        generation: of each feature, shape (D,), on the CPU, from 0 without gaps.

    Attributes:
        depth: the number of generations: so many passes always suffice.
        length: of positions; more than `depth` where generations are so uneven that each feature is a position.
    """

    def __init__(self, generation: Tensor) -> None:
        sizes = generation.bincount()
        self.features, self.depth = len(generation), len(sizes)
        by_generation = generation.argsort(stable=True)
        if len(sizes) * int(sizes.max()) > 2 * self.features:  # too much padding: each feature a position of its own
            generation = by_generation.argsort()
            sizes = torch.ones(self.features, dtype=torch.long, device="cpu")
        self.length = len(sizes)
        self.natural = bool((generation == torch.arange(self.features, device="cpu")).all())
        within = torch.cat([torch.arange(int(size), device="cpu") for size in sizes])
        self.width = int(sizes.max())  # smaller generations are padded
        self.slot = torch.empty(self.features, dtype=torch.long, device="cpu")  # of each feature, in (L * G)
        self.slot[by_generation] = generation[by_generation] * self.width + within
        self.source = torch.full(
            (self.length * self.width,), self.features, device="cpu"
        )  # of each slot; D for padding
        self.source[self.slot] = torch.arange(self.features, device="cpu")
        self.padded = bool((self.source == self.features).any())

    def to(self, device: torch.device) -> "Order":
        """The same with its indices on a device."""
        self.slot, self.source = self.slot.to(device), self.source.to(device)
        return self

    def positions(self, x: Tensor) -> Tensor:
        """(B, D) to (B, L), or (B, L, G) where generations have several features."""
        if self.natural:
            return x
        if self.padded:
            x = torch.cat([x, x.new_zeros(len(x), 1)], 1)
        x = x[:, self.source]
        return x if self.width == 1 else x.view(len(x), self.length, self.width)

    def original(self, x: Tensor) -> Tensor:
        """`positions`, undone."""
        return x if self.natural else x.flatten(1)[:, self.slot]


def reach(layers: Iterable[nn.Module], inputs: int) -> Tensor:
    """Which outputs of a chain of masked layers depend on which inputs, shape (outputs, inputs): 1. or 0.

    Args:
        layers: linear layers with a `mask`; chains of them (`nn.Sequential`), which are residual: x + chain(x); anything
            else, if it has no matrix, acts on each feature alone.
        inputs: how many there are; further columns of the first mask (a context) are left out.

    Raises:
        UnknownLayer: a layer has a matrix and no mask.
    """
    reached = torch.eye(inputs, dtype=torch.float32, device="cpu")
    for layer in layers:
        mask = getattr(layer, "mask", None)
        if isinstance(mask, Tensor):
            reached = (mask.detach().cpu().float()[:, :inputs] @ reached > 0).float()
        elif isinstance(layer, nn.Sequential):
            reached = (reached + reach(layer, len(reached)) @ reached > 0).float()
        elif any(parameter.dim() > 1 for parameter in layer.parameters()):
            raise UnknownLayer(layer)
        inputs = len(reached)
    return reached


def generations(depends: Tensor) -> Tensor | None:
    """The generation of each feature of a dependency graph; None if the graph has a cycle.

    Args:
        depends: shape (D, D), not zero at [i, j] where feature i depends on feature j.

    Returns:
        shape (D,): 0 for a feature that depends on none, and one more than the last of those it depends on.

    Example:
        >>> generations(torch.tensor([[0, 1, 0], [0, 0, 0], [1, 1, 0]])).tolist()
        [1, 0, 2]
    """
    depends = (depends != 0).float()
    generation = torch.full((len(depends),), -1, device=depends.device)
    missing = depends.sum(1)
    for number in range(len(depends)):
        ready = (missing == 0) & (generation < 0)
        if not ready.any():
            break
        generation[ready] = number
        missing = missing - depends[:, ready].sum(1)
    return generation if bool((generation >= 0).all()) else None
