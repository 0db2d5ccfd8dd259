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
        position_ids: shape (B, U).
        of_logits: whether logits are guided, and not their logarithmic softmax.
    """

    scale: float
    ids: Tensor
    mask: Tensor
    position_ids: Tensor
    of_logits: bool = False

    def doubled(self, prompt: Prompt, length: int) -> Prompt:
        """The prompts and below them the negative ones, padded on the left to one length."""
        columns = max(prompt.columns, self.ids.shape[1])
        mine = prompt.ids, prompt.mask[:, : prompt.columns], prompt.position_ids[:, : prompt.columns]
        pairs = zip(mine, (self.ids, self.mask, self.position_ids), strict=True)
        ids, mask, position_ids = (
            torch.cat([F.pad(part, (columns - part.shape[1], 0)) for part in pair]) for pair in pairs
        )
        return Prompt(ids, length, mask, position_ids)

    def combine(self, logits: Tensor) -> Tensor:
        """Guided scores, shape (B, W, V), from logits (2 B, W, V)."""
        scores, negative = (logits if self.of_logits else logits.log_softmax(-1)).chunk(2)
        return self.scale * (scores - negative) + negative


def taken_out(processors: Any, prompt: Tensor, model: Any) -> tuple[list[Any], Guidance | None]:
    """The processors but transformers' guidance, which is the first of them or not taken out, and that.

    Args:
        processors: as `generate` makes them.
        prompt: tokens, shape (B, P); their last is the negative prompt where none is given.
        model: it is tried how it numbers positions where transformers' guidance does not say.
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
    places = _places(model, ids, mask)
    return (processors, None) if places is None else (processors[1:], Guidance(first.guidance_scale, ids, mask, places))


@torch.no_grad()
def _places(model: Any, ids: Tensor, mask: Tensor) -> Tensor | None:
    """The position ids that a model gives a padded prompt by itself, (B, U): padding counts in most, not in some (OPT); None if it is neither."""
    columns = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    if bool(mask.all()):
        return columns

    def scores(**given: Any) -> Tensor:
        output: Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False, **given).logits[:, -1].float()
        return output

    alone = scores()
    for places in (columns, (mask.long().cumsum(1) - 1).clamp(min=0)):
        if torch.allclose(scores(position_ids=places), alone, rtol=1e-5, atol=1e-5 * float(alone.abs().max())):
            return places
    return None
