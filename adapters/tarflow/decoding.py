"""Decoding: the inverse of each block as a triangular system over a key-value cache with fixed storage.

Shapes: B batch (twice that with guidance), L positions, D values of a patch, W positions of the window.
"""

import math
import weakref
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property
from numbers import Real
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from parallel_decode._options import check_kind
from parallel_decode.adapters.tarflow.changes import check_decodable
from parallel_decode.adapters.tarflow.model import MetaBlock
from parallel_decode.adapters.tarflow.weights import Weights
from parallel_decode.cached import KeyValueStorage, Reads, RowReads
from parallel_decode.cached.graphs import Graphs
from parallel_decode.system import LayeredSystem, TriangularSystem
from parallel_decode.window import Window

if TYPE_CHECKING:
    from parallel_decode.adapters.tarflow.flow import TarFlow


class Guidance:
    """How conditional and unconditional predictions combine (TarFlow, section on guidance).

    Attributes:
        scale: w in a_c + w (a_c - a_u); 0 leaves the unconditional pass out.
        what: which of "a" and "b" are guided.
        annealed: let w rise linearly over the positions, from 0 at the first to `scale` at the last.
        attn_temp: attention temperature of the unconditional branch.
    """

    def __init__(self, scale: float = 0.0, what: str = "ab", annealed: bool = False, attn_temp: float = 1.0) -> None:
        for name, value in (("guidance", scale), ("attn_temp", attn_temp)):
            check_kind(name, value, Real, "a number")
        check_kind("guide_what", what, str, "'a', 'b', 'ab' or ''")
        if not math.isfinite(scale) or scale < 0:
            raise ValueError(f"guidance is {scale}, expected a finite number >= 0")
        if set(what) - set("ab"):
            raise ValueError(f"guide_what is {what!r}, expected 'a', 'b', 'ab' or ''")
        if not (math.isfinite(attn_temp) and attn_temp > 0):
            raise ValueError(f"attn_temp is {attn_temp}, expected a finite number > 0")
        self.scale, self.what, self.annealed, self.attn_temp = scale, what, annealed, attn_temp

    def __bool__(self) -> bool:
        return self.scale > 0 and bool(self.what)

    def combine(self, a: Tensor, b: Tensor, reads: Reads, length: int) -> tuple[Tensor, Tensor]:
        """(2 B, W, D) -> (B, W, D): the conditional rows come first."""
        (a, a_u), (b, b_u) = a.chunk(2), b.chunk(2)
        w: float | Tensor = self.scale
        if self.annealed:
            positions = torch.arange(length, device=a.device).to(a)[None, :, None]
            w = w * reads.targets(positions.expand(len(a), -1, -1)) / (length - 1)
        return (a + w * (a - a_u) if "a" in self.what else a), (b + w * (b - b_u) if "b" in self.what else b)


def decoding_weights(block: MetaBlock, y: Tensor | None, guidance: Guidance, batch: int, dtype: torch.dtype) -> Weights:
    """A block's weights, prepared for decoding in this type; with guidance the conditional rows come first."""
    weights = block.weights(y, dtype)
    if guidance and weights.condition is not None:
        both = weights.condition, cast(Tensor, block.condition(None))
        weights = replace(weights, condition=torch.cat([c.expand(batch, -1, -1) for c in both]))
    if guidance and guidance.attn_temp != 1:
        temperatures = weights.pos_embed.new_tensor([1.0, guidance.attn_temp])
        weights = replace(weights, temperature=temperatures.repeat_interleave(batch)[:, None, None, None])
    return weights


class BlockSystem(TriangularSystem):
    """The inverse of one block: x_l = z_l exp(a_l(x_<l)) + b_l(x_<l), in the block's order."""

    ragged = True
    prefix = 0

    def __init__(
        self,
        block: MetaBlock,
        z: Tensor,
        y: Tensor | None,
        guidance: Guidance,
        storage: KeyValueStorage,
        graphs: Graphs | None = None,
    ) -> None:
        self.block, self.z, self.y, self.guidance, self.storage = block, z, y, guidance, storage  # z: (B, L, D)
        self.graphs = graphs
        self.of_flow: tuple[FlowSystem, int] | None = None  # what it is the layer of, and which one
        self.weights: Weights | None = None
        self.own_dtype = block.pos_embed.dtype
        shape = (tuple(z.shape), block.pos_embed.shape[1], len(block.attn_blocks), bool(guidance))
        dtype = self._dtype()
        self.cost_key = ("tarflow", *shape, dtype, z.device, graphs is not None)
        self.gain_key = ("tarflow", weakref.ref(block), guidance.scale, guidance.what, dtype)

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
        self.weights = None  # a solve begins: they may have changed since the last one
        return self.z

    def resource(self) -> KeyValueStorage:
        return self.storage

    def evaluate(self, x: Tensor, window: Window) -> Tensor:
        device, dtype = x.device.type, self._dtype()
        with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
            if torch.is_grad_enabled():  # a function of x and the parameters: everything at once, and nothing kept
                reads = Reads(Window.full(self.length), self.length)
                return window.take(self._transform(x, self.z, reads, self._prepared(dtype), None))
            with torch.inference_mode():
                return self._decode(x, window, dtype)

    def affine(self, x: Tensor, reads: Reads) -> tuple[Tensor, Tensor]:
        """a and b at what is read, without guidance."""
        return self.block.affine(reads.take(x), self.block.weights(self.y), reads)

    def select(self, rows: Tensor) -> "BlockSystem | None":
        if self.graphs is not None:  # they are for one batch size
            return None
        both = torch.cat([rows, rows + len(self.z)]) if self.guidance else rows
        y = None if self.y is None else self.y[rows.to(self.y.device)]
        subset = BlockSystem(self.block, self.z[rows], y, self.guidance, self.storage)
        with torch.inference_mode():
            subset.weights = None if self.weights is None else self.weights.select(both)
            self.storage.select(both, self, subset)
        return subset

    def _dtype(self) -> torch.dtype:
        device = self.z.device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.own_dtype

    def _prepared(self, dtype: torch.dtype) -> Weights:
        return decoding_weights(self.block, self.y, self.guidance, len(self.z), dtype)

    def _decode(self, x: Tensor, window: Window, dtype: torch.dtype) -> Tensor:
        if self.weights is None or self.weights.dtype != dtype:
            self.storage.release()
            weights = self._prepared(dtype)
            self.weights = weights if self.graphs is None else weights.kept(self.graphs, self.block)
        weights, storage, size = self.weights, self.storage, self.length
        known = storage.claim(self, inputs=size)
        if self.graphs is not None and window.positions.step == 1 and size > 1:
            z = self.graphs.keep("z", self.z)

            def evaluate(x: Tensor, start: Tensor, width: int, before: int) -> Tensor:
                return self._transform(x, z, RowReads(start, width, before, size, size), weights, storage)

            value = self.graphs.run(self.block, x, window, min(window.changed_from, known), evaluate)
            storage.note(size)
            return value
        reads = Reads.of(window, size, known=known, device=x.device)
        return self._transform(x, self.z, reads, weights, storage)

    def _transform(
        self, x: Tensor, z: Tensor, reads: Reads, weights: Weights, storage: KeyValueStorage | None
    ) -> Tensor:
        """f at the window's positions, shape (B, W, D)."""
        values = reads.take(x)
        if self.guidance:
            a, b = self.block.affine(values.repeat(2, 1, 1), weights, reads.repeat(2), storage)
            a, b = self.guidance.combine(a, b, reads, self.length)
        else:
            a, b = self.block.affine(values, weights, reads, storage)
        return reads.complete(torch.addcmul(b, reads.targets(z), a.exp()), z).to(x.dtype)


class FlowSystem(LayeredSystem):
    """Sampling: the inverses of the blocks, the last block first."""

    def __init__(
        self, flow: "TarFlow", z: Tensor, y: Tensor | None, guidance: Guidance, graphs: Graphs | None = None
    ) -> None:
        self.flow, self.z, self.y, self.guidance, self.graphs = flow, z, y, guidance, graphs
        self.storage = KeyValueStorage() if graphs is None else graphs.storage

    @property
    def depth(self) -> int:
        return len(self.flow.blocks)

    @cached_property
    def _model(self) -> str:
        return self.flow.fingerprint()

    @property
    def identity(self) -> dict[str, str | int | float]:
        device = self.z.device
        low = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else self.flow.var.dtype
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        guidance = self.guidance.scale
        return {"model": self._model, "device": name, "dtype": str(low), "batch": len(self.z), "guidance": guidance}

    def _block(self, index: int) -> MetaBlock:
        return self.flow.blocks[self.depth - 1 - index]  # type: ignore[return-value]

    def layer(self, index: int, value: Tensor | None) -> BlockSystem:
        if value is None:  # a solve begins
            check_decodable(self.flow)
        x = self.z * self.flow.var.sqrt().to(self.z) if value is None else self._block(index - 1).permuted(value)
        block = self._block(index)
        system = BlockSystem(block, block.permuted(x), self.y, self.guidance, self.storage, self.graphs)
        system.of_flow = self, index
        return system

    def output(self, value: Tensor) -> Tensor:
        return self.flow.unpatchify(self._block(self.depth - 1).permuted(value))
