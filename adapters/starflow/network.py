"""What the blocks of the flow and the learned denoiser have in common: a transformer between patches, after a text.

Shapes: B batch, L patches (positions), D values of a patch, S the text's length, P inputs before the first position, W positions of the window, C
channels.
"""

from collections.abc import Hashable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel_decode.adapters.starflow.config import Config
from parallel_decode.adapters.starflow.transformer import AttentionBlock, RMSNorm
from parallel_decode.cached import KeyValueStorage, Reads
from parallel_decode.cached.graphs import Graphs


@dataclass(frozen=True)
class Condition:
    """What the positions of a block depend on besides one another.

    Attributes:
        prefix: embeddings of the inputs before the first position: a text, the start embedding, patches that are known, shape (B, P, C).
        places: embeddings of the inputs' places, shape (P + L, C); None with rotary positions.
        turn: cosines and sines of the inputs' places, shape (P + L - 1 or more, 2, 1, pairs); None without.
        copied: whether the first position is that of z, though a text comes before it, as no start embedding does.
    """

    prefix: Tensor
    places: Tensor | None
    turn: Tensor | None
    copied: bool = False

    @property
    def size(self) -> int:
        """P."""
        return self.prefix.shape[1]

    def select(self, rows: Tensor) -> "Condition":
        """The same for some rows of the batch."""
        return replace(self, prefix=self.prefix[rows])

    def kept(self, graphs: Graphs, name: Hashable) -> "Condition":
        """The same at addresses that CUDA graphs have captured under this name."""
        places, turn = (
            part if part is None else graphs.keep((name, kind), part)
            for kind, part in (("places", self.places), ("turn", self.turn))
        )
        return replace(self, prefix=graphs.keep((name, "prefix"), self.prefix), places=places, turn=turn)


class Network(nn.Module):
    """A transformer from patches to patches, after a text."""

    def __init__(self, config: Config, deep: bool, layers: int, outputs: int, sees_text: bool) -> None:
        super().__init__()
        shape, dim = config.shape(deep), config.in_channels * config.patch_size**2
        self.proj_in = nn.Linear(dim, shape.channels)
        self.proj_out = nn.Linear(shape.channels, outputs * dim)
        nn.init.zeros_(self.proj_out.weight)
        self.sees_text, self.txt_dim = sees_text, config.txt_dim
        if sees_text:
            self.proj_txt = nn.Linear(config.txt_dim, shape.channels) if shape.project_text else nn.Identity()
        self.attn_blocks = nn.ModuleList(AttentionBlock(shape) for _ in range(layers))
        self.final_norm = RMSNorm(shape.channels) if shape.use_final_norm else nn.Identity()

    def hidden(self, values: Tensor, given: Condition, reads: Reads, storage: KeyValueStorage | None = None) -> Tensor:
        """The transformer's outputs at the window's positions, shape (B, W, C).

        Args:
            values: that are read, shape (B, T, D); those of the inputs before the first position do not count.
            given: what those are.
            reads: which inputs are read.
            storage: the key-value cache, or None.
        """
        h = self.proj_in(values.to(self.proj_in.weight.dtype))
        if given.places is not None:
            h = h + reads.embedding(given.places)
        if reads.first < given.size:
            at, rows = reads.inputs(), torch.arange(len(h), device=h.device)[:, None]
            h = torch.where(at[..., None] < given.size, given.prefix[rows, at.clamp(max=given.size - 1)], h)
        turn = None if given.turn is None else reads.embedding(given.turn)
        for index, layer in enumerate(self.attn_blocks):
            h = layer(h, reads, turn, storage, index)
        return self.final_norm(reads.outputs(h))  # type: ignore[no-any-return]

    def conditioned(
        self, text: Tensor | None, values: Tensor, angles: Tensor | None, places: Tensor | None = None
    ) -> Condition:
        """What is read first.

        Args:
            text: shape (B, S, txt_dim), where the block sees one.
            values: patches, shape (B, P - S, D).
            angles: of all inputs, shape (S + all patches, pairs); None without rotary positions.
            places: embeddings of the patches' places, shape (all patches, C); None with rotary positions.
        """
        weight = self.proj_in.weight
        prefix = self.proj_in(values.to(weight.dtype))
        size = 0
        if places is not None:
            prefix = prefix + places[: prefix.shape[1]]
        if self.sees_text and text is not None:
            prefix, size = torch.cat([self.proj_txt(text.to(weight.dtype)), prefix], 1), text.shape[1]
        turn = None if angles is None else torch.stack([angles.cos(), angles.sin()], 1)[:, :, None]
        return Condition(
            prefix,
            None if places is None else F.pad(places, (0, 0, size, 1)),
            None if turn is None else turn.to(weight.device, torch.promote_types(weight.dtype, torch.float32)),
        )
