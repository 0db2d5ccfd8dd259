"""Janus (arXiv 2410.13848, 2501.17811) of transformers: an embedding and a head of its own for image tokens."""

from typing import Any

import torch
from torch import Tensor

from parallel_decode.adapters.causal_lm.guidance import Guidance
from parallel_decode.adapters.image_tokens.model import ImageModel, Request, joined, prompts


class Janus(ImageModel):
    """`JanusForConditionalGeneration`, with what its `generate(generation_mode="image")` does: positions count padding, and the second prompt is the first with
    nothing but its beginnings."""

    def __init__(self, model: Any) -> None:
        vision = model.model.vision_model.config
        side = round(vision.num_image_tokens**0.5)
        super().__init__(model, model.config.vq_config.num_embeddings, side, vision.num_image_tokens // side)

    def request(self, inputs: dict[str, Any], guidance_scale: float | None) -> Request:
        (ids, mask), config = prompts(inputs), self.model.generation_config
        places = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        scale = 5.0 if guidance_scale is None else guidance_scale  # as its generate has it
        guidance = None
        if scale > 1:
            begins = (config.generation_kwargs or {}).get("boi_token_id")
            if begins is None or config.bos_token_id is None or config.pad_token_id is None:
                raise ValueError(
                    "guidance needs bos_token_id, pad_token_id and generation_kwargs['boi_token_id'] in the model's generation_config, as Janus's checkpoints have them"
                )
            kept = (ids == config.bos_token_id) | (ids == begins)
            negative = torch.where(kept, ids, config.pad_token_id)
            guidance = Guidance(scale, negative + self.tokens, mask, places, of_logits=True)
        return Request(ids + self.tokens, mask, places, guidance)

    def embed(self, ids: Tensor) -> Tensor:
        return joined(
            ids, self.tokens, self.model.prepare_embeddings_for_image_generation, self.model.get_input_embeddings()
        )

    def decode(self, **inputs: Any) -> Tensor:
        return self.model.model.language_model(**inputs).last_hidden_state  # type: ignore[no-any-return]

    def head(self, hidden: Tensor) -> Tensor:
        return self.model.model.generation_head(hidden)  # type: ignore[no-any-return]

    def pixels(self, tokens: Tensor) -> Tensor:
        decoded: Tensor = self.model.decode_image_tokens(tokens)  # (B, H, W, C), from -1 to 1
        return (decoded.permute(0, 3, 1, 2).float() / 2 + 0.5).clamp(0, 1)
