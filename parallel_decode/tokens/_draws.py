"""Draws from probabilities.

Shapes: N rows, V tokens of the vocabulary.
"""

import torch
from torch import Tensor


def undrawable(probabilities: Tensor) -> Tensor:
    """Where the scores had no softmax: it is NaN all over then."""
    return probabilities[..., 0].isnan()


def default_generator(device: torch.device) -> torch.Generator:
    if device.type == "cuda":
        torch.cuda.init()  # type: ignore[no-untyped-call]
        return torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
    return torch.mps._get_default_mps_generator() if device.type == "mps" else torch.default_generator


def draw(weights: Tensor, generator: torch.Generator | None) -> Tensor:
    """An index for each row of weights (N, V), by the inverse of their cumulative sum: one number is drawn for a row, where `torch.multinomial` draws V."""
    wide = torch.float32 if weights.device.type == "mps" else torch.float64
    sums = weights.cumsum(1, dtype=wide)
    uniform = torch.rand(len(weights), 1, dtype=wide, device=weights.device, generator=generator) * (
        1 - torch.finfo(wide).eps
    )
    found = torch.searchsorted(sums, uniform * sums[:, -1:], right=True)[:, 0]
    return found.clamp_(max=weights.shape[1] - 1)
