"""Noise levels: as users hand them to a flow, and as a block takes them.

Shapes: B batch, C channels.
"""

import math
from numbers import Real

import torch
from torch import Tensor, nn

from parallel_decode.adapters.tarflow.inputs import FLOATS, readable

Levels = Tensor | float


def levels_of(t: Levels | None, batch: int, known: float | None, like: Tensor) -> Tensor:
    """Noise levels of shape (B, 1), in float32 at least, on the device of the flow.

    Args:
        t: shape (B, 1), or one for all.
        batch: B.
        known: the level to take where t is None.
        like: a tensor of the flow.

    Raises:
        TypeError: t is of the wrong kind.
        ValueError: no level is known, or t is of another shape, or not positive and finite.
    """
    t = known if t is None else t
    if t is None:
        raise ValueError(
            "t, the noise level, was left out, and this flow does not know that of its training: pass t=0.3, say, or noise_std= to the flow"
        )
    if isinstance(t, bool) or not isinstance(t, (Real, Tensor)):
        raise TypeError(f"t is {t!r}, expected a number, or a tensor of shape ({batch}, 1)")
    level = t if isinstance(t, Tensor) else torch.tensor(float(t), dtype=torch.float64)
    if level.shape not in ((), (batch, 1)) or level.dtype not in FLOATS:
        raise ValueError(f"t is {level.dtype} of shape {tuple(level.shape)}, expected floats of shape ({batch}, 1)")
    if isinstance(t, Tensor) and t.dim() and t.device != like.device:
        raise ValueError(f"t is on {t.device} and the flow on {like.device}: move one of them")
    if readable(level) and not ((level > 0) & level.isfinite()).all():
        raise ValueError(f"t is {t}, expected noise levels above 0: standard deviations")
    wide = torch.promote_types(like.dtype, torch.float32)
    return level.to(like.device, wide).expand(batch, 1)


class FourierTimeEmbedding(nn.Module):
    """An embedding of numbers: sines and cosines of them at periods from 2 pi to 20000 pi, and a network of two layers."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.mlp = nn.Sequential(nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels))

    def forward(self, t: Tensor) -> Tensor:
        """(B, 1) to (B, C)."""
        half = self.channels // 2
        frequencies = torch.exp(-math.log(1e4) / half * torch.arange(half, dtype=t.dtype, device=t.device))
        phases = t * frequencies
        features = torch.cat([phases.sin(), phases.cos()], 1).to(next(self.parameters()).dtype)
        return self.mlp(features)  # type: ignore[no-any-return]
