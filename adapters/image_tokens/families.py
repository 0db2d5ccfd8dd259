"""Which class describes a model."""

from typing import Any

from parallel_decode.adapters.image_tokens.emu3 import Emu3
from parallel_decode.adapters.image_tokens.glm_image import GlmImage
from parallel_decode.adapters.image_tokens.imagegpt import ImageGPT
from parallel_decode.adapters.image_tokens.janus import Janus
from parallel_decode.adapters.image_tokens.model import ImageModel

FAMILIES: dict[str, type[ImageModel]] = {
    "Emu3ForConditionalGeneration": Emu3,
    "GlmImageForConditionalGeneration": GlmImage,
    "ImageGPTForCausalImageModeling": ImageGPT,
    "JanusForConditionalGeneration": Janus,
}
REFUSED = {
    "ChameleonForConditionalGeneration": "transformers' Chameleon cannot draw: it masks all image tokens in its logits, and its VQ-VAE has no decoder",
}


def described(model: Any) -> ImageModel:
    """A model as an `ImageModel`.

    Raises:
        NotImplementedError: it is none that draws.
    """
    if isinstance(model, ImageModel):
        return model
    name = type(model).__name__
    if name in REFUSED:
        raise NotImplementedError(REFUSED[name])
    if name not in FAMILIES:
        raise NotImplementedError(
            f"{name} is no model of image tokens that is known here: expected {', '.join(FAMILIES)}, or an ImageModel of your own"
        )
    family: Any = FAMILIES[name]
    return family(model)  # type: ignore[no-any-return]
