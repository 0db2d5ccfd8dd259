"""Emu3 (arXiv 2409.18869) of transformers: rows of tokens with marks between them, in the vocabulary of its text."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel_decode.adapters.causal_lm.guidance import Guidance
from parallel_decode.adapters.causal_lm.model_check import hooked
from parallel_decode.adapters.image_tokens.model import ImageModel, Request, prompts

# Ends of a row, of the frame, of the image; that of the text follows them.
MARKS = ("<|extra_200|>", "<|extra_201|>", "<|image end|>")
BEGIN = "<|image token|>"  # ends a prompt


class Emu3(ImageModel):
    """`Emu3ForConditionalGeneration`, with what its `generate` does under the `prefix_allowed_tokens_fn` of its documentation: rows of visual tokens, a mark behind
    each, and three behind all.

    Guidance is transformers': any scale but 1, away from `negative_prompt_ids` with `negative_prompt_attention_mask` (shape (B, U)), or from a prompt's last token.

    The head computes only what can be drawn, from a copy of its rows that is made here. One that is more than its weight (hooks, adapters, quantized) computes all.
    """

    def __init__(self, model: Any) -> None:
        text, known = model.config.get_text_config(), model.vocabulary_mapping
        missing = [name for name in (*MARKS, BEGIN) if name not in known.vocab_map]
        end = text.eos_token_id[0] if isinstance(text.eos_token_id, list) else text.eos_token_id
        if missing or end is None or not known.image_tokens:
            raise ValueError(
                f"the model's config has {len(known.image_tokens)} visual tokens in its vocabulary_map, the eos_token_id {end}, and no token {missing}: expected them "
                "as in Emu3's checkpoints"
            )
        own = [*known.image_tokens, *(known.vocab_map[name] for name in MARKS), end]
        super().__init__(model, len(own), 0, 0)  # each request has a size of its own
        self.visual, self.begin = len(known.image_tokens), known.vocab_map[BEGIN]
        self.names, self.vocabulary = torch.tensor(own, device=model.device), text.vocab_size
        head = model.lm_head
        plain = type(head) is nn.Linear and not hooked(head) and "forward" not in vars(head)
        self.weight: Tensor | None = head.weight[self.names] if plain else None

    def request(self, inputs: dict[str, Any], guidance_scale: float | None) -> Request:
        ids, mask = prompts(inputs)
        sizes = torch.as_tensor(inputs.get("image_sizes", ()))
        alike = sizes.shape == (len(ids), 2) and bool((sizes == sizes[0]).all()) and int(sizes.min()) > 0
        if not alike or bool((ids[:, -1] != self.begin).any()):
            raise ValueError(
                f"image_sizes is {sizes.tolist()}, expected one size for all, and prompts that end with {BEGIN}: call the processor with return_for_image_generation=True"
            )
        self.rows, width = sizes[0].tolist()
        self.columns = width + 1
        fixed = torch.full((self.rows * self.columns + 3,), -1)
        fixed[width : -3 : self.columns] = self.visual
        fixed[-3:] = torch.arange(self.visual + 1, self.tokens)
        guidance = None if guidance_scale in (None, 1) else self._guidance(inputs, ids, guidance_scale)
        grids = ((self.rows, self.columns),)
        return Request(ids + self.tokens, mask, None, guidance, grids=grids, length=len(fixed), fixed=fixed)

    def _guidance(self, inputs: dict[str, Any], ids: Tensor, scale: float) -> Guidance:
        away = inputs.get("negative_prompt_ids")
        if away is None:
            away, mask = ids[:, -1:], torch.ones_like(ids[:, -1:])
        else:
            away, mask = prompts({"input_ids": away, "attention_mask": inputs.get("negative_prompt_attention_mask")})
        if len(away) != len(ids):
            raise ValueError(f"negative_prompt_ids has {len(away)} rows, expected {len(ids)} as input_ids")
        places = (mask.cumsum(1) - 1).clamp(min=0)
        # transformers guides logarithmic softmaxes of the whole vocabulary: other numbers by a constant for each position, which no softmax or argmax sees.
        return Guidance(scale, away + self.tokens, mask, places, of_logits=True)

    def embed(self, ids: Tensor) -> Tensor:
        named = torch.where(ids < self.tokens, self.told(ids.clamp(max=self.tokens - 1)), ids - self.tokens)
        return self.model.get_input_embeddings()(named)  # type: ignore[no-any-return]

    def decode(self, **inputs: Any) -> Tensor:
        return self.model.model.text_model(**inputs).last_hidden_state  # type: ignore[no-any-return]

    def head(self, hidden: Tensor) -> Tensor:
        return self.model.lm_head(hidden)[..., self.names] if self.weight is None else F.linear(hidden, self.weight)

    def pixels(self, tokens: Tensor) -> Tensor:
        own, width = self.told(tokens), self.columns - 1
        decoded: Tensor = self.model.decode_image_tokens(image_tokens=own, height=self.rows, width=width)  # -1 to 1
        return (decoded.float() / 2 + 0.5).clamp(0, 1)
