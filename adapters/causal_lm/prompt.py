"""A batch of prompts, padded on the left, with room for what follows.

Shapes: B batch rows, P columns of the prompt, L positions. Position l is column P + l.
"""

import copy

import torch
from torch import Tensor


class Prompt:
    """Tokens, and the mask and the position ids of all columns.

    Args:
        ids: tokens, shape (B, P).
        length: L.
        attention_mask: of the prompt, shape (B, P), 0 for padding; None for no padding.
        position_ids: of the prompt, shape (B, P); None counts what is not padding.

    Attributes:
        columns: P.
        padded: whether there is padding.
        mask, position_ids: shape (B, P + L).
    """

    def __init__(self, ids: Tensor, length: int, attention_mask: Tensor | None, position_ids: Tensor | None) -> None:
        self.ids, self.columns = ids, ids.shape[1]
        mask = torch.ones_like(ids) if attention_mask is None else attention_mask.long().to(ids.device)
        self.padded = not bool(mask.all())
        self.mask = torch.cat([mask, mask.new_ones(len(ids), length)], 1)
        if position_ids is None or position_ids.shape != ids.shape:
            position_ids = (mask.cumsum(1) - 1).clamp(min=0)
        position_ids = position_ids.to(ids.device)
        ahead = torch.arange(1, length + 1, device=ids.device)
        self.position_ids = torch.cat([position_ids, position_ids[:, -1:] + ahead], 1)

    def tokens(self) -> list[list[int]]:
        """The tokens of each row, without padding."""
        kept = self.mask[:, : self.columns].bool().cpu()
        return [line[there].tolist() for line, there in zip(self.ids.cpu(), kept, strict=True)]

    def text(self, x: Tensor) -> Tensor:
        """All columns, shape (B, P + L), with the tokens x (B, L) after the prompt."""
        return torch.cat([self.ids, x], 1)

    def select(self, rows: Tensor) -> "Prompt":
        """The same for some rows."""
        subset = copy.copy(self)
        subset.ids, subset.mask, subset.position_ids = self.ids[rows], self.mask[rows], self.position_ids[rows]
        return subset
