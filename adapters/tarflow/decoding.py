"""Decoding flows over images: the inverse of each block, conditioned on classes and levels of noise.

Shapes: B batch (twice that with guidance), L positions, D values of a patch.
"""

from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from parallel_decode.adapters.tarflow.changes import check_decodable
from parallel_decode.adapters.tarflow.guidance import Guidance
from parallel_decode.adapters.tarflow.inverse import BlockInverse, FlowInverse
from parallel_decode.adapters.tarflow.model import MetaBlock
from parallel_decode.adapters.tarflow.weights import Weights
from parallel_decode.cached import KeyValueStorage
from parallel_decode.cached.graphs import Graphs
from parallel_decode.window import Window

if TYPE_CHECKING:
    from parallel_decode.adapters.tarflow.images import ImageFlow


class BlockSystem(BlockInverse):
    """The inverse of one block for classes y, shape (B,), and logarithms of noise levels t, shape (B, 1)."""

    def __init__(
        self,
        block: MetaBlock,
        z: Tensor,
        y: Tensor | None,
        guidance: Guidance,
        storage: KeyValueStorage | None = None,
        graphs: Graphs | None = None,
        t: Tensor | None = None,
    ) -> None:
        super().__init__(block, z, guidance, storage, graphs)
        self.y, self.t = y, t

    def evaluate(self, x: Tensor, window: Window) -> Tensor:
        device, dtype = x.device.type, self.dtype  # weights are prepared in it, and called without autocast
        with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
            return self._evaluate(x, window, dtype)

    def given(self, guidance: Guidance, dtype: torch.dtype) -> Weights:
        weights, rows = self.block.weights(self.y, dtype, self.t), len(self.z)
        if guidance and weights.condition is not None:
            both = weights.condition, self.block.condition(None, self.t)
            weights = replace(weights, condition=torch.cat([c.expand(rows, -1, -1) for c in both]))
        if guidance and guidance.attn_temp != 1:
            temperatures = weights.pos_embed.new_tensor([1.0, guidance.attn_temp])
            weights = replace(weights, temperature=temperatures.repeat_interleave(rows)[:, None, None, None])
        return weights  # type: ignore[no-any-return]

    def _subset(self, rows: Tensor, both: Tensor) -> "BlockSystem":
        y, t = (None if given is None else given[rows.to(given.device)] for given in (self.y, self.t))
        return BlockSystem(self.block, self.z[rows], y, self.guidance, self.storage, t=t)


class FlowSystem(FlowInverse):
    """Sampling: the inverses of the blocks, the last block first."""

    def __init__(
        self,
        flow: "ImageFlow",
        z: Tensor,
        y: Tensor | None,
        guidance: Guidance,
        graphs: Graphs | None = None,
        t: Tensor | None = None,
    ) -> None:
        super().__init__(flow, z, guidance, graphs)
        self.y, self.t = y, t

    @property
    def depth(self) -> int:
        return len(self.flow.blocks)

    def _block(self, index: int) -> MetaBlock:
        return self.flow.blocks[self.depth - 1 - index]  # type: ignore[no-any-return]

    def layer(self, index: int, value: Tensor | None) -> BlockInverse:
        if value is None:  # a solve begins
            check_decodable(self.flow)
            x = self.z * self.flow.var.sqrt().to(self.z)
        else:
            at = self.depth - index
            x = self.flow.repatched(self._block(index - 1).permuted(value), at, at - 1)
        block, guidance = self._block(index), self.guidance.of_layer(index)
        system = BlockSystem(block, block.permuted(x), self.y, guidance, graphs=self.graphs, t=self.t)
        return self._placed(system, index)

    def output(self, value: Tensor) -> Tensor:
        return self.flow.unpatchify(self._block(self.depth - 1).permuted(value))  # type: ignore[no-any-return]
