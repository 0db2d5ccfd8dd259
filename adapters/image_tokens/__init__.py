"""Image tokens: pictures of autoregressive models of transformers and diffusers, in fewer forwards."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from parallel_decode.adapters.image_tokens.images import Images, generate_images
    from parallel_decode.adapters.image_tokens.model import ImageModel, Request
    from parallel_decode.adapters.image_tokens.pipelines import parallelize

__all__ = ["ImageModel", "Images", "Request", "generate_images", "parallelize"]

MODULES = {
    "ImageModel": "model",
    "Images": "images",
    "Request": "model",
    "generate_images": "images",
    "parallelize": "pipelines",
}


def __getattr__(name: str) -> Any:
    """A name is imported when it is asked for: the command line imports this package, and transformers takes seconds."""
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{MODULES[name]}"), name)
