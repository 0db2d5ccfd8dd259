"""Decoding a flow: the inverses of its blocks, the deep one first.

Shapes: B batch, F frames (1 of images), N patches of a frame, D values of a patch, L positions, R rows of a block (B, or B F where frames are decoded apart).
"""

from functools import cached_property
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from parallel_decode.adapters.starflow.block import BlockSystem, Task
from parallel_decode.adapters.starflow.model import MetaBlock
from parallel_decode.adapters.tarflow.changes import check_called
from parallel_decode.cached.graphs import graphs_of
from parallel_decode.system import LayeredSystem

if TYPE_CHECKING:
    from parallel_decode.adapters.starflow.density import Density


class FlowSystem(LayeredSystem):
    """Sampling: the inverses of the blocks, the last block first, and that over one stretch of a video after the other.

    Args:
        flow: the flow.
        patches: noise, shape (B, F, N, D).
        size: height and width of a frame, in patches.
        text, guidance: of the blocks that see the text, see `Task`.
        given: what the deep block has for the first frames of a video, shape (B, any, N, D).
        stretches: for each the frame that is read first, the first that is decoded, and the end.
        video: whether the output has frames.
        compile: whether to capture windows as CUDA graphs.
    """

    def __init__(
        self,
        flow: "Density",
        patches: Tensor,
        size: tuple[int, int],
        text: Tensor | None,
        guidance: float,
        given: Tensor,
        stretches: list[tuple[int, int, int]],
        video: bool,
        compile: bool = False,
    ) -> None:
        self.flow, self.patches, self.size, self.text, self.guidance = flow, patches, size, text, guidance
        self.video, self.stretches, self.compile = video, stretches, compile and patches.is_cuda
        self.blocks = [cast(MetaBlock, block) for block in flow.blocks if not isinstance(block, nn.Identity)]
        self.shallow = self.blocks[-2::-1]
        self._deep = [
            self._ordered(given)
        ]  # what the deep block has, in its order: given, and of each stretch but the last

    @property
    def depth(self) -> int:
        return len(self.stretches) + len(self.shallow)

    @cached_property
    def _model(self) -> str:
        return self.flow.fingerprint()

    @property
    def identity(self) -> dict[str, str | int | float]:
        device = self.patches.device
        low = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else self.flow.var.dtype
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        shape = "x".join(map(str, (self.patches.shape[1], *self.size)))
        batch: dict[str, str | int | float] = {"batch": len(self.patches), "shape": shape, "guidance": self.guidance}
        return {"model": self._model, "device": name, "dtype": str(low), **batch}

    def _ordered(self, patches: Tensor) -> Tensor:
        return self.flow.deep.permuted(patches.flatten(1, 2), patches.shape[2])

    def layer(self, index: int, value: Tensor | None) -> BlockSystem:
        if value is None:  # a solve begins
            check_called(self.flow, self.blocks)
        count, (_, frames, each, _) = len(self.stretches), self.patches.shape
        if index < count:
            if value is not None:
                self._deep[index:] = [value]
            first, start, stop = self.stretches[index]
            block, frames, text = self.flow.deep, stop - first, self.text
            z = self._ordered(self.patches)[:, start * each : stop * each]
            given = torch.cat(self._deep[: index + 1], 1)[:, first * each : start * each]
        else:
            block = self.shallow[index - count]
            rows, frames = self.flow.rows(block, self._patches(index, value))
            z, text = block.permuted(rows, each), self.text if block.sees_text else None
            given = z[:, :0]
        guidance = 0.0 if text is None else self.guidance
        angles = self.flow.angles(block, 0 if text is None else text.shape[1], frames, self.size)
        graphs = None
        if self.compile and (index >= count or count == 1):
            autocast = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
            graphs = graphs_of(block, (z.shape, z.dtype, z.device, given.shape, self.size, guidance, autocast))
        task = Task(z, given, text, angles, guidance)
        system = BlockSystem(block, task, graphs)
        system.of_flow = self, index
        return system

    def _patches(self, index: int, value: Tensor | None) -> Tensor:
        """Patches (B, F, N, D) in their places, where this layer of a shallow block begins."""
        assert value is not None
        if index == len(self.stretches):
            value = torch.cat([*self._deep[:index], value], 1)
        block = self.flow.deep if index == len(self.stretches) else self.shallow[index - len(self.stretches) - 1]
        return block.permuted(value, self.patches.shape[2]).reshape(self.patches.shape)

    def output(self, value: Tensor) -> Tensor:
        x = self.flow.unpatchify(self._patches(self.depth, value), self.size)
        return x if self.video else x[:, 0]
