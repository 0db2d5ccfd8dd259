"""The network: a stack of causal transformers, with parameters and buffers named as in Apple's public checkpoints.

One forward serves density, training, windows, single positions and probes. It takes the weights from the modules themselves, or prepared for
decoding (`weights.py`), and reads what a window needs over a key-value cache, or everything.

Shapes: B batch, L patches (positions), D values of a patch, C channels of the transformer, T positions read, W positions of the window.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel_decode.adapters.tarflow.weights import HEAD_DIM, Function, Use, Weights, plain
from parallel_decode.cached import KeyValueStorage, Reads
from parallel_decode.window import Window


class Attention(nn.Module):
    """The parameters of causal self-attention."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)


class MLP(nn.Module):
    """The parameters of two linear layers around a GELU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.main = nn.Sequential(nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels))


class Layer(NamedTuple):
    """One transformer layer, of functions of rows of numbers, (N, in) to (N, out): modules, or what was prepared of them."""

    norm: Function
    qkv: Function
    proj: Function
    mlp_norm: Function
    up: Function
    down: Function

    def __call__(
        self,
        h: Tensor,
        reads: Reads,
        storage: KeyValueStorage | None = None,
        index: int = 0,
        temperature: Tensor | None = None,
    ) -> Tensor:
        """The residual stream at what is read, shape (B T, C) to the same.

        Args:
            h: before the layer.
            reads: which positions those are, and what they attend to.
            storage: of the keys and values of all positions; without it there are only those that are read.
            index: of this layer in it.
            temperature: of the attention of each row, shape (B, 1, 1, 1).
        """
        rows, channels = h.shape
        qkv = self.qkv(self.norm(h)).view(rows // reads.size, reads.size, 3, -1, HEAD_DIM)
        q, kv = qkv[:, :, 0].transpose(1, 2), qkv[:, :, 1:]
        keys, values = kv.permute(2, 0, 3, 1, 4) if storage is None else storage.update(index, kv, reads)
        if temperature is not None:
            q = (q / temperature).to(keys.dtype)
        y = F.scaled_dot_product_attention(
            q, keys, values, attn_mask=reads.mask, is_causal=reads.causal, scale=HEAD_DIM**-0.5
        )
        h = h + self.proj(y.transpose(1, 2).reshape(rows, channels))
        return h + self.down(F.gelu(self.up(self.mlp_norm(h))))


class AttentionBlock(nn.Module):
    """The parameters of a layer."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.attention = Attention(channels)
        self.mlp = MLP(channels)

    def layer(self, use: Use) -> Layer:
        """The layer, of what `use` makes of its modules."""
        attention, mlp = self.attention, self.mlp
        modules = attention.norm, attention.qkv, attention.proj, mlp.norm, mlp.main[0], mlp.main[2]
        return Layer(*map(use, modules))

    def forward(self, h: Tensor, reads: Reads, *more: Any) -> Tensor:
        """See `Layer`."""
        return self.layer(plain)(h, reads, *more)


class MetaBlock(nn.Module):
    """One block of the flow: an affine autoregressive transform whose a and b are a causal transformer's."""

    def __init__(
        self, patch_dim: int, channels: int, num_patches: int, num_layers: int, flip: bool, nvp: bool, num_classes: int
    ) -> None:
        super().__init__()
        self.flip, self.nvp = flip, nvp
        self.proj_in = nn.Linear(patch_dim, channels)
        self.pos_embed = nn.Parameter(torch.randn(num_patches, channels) * 1e-2)
        self.class_embed = nn.Parameter(torch.randn(num_classes, 1, channels) * 1e-2) if num_classes else None
        self.attn_blocks = nn.ModuleList(AttentionBlock(channels) for _ in range(num_layers))
        self.proj_out = nn.Linear(channels, patch_dim * (2 if nvp else 1))
        nn.init.zeros_(self.proj_out.weight)

    def permuted(self, x: Tensor, dim: int = 1) -> Tensor:
        """x in the block's order, and back: every second block reads the patches from last to first."""
        return x.flip(dim) if self.flip else x

    def condition(self, y: Tensor | None) -> Tensor | None:
        """The class embedding, shape (B or 1, 1, C): their mean where y is None or negative; None without classes."""
        if self.class_embed is None:
            return None
        mean = self.class_embed.mean(0, keepdim=True)
        y = None if y is None else y.to(mean.device)
        return mean if y is None else torch.where((y < 0)[:, None, None], mean, self.class_embed[y.clamp(min=0)])

    def weights(self, y: Tensor | None, use: Use = plain, dtype: torch.dtype | None = None) -> Weights:
        """What `use` makes of the block's modules, and embeddings, for these classes."""
        blocks = cast(list[AttentionBlock], list(self.attn_blocks))
        layers: Sequence[Any] = blocks if use is plain else [block.layer(use) for block in blocks]
        pos_embed, dtype = self.permuted(self.pos_embed, 0), dtype or self.proj_in.weight.dtype
        return Weights(dtype, use(self.proj_in), use(self.proj_out), layers, pos_embed, self.condition(y))

    def affine(
        self, x: Tensor, w: Weights, reads: Reads, storage: KeyValueStorage | None = None
    ) -> tuple[Tensor, Tensor]:
        """a and b.

        Args:
            x: the values that are read, in the block's order, shape (B, T, D).
            w: the weights.
            reads: which positions those are.
            storage: the key-value cache, or None.

        Returns:
            Each at the window's positions but position 0, which depends on nothing: shape (B, W, D), float32 at least.
        """
        batch, size, dim = x.shape
        if not size:
            return x, x
        h = w.proj_in(x.reshape(-1, dim).to(w.dtype)).view(batch, size, -1) + reads.embedding(w.pos_embed)
        h = (h if w.condition is None else h + w.condition).flatten(0, 1)
        for index, layer in enumerate(w.layers):
            h = layer(h, reads, storage, index, w.temperature)
        h = reads.outputs(h.view(batch, size, -1))
        out = w.proj_out(h.reshape(-1, h.shape[2]).to(w.dtype)).view(batch, h.shape[1], -1)
        out = out if out.element_size() > 2 else out.float()
        a, b = out.chunk(2, dim=-1) if self.nvp else (torch.zeros_like(out), out)
        return a, b

    def forward(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """z, shape (B, L, D), and the log-determinant, shape (B,)."""
        x = self.permuted(x)
        reads = Reads(Window.full(x.shape[1]), x.shape[1])
        a, b = self.affine(reads.take(x), self.weights(y), reads)
        return self.permuted(reads.complete((reads.targets(x) - b) * (-a).exp(), x)), -a.sum((1, 2))
