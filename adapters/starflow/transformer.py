"""The layers of the transformers, with parameters and buffers named as in the published checkpoints.

Shapes: B batch, T inputs read, C channels, H heads, D values of a head.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel_decode.adapters.starflow.config import Shape
from parallel_decode.adapters.tarflow.changes import built
from parallel_decode.adapters.tarflow.transformer import LayerNorm
from parallel_decode.cached import KeyValueStorage, Reads


@built
class RMSNorm(nn.Module):
    """x / rms(x) (1 + weight), in float32 at least."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.rms_norm(x.to(wide), self.weight.shape, 1 + self.weight.to(wide), eps=1e-6).to(x.dtype)


def _norm(kind: str, channels: int) -> nn.Module:
    return LayerNorm(channels) if kind == "layer_norm" else RMSNorm(channels) if kind == "rms_norm" else nn.Identity()


@dataclass(frozen=True)
class Rope:
    """Rotary positions: of a place in a text, and of height, width and frame.

    Attributes:
        head_dim: D.
        side: height and width of a picture, in patches, that places are scaled to.
        timed: whether eight of the D / 2 pairs belong to time, in which a text precedes a picture.
        one_d: count text and patches through, as language models do.
    """

    head_dim: int
    side: int
    timed: bool
    one_d: bool = False

    def __call__(self, text: int, frames: int, height: int, width: int) -> Tensor:
        """Angles of a text and the patches of pictures, shape (text + frames height width, D / 2), float64 on the CPU."""
        pairs, count, scale = self.head_dim // 2, height * width, self.side / math.sqrt(height * width)
        if self.one_d:
            return torch.arange(text + frames * count).double()[:, None] * _frequencies(pairs)
        places = torch.cartesian_prod(*(torch.arange(n).double() for n in (frames, height, width))).view(-1, 3)
        texts = F.pad(torch.arange(text).double()[:, None] * (self.side / max(text, 1)), (0, 2))
        time, down, right = torch.cat([texts, places * places.new_tensor([1, scale, scale])]).T[..., None]
        space = _frequencies(pairs // 2 - 4 * self.timed)
        return torch.cat([down * space, right * space, *([time * _frequencies(8)] if self.timed else [])], 1)


def _frequencies(count: int) -> Tensor:
    return 1e4 ** -(torch.arange(count).double() / max(count, 1))


def rotate(x: Tensor, turn: Tensor, halves: bool) -> Tensor:
    """Turn the pairs of a head by angles.

    Args:
        x: shape (B, T, H, D).
        turn: cosines and sines, shape (B or none, T, 2, 1, D / 2).
        halves: whether a pair is i and i + D / 2, or 2 i and 2 i + 1.
    """
    cos, sin = turn.unbind(-3)
    if halves:
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)
    a, b = x[..., ::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2).to(x.dtype)


@built
class Attention(nn.Module):
    """Self-attention with what is read, and before it what a storage holds."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.shape = s
        self.norm = _norm(s.norm_type, s.channels)
        heads = s.num_heads * s.head_dim
        self.qkv = nn.Linear(s.channels, heads + 2 * s.num_kv_heads * s.head_dim, bias=s.use_bias)
        self.proj = nn.Linear(heads, s.channels, bias=s.use_bias)
        self.query_norm = RMSNorm(s.head_dim) if s.use_qk_norm else None
        self.key_norm = RMSNorm(s.head_dim) if s.use_qk_norm else None
        self.post_norm = RMSNorm(s.channels) if s.use_post_norm else None

    def forward(
        self, h: Tensor, reads: Reads, turn: Tensor | None, storage: KeyValueStorage | None = None, index: int = 0
    ) -> Tensor:
        """What attention adds to the residual stream.

        Args:
            h: the residual stream, shape (B, T, C).
            reads: which inputs those are, and what they attend to.
            turn: see `rotate`; None without rotary positions.
            storage: of the keys (turned) and values of all inputs; without it there are only those that are read.
            index: of this layer in it.
        """
        s = self.shape
        heads = self.qkv(self.norm(h)).unflatten(2, (-1, s.head_dim))
        q, k, v = heads.split([s.num_heads, s.num_kv_heads, s.num_kv_heads], 2)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        if turn is not None:
            q, k = (rotate(x, turn, s.hf_style_rope) for x in (q, k))
        kv = torch.stack([k, v], 2)
        keys, values = kv.permute(2, 0, 3, 1, 4) if storage is None else storage.update(index, kv, reads)
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            keys,
            values,
            attn_mask=reads.mask,
            is_causal=reads.causal,
            scale=s.head_dim**-0.5,
            enable_gqa=s.num_heads != s.num_kv_heads,
        )
        y = self.proj(y.transpose(1, 2).flatten(2))
        return y if self.post_norm is None else self.post_norm(y)  # type: ignore[no-any-return]


@built
class MLP(nn.Module):
    """Two linear layers around a GELU, or SwiGLU."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.norm = _norm(s.norm_type, s.channels)
        self.post_norm = RMSNorm(s.channels) if s.use_post_norm else None
        inner = s.channels * s.expansion
        self.swiglu = s.use_swiglu
        if s.use_swiglu:
            self.gate_proj = nn.Linear(s.channels, inner, bias=s.use_bias)
            self.up_proj = nn.Linear(s.channels, inner, bias=s.use_bias)
            self.down_proj = nn.Linear(inner, s.channels, bias=s.use_bias)
        else:
            up, down = nn.Linear(s.channels, inner, bias=s.use_bias), nn.Linear(inner, s.channels, bias=s.use_bias)
            self.main = nn.Sequential(up, nn.GELU(), down)

    def forward(self, h: Tensor) -> Tensor:
        h = self.norm(h)
        if self.swiglu:
            h = self.down_proj(F.gelu(self.gate_proj(h), approximate="tanh") * self.up_proj(h))
        else:
            h = self.main(h)
        return h if self.post_norm is None else self.post_norm(h)


@built
class AttentionBlock(nn.Module):
    """One transformer layer."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.attention, self.mlp = Attention(s), MLP(s)

    def forward(
        self, h: Tensor, reads: Reads, turn: Tensor | None, storage: KeyValueStorage | None = None, index: int = 0
    ) -> Tensor:
        """The residual stream after the layer, shape (B, T, C); see `Attention`."""
        h = h + self.attention(h, reads, turn, storage, index)
        return h + self.mlp(h)  # type: ignore[no-any-return]
