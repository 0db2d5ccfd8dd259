"""`parallelize`: pipelines of diffusers that sample image tokens, in fewer forwards.

Shapes: none.
"""

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from parallel_decode.adapters.image_tokens.glm_image import glm_generate
from parallel_decode.schedules import Schedule
from parallel_decode.tokens.guesses import Guess

GENERATES: dict[str, Callable[..., Any]] = {"GlmImageForConditionalGeneration": glm_generate}
COMPONENT = "vision_language_encoder"

_lock = threading.Lock()


class Route:
    """What stands in place of a model's `generate` while there are ways to go: the newest is gone.

    Args:
        model: of transformers.

    Attributes:
        ways: `custom_generate`, the newest last.
    """

    def __init__(self, model: Any) -> None:
        self.generate = model.generate
        self.own = vars(model).get("generate")  # of this very object, if there is one
        self.ways: list[Callable[..., Any]] = []

    def __call__(self, *args: Any, **options: Any) -> Any:
        ways = self.ways[-1:]  # another thread may have taken the last way back
        if ways and options.get("custom_generate") is None:
            options["custom_generate"] = ways[0]
        return self.generate(*args, **options)


class Parallelized:
    """A pipeline whose image tokens come in parallel, until `restore`. It is called as the pipeline is, and has its attributes."""

    def __init__(self, pipeline: Any, way: Callable[..., Any]) -> None:
        vars(self).update(pipeline=pipeline, _model=getattr(pipeline, COMPONENT), _way=way)
        with _lock:
            route = vars(self._model).get("generate")
            if not isinstance(route, Route):
                route = self._model.generate = Route(self._model)
            route.ways.append(way)

    def restore(self) -> None:
        """The pipeline generates as before. Once is enough, and more does no harm."""
        with _lock:
            route = vars(self._model).get("generate")
            if not isinstance(route, Route):
                return
            route.ways[:] = [way for way in route.ways if way is not self._way]
            if not route.ways and route.own is not None:
                self._model.generate = route.own
            elif not route.ways:
                del self._model.generate

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.pipeline(*args, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self).get("pipeline"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.pipeline, name, value)

    def __enter__(self) -> Any:
        return self.pipeline

    def __exit__(self, *error: object) -> None:
        self.restore()


def parallelize(
    pipeline: Any,
    *,
    schedule: Schedule | str = "auto",
    guess: Guess | str | Callable[..., Any] = "grid",
    sampling: str = "gumbel",
    generator: torch.Generator | None = None,
    report: dict[str, Any] | None = None,
) -> Parallelized:
    """Draw the image tokens of a pipeline in fewer forwards: with the same seed the same tokens, and so the same pictures.

    It acts at once and until `restore()`, or inside a `with`, which hands out the pipeline itself: `with parallelize(pipeline) as pipeline: ...`. Neither the
    pipeline's class nor its components change; the `generate` of its `vision_language_encoder` is another meanwhile, for all threads and for all pipelines
    that share that model. Of several calls the newest counts, and each takes back its own.

    Args:
        pipeline: diffusers' `GlmImagePipeline`.
        schedule: "auto" (`Adaptive`), "sequential", `Sliding(width)`, or any other of this library.
        guess: of tokens that no window has held: "grid" or "preview" (the small picture upsampled), "above", "left", "last", "n-gram", or a `Guess`. It
            never changes the result.
        sampling: "gumbel" (for a seed the pipeline's own sample), "maximal" or "speculative" (the same distribution, other samples).
        generator: of the noise; the default one, which the pipeline seeds, if None.
        report: a dictionary, to be filled with forwards, tokens, seconds and more (`parallel_generate`).

    Raises:
        TypeError: nothing in the pipeline samples image tokens.

    Example:
        >>> from diffusers import GlmImagePipeline  # doctest: +SKIP
        >>> pipeline = GlmImagePipeline.from_pretrained("zai-org/GLM-Image")  # doctest: +SKIP
        >>> with parallelize(pipeline):  # doctest: +SKIP
        ...     image = pipeline("A cat", height=1024, width=1024).images[0]
    """
    model = getattr(pipeline, COMPONENT, None)
    generate = GENERATES.get(type(model).__name__)
    if generate is None:
        found = f"its {COMPONENT} is {type(model).__name__}" if model is not None else f"it has no {COMPONENT}"
        raise TypeError(
            f"{type(pipeline).__name__} samples no image tokens that are known here ({found}): expected diffusers' GlmImagePipeline, with one of {', '.join(GENERATES)}"
        )
    options = {"schedule": schedule, "guess": guess, "sampling": sampling, "generator": generator, "report": report}
    return Parallelized(pipeline, partial(generate, **options))
