"""The layout of an image's tokens: some are prescribed, such as the ends of rows.

Shapes: B batch rows, W positions of a window, L tokens of an image, V ids that an image may hold.
"""

from typing import Any

import torch
from torch import Tensor

from parallel_decode.adapters.causal_lm.stopping import Generation


class Layout:
    """A processor of logits that takes a whole window at once: prescribed tokens at their positions, and at no other.

    Args:
        fixed: the token of each position, -1 where the model chooses one; shape (L,), on the host.
        columns: of the prompt.

    Example:
        >>> layout = Layout(torch.tensor([-1, 2]), columns=5)
        >>> layout.of_window(torch.zeros(1, 2, 3), torch.tensor([[5, 6]]))
        tensor([[[0., 0., -inf],
                 [-inf, -inf, 0.]]])
    """

    def __init__(self, fixed: Tensor, columns: int) -> None:
        self.fixed, self.columns = fixed, columns
        self.prescribed = torch.tensor(sorted(set(fixed.tolist()) - {-1}))

    def of_window(self, logits: Tensor, lengths: Tensor) -> Tensor:
        """The scores, from logits (B, W, V), in place, where so many tokens (B, W) are before each position."""
        fixed = self.fixed[lengths - self.columns]
        row, column = (fixed >= 0).nonzero(as_tuple=True)
        logits[..., self.prescribed] = -torch.inf
        logits[row, column] = -torch.inf
        logits[row, column, fixed[row, column]] = 0
        return logits


class LaidOut(Generation):
    """A continuation whose iterate holds prescribed tokens from the start: drafts that always come true. All else in it is an image's id, which drafts that were
    looked up in prompts need not be.

    Args:
        fixed: as of `Layout`; None for no layout.
    """

    def __init__(self, *args: Any, fixed: Tensor | None, **options: Any) -> None:
        super().__init__(*args, **options)
        fixed = torch.full((self.length,), -1) if fixed is None else fixed
        self.where = (fixed >= 0).nonzero()[:, 0].to(self.prompt.ids.device)
        self.prescribed = fixed.to(self.where.device)[self.where]

    def initial(self) -> Tensor:
        return self._laid_out(super().initial())

    def after_pass(self, x: Tensor, fronts: Tensor) -> Tensor:
        fronts = super().after_pass(x, fronts)
        self._laid_out(x)
        return fronts

    def _laid_out(self, x: Tensor) -> Tensor:
        going = ~self.ended.to(x.device)[:, None]  # behind an end there is padding, which need not be an image's id
        x.copy_(torch.where(going, x.clamp(max=self.model.tokens - 1), x))
        x[:, self.where] = self.prescribed
        return x
