"""The sampler that TarFlows are published with, in few lines: what others are compared with.

One position after the other, over keys and values that grow by concatenation.
"""

from collections.abc import Iterable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from parallel_decode.adapters.tarflow.flow import TarFlow
from parallel_decode.adapters.tarflow.model import MetaBlock
from parallel_decode.adapters.tarflow.transformer import AttentionBlock
from parallel_decode.adapters.tarflow.weights import HEAD_DIM


@torch.no_grad()
def plain_sample(flow: TarFlow, z: Tensor, y: Tensor | None = None) -> Tensor:
    """Images, shape (B, C, H, W), from noise of shape (B, L, D) and classes of shape (B,), or None: without guidance or denoising.

    References:
        Zhai et al., Normalizing Flows are Capable Generative Models (arXiv 2412.06329).

    Example:
        >>> import torch
        >>> from parallel_decode.adapters.tarflow import TarFlow
        >>> flow = TarFlow(in_channels=1, img_size=4, patch_size=2, channels=64, num_blocks=2, layers_per_block=1)
        >>> plain_sample(flow, torch.randn(2, 4, 4)).shape
        torch.Size([2, 1, 4, 4])
    """
    x = z
    for block in reversed(flow.blocks):
        assert isinstance(block, MetaBlock)
        x = block.permuted(_solved(block, block.permuted(x), y))
    return flow.unpatchify(x)


def _solved(block: MetaBlock, z: Tensor, y: Tensor | None) -> Tensor:
    """x of one block, in its order."""
    pos_embed, condition = block.permuted(block.pos_embed, 0), block.condition(y)
    caches: list[Tensor | None] = [None for _ in block.layers]  # (2, B, heads, positions so far, HEAD_DIM)
    x = [z[:, :1]]
    for position in range(z.shape[1] - 1):
        h = block.proj_in(x[-1]) + pos_embed[position]
        h = h if condition is None else h + condition
        for index, layer in enumerate(cast(Iterable[AttentionBlock], block.layers)):
            attention = layer.attention
            q, *kv = attention.qkv(attention.norm(h)).view(len(h), 1, 3, -1, HEAD_DIM).permute(2, 0, 3, 1, 4)
            new, before = torch.stack(kv), caches[index]
            caches[index] = cache = new if before is None else torch.cat([before, new], dim=3)
            h = h + attention.proj(F.scaled_dot_product_attention(q, *cache).transpose(1, 2).flatten(2))
            h = h + layer.mlp(h)
        out = block.proj_out(h)
        a, b = out.chunk(2, dim=-1) if block.nvp else (torch.zeros_like(out), out)
        x.append(z[:, position + 1 : position + 2] * a.exp() + b)
    return torch.cat(x, dim=1)
