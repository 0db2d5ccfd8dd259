"""The prior of class-conditional models of the LlamaGen kind (arXiv 2406.06525): a Llama whose positions are places on a grid.

Shapes: B batch rows, n columns of a pass, D channels, h channels of an attention head.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM


class GridRotary(nn.Module):
    """LlamaGen's rotary embedding: half of a head's channels turn with the row, half with the column; keys and queries of the class are 0.

    Args:
        columns: of the grid; position 0 is the class, position 1 + l is token l.
        head_dim: h.
        base: of the frequencies.
    """

    def __init__(self, columns: int, head_dim: int, base: float) -> None:
        super().__init__()
        self.columns, self.head_dim, self.base = columns, head_dim, base

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines, each of shape (B, n, h) and x's dtype, for positions (B, n)."""
        half = self.head_dim // 2
        frequencies = self.base ** (-torch.arange(0, half, 2, device=x.device).float() / half)
        place = (position_ids - 1)[..., None]
        row, column = place.div(self.columns, rounding_mode="floor"), place.remainder(self.columns)
        angles = torch.cat([row * frequencies, column * frequencies], -1).repeat(1, 1, 2)
        token = place >= 0
        return (angles.cos() * token).to(x.dtype), (angles.sin() * token).to(x.dtype)


class Prior(LlamaForCausalLM):  # type: ignore[no-untyped-call]
    """A Llama over codes, with positions on a grid and an embedding of classes.

    Args:
        config: transformers' `LlamaConfig(vocab_size=V, ...)` with three entries more: `num_classes`, `rows` and `columns` of the grid.

    Attributes:
        classes: the last embedding stands for no class, shape (num_classes + 1, D).

    Raises:
        ValueError: an entry is missing, or heads have a number of channels that 4 does not divide.
    """

    def __init__(self, config: LlamaConfig) -> None:
        wanted: Any = config
        for name in ("num_classes", "rows", "columns"):
            number = getattr(config, name, None)
            if not isinstance(number, int) or number < 1:
                raise ValueError(
                    f"config.{name} is {number!r}, expected a whole number >= 1: LlamaConfig(..., {name}=...)"
                )
        if wanted.head_dim % 4:
            raise ValueError(
                f"config.head_dim is {wanted.head_dim}, expected a multiple of 4: two coordinates, each with sines and cosines"
            )
        super().__init__(config)
        rope: Any = config.rope_parameters
        self.classes = nn.Embedding(wanted.num_classes + 1, config.hidden_size)
        self.model.rotary_emb = GridRotary(wanted.columns, wanted.head_dim, rope["rope_theta"])
        self.post_init()  # type: ignore[no-untyped-call]
