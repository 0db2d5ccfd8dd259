"""GLM-Image of transformers: a small preview and then the picture, token by token, at positions that their two grids prescribe. Diffusion makes pixels of them.

Shapes: B batch rows, P columns of the prompt, L tokens of both grids and the end, V ids of the head.
"""

import copy
from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from parallel_decode.adapters.causal_lm.cache import NAME
from parallel_decode.adapters.causal_lm.generate import parallel_generate
from parallel_decode.adapters.causal_lm.guidance import NAME as GUIDANCE
from parallel_decode.adapters.image_tokens.guesses import as_image_guess
from parallel_decode.adapters.image_tokens.model import ImageModel, Request, prompts
from parallel_decode.schedules import Schedule
from parallel_decode.tokens.guesses import Guess

OWN = ("image_grid_thw", "images_per_sample", "pixel_values", "mm_encoder_outputs")  # inputs that a request has read


class GlmImage(ImageModel):
    """`GlmImageForConditionalGeneration`. Prompts and pictures share one embedding, so joint ids are the model's own.

    The model writes the positions of what follows a prompt on itself when it reads the prompt, and finds them again by the length of its cache. Windows
    need them beforehand, so they are computed once, on a copy: threads may share a model.
    """

    def __init__(self, model: Any) -> None:
        super().__init__(model, model.config.text_config.vision_vocab_size, 1, 1)

    def request(self, inputs: dict[str, Any], guidance_scale: float | None = None) -> Request:
        (ids, mask), shapes, counts = prompts(inputs), inputs.get("image_grid_thw"), inputs.get("images_per_sample")
        if shapes is None:
            raise ValueError("image_grid_thw is missing: expected all that GLM-Image's processor gives")
        if counts is None and len(ids) > 1:
            raise ValueError(f"images_per_sample is missing: expected a number for each of {len(ids)} prompts")
        if guidance_scale not in (None, 1):
            raise ValueError(f"guidance_scale is {guidance_scale}, expected None: GLM-Image's tokens have no guidance")
        count = ((ids == self.config.image_end_token_id) & (mask == 1)).sum(
            1
        )  # of pictures to be edited; padding may be that token
        ids = self._encoded(ids, inputs, count)
        positions = copy.copy(self.model.model)
        before, _ = positions.get_rope_index(ids, shapes, counts, mask)
        after = positions._cached_decode_position_ids.transpose(0, 1)  # (3, B, L), the last for the end
        drawn = shapes[: len(shapes) if counts is None else int(counts[0])][int(count[0]) :]
        grids = tuple((rows, columns) for _, rows, columns in drawn.flip(0).tolist())
        config, length = self.model.generation_config, after.shape[-1]
        ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        eos = tuple(int(token) for token in ends if token is not None)
        pad = next((token for token in (config.pad_token_id, *eos) if token is not None), 0)
        return Request(ids, mask, torch.cat([before, after], -1), None, grids, length, eos, pad)

    def _encoded(self, ids: Tensor, inputs: dict[str, Any], count: Tensor) -> Tensor:
        """The prompt's ids, with those of the pictures to be edited, so many in each row, in their places."""
        encoded, inner = (inputs.get("mm_encoder_outputs") or {}).get("image"), self.model.model
        if encoded is None and inputs.get("pixel_values") is None:
            return ids
        shapes, counts = inputs["image_grid_thw"], inputs.get("images_per_sample")
        rows = shapes.split([len(shapes)] if counts is None else counts.tolist())
        given = torch.cat([row[:number] for row, number in zip(rows, count.tolist(), strict=True)])
        if encoded is None:
            encoded = inner.get_image_features(inputs["pixel_values"], given, return_dict=True)
        features = encoded.pooler_output
        if (
            "mm_encoder_outputs" not in signature(inner.forward).parameters
        ):  # transformers 5.17 takes them in one tensor
            features = torch.cat(features)
        tokens = inner.get_image_tokens(features, given).view(-1).to(ids)
        return ids.masked_scatter(inner.get_placeholder_mask(ids, tokens), tokens)

    def forward(  # type: ignore[override]
        self, input_ids: Tensor, position_ids: Tensor | None = None, **inputs: Any
    ) -> CausalLMOutputWithPast:
        # The whole model is called, and no parts of it: with offloading its hooks bring it to the device.
        return self.model(input_ids=input_ids, position_ids=position_ids, **inputs)  # type: ignore[no-any-return]

    def _supports_default_dynamic_cache(self) -> bool:
        return self.model._supports_default_dynamic_cache()  # type: ignore[no-any-return]

    def pixels(self, tokens: Tensor) -> None:
        return None


def glm_generate(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any = None,
    stopping_criteria: Any = None,
    generation_config: Any = None,
    schedule: Schedule | str = "auto",
    guess: Guess | str | Callable[..., Any] = "grid",
    sampling: str = "gumbel",
    generator: torch.Generator | None = None,
    stream: Any = None,
    report: dict[str, Any] | None = None,
    **given: Any,
) -> Any:
    """`parallel_generate` for GLM-Image: `model.generate(**inputs, custom_generate=glm_generate, ...)`.

    Args:
        model, input_ids, logits_processor, stopping_criteria, generation_config: what `generate` passes.
        schedule, sampling, generator, stream, report: see `parallel_generate`.
        guess: "grid" or "preview" (the small picture upsampled), "above", "left", or any of `parallel_generate`.
        given: what the model gets besides.

    Returns:
        What `generate` returns.

    Raises:
        NotImplementedError: guidance, a cache that is not empty, or what `parallel_generate` refuses.
        ValueError: an option or an input is not as expected.
    """
    if any(type(processor).__name__ == GUIDANCE for processor in logits_processor or ()):
        raise NotImplementedError("guidance_scale was given: GLM-Image's tokens have no guidance; leave it out")
    if (cache := given.get(NAME)) is not None and cache.get_seq_length():
        raise NotImplementedError(f"{NAME} is not empty: GLM-Image counts its positions from the prompt; leave it out")
    described = GlmImage(model)
    request = described.request({"input_ids": input_ids} | given)
    assert request.grids is not None
    given = {name: value for name, value in given.items() if name not in OWN}
    output = parallel_generate(
        described,
        request.ids,
        logits_processor,
        stopping_criteria,
        generation_config,
        schedule,
        as_image_guess(guess, request.grids),
        sampling,
        generator,
        stream,
        report,
        **given | {"position_ids": request.position_ids},
    )
    sequences = output if isinstance(output, Tensor) else output.sequences
    sequences[:, : input_ids.shape[1]] = input_ids  # placeholders again
    return output
