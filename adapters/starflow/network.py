"""What the blocks of the flow and the learned denoiser have in common: a transformer between patches, after a text.

Shapes: B batch, L patches (positions), D values of a patch, S the text's length, P inputs before the first position, W positions of the window, C
channels.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from parallel_decode.adapters.starflow.config import Config
from parallel_decode.adapters.starflow.transformer import AttentionBlock, RMSNorm
from parallel_decode.cached import KeyValueStorage, Reads
from parallel_decode.cached.graphs import Graphs


@dataclass(frozen=True)
class Condition:
    """What the positions of a block depend on besides one another.

    Attributes:
        text: in the transformer's channels, shape (B, S, C); None without.
        values: patches that are read next: the start embedding, and those that are given, shape (B, P - S, D).
        places: embeddings of the inputs' places, shape (P + L, C); None with rotary positions.
        turn: cosines and sines of the inputs' places, shape (P + L - 1 or more, 2, 1, pairs); None without.
    """

    text: Tensor | None
    values: Tensor
    places: Tensor | None
    turn: Tensor | None

    @property
    def text_size(self) -> int:
        return 0 if self.text is None else self.text.shape[1]

    @property
    def prefix(self) -> int:
        """P."""
        return self.text_size + self.values.shape[1]

    def select(self, rows: Tensor) -> "Condition":
        """The same for some rows of the batch."""
        return replace(self, text=None if self.text is None else self.text[rows], values=self.values[rows])

    def kept(self, graphs: Graphs) -> "Condition":
        """The same at addresses that stay."""
        parts = self.text, self.values, self.places, self.turn
        return Condition(*(t if t is None else graphs.keep(index, t) for index, t in enumerate(parts)))  # type: ignore[arg-type]


class Network(nn.Module):
    """A transformer from patches to patches, after a text."""

    def __init__(self, config: Config, deep: bool, layers: int, outputs: int, sees_text: bool) -> None:
        super().__init__()
        shape, dim = config.shape(deep), config.in_channels * config.patch_size**2
        self.proj_in = nn.Linear(dim, shape.channels)
        self.proj_out = nn.Linear(shape.channels, outputs * dim)
        nn.init.zeros_(self.proj_out.weight)
        self.sees_text = sees_text
        if sees_text:
            self.proj_txt = nn.Linear(config.txt_dim, shape.channels) if shape.project_text else nn.Identity()
        self.attn_blocks = nn.ModuleList(AttentionBlock(shape) for _ in range(layers))
        self.final_norm = RMSNorm(shape.channels) if shape.use_final_norm else nn.Identity()

    def hidden(
        self,
        x: Tensor,
        condition: Condition,
        reads: Reads,
        storage: KeyValueStorage | None = None,
        with_text: bool = True,
    ) -> Tensor:
        """The transformer's outputs at the window's positions, shape (B, W, C).

        Args:
            x: the values, shape (B, L, D).
            condition: what is read before them.
            reads: what is read.
            storage: the key-value cache, or None.
            with_text: whether some of the text may be among what is read.
        """
        size = condition.text_size
        blank = condition.values.new_zeros(len(x), size, x.shape[2])
        inputs = torch.cat([blank, condition.values, x.to(condition.values.dtype)], 1)
        h = self.proj_in(reads.take(inputs))
        if condition.places is not None:
            h = h + reads.embedding(condition.places)
        if condition.text is not None and with_text:
            at = reads.take(torch.arange(inputs.shape[1], device=x.device)[None])
            text = condition.text[torch.arange(len(x), device=x.device)[:, None], at.clamp(max=size - 1)]
            h = torch.where(at[..., None] < size, text, h)
        turn = None if condition.turn is None else reads.embedding(condition.turn)
        for index, layer in enumerate(self.attn_blocks):
            h = layer(h, reads, turn, storage, index)
        return self.final_norm(reads.outputs(h))  # type: ignore[no-any-return]

    def conditioned(self, text: Tensor | None, values: Tensor, angles: Tensor | None) -> Condition:
        """What is read first.

        Args:
            text: shape (B, S, txt_dim), where the block sees one.
            values: patches, shape (B, P - S, D).
            angles: of all inputs, shape (S + all patches, pairs); None without rotary positions.
        """
        weight = self.proj_in.weight
        turn = None if angles is None else torch.stack([angles.cos(), angles.sin()], 1)[:, :, None]
        wide = torch.promote_types(weight.dtype, torch.float32)
        return Condition(
            self.proj_txt(text.to(weight.dtype)) if self.sees_text and text is not None else None,
            values.to(weight.dtype),
            None,
            None if turn is None else turn.to(weight.device, wide),
        )
