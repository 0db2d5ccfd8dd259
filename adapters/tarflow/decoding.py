"""Decoding: the inverse of each block as a triangular system over a key-value cache with fixed storage.

Shapes: B batch (twice that with guidance), L positions, D values of a patch, W positions of the window.
"""

import weakref
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from parallel_decode.adapters.tarflow.changes import check_decodable
from parallel_decode.adapters.tarflow.guidance import Guidance
from parallel_decode.adapters.tarflow.model import MetaBlock
from parallel_decode.adapters.tarflow.weights import Weights
from parallel_decode.cached import KeyValueStorage, Reads, RowReads
from parallel_decode.cached.graphs import Graphs
from parallel_decode.system import LayeredSystem, TriangularSystem
from parallel_decode.window import Window

if TYPE_CHECKING:
    from parallel_decode.adapters.tarflow.base import Flow


def decoding_weights(
    block: MetaBlock, y: Tensor | None, guidance: Guidance, batch: int, dtype: torch.dtype, t: Tensor | None = None
) -> Weights:
    """A block's weights, prepared for decoding in this type; with guidance the conditional rows come first."""
    weights = block.weights(y, dtype, t)
    if guidance and weights.condition is not None:
        both = weights.condition, cast(Tensor, block.condition(None, t))
        weights = replace(weights, condition=torch.cat([c.expand(batch, -1, -1) for c in both]))
    if guidance and guidance.attn_temp != 1:
        temperatures = weights.pos_embed.new_tensor([1.0, guidance.attn_temp])
        weights = replace(weights, temperature=temperatures.repeat_interleave(batch)[:, None, None, None])
    return weights


class BlockSystem(TriangularSystem):
    """The inverse of one block: x_l = z_l exp(a_l(x_<l)) + b_l(x_<l), in the block's order."""

    ragged = True

    def __init__(
        self,
        block: MetaBlock,
        z: Tensor,
        y: Tensor | None,
        guidance: Guidance,
        storage: KeyValueStorage,
        graphs: Graphs | None = None,
        t: Tensor | None = None,
    ) -> None:
        self.block, self.z, self.y, self.guidance, self.storage = block, z, y, guidance, storage  # z: (B, L, D)
        self.graphs, self.t = graphs, t  # t: (B, 1)
        self.of_flow: tuple[FlowSystem, int] | None = None  # what it is the layer of, and which one
        self.weights: Weights | None = None
        self.own_dtype = block.pos_embed.dtype
        shape = (tuple(z.shape), block.pos_embed.shape[1], len(block.layers), bool(guidance))
        dtype = self._dtype()
        self.cost_key = ("tarflow", *shape, dtype, z.device, graphs is not None)
        self.gain_key = ("tarflow", weakref.ref(block), guidance.scale, guidance.what, guidance.rule, dtype)

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

    def select(self, rows: Tensor) -> "BlockSystem | None":
        if self.graphs is not None:  # they are for one batch size
            return None
        both = torch.cat([rows, rows + len(self.z)]) if self.guidance else rows
        y, t = (None if given is None else given[rows.to(given.device)] for given in (self.y, self.t))
        subset = BlockSystem(self.block, self.z[rows], y, self.guidance, self.storage, t=t)
        with torch.inference_mode():
            subset.weights = None if self.weights is None else self.weights.select(both)
            self.storage.select(both, self, subset)
        return subset

    def _dtype(self) -> torch.dtype:
        device = self.z.device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.own_dtype

    def _prepared(self, dtype: torch.dtype) -> Weights:
        return decoding_weights(self.block, self.y, self.guidance, len(self.z), dtype, self.t)

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
            scale, b = self.guidance.combine(a, b, reads, self.length)
        else:
            a, b = self.block.affine(values, weights, reads, storage)
            scale = a.exp()
        return reads.complete(torch.addcmul(b, reads.targets(z), scale), z).to(x.dtype)


class FlowSystem(LayeredSystem):
    """Sampling: the inverses of the blocks, the last block first."""

    def __init__(
        self,
        flow: "Flow",
        z: Tensor,
        y: Tensor | None,
        guidance: Guidance,
        graphs: Graphs | None = None,
        t: Tensor | None = None,
    ) -> None:
        self.flow, self.z, self.y, self.guidance, self.graphs, self.t = flow, z, y, guidance, graphs, t
        self.storage = KeyValueStorage()

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
        of_call: dict[str, str | int | float] = {"device": name, "dtype": str(low), "batch": len(self.z)}
        return {"model": self._model, **of_call, **self.guidance.identity}

    def _block(self, index: int) -> MetaBlock:
        return self.flow.blocks[self.depth - 1 - index]  # type: ignore[return-value]

    def _storage(self, block: MetaBlock, guidance: Guidance) -> KeyValueStorage:
        """One for all blocks, which it fits; where windows are captured its addresses stay, so there is one for each shape."""
        if self.graphs is None:
            return self.storage
        return self.graphs.first(("storage", block.pos_embed.shape, bool(guidance)), KeyValueStorage())

    def layer(self, index: int, value: Tensor | None) -> BlockSystem:
        if value is None:  # a solve begins
            check_decodable(self.flow)
            x = self.z * self.flow.var.sqrt().to(self.z)
        else:
            at = self.depth - index
            x = self.flow.repatched(self._block(index - 1).permuted(value), at, at - 1)
        block, guidance = self._block(index), self.guidance.of_layer(index)
        storage = self._storage(block, guidance)
        system = BlockSystem(block, block.permuted(x), self.y, guidance, storage, self.graphs, self.t)
        system.of_flow = self, index
        return system

    def output(self, value: Tensor) -> Tensor:
        return self.flow.unpatchify(self._block(self.depth - 1).permuted(value))
