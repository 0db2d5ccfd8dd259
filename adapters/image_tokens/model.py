"""A model of image tokens as a causal language model: what differs from one to the next is said in a small class of its own.

Shapes: B batch rows, P columns of the prompt, L tokens of an image, V ids that an image may hold, n columns of a pass, D channels, H x W pixels.
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from parallel_decode.adapters.causal_lm.guidance import Guidance


class Request(NamedTuple):
    """What is to be drawn.

    Attributes:
        ids: the prompts in joint ids, shape (B, P), padded on the left.
        mask: 0 for padding, shape (B, P); None for none.
        position_ids: shape (..., B, P), or (..., B, P + L) where tokens have positions of their own; None counts what is not padding.
        guidance: a second prompt for each row, in joint ids; None without guidance.
        grids: rows and columns of what is drawn, one after the other; None for the model's one.
        length: L; None for the model's.
        eos: tokens that end a picture before that.
        pad: what stands behind them.
        fixed: the token of each position that has a prescribed one, -1 for the others, shape (L,), on the host; None for none.
        begun: tokens of the grid that are in the prompt.
    """

    ids: Tensor
    mask: Tensor | None = None
    position_ids: Tensor | None = None
    guidance: Guidance | None = None
    grids: tuple[tuple[int, int], ...] | None = None
    length: int | None = None
    eos: tuple[int, ...] = ()
    pad: int = 0
    fixed: Tensor | None = None
    begun: int = 0


class ImageModel(nn.Module):
    """Joint ids: 0 ... V - 1 are an image's, and what may be in a prompt follows. So tokens are what the model calls them, and prompts are shifted by V.

    Args:
        model: of transformers.
        tokens: V.
        rows, columns: of the grid of tokens.

    Attributes:
        length: L.
        names: what the model's own `generate` calls the V ids, shape (V,); None if the same.
        vocabulary: how many ids that draws among, where there are names.
    """

    model: Any

    def __init__(self, model: nn.Module, tokens: int, rows: int, columns: int) -> None:
        super().__init__()
        self.model, self.tokens, self.rows, self.columns = model, tokens, rows, columns
        self.config: Any = model.config
        self.length = rows * columns
        self.names: Tensor | None = None
        self.vocabulary = tokens

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype  # type: ignore[no-any-return]

    @property
    def device(self) -> torch.device:
        return self.model.device  # type: ignore[no-any-return]

    @abstractmethod
    def request(self, inputs: dict[str, Any], guidance_scale: float | None) -> Request:
        """What the processor gave, as a request.

        Raises:
            ValueError: something is missing, or does not fit.
        """

    def embed(self, ids: Tensor) -> Tensor:
        """Joint ids (B, n) as vectors (B, n, D)."""
        raise NotImplementedError

    def decode(self, **inputs: Any) -> Tensor:
        """The transformer's last hidden states, shape (B, n, D), from `inputs_embeds` and what else `forward` gets."""
        raise NotImplementedError

    def head(self, hidden: Tensor) -> Tensor:
        """Logits of the image's ids, shape (B, n, V)."""
        raise NotImplementedError

    @abstractmethod
    def pixels(self, tokens: Tensor) -> Tensor | None:
        """Pictures, shape (B, C, H, W), from 0 to 1, from tokens (B, L) of image ids; None where the model has no decoder of pictures."""

    def told(self, tokens: Tensor) -> Tensor:
        """The tokens as the model's own `generate` returns them."""
        return tokens if self.names is None else self.names[tokens]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
        **more: Any,
    ) -> CausalLMOutputWithPast:
        """As of transformers' language models: logits, shape (B, n or `logits_to_keep`, V). Made of `embed`, `decode` and `head`, unless a model overrides it."""
        hidden = self.decode(
            inputs_embeds=self.embed(input_ids), attention_mask=attention_mask, position_ids=position_ids, **more
        )
        return CausalLMOutputWithPast(logits=self.head(hidden[:, -logits_to_keep:]))

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, next_sequence_length: int, is_first_iteration: bool, position_ids: Tensor, **more: Any
    ) -> dict[str, Any]:
        """The last columns, and what goes with them."""
        count = next_sequence_length
        return {"input_ids": input_ids[:, -count:], "position_ids": position_ids[..., -count:], **more}

    def _supports_logits_to_keep(self) -> bool:
        return True

    def get_input_embeddings(self) -> None:
        """Joint ids have no table of their own."""


def prompts(inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Ids and mask, each of shape (B, P), of what a processor gave.

    Raises:
        ValueError: they are missing, or are not of that shape.
    """
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point() or not ids.numel():
        found = tuple(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(
            f'inputs["input_ids"] is {found}, expected token ids of shape (B, P): call the processor with return_tensors="pt"'
        )
    mask = inputs.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    if mask.shape != ids.shape:
        raise ValueError(f"attention_mask has shape {tuple(mask.shape)}, expected {tuple(ids.shape)} as input_ids")
    return ids, mask


def joined(ids: Tensor, tokens: int, image: Callable[[Tensor], Tensor], text: Callable[[Tensor], Tensor]) -> Tensor:
    """Joint ids (B, n) as vectors (B, n, D): those below `tokens` by one embedding, the others by the other. (Both are read: to look which are needed
    would wait for the device.)"""
    own = (ids < tokens)[..., None]
    return torch.where(own, image(ids.clamp(max=tokens - 1)), text((ids - tokens).clamp(min=0)))
