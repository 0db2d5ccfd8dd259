"""Decoding a block: its inverse as a triangular system over a key-value cache with fixed storage.

Shapes: R rows (B, a batch; B F where frames are decoded apart), L positions, D values of a patch, S the text's length, W positions of the window.
"""

import weakref
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from parallel_decode.adapters.starflow.model import MetaBlock
from parallel_decode.adapters.starflow.network import Condition
from parallel_decode.cached import KeyValueStorage, Reads, RowReads
from parallel_decode.cached.graphs import Graphs
from parallel_decode.system import LayeredSystem, TriangularSystem
from parallel_decode.window import Window


def guided(scale: Tensor, shift: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    """Scale and shift of p_c (p_c / p_u)^w, a product of Gaussians: (2 B, W, D), the conditional rows first, to (B, W, D).

    The unconditional scale counts as no smaller than the conditional one, so that there is such a Gaussian.
    """
    (scale, scale_u), (shift, shift_u) = scale.chunk(2), shift.chunk(2)
    pull = strength * (scale / scale_u).clamp(max=1).square()
    weight = 1 + strength - pull
    return scale / weight.sqrt(), ((1 + strength) * shift - pull * shift_u) / weight


class Task(NamedTuple):
    """What a block is to invert.

    Attributes:
        z: shape (R, L, D), in the block's order.
        given: patches before them, which are known, shape (R, any, D).
        text: shape (R, S, txt_dim), with guidance twice as many rows, the conditional ones first; None without.
        angles: of all inputs, see `Rope`; None without rotary positions.
        guidance: its strength; 0 for none.
    """

    z: Tensor
    given: Tensor
    text: Tensor | None
    angles: Tensor | None
    guidance: float


class BlockSystem(TriangularSystem):
    """The inverse of one block: x_l = z_l scale_l(x_<l) + shift_l(x_<l), in the block's order."""

    ragged = True

    def __init__(self, block: MetaBlock, task: Task, graphs: Graphs | None = None) -> None:
        self.block, self.task, self.z, self.graphs = block, task, task.z, graphs
        self.storage = KeyValueStorage() if graphs is None else graphs.storage
        self.of_flow: tuple[LayeredSystem, int] | None = None  # what it is the layer of, and which one
        self._condition: Condition | None = None
        weight = block.proj_in.weight
        low = torch.is_autocast_enabled(self.z.device.type)
        dtype = torch.get_autocast_dtype(self.z.device.type) if low else weight.dtype
        network = len(weight), len(block.attn_blocks), self.prefix, bool(task.guidance)
        self.cost_key = ("starflow", tuple(self.z.shape), network, dtype, self.z.device, graphs is not None)
        self.gain_key = ("starflow", weakref.ref(block), task.guidance, dtype)

    @property
    def length(self) -> int:
        return self.z.shape[1]

    @property
    def identity(self) -> Mapping[str, str | int | float]:  # type: ignore[override]
        if self.of_flow is None:
            return {}
        flow, index = self.of_flow
        return {**flow.identity, "layer": index, "captured": self.graphs is not None}

    def initial(self) -> Tensor:
        self._condition = None  # a solve begins: the weights may have changed since the last one
        return self.z

    def resource(self) -> KeyValueStorage:
        return self.storage

    def evaluate(self, x: Tensor, window: Window) -> Tensor:
        if torch.is_grad_enabled():  # a function of all it depends on: everything at once, and nothing kept
            condition = self.condition()
            reads = Reads(Window.full(self.length), self.length, condition.prefix)
            return window.take(self._transform(x, self.z, reads, condition, None))
        with torch.inference_mode():
            if self._condition is None:
                self.storage.release()
                self._condition = self.condition()
            return self._decode(x, window, self._condition)

    def condition(self) -> Condition:
        """What the positions depend on besides one another."""
        _, given, text, angles, guidance = self.task
        return self.block.condition(text, given.repeat(2, 1, 1) if guidance else given, angles)

    @property
    def prefix(self) -> int:
        """Inputs before the first position."""
        text, start = self.task.text, self.block.sos_embed is not None
        return (0 if text is None else text.shape[1]) + start + self.task.given.shape[1]

    def affine(self, x: Tensor, reads: Reads) -> tuple[Tensor, Tensor]:
        """The logarithm of the scale, and the shift, at what is read, without guidance."""
        scale, shift = self.block.affine(x, self.condition(), reads)
        return scale.log(), shift

    def select(self, rows: Tensor) -> "BlockSystem | None":
        if self.graphs is not None:  # they are for one batch size
            return None
        both = torch.cat([rows, rows + len(self.z)]) if self.task.guidance else rows
        z, given, text = self.z[rows], self.task.given[rows], self.task.text
        task = self.task._replace(z=z, given=given, text=None if text is None else text[both])
        subset = BlockSystem(self.block, task)
        subset.storage = self.storage
        with torch.inference_mode():
            subset._condition = None if self._condition is None else self._condition.select(both)
            self.storage.select(both, self, subset)
        return subset

    def _decode(self, x: Tensor, window: Window, condition: Condition) -> Tensor:
        size, prefix = self.length, condition.prefix
        known = self.storage.claim(self, inputs=prefix + size)
        if self.graphs is not None and window.positions.step == 1 and size > 1:
            return self._replay(x, window, condition, self.graphs, known)
        reads = Reads.of(window, size, prefix, known, x.device)
        with_text = known < condition.text_size or self.block.sos_embed is None
        return self._transform(x, self.z, reads, condition, self.storage, with_text)

    def _replay(self, x: Tensor, window: Window, condition: Condition, graphs: Graphs, known: int) -> Tensor:
        size, prefix, storage = self.length, condition.prefix, self.storage
        if known < prefix:  # what comes before the first position is read once, apart
            self.block.hidden(condition.values[:, :0], condition, Reads(Window(range(1), 0), 1, prefix), storage)
        z, kept = graphs.keep("z", self.z), condition.kept(graphs)

        def evaluate(x: Tensor, start: Tensor, width: int, before: int) -> Tensor:
            reads = RowReads(start, width, before, prefix + size, size, prefix)
            return self._transform(x, z, reads, kept, storage)

        value = graphs.run(None, x, window, min(window.changed_from, max(known - prefix, 0)), evaluate)
        storage.note(prefix + size)
        return value

    def _transform(
        self,
        x: Tensor,
        z: Tensor,
        reads: Reads,
        condition: Condition,
        storage: KeyValueStorage | None,
        with_text: bool = True,
    ) -> Tensor:
        """f at the window's positions, shape (R, W, D)."""
        if not reads.size:
            return reads.complete(x[:, :0], z)
        if self.task.guidance:
            affine = self.block.affine(x.repeat(2, 1, 1), condition, reads.repeat(2), storage, with_text)
            scale, shift = guided(*affine, self.task.guidance)
        else:
            scale, shift = self.block.affine(x, condition, reads, storage, with_text)
        return reads.complete(torch.addcmul(shift, reads.targets(z), scale), z).to(x.dtype)
