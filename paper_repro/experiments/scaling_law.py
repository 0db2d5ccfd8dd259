"""Power laws: value = c * x_1^a_1 * ... * x_n^a_n, fitted by least squares between logarithms."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Law:
    """A power law of n factors.

    Attributes:
        constant: c.
        exponents: a, one for each factor.
        errors: the standard error of each; None where there are no more points than coefficients.
        misfit: the standard deviation of a value about the law, as a factor of 1 or more; None likewise.
    """

    constant: float
    exponents: tuple[float, ...]
    errors: tuple[float, ...] | None
    misfit: float | None

    def __call__(self, *point: float) -> float:
        """The value at a point, given by its factors."""
        return self.constant * math.prod(math.pow(x, a) for x, a in zip(point, self.exponents, strict=True))


def fit(points: Sequence[Sequence[float]], values: Sequence[float]) -> Law:
    """The law that is nearest to the values.

    Args:
        points: the n factors of each value, all above 0.
        values: all above 0.

    Raises:
        ValueError: a number that is not above 0, or points that do not determine the n + 1 coefficients.

    Example:
        >>> law = fit([(1, 1), (4, 1), (1, 9), (4, 9)], [3, 6, 27, 54])
        >>> f"{law.constant:.2f}", [f"{exponent:.2f}" for exponent in law.exponents]
        ('3.00', ['0.50', '1.00'])
    """
    x, y = np.array(points, dtype=np.float64), np.array(values, dtype=np.float64)
    for name, numbers in (("points", x), ("values", y)):
        if not (numbers > 0).all():
            raise ValueError(f"{name} are {numbers.tolist()}, expected numbers above 0, which have logarithms")
    design: NDArray[np.float64] = np.concatenate([np.ones((len(x), 1)), np.log(x)], axis=1)
    count, coefficients = design.shape
    if np.linalg.matrix_rank(design) < coefficients:
        raise ValueError(
            f"{count} points do not determine {coefficients} coefficients: vary each factor apart from the others"
        )
    found = np.linalg.lstsq(design, np.log(y), rcond=None)[0]
    free, errors, misfit = count - coefficients, None, None
    if free:
        variance = float(np.square(np.log(y) - design @ found).sum()) / free
        covariance = variance * np.linalg.inv(design.T @ design)
        errors, misfit = tuple(map(float, np.sqrt(np.diag(covariance)[1:]))), math.exp(math.sqrt(variance))
    return Law(math.exp(found[0]), tuple(map(float, found[1:])), errors, misfit)
