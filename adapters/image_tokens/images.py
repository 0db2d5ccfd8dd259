"""`generate_images`: pictures from any model of image tokens, by windows.

Shapes: B pictures, L tokens of each, V ids that an image may hold, H x W pixels of C channels.
"""

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from transformers import EosTokenCriteria, GenerationConfig, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from parallel_decode.adapters.causal_lm.adaptive import Adaptive
from parallel_decode.adapters.causal_lm.bounded import Until
from parallel_decode.adapters.causal_lm.generate import SAMPLING
from parallel_decode.adapters.image_tokens.families import described
from parallel_decode.adapters.image_tokens.guesses import as_image_guess
from parallel_decode.adapters.image_tokens.layout import LaidOut, Layout
from parallel_decode.adapters.image_tokens.model import ImageModel, Request
from parallel_decode.schedules import Schedule
from parallel_decode.selective import as_schedule
from parallel_decode.solution import Solution
from parallel_decode.solver import Pass, solve
from parallel_decode.tokens.choices import Choice, Greedy, Gumbel
from parallel_decode.tokens.guesses import Guess

DEFAULTS: Any = getattr(GenerationConfig, "_get_default_generation_params", dict)()  # of `generate`


@dataclass(frozen=True, eq=False)
class Images:
    """Pictures and their tokens.

    Attributes:
        tokens: as the model's own `generate` returns them after the prompt, shape (B, L).
        pixels: from 0 to 1, shape (B, C, H, W); None where the model has no decoder of pictures (diffusion makes GLM-Image's).
        solution: how the tokens were found.
    """

    tokens: Tensor
    pixels: Tensor | None
    solution: Solution

    def to_pil(self) -> list[Any]:
        """The pictures as PIL images.

        Raises:
            ValueError: there are no pixels.
        """
        from PIL import Image

        if self.pixels is None:
            raise ValueError(
                "there are tokens alone: GLM-Image leaves pictures to a pipeline of diffusers, and ImageGPT's take inputs['clusters'], of its image processor"
            )
        bytes_ = (self.pixels * 255).round().byte().permute(0, 2, 3, 1).cpu()
        return [Image.fromarray((picture[..., 0] if picture.shape[2] == 1 else picture).numpy()) for picture in bytes_]


@torch.no_grad()
def generate_images(
    model: Any,
    inputs: Mapping[str, Any],
    *,
    schedule: str | Schedule = "auto",
    sampling: str = "gumbel",
    guess: str | Guess | Callable[..., Any] = "grid",
    do_sample: bool | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    guidance_scale: float | None = None,
    num_images: int = 1,
    generator: torch.Generator | None = None,
    progress: bool = False,
    on_row: Callable[[int, int, Tensor], None] | None = None,
) -> Images:
    """Draw pictures: the same tokens as one after the other, in fewer forwards.

    Args:
        model: `JanusForConditionalGeneration`, or another that docs/image_tokens.md names.
        inputs: what the model's processor gives (`input_ids`, `attention_mask`, ...).
        schedule: "auto" (`Adaptive`), "sequential", `Sliding(width)`, or any other of this library.
        sampling: "gumbel" draws the very sample of one token after the other, from the same noise; "maximal" and "speculative" draw other samples of the same
            distribution, in fewer forwards (`parallel_decode.tokens`).
        guess: of tokens that no window has held: "grid", "left", "above", "preview" (GLM-Image), "last", "n-gram", or a `Guess`. It changes how many forwards are needed, never the result.
        do_sample, temperature, top_k, top_p, guidance_scale: those of the model's `generation_config` if None, or else `generate`'s defaults.
        num_images: pictures for each prompt.
        generator: of the noise; the device's default one if None.
        progress: show a bar.
        on_row: called with a picture's number, a row's, and its tokens, shape (tokens of a row,), as soon as they are final, in order.

    Raises:
        NotImplementedError: the model is none of them.
        ValueError: an argument is not as expected.

    References:
        Speculative Jacobi Decoding (arXiv 2410.01699), its maximal couplings (arXiv 2510.24211).
    """
    if sampling not in SAMPLING:
        raise ValueError(f"sampling is {sampling!r}, expected one of {', '.join(map(repr, SAMPLING))}")
    if isinstance(num_images, bool) or not isinstance(num_images, int) or num_images < 1:
        raise ValueError(f"num_images is {num_images!r}, expected a whole number >= 1")
    described_model = described(model)
    config = model.generation_config
    scale = getattr(config, "guidance_scale", None) if guidance_scale is None else guidance_scale
    request = _repeated(described_model.request(dict(inputs), scale), num_images)
    grids = request.grids or ((described_model.rows, described_model.length // described_model.rows),)
    sampled = bool(config.do_sample) if do_sample is None else do_sample
    default = None if described_model is model else DEFAULTS.get("top_k")
    warpers = _warpers(config, temperature, top_k, top_p, default) if sampled else []
    layout: list[Any] = [] if request.fixed is None else [Layout(request.fixed, request.ids.shape[1])]
    system = LaidOut(
        described_model,
        request.ids,
        request.length or described_model.length,
        attention_mask=request.mask,
        position_ids=request.position_ids,
        processors=layout + warpers,
        fixed=request.fixed,
        choice=_choice(sampling, request.ids, generator, described_model) if sampled else Greedy(),
        guess=as_image_guess(guess, grids),
        guidance=request.guidance,
        ends=[EosTokenCriteria(list(request.eos))] if request.eos else [],
        pad=request.pad,
        keep=(False, False),
        keep_ended=False,
        stream=None,
    )
    rows = None if on_row is None else _Rows(described_model, grids, request.begun, on_row)
    chosen = Adaptive() if schedule == "auto" else as_schedule(schedule)
    # Windows end where a table of positions does.
    if system.reach < system.length and isinstance(chosen, Schedule) and chosen.freezes:
        chosen = Until(
            tol=chosen.tol, start=chosen.start, correction=chosen.correction, schedule=chosen, end=system.reach
        )
    solution = solve(system, chosen, callback=rows, progress=progress)
    length = int(system.lengths.max())
    system.choice.finish(length)
    tokens = solution.value[:, :length]
    return Images(described_model.told(tokens), described_model.pixels(tokens), solution)


def _repeated(request: Request, count: int) -> Request:
    """Each prompt so many times."""
    if count == 1:
        return request

    def each(part: Any) -> Any:
        return None if part is None else part.repeat_interleave(count, -2)

    guidance = request.guidance
    if guidance is not None:
        ids, mask, places = (part.repeat_interleave(count, -2) for part in guidance[1:4])
        guidance = guidance._replace(ids=ids, mask=mask, position_ids=places)
    ids, mask, position_ids = each(request.ids), each(request.mask), each(request.position_ids)
    return request._replace(ids=ids, mask=mask, position_ids=position_ids, guidance=guidance)


def _warpers(
    config: Any, temperature: float | None, top_k: int | None, top_p: float | None, default: int | None
) -> list[Any]:
    """Processors of logits, in the order of `generate`; `default` is top_k where nothing says another."""
    temperature = config.temperature if temperature is None else temperature
    top_k = config.top_k if top_k is None else top_k
    top_k = default if top_k is None else top_k
    top_p = config.top_p if top_p is None else top_p
    made: list[Any] = []
    if temperature not in (None, 1.0):
        made.append(TemperatureLogitsWarper(float(temperature)))
    if top_k not in (None, 0):
        made.append(TopKLogitsWarper(top_k=top_k))
    if top_p is not None and top_p < 1.0:
        made.append(TopPLogitsWarper(top_p=top_p))
    return made


def _choice(name: str, ids: Tensor, generator: torch.Generator | None, model: ImageModel) -> Choice:
    if name == "gumbel" and model.names is not None:
        return Gumbel(len(ids), ids.device, generator, (model.vocabulary, model.names))
    return SAMPLING[name](len(ids), ids.device, generator)


class _Rows:
    """Tells of each row of a picture once it is final."""

    def __init__(
        self, model: ImageModel, grids: Sequence[tuple[int, int]], begun: int, tell: Callable[[int, int, Tensor], None]
    ) -> None:
        widths = [width for rows, width in grids for _ in range(rows)]
        self.ends = [max(0, end - begun) for end in accumulate(widths)]
        self.model, self.tell = model, tell
        self.told: dict[int, int] = {}

    def __call__(self, step: Pass) -> None:
        for picture, front in enumerate(step.front.tolist()):
            done = bisect_right(self.ends, front)
            for row in range(self.told.get(picture, bisect_right(self.ends, 0)), done):
                start = self.ends[row - 1] if row else 0
                self.tell(picture, row, self.model.told(step.x[picture, start : self.ends[row]].clone()))
            self.told[picture] = done
