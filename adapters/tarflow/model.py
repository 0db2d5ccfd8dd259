"""The network: a stack of causal transformers, with parameters and buffers named as in Apple's public checkpoints.

Shapes: B batch, L patches (positions), D values of a patch, C channels of the transformer, H heads.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEAD_DIM = 64


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.heads = channels // HEAD_DIM
        self.norm = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(layer_norm(self.norm, x)).unflatten(2, (3 * self.heads, HEAD_DIM)).transpose(1, 2)
        q, k, v = qkv.chunk(3, dim=1)
        y: Tensor = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=HEAD_DIM**-0.5)
        return self.proj(y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def layer_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """LayerNorm in float32 (float64 stays float64), whatever the precision around it."""
    wide = torch.promote_types(x.dtype, torch.float32)
    y = F.layer_norm(x.to(wide), norm.normalized_shape, norm.weight.to(wide), norm.bias.to(wide), norm.eps)
    return y.to(x.dtype)


class MLP(nn.Module):
    """Two linear layers around a GELU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.main = nn.Sequential(nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.main(layer_norm(self.norm, x))  # type: ignore[no-any-return]


class AttentionBlock(nn.Module):
    """A transformer layer."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.attention = Attention(channels)
        self.mlp = MLP(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.mlp(x)  # type: ignore[no-any-return]


class MetaBlock(nn.Module):
    """One block of the flow: an affine autoregressive transform whose a and b are a causal transformer's."""

    def __init__(
        self, patch_dim: int, channels: int, num_patches: int, num_layers: int, flip: bool, nvp: bool, num_classes: int
    ) -> None:
        super().__init__()
        self.flip, self.nvp, self.heads = flip, nvp, channels // HEAD_DIM
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

    def affine(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """(a, b) for the position after each, from the transformer's output."""
        out = self.proj_out(h)
        out = out.to(torch.promote_types(out.dtype, torch.float32))
        a, b = out.chunk(2, dim=-1) if self.nvp else (torch.zeros_like(out), out)
        return a, b

    def forward(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """z, shape (B, L, D), and the log-determinant, shape (B,)."""
        x = self.permuted(x)
        h = self.proj_in(x.to(self.proj_in.weight.dtype)) + self.permuted(self.pos_embed, 0)
        if (condition := self.condition(y)) is not None:
            h = h + condition
        for block in self.attn_blocks:
            h = block(h)
        a, b = (F.pad(s[:, :-1], (0, 0, 1, 0)) for s in self.affine(h))
        return self.permuted((x - b) * (-a).exp()), -a.sum((1, 2))
