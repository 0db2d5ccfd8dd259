"""Decoding STARFlows: the inverses of the blocks, the deep one first.

Shapes: B batch, F frames (1 of images), N patches of a frame, D values of a patch, L positions, R rows of a block (B, or B F where frames are decoded apart), S the text's length.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from parallel_decode.adapters.starflow.model import MetaBlock
from parallel_decode.adapters.starflow.network import Condition
from parallel_decode.adapters.tarflow.changes import check_decodable
from parallel_decode.adapters.tarflow.guidance import Guidance
from parallel_decode.adapters.tarflow.inverse import BlockInverse, FlowInverse
from parallel_decode.cached import KeyValueStorage
from parallel_decode.cached.graphs import Graphs

if TYPE_CHECKING:
    from parallel_decode.adapters.starflow.density import Density


class BlockSystem(BlockInverse):
    """The inverse of one block after a text, and patches that are known.

    Args:
        block: the block.
        z: shape (R, L, D), in the block's order.
        known: patches before them, shape (R, any, D).
        text: shape (R, S, txt_dim), with guidance twice as many rows, the conditional ones first; None without.
        angles: of all inputs, see `Rope`; None without rotary positions.
        guidance, storage, graphs: see `BlockInverse`.
    """

    def __init__(
        self,
        block: MetaBlock,
        z: Tensor,
        known: Tensor,
        text: Tensor | None,
        angles: Tensor | None,
        guidance: Guidance,
        storage: KeyValueStorage | None = None,
        graphs: Graphs | None = None,
    ) -> None:
        prefix = (0 if text is None else text.shape[1]) + (block.sos_embed is not None) + known.shape[1]
        super().__init__(block, z, guidance, storage, graphs, prefix)
        self.known, self.text, self.angles = known, text, angles

    def given(self, guidance: Guidance, dtype: torch.dtype) -> Condition:
        rows = len(self.z) * (2 if guidance else 1)
        text, known = None if self.text is None else self.text[:rows], self.known
        return self.block.condition(text, known.repeat(2, 1, 1) if guidance else known, self.angles)  # type: ignore[no-any-return]

    def _subset(self, rows: Tensor, both: Tensor) -> "BlockSystem":
        z, known, text = self.z[rows], self.known[rows], None if self.text is None else self.text[both]
        return BlockSystem(self.block, z, known, text, self.angles, self.guidance, self.storage)


class FlowSystem(FlowInverse):
    """Sampling: the inverses of the blocks, the last block first, and that over one stretch of a video after the other.

    Args:
        flow: the flow.
        patches: noise, shape (B, F, N, D).
        size: height and width of a frame, in patches.
        text, guidance: of the blocks that see the text, see `BlockSystem`.
        known: what the deep block has for the first frames of a video, shape (B, any, N, D).
        stretches: for each the frame that is read first, the first that is decoded, and the end.
        video: whether the output has frames.
        graphs: to capture windows in.
    """

    def __init__(
        self,
        flow: "Density",
        patches: Tensor,
        size: tuple[int, int],
        text: Tensor | None,
        guidance: Guidance,
        known: Tensor,
        stretches: list[tuple[int, int, int]],
        video: bool,
        graphs: Graphs | None = None,
    ) -> None:
        super().__init__(flow, patches, guidance, graphs)
        self.size, self.text, self.video, self.stretches = size, text, video, stretches
        self.shallow = flow.transforms[-2::-1]
        self._deep = [self._ordered(known)]  # what the deep block has, in its order: known, and of each stretch

    @property
    def depth(self) -> int:
        return len(self.stretches) + len(self.shallow)

    @property
    def identity(self) -> dict[str, str | int | float]:
        return {**super().identity, "shape": "x".join(map(str, (self.z.shape[1], *self.size)))}

    def _ordered(self, patches: Tensor) -> Tensor:
        return self.flow.deep.permuted(patches.flatten(1, 2), patches.shape[2])  # type: ignore[no-any-return]

    def layer(self, index: int, value: Tensor | None) -> BlockInverse:
        if value is None:  # a solve begins
            check_decodable(self.flow)
        count, (_, frames, each, _), graphs = len(self.stretches), self.z.shape, self.graphs
        if index < count:
            if value is not None:
                self._deep[index:] = [value]
            first, start, stop = self.stretches[index]
            block, frames, text = self.flow.deep, stop - first, self.text
            z = self._ordered(self.z)[:, start * each : stop * each]
            known = torch.cat(self._deep[: index + 1], 1)[:, first * each : start * each]
            graphs = graphs if count == 1 else None  # stretches differ in what they read first
        else:
            block = self.shallow[index - count]
            rows, frames = self.flow.rows(block, self._patches(index, value))
            z, text = block.permuted(rows, each), self.text if block.sees_text else None
            known = z[:, :0]
        guidance = Guidance() if text is None else self.guidance
        angles = self.flow.angles(block, 0 if text is None else text.shape[1], frames, self.size)
        return self._placed(BlockSystem(block, z, known, text, angles, guidance, graphs=graphs), index)

    def _patches(self, index: int, value: Tensor | None) -> Tensor:
        """Patches (B, F, N, D) in their places, where this layer of a shallow block begins."""
        assert value is not None
        if index == len(self.stretches):
            value = torch.cat([*self._deep[:index], value], 1)
        block = self.flow.deep if index == len(self.stretches) else self.shallow[index - len(self.stretches) - 1]
        return block.permuted(value, self.z.shape[2]).reshape(self.z.shape)  # type: ignore[no-any-return]

    def output(self, value: Tensor) -> Tensor:
        x: Tensor = self.flow.unpatchify(self._patches(self.depth, value), self.size)
        return x if self.video else x[:, 0]
