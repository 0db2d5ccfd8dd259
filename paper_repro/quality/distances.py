"""Distances between two sets of features.

Shapes: N images (rows), F features. Everything is computed in float64 on the CPU.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Statistics:
    """The mean (F,) and the unbiased covariance (F, F) of the features of `count` images."""

    mean: Tensor
    covariance: Tensor
    count: int

    @staticmethod
    def of(features: Tensor) -> "Statistics":
        """The statistics of features (N, F).

        Raises:
            ValueError: the features are not finite numbers (N, F) with N >= 2.
        """
        _check(features)
        features = features.double()
        return Statistics(features.mean(0), features.T.cov().reshape(2 * features.shape[1:]), len(features))


def frechet(a: Tensor | Statistics, b: Tensor | Statistics) -> float:
    """The Frechet distance between Gaussians with the statistics of `a` and of `b` (FID, arXiv 1706.08500).

    |mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)) for covariances A and B, which may be singular. The estimate
    from N images is biased upward, by an amount that falls with N and depends on the features (Chong & Forsyth,
    arXiv 1911.07023): compare only distances of equal N.

    Args:
        a, b: features (N, F), or statistics.

    Raises:
        ValueError: the numbers of features differ, or features are not finite numbers (N, F) with N >= 2.

    Example:
        >>> one, four = torch.eye(2, dtype=torch.float64), 4 * torch.eye(2, dtype=torch.float64)
        >>> frechet(Statistics(torch.zeros(2), one, 100), Statistics(torch.ones(2), four, 100))  # 2 + 2 (1 - 2)^2
        4.0
    """
    a, b = (s if isinstance(s, Statistics) else Statistics.of(s) for s in (a, b))
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"a has {len(a.mean)} features and b {len(b.mean)}: take both from the same network")
    values, vectors = torch.linalg.eigh(a.covariance.double())
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    # A B has the eigenvalues of A^(1/2) B A^(1/2), which is symmetric: they stay real when A or B is singular
    product = torch.linalg.eigvalsh(root @ b.covariance.double() @ root)
    means = (a.mean.double() - b.mean.double()).square().sum()
    distance = means + a.covariance.trace() + b.covariance.trace() - 2 * product.clamp(min=0).sqrt().sum()
    return max(0.0, float(distance))  # below 0 by rounding only


def squared_mmd(a: Tensor, b: Tensor) -> float:
    """The unbiased estimate of the squared maximum mean discrepancy under the kernel (x.y / F + 1)^3 (arXiv 1801.01401).

    It takes N^2 memory; `kid` averages it over subsets.

    Args:
        a, b: features (N, F) and (M, F).

    Raises:
        ValueError: the numbers of features differ, or features are not finite numbers (N, F) with N >= 2.
    """
    _check(a)
    _check(b)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"a has {a.shape[1]} features and b {b.shape[1]}: take both from the same network")
    a, b = a.double(), b.double()
    return float(_within(a) + _within(b) - 2 * _kernel(a, b).mean())


def kid(a: Tensor, b: Tensor, subsets: int, subset_size: int, generator: torch.Generator) -> tuple[float, float]:
    """The kernel distance (KID in Inception's features, arXiv 1801.01401): the mean and deviation of `squared_mmd`.

    Unlike the Frechet distance it is unbiased at every N, and can be negative.

    Args:
        a, b: features (N, F) and (M, F).
        subsets: how many pairs of subsets to average over.
        subset_size: rows of each subset, drawn without replacement.
        generator: what they are drawn by.

    Returns:
        The mean over the subsets, and their standard deviation, which is that of one subset and not of the mean.

    Raises:
        ValueError: a set has fewer than `subset_size` rows, or what `squared_mmd` raises.

    Example:
        >>> rows = torch.arange(20.0).reshape(10, 2)
        >>> mean, deviation = kid(rows, rows + 9, subsets=5, subset_size=8, generator=torch.Generator().manual_seed(0))
        >>> mean > 0 and deviation > 0
        True
    """
    if subsets < 1 or not 2 <= subset_size <= min(len(a), len(b)):
        raise ValueError(
            f"{subsets} subsets of {subset_size} rows cannot be drawn from {len(a)} and {len(b)}: "
            "subsets must be 1 or more, and subset_size from 2 to the smaller number of rows"
        )
    values = [
        squared_mmd(*(s[torch.randperm(len(s), generator=generator)[:subset_size]] for s in (a, b)))
        for _ in range(subsets)
    ]
    mean = torch.tensor(values, dtype=torch.float64)
    return mean.mean().item(), mean.std(correction=0).item()


def _check(features: Tensor) -> None:
    if features.ndim != 2 or len(features) < 2 or not features.isfinite().all():
        raise ValueError(f"features are {tuple(features.shape)}, expected finite numbers (N, F) with N >= 2")


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.T / a.shape[1] + 1) ** 3


def _within(a: Tensor) -> Tensor:
    kernel = _kernel(a, a)
    return (kernel.sum() - kernel.trace()) / (len(a) * (len(a) - 1))
