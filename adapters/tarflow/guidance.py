"""Guidance: how a conditional and an unconditional affine transform combine, in one doubled batch.

Shapes: B batch, W positions of the window, D values of a patch.
"""

import math
from collections.abc import Callable
from numbers import Real

import torch
from torch import Tensor

from parallel_decode._options import check_at_least_one, check_kind
from parallel_decode.cached import Reads

Rule = Callable[[Tensor, Tensor, Tensor, Tensor, float | Tensor], tuple[Tensor, Tensor]]


def guide_logs(a: Tensor, b: Tensor, a_u: Tensor, b_u: Tensor, w: float | Tensor) -> tuple[Tensor, Tensor]:
    """Scale and shift with a and b moved away from the unconditional ones: a + w (a - a_u), b + w (b - b_u) (arXiv 2412.06329)."""
    return (a + w * (a - a_u)).exp(), b + w * (b - b_u)


def guide_scales(a: Tensor, b: Tensor, a_u: Tensor, b_u: Tensor, w: float | Tensor) -> tuple[Tensor, Tensor]:
    """The same of exp(a) in place of a (arXiv 2604.20041)."""
    scale, scale_u = a.exp(), a_u.exp()
    return scale + w * (scale - scale_u), b + w * (b - b_u)


def guide_gaussians(a: Tensor, b: Tensor, a_u: Tensor, b_u: Tensor, w: float | Tensor) -> tuple[Tensor, Tensor]:
    """Standard deviation and mean of the Gaussian p_c^(1 + w) / p_u^w, where p_u counts as at least as wide as p_c (arXiv 2506.06276)."""
    s = (2 * (a - a_u).clamp(max=0)).exp()  # the ratio of the variances
    precision = 1 + w - w * s  # in units of that of p_c
    return a.exp() / precision**0.5, ((1 + w) * b - w * s * b_u) / precision


class Guidance:
    """How conditional and unconditional predictions combine.

    Attributes:
        scale: w, see the rules; 0 leaves the unconditional pass out.
        what: which of "a" and "b" are guided.
        annealed: let w rise linearly over the positions, from 0 at the first to `scale` at the last.
        attn_temp: attention temperature of the unconditional branch.
        rule: takes a, b, a_u, b_u and w, and returns scale and shift.
        blocks: how many blocks are guided, in the order of generation; None for all.
    """

    def __init__(
        self,
        scale: float = 0.0,
        what: str = "ab",
        annealed: bool = False,
        attn_temp: float = 1.0,
        rule: Rule = guide_logs,
        blocks: int | None = None,
    ) -> None:
        for name, value in (("guidance", scale), ("attn_temp", attn_temp)):
            check_kind(name, value, Real, "a number")
        check_kind("guide_what", what, str, "'a', 'b', 'ab' or ''")
        if not math.isfinite(scale) or scale < 0:
            raise ValueError(f"guidance is {scale}, expected a finite number >= 0")
        if set(what) - set("ab"):
            raise ValueError(f"guide_what is {what!r}, expected 'a', 'b', 'ab' or ''")
        if not (math.isfinite(attn_temp) and attn_temp > 0):
            raise ValueError(f"attn_temp is {attn_temp}, expected a finite number > 0")
        if blocks is not None:
            check_at_least_one("guide_flows", blocks)
        self.scale, self.what, self.annealed, self.attn_temp = scale, what, annealed, attn_temp
        self.rule, self.blocks = rule, blocks

    def __bool__(self) -> bool:
        return self.scale > 0 and bool(self.what)

    @property
    def identity(self) -> dict[str, str | int | float]:
        """What tells a plan or a measurement under this guidance from others."""
        named: dict[str, str | int | float] = {"guidance": self.scale}
        named |= {} if self.rule is guide_logs else {"rule": self.rule.__name__}
        return named if self.blocks is None else named | {"guided blocks": self.blocks}

    def of_layer(self, index: int) -> "Guidance":
        """That of one block, by its index in the order of generation."""
        return self if self.blocks is None or index < self.blocks else Guidance()

    def combine(self, a: Tensor, b: Tensor, reads: Reads, length: int) -> tuple[Tensor, Tensor]:
        """Scale and shift, (2 B, W, D) -> (B, W, D): the conditional rows come first."""
        (a, a_u), (b, b_u) = a.chunk(2), b.chunk(2)
        w: float | Tensor = self.scale
        if self.annealed:
            positions = torch.arange(length, device=a.device).to(a)[None, :, None]
            w = w * reads.targets(positions.expand(len(a), -1, -1)) / (length - 1)
        return self.rule(a, b, a_u if "a" in self.what else a, b_u if "b" in self.what else b, w)
