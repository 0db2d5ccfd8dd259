"""Approximate rules of other codebases, written from their papers and public code as loops over `system.evaluate`.

They go over the positions in contiguous segments and sweep each until a cap, or until one number for the whole batch falls under a
threshold; what stands there is then kept, solved or not. `pd.solve` offers no such end: its answers are within a tolerance
of the sequential ones, and these rules promise nothing. Unlike both codes, keys are read again from the values
that were kept, not from those of the sweep before.

Shapes: B batch, L positions, W positions of a segment, D values of a position.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from parallel_decode._options import check_at_least_one
from parallel_decode.system import LayeredSystem, TriangularSystem
from parallel_decode.window import Window


@dataclass(frozen=True)
class Rule(ABC):
    """How one layer is swept.

    Attributes:
        cap: the most sweeps of a segment.
        threshold: a segment ends when `change` is no more than this.
        start: the first guess, the system's own (z) or zeros after the first position.
        clamp: every new value is clamped to [-clamp, clamp]; None leaves them.
    """

    cap: int
    threshold: float
    start: Literal["system", "zeros"] = "system"
    clamp: float | None = None

    def __post_init__(self) -> None:
        if self.cap < 1:
            raise ValueError(f"cap is {self.cap}, expected at least one sweep")

    @abstractmethod
    def segments(self, length: int) -> list[range]:
        """The segments of L positions, in the order of solving."""

    @abstractmethod
    def change(self, new: Tensor, old: Tensor) -> Tensor:
        """One number for the change of a segment, both (B, W, D)."""


@dataclass(frozen=True)
class GSJacobi(Rule):
    """GS-Jacobi (Liu et al., arXiv 2505.12849): equal segments, each by capped Jacobi sweeps clamped to [-3, 3].

    A segment ends at `cap` sweeps, or when ||new - old|| / (B D) <= 1e-6. Position 0 needs no sweep, and the published
    code lets the segments begin at position 1; here it belongs to the first segment, at no cost.

    Attributes:
        count: the number of segments; 1 is plain capped Jacobi, L or more is sequential decoding.
    """

    cap: int = 32
    threshold: float = 1e-6
    clamp: float | None = 3.0
    count: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least_one("count", self.count)

    def segments(self, length: int) -> list[range]:
        count = min(self.count, length)
        if length % count:
            raise ValueError(f"{count} segments do not divide {length} positions: choose a divisor")
        bounds = [0, *range(length // count + 1, length, length // count), length]
        return [range(*bound) for bound in pairwise(bounds)]

    def change(self, new: Tensor, old: Tensor) -> Tensor:
        size: Tensor = (new - old).norm()
        return size / (new.shape[0] * new.shape[-1])


@dataclass(frozen=True)
class Starflow(Rule):
    """STARFlow's decoding (Gu et al., arXiv 2506.06276): windows in turn, over a key-value cache, from z.

    A window ends at `cap` sweeps, or when mean (new - old)^2 / mean new^2 over the batch is at most 0.001. TarFlow's scales are
    exponentials, which overflow from z where STARFlow's softplus does not, so values are clamped to [-3, 3] here.

    Attributes:
        width: positions of a window; the published code uses 16 to 64.
    """

    cap: int = 32
    threshold: float = 1e-3
    clamp: float | None = 3.0
    width: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least_one("width", self.width)

    def segments(self, length: int) -> list[range]:
        return [range(at, min(at + self.width, length)) for at in range(0, length, self.width)]

    def change(self, new: Tensor, old: Tensor) -> Tensor:
        return (new - old).square().mean() / new.square().mean()


def sweep(system: TriangularSystem, rule: Rule) -> tuple[Tensor, int, int]:
    """One layer by a rule.

    Returns:
        the values that were kept, shape (B, L, D), the sweeps of all segments, and the positions that they evaluated.

    Example:
        >>> import torch, parallel_decode as pd
        >>> f = lambda x: 1 + torch.nn.functional.pad(x, (1, -1)) / 2
        >>> value, sweeps, positions = sweep(pd.from_function(f, torch.zeros(1, 6)), Starflow(cap=9, threshold=0, width=3))
        >>> value[0, -1].item(), sweeps, positions  # exact after W sweeps; one more sees that nothing changes
        (1.96875, 8, 24)
    """
    x = system.initial().clone()
    if rule.start == "zeros":
        x[:, 1:] = 0
    sweeps = positions = changed = 0
    for segment in rule.segments(system.length):
        for _ in range(rule.cap):
            window = Window(segment, changed)
            new = system.evaluate(x, window)
            new = new if rule.clamp is None else new.clamp(-rule.clamp, rule.clamp)
            change = rule.change(new, x[:, window.slice])
            x[:, window.slice] = new
            changed, sweeps, positions = segment.start, sweeps + 1, positions + len(segment)
            if change <= rule.threshold:
                break
    return x, sweeps, positions


@torch.no_grad()
def solve(system: LayeredSystem, rules: tuple[Rule, ...]) -> tuple[Tensor, tuple[int, ...], int]:
    """All layers, each by its rule; the last rule serves all layers that remain.

    Returns:
        the system's output, the sweeps of each layer, and the positions evaluated by all of them.
    """
    sweeps: list[int] = []
    positions = 0

    def sweep_layer(index: int, make: Callable[[], TriangularSystem]) -> Tensor:
        nonlocal positions
        value, swept, evaluated = sweep(make(), rules[min(index, len(rules) - 1)])
        sweeps.append(swept)
        positions += evaluated
        return value

    return system.walk(sweep_layer), tuple(sweeps), positions
