"""Probes: what makes the blocks of a flow easy or hard to decode in parallel.

Shapes: B batch, L positions, D values of a position.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from parallel_decode.adapters.tarflow.base import Flow
from parallel_decode.adapters.tarflow.guidance import Guidance
from parallel_decode.adapters.tarflow.inverse import BlockInverse
from parallel_decode.cached import Reads
from parallel_decode.schedules import Jacobi, Sliding
from parallel_decode.solver import solve
from parallel_decode.system import TriangularSystem
from parallel_decode.window import Window


@dataclass(frozen=True)
class BlockProbe:
    """What was found about one block.

    Attributes:
        passes: of "jacobi" and of "sliding" (64), at the default tolerance.
        crm: the convergence ranking metric of GS-Jacobi, ||mean of exp(-a) x||_2 ||W_a||_2 + ||W_b||_2, the mean over the batch and the
            matrix norms spectral: the larger, the slower Jacobi is said to converge.
        igm: its initial guessing metric, ||mean of F(x0) - x||_2 for x0 = z ("system") and for zeros: the smaller is the
            better start.
        redundancy: for each number of hidden predecessors the cosine similarity, and the distance (L2), of what the block then
            generates to what it generates else, means over the batch. Close to 1 and 0: they are redundant.
        jacobian: the spectral norm of the mean Jacobian of a position by the one so many (the lag) before.
    """

    passes: dict[str, int]
    crm: float
    igm: dict[str, float]
    redundancy: dict[int, tuple[float, float]]
    jacobian: dict[int, float]


@dataclass(frozen=True)
class Probe:
    """What was found about a flow.

    Attributes:
        blocks: in the order of solving (the last block of the flow first).
        batch: images that it was found on.
    """

    blocks: tuple[BlockProbe, ...]
    batch: int

    def save(self, path: str | Path) -> None:
        """Write it as JSON."""
        Path(path).write_text(json.dumps(asdict(self), indent=1) + "\n")


@torch.no_grad()
def probe(
    flow: Flow,
    n: int = 8,
    *,
    generator: torch.Generator | None = None,
    hidden: Sequence[int] | None = None,
    lags: Sequence[int] | None = None,
    positions: int = 16,
    **options: Any,
) -> Probe:
    """Draw images, and look at how each block came to its part of them.

    Args:
        flow: the flow.
        n: how many images.
        generator: for the noise.
        hidden: how many of the nearest predecessors are hidden from attention, in turn; 1, 2 and 5 by default.
        lags: of the Jacobian; 1 to 4, and around one and two rows of patches, by default.
        positions: how many positions the mean Jacobian is taken over, evenly spaced.
        options: of `flow.example`: classes `y`, which are all in turn by default, texts, which are noise, and others of sampling.

    Raises:
        ValueError: a number is out of its range.

    References:
        Zhang et al., Selective Jacobi Decoding (arXiv 2505.24791): redundancy by masking.
        Liu et al., Accelerate TarFlow Sampling with GS-Jacobi Iteration (arXiv 2505.12849): CRM and IGM.

    Example:
        >>> from parallel_decode.adapters.tarflow import TarFlow
        >>> from parallel_decode.adapters.tarflow.probe import probe
        >>> found = probe(TarFlow(1, 8, 2, 64, num_blocks=2, layers_per_block=1), n=2)
        >>> len(found.blocks), found.blocks[0].redundancy[1][1] < 1e-5  # a new flow is nearly the identity
        (2, True)
    """
    length = min(flow.lengths)
    side = math.isqrt(length)
    near = [1, 2, 3, 4, side - 1, side, side + 1, 2 * side]
    hidden = [o for o in (1, 2, 5) if o < length] if hidden is None else list(hidden)
    lags = sorted({lag for lag in near if 1 <= lag < length}) if lags is None else list(lags)
    if n < 1 or positions < 1:
        raise ValueError(f"n is {n} and positions {positions}, expected at least 1 each")
    if any(not 1 <= o < length for o in (*hidden, *lags)):
        raise ValueError(f"hidden is {hidden} and lags {lags}, expected numbers from 1 to {length - 1}")
    system = flow.example(n, generator=generator, **options)
    blocks: list[BlockProbe] = []

    def probe_layer(index: int, make: Callable[[], TriangularSystem]) -> Tensor:
        layer = make()
        assert isinstance(layer, BlockInverse)
        value = solve(layer, "sequential").value
        blocks.append(_block(layer, value, hidden, lags, positions))
        return value

    system.walk(probe_layer)
    return Probe(tuple(blocks), n)


def _block(layer: BlockInverse, x: Tensor, hidden: Sequence[int], lags: Sequence[int], positions: int) -> BlockProbe:
    block, z = layer.block, layer.z
    full = Window.full(layer.length)
    starts = {"system": z, "zeros": torch.cat([x[:, :1], torch.zeros_like(x[:, 1:])], 1)}
    plain = Masked(layer, 0)
    a = plain.reads.complete(plain.affine(x)[0], torch.zeros_like(x))
    norms = [float(torch.linalg.matrix_norm(w, ord=2)) for w in block.proj_out.weight.chunk(2 if block.nvp else 1)]
    scale = norms[0] if block.nvp else 0.0
    redundancy = {}
    for o in hidden:
        other = solve(Masked(layer, o), "jacobi").value
        cosine = F.cosine_similarity(other.flatten(1), x.flatten(1)).mean()
        redundancy[o] = _short(cosine), _short((other - x).flatten(1).norm(dim=1).mean())
    return BlockProbe(
        passes={name: solve(layer, s).passes for name, s in (("jacobi", Jacobi()), ("sliding", Sliding(64)))},
        crm=_short(torch.linalg.matrix_norm(((-a).exp() * x).mean(0), ord=2) * scale + norms[-1]),
        igm={
            name: _short(torch.linalg.matrix_norm((layer.evaluate(x0, full) - x).mean(0), ord=2))
            for name, x0 in starts.items()
        },
        redundancy=redundancy,
        jacobian={
            lag: _short(torch.linalg.matrix_norm(mean_jacobian(layer, x, lag, positions), ord=2)) for lag in lags
        },
    )


def _short(value: Tensor) -> float:
    return float(f"{float(value):.4g}")


def mean_jacobian(system: TriangularSystem, x: Tensor, lag: int, positions: int = 16) -> Tensor:
    """The mean over rows and positions of d f_l / d x_{l - lag}, shape (D, D).

    Args:
        system: a system whose `evaluate` can be differentiated.
        x: where, shape (B, L, D).
        lag: how far back.
        positions: how many l, evenly spaced over lag..L-1.
    """
    length, size = x.shape[1:]
    at = torch.linspace(lag, length - 1, min(positions, length - lag)).round().long().tolist()
    rows = torch.eye(size, dtype=x.dtype, device=x.device)
    total = torch.zeros(size, size, dtype=x.dtype, device=x.device)
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        fx = system.evaluate(x, Window.full(length))
        for l in at:
            for i in range(size):
                if fx.requires_grad:
                    (slope,) = torch.autograd.grad(
                        fx[:, l] @ rows[i], x, torch.ones_like(fx[:, l, 0]), retain_graph=True
                    )
                    total[i] += slope[:, l - lag].mean(0) / len(at)
    return total


class Masked(TriangularSystem):
    """The inverse of a block that does not attend to the `hidden` nearest predecessors of the position it computes.

    They are masked in the attention of all layers; inputs before the first position, or that one where there are none, stay visible. The
    value of the nearest predecessor still enters by the residual stream, as it is what the transformer reads there.
    """

    def __init__(self, layer: BlockInverse, hidden: int) -> None:
        self.z, self.layer = layer.z, layer
        self.given = layer.given(Guidance(), layer.dtype)
        self.reads = Reads(Window.full(layer.length), layer.length, layer.prefix, device=layer.z.device)
        key = torch.arange(self.reads.size, device=layer.z.device)
        query = key[:, None]  # position l is computed at input P + l - 1
        self.reads.mask = (key <= query - hidden) | ((key < max(layer.prefix, 1)) & (key <= query))
        self.reads.causal = False

    @property
    def length(self) -> int:
        return self.z.shape[1]

    def initial(self) -> Tensor:
        return self.z

    def affine(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """a and b at all positions but the first if nothing is read for it, each of shape (B, W, D)."""
        values = self.layer.read(x, self.reads)
        return self.layer.block.affine(values, self.given, self.reads)  # type: ignore[no-any-return]

    def evaluate(self, x: Tensor, window: Window) -> Tensor:
        x = x.clone()
        x[:, window.positions[-1] :] = 0
        a, b = self.affine(x)
        return window.take(self.reads.complete(self.reads.targets(self.z) * a.exp() + b, self.z))
