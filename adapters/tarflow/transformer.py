"""The layers of the causal transformers, as modules and of prepared weights.

Shapes: B batch, T positions read, C channels.
"""

from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel_decode.adapters.tarflow.changes import as_built, built, uncompiled
from parallel_decode.adapters.tarflow.weights import HEAD_DIM, Called, Function, Linear, Norm
from parallel_decode.cached import KeyValueStorage, Reads


@built
class LayerNorm(nn.LayerNorm):
    """In float32 at least, whatever the precision around it."""

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        y = F.layer_norm(x.to(wide), self.normalized_shape, self.weight.to(wide), self.bias.to(wide), self.eps)
        return y.to(x.dtype)


def attend(
    norm: Function,
    qkv: Function,
    h: Tensor,
    reads: Reads,
    storage: KeyValueStorage | None = None,
    index: int = 0,
    temperature: Tensor | None = None,
) -> Tensor:
    """What the heads of causal self-attention give at what is read, side by side, shape (B T, C).

    Args:
        norm, qkv: functions of rows of numbers, (N, in) to (N, out).
        h: the residual stream, shape (B T, C).
        reads: which positions those are, and what they attend to.
        storage: of the keys and values of all positions; without it there are only those that are read.
        index: of this layer in it.
        temperature: of the attention of each row, shape (B, 1, 1, 1).
    """
    rows, channels = h.shape
    heads = qkv(norm(h)).view(rows // reads.size, reads.size, 3, -1, HEAD_DIM)
    q, kv = heads[:, :, 0].transpose(1, 2), heads[:, :, 1:]
    keys, values = kv.permute(2, 0, 3, 1, 4) if storage is None else storage.update(index, kv, reads)
    if temperature is not None:
        q = (q / temperature).to(keys.dtype)
    y = F.scaled_dot_product_attention(
        q, keys, values, attn_mask=reads.mask, is_causal=reads.causal, scale=HEAD_DIM**-0.5
    )
    return y.transpose(1, 2).reshape(rows, channels)


def gelu(h: Tensor) -> Tensor:
    """The exact GELU, by the faster kernel.

    On a CPU torch hands contiguous tensors to oneDNN, where every call costs some 7 us more than with torch's own kernel. Up to some
    thousands of numbers that is most of the time, and a transposed view is not contiguous.
    """
    if h.device.type != "cpu" or h.numel() > 8192:
        return F.gelu(h)
    return F.gelu(h.view(2, -1).t()).t().view(h.shape)


@built
class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, h: Tensor, reads: Reads, *more: Any) -> Tensor:
        """What is added to the residual stream h, shape (B T, C); see `attend`."""
        return self.proj(attend(self.norm, self.qkv, h, reads, *more))  # type: ignore[no-any-return]


@built
class MLP(nn.Module):
    """Two linear layers around a GELU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = LayerNorm(channels)
        self.main = nn.Sequential(nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels))

    def forward(self, h: Tensor) -> Tensor:
        return self.main(self.norm(h))  # type: ignore[no-any-return]


@built
class AttentionBlock(nn.Module):
    """One transformer layer."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.attention = Attention(channels)
        self.mlp = MLP(channels)

    def forward(self, h: Tensor, reads: Reads, *more: Any) -> Tensor:
        """The residual stream after the layer, shape (B T, C); see `attend`."""
        h = h + self.attention(h, reads, *more)
        return h + self.mlp(h)  # type: ignore[no-any-return]


_ATTENTION = Attention, LayerNorm, nn.Linear, nn.Linear
_MLP = MLP, LayerNorm, nn.Sequential, nn.Linear, nn.GELU, nn.Linear
_PARTS = AttentionBlock, *_ATTENTION, *_MLP


def is_as_built(block: nn.Module) -> bool:
    """Whether a layer is that of this package, and nothing in it was changed."""
    return as_built(uncompiled(block), _PARTS)


class Layer(NamedTuple):
    """A transformer layer of prepared weights."""

    norm: Function
    qkv: Function
    proj: Linear
    mlp_norm: Function
    up: Function
    down: Linear

    @staticmethod
    def of(block: nn.Module, dtype: torch.dtype) -> "Layer | Called":
        """The layer in this type; as it is, if anything in it was changed."""
        if not is_as_built(block):
            return Called(block, dtype)
        block = uncompiled(block)
        attention, mlp = cast(Attention, block.attention), cast(MLP, block.mlp)
        norm, mlp_norm = (Norm.of(module, dtype) for module in (attention.norm, mlp.norm))
        linear = (attention.qkv, attention.proj, mlp.main[0], mlp.main[2])
        qkv, proj, up, down = (Linear.of(module, dtype) for module in linear)
        return Layer(norm, qkv, proj, mlp_norm, up, down)

    def __call__(self, h: Tensor, reads: Reads, *more: Any) -> Tensor:
        """See `AttentionBlock`; h may be overwritten."""
        h = self.proj.add_to(h, attend(self.norm, self.qkv, h, reads, *more))
        return self.down.add_to(h, gelu(self.up(self.mlp_norm(h))))
