"""A batch of prompts, padded on the left, with room for what follows.

Shapes: B batch rows, P columns of the prompt, L positions. Position l is column P + l.
"""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class Prompt:
    """Tokens, and the mask and the position ids of all columns.

    Args:
        ids: tokens, shape (B, P).
        length: L.
        attention_mask: of the prompt, shape (B, P), 0 for padding; None for no padding.
        position_ids: shape (..., B or 1, P or more); None counts what is not padding. Columns behind those that are given count on by 1.
        zeros: names of arguments that are 0 for every column (token types of text).

    Attributes:
        columns: P.
        padded: whether there is padding.
        mask: shape (B, P + L).
        position_ids: shape (..., B, P + L).
        zeros: by name, shape (B, P + L).

    Raises:
        ValueError: a mask or position ids of another shape.
    """

    def __init__(
        self,
        ids: Tensor,
        length: int,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        zeros: tuple[str, ...] = (),
    ) -> None:
        self.ids, self.columns = ids, ids.shape[1]
        mask = torch.ones_like(ids) if attention_mask is None else attention_mask.long().to(ids.device)
        if mask.shape != ids.shape:
            raise ValueError(f"attention_mask has shape {tuple(mask.shape)}, expected {tuple(ids.shape)} as the tokens")
        self.padded = not bool(mask.all())
        self.mask = F.pad(mask, (0, length), value=1)
        if position_ids is None:
            position_ids = (mask.cumsum(1) - 1).masked_fill(mask == 0, 0)
        if position_ids.shape[-1] < self.columns:
            raise ValueError(
                f"position_ids has shape {tuple(position_ids.shape)}, expected {self.columns} columns as the tokens, or more"
            )
        position_ids = position_ids[..., : self.columns + length].to(ids.device)
        position_ids = position_ids.expand(*position_ids.shape[:-2], len(ids), -1)
        missing = self.columns + length - position_ids.shape[-1]
        ahead = position_ids[..., -1:] + torch.arange(1, missing + 1, device=ids.device)
        self.position_ids = torch.cat([position_ids, ahead], -1)
        self.zeros = {name: torch.zeros_like(self.mask) for name in zeros}

    def after(self, held: int, attention_mask: Tensor, position_ids: Tensor | None) -> "Prompt":
        """The same behind so many columns that a cache holds and nobody reads again; with the mask and the position ids of all."""
        length = self.mask.shape[1] - self.columns
        if position_ids is not None and position_ids.shape[-1] == self.columns:
            position_ids = F.pad(position_ids, (held, 0))
        return Prompt(F.pad(self.ids, (held, 0)), length, attention_mask, position_ids, tuple(self.zeros))

    def tokens(self) -> list[list[int]]:
        """The tokens of each row, without padding."""
        kept = self.mask[:, : self.columns].bool().cpu()
        return [line[there].tolist() for line, there in zip(self.ids.cpu(), kept, strict=True)]

    def pad(self, config: Any) -> int:
        """The token that stands where there is padding."""
        hidden = self.ids[self.mask[:, : self.columns] == 0]
        config = config.get_text_config(decoder=True)
        token = getattr(config, "pad_token_id", None)
        if len(hidden):
            return int(hidden[0])
        return token if isinstance(token, int) and 0 <= token < config.vocab_size else 0

    def text(self, x: Tensor) -> Tensor:
        """All columns, shape (B, P + L), with the tokens x (B, L) after the prompt."""
        return torch.cat([self.ids, x], 1)

    def select(self, rows: Tensor) -> "Prompt":
        """The same for some rows."""
        subset = copy.copy(self)
        subset.ids, subset.mask, subset.position_ids = self.ids[rows], self.mask[rows], self.position_ids[..., rows, :]
        subset.zeros = {name: value[rows] for name, value in self.zeros.items()}
        return subset
