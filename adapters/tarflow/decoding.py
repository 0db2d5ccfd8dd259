"""Decoding: the inverse of each block as a triangular system over a key-value cache with fixed storage.

Here the transformer of `model.py` is written out in few operations over prepared weights: at small batches the time of a pass is
that of calling them. Position l is computed by the transformer at position l - 1.

Shapes: B batch (twice that with guidance), L positions, D values of a patch, C channels, H heads, T positions read,
W positions of the window.
"""

import copy
import math
import weakref
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel_decode._claims import check_unclaimed
from parallel_decode.adapters.tarflow.graphs import Graphs
from parallel_decode.adapters.tarflow.model import HEAD_DIM, AttentionBlock, MetaBlock
from parallel_decode.adapters.tarflow.storage import Cache, Storage
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
        if not math.isfinite(scale) or scale < 0:
            raise ValueError(f"guidance is {scale}, expected a finite number >= 0")
        if set(what) - set("ab"):
            raise ValueError(f"guide_what is {what!r}, expected 'a', 'b', 'ab' or ''")
        if not (math.isfinite(attn_temp) and attn_temp > 0):
            raise ValueError(f"attn_temp is {attn_temp}, expected a finite number > 0")
        self.scale, self.what, self.annealed, self.attn_temp = scale, what, annealed, attn_temp

    def __bool__(self) -> bool:
        return self.scale > 0 and bool(self.what)

    def combine(self, a: Tensor, b: Tensor, positions: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """(2 B, W, D) -> (B, W, D): the conditional rows come first. positions: (B or 1, W)."""
        (a, a_u), (b, b_u) = a.chunk(2), b.chunk(2)
        w = self.scale * positions[..., None].to(a) / (length - 1) if self.annealed else self.scale
        return (a + w * (a - a_u) if "a" in self.what else a), (b + w * (b - b_u) if "b" in self.what else b)


class _Linear(NamedTuple):
    weight: Tensor  # (in, out)
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """(N, in) -> (N, out)"""
        return torch.addmm(self.bias, x, self.weight)


class _Norm(NamedTuple):
    """A LayerNorm in float32 at least, whatever the type of what goes in and comes out."""

    weight: Tensor
    bias: Tensor
    eps: float

    def __call__(self, h: Tensor, dtype: torch.dtype) -> Tensor:
        """(N, C) -> (N, C)"""
        wide = self.weight.dtype
        h = h if h.dtype == wide else h.to(wide)
        y = torch.layer_norm(h, self.weight.shape, self.weight, self.bias, self.eps)
        return y if dtype == wide else y.to(dtype)


class _Layer(NamedTuple):
    """The weights of one transformer layer."""

    norm: _Norm
    mlp_norm: _Norm
    qkv: _Linear
    proj: _Linear
    up: _Linear
    down: _Linear


class Network:
    """The weights of a block in the type that it computes in."""

    def __init__(self, block: MetaBlock, y: Tensor | None, guidance: Guidance, batch: int, dtype: torch.dtype) -> None:
        self.dtype, self.nvp = dtype, block.nvp
        self.layers = []
        for layer in cast(list[AttentionBlock], list(block.attn_blocks)):
            attention, (up, _, down) = layer.attention, cast(tuple[nn.Linear, nn.GELU, nn.Linear], layer.mlp.main)
            linear = [self._linear(module) for module in (attention.qkv, attention.proj, up, down)]
            self.layers.append(_Layer(self._norm(attention.norm), self._norm(layer.mlp.norm), *linear))
        self.proj_in, self.proj_out = self._linear(block.proj_in), self._linear(block.proj_out)
        self.pos_embed = block.permuted(block.pos_embed, 0)
        self.condition, self.temp = block.condition(y), None  # (B, 1, C); (B, 1, 1, 1), of the attention of each row
        if guidance:
            if self.condition is not None:
                both = self.condition, block.condition(None)
                self.condition = torch.cat([c.expand(batch, -1, -1) for c in both if c is not None])
            if guidance.attn_temp != 1:
                temps = self.pos_embed.new_tensor([1.0, guidance.attn_temp])
                self.temp = temps.repeat_interleave(batch)[:, None, None, None]

    def _linear(self, linear: nn.Linear) -> _Linear:
        weight, bias = linear.weight.to(self.dtype).t(), linear.bias.to(self.dtype)
        if weight.device.type == "cpu":
            weight = weight.contiguous()  # up to twice as fast for few rows
        return _Linear(weight, bias)

    def _norm(self, norm: nn.LayerNorm) -> _Norm:
        wide = torch.promote_types(norm.weight.dtype, torch.float32)
        return _Norm(norm.weight.to(wide), norm.bias.to(wide), norm.eps)

    def embed(self, x: Tensor, pos_embed: Tensor) -> Tensor:
        """Values (B, T, D) and the embeddings of their positions, (T, C) or (B, T, C), to (B, T, C)."""
        batch, size, dim = x.shape
        h = self.proj_in(x.reshape(-1, dim).to(self.dtype)).view(batch, size, -1) + pos_embed
        return h if self.condition is None else h + self.condition

    def layer(self, layer: _Layer, h: Tensor, read: "_Read | _RaggedRead", cache: "Cache | None") -> Tensor:
        """One layer, (B, T, C) to the same; keys and values go through the cache, if there is one."""
        batch, size, channels = h.shape
        h = h.view(-1, channels)
        q, kv = layer.qkv(layer.norm(h, self.dtype)).split_with_sizes((channels, 2 * channels), 1)
        q = q.view(batch, size, -1, HEAD_DIM).transpose(1, 2)
        if self.temp is not None:
            q = (q / self.temp).to(self.dtype)
        if cache is None:
            k, v = kv.view(batch, size, 2, -1, HEAD_DIM).permute(2, 0, 3, 1, 4)
        else:
            read.write(cache.kv, kv.view(batch, size, -1))
            k, v = cache.keys.narrow(2, 0, read.stop), cache.values.narrow(2, 0, read.stop)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=read.mask, is_causal=read.causal, scale=HEAD_DIM**-0.5)
        h = h + layer.proj(y.transpose(1, 2).reshape(-1, channels))
        h = h + layer.down(F.gelu(layer.up(layer.mlp_norm(h, self.dtype))))
        return h.view(batch, size, channels)

    def step(self, x: Tensor, position: int, caches: Sequence[Cache]) -> Tensor:
        """The same for the one position whose value is x, shape (B, D), in as few operations as can be: (B, C)."""
        h = self.proj_in(x.to(self.dtype)) + self.pos_embed[position]
        if self.condition is not None:
            h = h + self.condition[:, 0]
        batch, channels = h.shape
        for layer, cache in zip(self.layers, caches, strict=True):
            qkv = layer.qkv(layer.norm(h, self.dtype))
            cache.kv[:, position] = qkv[:, channels:]
            q = qkv[:, :channels].view(batch, -1, 1, HEAD_DIM)
            if self.temp is not None:
                q = (q / self.temp).to(self.dtype)
            k, v = cache.keys[:, :, : position + 1], cache.values[:, :, : position + 1]
            y = F.scaled_dot_product_attention(q, k, v, scale=HEAD_DIM**-0.5)
            h = h + layer.proj(y.view(batch, channels))
            h = h + layer.down(F.gelu(layer.up(layer.mlp_norm(h, self.dtype))))
        return h

    def affine(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """a and b, shape (B, W, D), from (B, W, C)."""
        out = self.proj_out(h.reshape(-1, h.shape[2]).to(self.dtype)).view(*h.shape[:2], -1)
        out = out.to(torch.promote_types(self.dtype, torch.float32))
        a, b = out.chunk(2, dim=2) if self.nvp else (torch.zeros_like(out), out)
        return a, b

    def tensors(self) -> list[Tensor]:
        """All weights."""
        parts = [part for layer in self.layers for part in layer] + [self.proj_in, self.proj_out]
        return [self.pos_embed, *(tensor for part in parts for tensor in (part.weight, part.bias))]

    def select(self, rows: Tensor) -> "Network":
        """The same for some rows of the batch."""
        subset = copy.copy(self)
        if self.condition is not None and len(self.condition) > 1:
            subset.condition = self.condition[rows]
        if self.temp is not None:
            subset.temp = self.temp[rows]
        return subset


class _Read:
    """Which positions a pass reads, and how they attend to what is cached: all from the first that changed.

    A cached key belongs to the values that the positions up to its own hold now.
    """

    def __init__(self, window: Window, changed: int, at: Tensor) -> None:
        wanted = window.positions
        wanted = wanted[1:] if wanted[0] == 0 else wanted  # position 0 depends on nothing
        first, self.stop = min(wanted[0] - 1, changed), wanted[-1]
        self.window, self.read = window, slice(first, self.stop)
        self.out = None if self.stop - first == len(wanted) else slice(wanted[0] - 1 - first, None, wanted.step)
        self.positions = at[wanted.start : wanted.stop : wanted.step]
        self.single = self.stop - first == 1
        self.causal = first == 0 and self.stop > 1
        self.mask = None if first in (0, self.stop - 1) else at[: self.stop] <= at[self.read, None]

    def take(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, T, D)"""
        return x[:, self.read]

    def embedding(self, pos_embed: Tensor) -> Tensor:
        """(L, C) -> (T, C)"""
        return pos_embed[self.read]

    def write(self, cache: Tensor, kv: Tensor) -> None:
        """kv, shape (B, T, 2 C), to its positions of the cache, shape (B, L, 2 C)."""
        cache[:, self.read] = kv

    def wanted(self, h: Tensor) -> Tensor:
        """What the window's positions, all but position 0, are computed from: (B, T, C) -> (B, W, C)"""
        return h if self.out is None else h[:, self.out]

    def finish(self, a: Tensor, b: Tensor, z: Tensor) -> Tensor:
        """z exp(a) + b at the window's positions, shape (B, W, D); z has shape (B, L, D)."""
        if self.window.positions[0] == 0:
            a, b = (F.pad(s, (0, 0, 1, 0)) for s in (a, b))
        return torch.addcmul(b, z[:, self.window.slice], a.exp())


class _RaggedRead:
    """The same where every row has a window of its own. Shapes do not depend on where the windows lie.

    Args:
        start: the first position of each row's window, shape (B, 1).
        width: W. What would lie beyond the last position is that position again.
        changed: how many positions before its window a row's first change lies, at most.
        stop: nothing from here on is needed.
        at: 0..L-1.
        copies: how often the transformer has the batch: twice with guidance.
    """

    causal = False

    def __init__(self, start: Tensor, width: int, changed: int, stop: int, at: Tensor, copies: int) -> None:
        before = max(changed, 1)
        size = min(before + width - 1, len(at) - 1)
        first = (start - before).clamp(0, len(at) - 1 - size)
        self.stop = stop
        self.positions = (start + at[:width]).clamp(max=len(at) - 1)  # (B, W)
        self.index = first + at[:size]  # (B, T)
        self.out = (self.positions - 1 - first).clamp(min=0)[..., None]  # (B, W, 1), into T
        self.rows = torch.arange(len(start), device=at.device)[:, None]
        self.all_rows = torch.arange(len(start) * copies, device=at.device)[:, None]
        self.all_index = self.index.repeat(copies, 1)
        self.mask = (at[:stop] <= self.all_index[..., None])[:, None]  # (B, 1, T, stop)

    def take(self, x: Tensor) -> Tensor:
        return x[self.rows, self.index]

    def embedding(self, pos_embed: Tensor) -> Tensor:
        return pos_embed[self.all_index]

    def write(self, cache: Tensor, kv: Tensor) -> None:
        # what lies after a row's window stays in the cache, masked, and 0 * NaN is NaN
        cache[self.all_rows, self.all_index] = kv.nan_to_num()

    def wanted(self, h: Tensor) -> Tensor:
        out = self.out.repeat(len(h) // len(self.out), 1, 1)
        return h.gather(1, out.expand(-1, -1, h.shape[2]))

    def finish(self, a: Tensor, b: Tensor, z: Tensor) -> Tensor:
        z = z[self.rows, self.positions]
        return torch.where((self.positions == 0)[..., None], z, torch.addcmul(b, z, a.exp()))


class BlockSystem(TriangularSystem):
    """The inverse of one block: x_l = z_l exp(a_l(x_<l)) + b_l(x_<l), in the block's order."""

    ragged = True

    def __init__(
        self,
        block: MetaBlock,
        z: Tensor,
        y: Tensor | None,
        guidance: Guidance,
        storage: Storage,
        graphs: Graphs | None = None,
    ) -> None:
        self.block, self.z, self.y, self.guidance, self.storage = block, z, y, guidance, storage  # z: (B, L, D)
        self.graphs = graphs
        self.at = torch.arange(z.shape[1], device=z.device)
        self.dtype, self.heads = block.proj_in.weight.dtype, block.heads
        self.network: Network | None = None
        device = z.device.type
        low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.dtype
        shape = (tuple(z.shape), block.proj_in.out_features, len(block.attn_blocks), bool(guidance))
        self.cost_key = ("tarflow", *shape, low, z.device, graphs is not None)
        self.gain_key = ("tarflow", weakref.ref(block), guidance.scale, guidance.what, low)

    @property
    def length(self) -> int:
        return self.z.shape[1]

    def initial(self) -> Tensor:
        self.network = None  # a solve begins: the weights may have changed since the last one
        return self.z

    def resource(self) -> Storage:
        return self.storage

    def evaluate(self, x: Tensor, window: Window) -> Tensor:
        check_unclaimed(self.storage)
        if self.length == 1 or (window.positions[-1] == 0 and window.shift is None):
            return self.z[:, :1]  # the first position depends on nothing
        device, dtype = x.device.type, self.dtype
        autocast = torch.is_autocast_enabled(device)
        if autocast:
            dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False) if autocast else nullcontext():
            if torch.is_grad_enabled():  # a function of x and the parameters: everything at once, and nothing kept
                full = Window.full(self.length)
                network = self._load(dtype)
                nothing = [None] * len(network.layers)
                return window.take(self._transform(x, self.z, _Read(full, 0, self.at), network, nothing))
            with torch.inference_mode():
                return self._decode(x, window, dtype)

    def select(self, rows: Tensor) -> "BlockSystem | None":
        if self.graphs is not None:  # they are for one batch size
            return None
        both = torch.cat([rows, rows + len(self.z)]) if self.guidance else rows
        y = None if self.y is None else self.y[rows.to(self.y.device)]
        subset = BlockSystem(self.block, self.z[rows], y, self.guidance, self.storage)
        if self.network is not None and self.storage.owner is self:
            with torch.inference_mode():
                subset.network = self.network.select(both)
                self.storage.select(both)
            self.storage.owner = subset
        return subset

    def _load(self, dtype: torch.dtype) -> Network:
        network = Network(self.block, self.y, self.guidance, len(self.z), dtype)
        return (
            network if self.graphs is None or torch.is_grad_enabled() else self.graphs.keep_network(self.block, network)
        )

    def _decode(self, x: Tensor, window: Window, dtype: torch.dtype) -> Tensor:
        if self.network is None or self.network.dtype != dtype:
            self.network, self.storage.owner = self._load(dtype), None
        network, copies, changed = self.network, 2 if self.guidance else 1, window.changed_from
        if self.storage.owner is not self:
            layers, channels = len(network.layers), network.pos_embed.shape[1]
            self.storage.claim(self, (layers, copies * len(x), self.length, 2 * channels), network.proj_in.weight)
            changed = 0
        caches = self.storage.caches
        if self.graphs is not None and window.positions.step == 1:
            z = self.graphs.keep("z", self.z)

            def evaluate(x: Tensor, start: Tensor, width: int, before: int) -> Tensor:
                read = _RaggedRead(start, width, before, self.length, self.at, copies)
                return self._transform(x, z, read, network, caches)

            return self.graphs.run(self.block, x, window, changed, evaluate)
        if window.shift is None:
            return self._transform(x, self.z, _Read(window, changed, self.at), network, caches)
        first, width = window.positions[0], len(window.positions)
        last = window.positions[-1] + int(window.shift.max()) if x.device.type == "cpu" else self.length
        read = _RaggedRead(first + window.shift[:, None], width, first - changed, last, self.at, copies)
        return self._transform(x, self.z, read, network, caches)

    def _transform(
        self, x: Tensor, z: Tensor, read: _Read | _RaggedRead, network: Network, caches: Sequence[Cache | None]
    ) -> Tensor:
        """f at the window's positions, shape (B, W, D)."""
        values = read.take(x)
        if self.guidance:
            values = values.repeat(2, 1, 1)
        if isinstance(read, _Read) and read.single and caches[0] is not None:
            h = network.step(values[:, 0], read.stop - 1, cast(Sequence[Cache], caches))[:, None]
        else:
            h = network.embed(values, read.embedding(network.pos_embed))
            for layer, cache in zip(network.layers, caches, strict=True):
                h = network.layer(layer, h, read, cache)
            h = read.wanted(h)
        a, b = network.affine(h)
        if self.guidance:
            a, b = self.guidance.combine(a, b, read.positions, self.length)
        return read.finish(a, b, z).to(x.dtype)


class FlowSystem(LayeredSystem):
    """Sampling: the inverses of the blocks, the last block first."""

    def __init__(
        self, flow: "TarFlow", z: Tensor, y: Tensor | None, guidance: Guidance, graphs: Graphs | None = None
    ) -> None:
        self.flow, self.z, self.y, self.guidance, self.graphs = flow, z, y, guidance, graphs
        self.storage = Storage() if graphs is None else graphs.storage

    @property
    def depth(self) -> int:
        return len(self.flow.blocks)

    @property
    def identity(self) -> dict[str, str | int | float]:
        device = self.z.device
        low = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else self.flow.var.dtype
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        model, guidance = self.flow.fingerprint(), self.guidance.scale
        return {"model": model, "device": name, "dtype": str(low), "batch": len(self.z), "guidance": guidance}

    def _block(self, index: int) -> MetaBlock:
        return self.flow.blocks[self.depth - 1 - index]  # type: ignore[return-value]

    def layer(self, index: int, value: Tensor | None) -> BlockSystem:
        x = self.z * self.flow.var.sqrt().to(self.z) if value is None else self._block(index - 1).permuted(value)
        block = self._block(index)
        return BlockSystem(block, block.permuted(x), self.y, self.guidance, self.storage, self.graphs)

    def output(self, value: Tensor) -> Tensor:
        return self.flow.unpatchify(self._block(self.depth - 1).permuted(value))
