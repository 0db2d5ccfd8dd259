"""Classifier-free guidance: a second row with a prompt of its own for every row, in one doubled batch.

Shapes: B batch rows, U columns of the negative prompts, W positions of a window, V tokens of the vocabulary.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from parallel_decode.adapters.causal_lm.prompt import Prompt

NAME = "UnbatchedClassifierFreeGuidanceLogitsProcessor"


class Guidance(NamedTuple):
    """What is guided away from.

    Attributes:
        scale: 1 for none.
        ids: the negative prompts, shape (B, U).
        mask: 0 for their padding, shape (B, U).
    """

    scale: float
    ids: Tensor
    mask: Tensor

    def doubled(self, prompt: Prompt, length: int) -> Prompt:
        """The prompts and below them the negative ones, padded on the left to one length. Both keep the position ids that they have alone."""
        columns = max(prompt.columns, self.ids.shape[1])
        places = torch.arange(self.ids.shape[1], device=self.ids.device).expand_as(
            self.ids
        )  # padding counts, as in transformers
        mine = prompt.ids, prompt.mask[:, : prompt.columns], prompt.position_ids[:, : prompt.columns]
        pairs = zip(mine, (self.ids, self.mask, places), strict=True)
        ids, mask, position_ids = (
            torch.cat([F.pad(part, (columns - part.shape[1], 0)) for part in pair]) for pair in pairs
        )
        return Prompt(ids, length, mask, position_ids)

    def combine(self, logits: Tensor) -> Tensor:
        """Guided scores, shape (B, W, V), from logits (2 B, W, V)."""
        scores, negative = logits.log_softmax(-1).chunk(2)
        return self.scale * (scores - negative) + negative


def taken_out(processors: Any, prompt: Tensor) -> tuple[list[Any], Guidance | None]:
    """The processors but transformers' guidance, which is the first of them or not taken out, and that.

    Args:
        processors: as `generate` makes them.
        prompt: tokens, shape (B, P); their last is the negative prompt where none is given.
    """
    processors = list(processors or ())
    first: Any = processors[0] if processors else None
    if type(first).__name__ != NAME or not type(first).__module__.startswith("transformers."):
        return processors, None
    context = first.unconditional_context
    if first.guidance_scale == 1 or not (context["use_cache"] and context["first_pass"]):
        return processors, None
    ids = prompt[:, -1:] if context["input_ids"] is None else context["input_ids"].to(prompt.device)
    mask = torch.ones_like(ids) if context["attention_mask"] is None else context["attention_mask"].to(ids)
    if len(ids) != len(prompt) or mask.shape != ids.shape:
        return processors, None
    return processors[1:], Guidance(first.guidance_scale, ids, mask)
