"""Intervals that say how certain a measured distance is, from resampling stored features.

Shapes: N images (rows), F features.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from paper_repro.quality.distances import Statistics

LEVEL = 0.95  # how often an interval should hold the expected value


@dataclass(frozen=True)
class Interval:
    """A measured value, and the 95% interval of its expectation for sets of this size.

    Attributes:
        value: of the sets as they are.
        low, high: the ends of the interval.
        spread: the standard deviation of the value over resampled sets.
    """

    value: float
    low: float
    high: float
    spread: float


Reference = TypeVar("Reference", Tensor, Statistics)


def bootstrap(
    a: Tensor, b: Reference, measure: Callable[[Tensor, Reference], float], draws: int, generator: torch.Generator
) -> Interval:
    """The interval of `measure(a, b)`, from resampling the rows of `a`, and of `b` where it is features, with replacement.

    Repeated rows shift the draws themselves (a Frechet distance upward), so that only their deviation from their own
    mean is used. The interval is therefore of the expected value at this N, with its bias, and not of the limit at
    infinite N. It is unreliable where both sets come from one distribution.

    Args:
        a: features (N, F).
        b: features (M, F), or the statistics of a reference that is held fixed.
        measure: `frechet`, `squared_mmd`, or another function of both.
        draws: of resampled sets; a few hundred make a stable interval.
        generator: what they are drawn by.

    Raises:
        ValueError: `draws` is below 2, or what `measure` raises.

    Example:
        >>> from paper_repro.quality.distances import frechet
        >>> generator = torch.Generator().manual_seed(0)
        >>> a, b = torch.randn(2, 200, 3, generator=generator)
        >>> interval = bootstrap(a, b + 1, frechet, 50, generator)  # 3 for infinitely many rows
        >>> interval.low < 3 < interval.high
        True
    """
    values = [measure(_rows(a, generator), _resampled(b, generator)) for _ in _draws(draws)]
    return _interval(measure(a, b), values)


def difference(
    x: Tensor,
    y: Tensor,
    reference: Reference,
    measure: Callable[[Tensor, Reference], float],
    draws: int,
    generator: torch.Generator,
) -> Interval:
    """The interval of `measure(x, reference) - measure(y, reference)` for two methods that drew from the same noise.

    Row i of `x` and of `y` belong to one noise: they are resampled together, so that what both methods share cancels.
    Of two methods that do the same, the interval is tight about 0.

    Args:
        x, y: features (N, F) of the two methods, row by row from the same noise.
        reference, measure, draws, generator: see `bootstrap`; both methods meet the same resampled reference.

    Raises:
        ValueError: `x` and `y` differ in shape, `draws` is below 2, or what `measure` raises.
    """
    if x.shape != y.shape:
        raise ValueError(f"x is {tuple(x.shape)} and y {tuple(y.shape)}: paired features need one row for each noise")
    values = []
    for _ in _draws(draws):
        rows, drawn = torch.randint(len(x), (len(x),), generator=generator), _resampled(reference, generator)
        values.append(measure(x[rows], drawn) - measure(y[rows], drawn))
    return _interval(measure(x, reference) - measure(y, reference), values)


def _draws(draws: int) -> range:
    if draws < 2:
        raise ValueError(f"draws is {draws}, expected 2 or more, and a few hundred for a stable interval")
    return range(draws)


def _rows(features: Tensor, generator: torch.Generator) -> Tensor:
    return features[torch.randint(len(features), (len(features),), generator=generator)]


def _resampled(reference: Reference, generator: torch.Generator) -> Reference:
    return _rows(reference, generator) if isinstance(reference, Tensor) else reference


def _interval(value: float, draws: list[float]) -> Interval:
    deviations = torch.tensor(draws, dtype=torch.float64)
    deviations = deviations - deviations.mean()
    tail = (1 - LEVEL) / 2
    below, above = deviations.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    # the value deviates from its expectation as draws do from theirs: the ends change sides (basic bootstrap)
    return Interval(value, value - above, value - below, deviations.std().item())
