"""What `generate` hands over: refused, or sorted into what a system takes.

Shapes: B batch rows, P columns of the prompt.
"""

import inspect
import math
from typing import Any

from torch import Tensor
from transformers import StaticCache

from parallel_decode.adapters.causal_lm.cache import NAME
from parallel_decode.adapters.causal_lm.guidance import Guidance, taken_out
from parallel_decode.adapters.causal_lm.model_check import ModelCheck
from parallel_decode.adapters.causal_lm.prompt import Prompt
from parallel_decode.tokens.processors import Processors

MODES = (  # options that ask for something else than greedy text or samples
    "num_beams",
    "num_beam_groups",
    "constraints",
    "force_words_ids",
    "penalty_alpha",
    "dola_layers",
    "prompt_lookup_num_tokens",
    "assistant_early_exit",
    "use_mtp",
)
TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")  # 0 for text


def refuse(model: Any, config: Any) -> None:
    """Raise where a model, or what a `GenerationConfig` asks for, is nothing for windows.

    Raises:
        NotImplementedError: so it is.
        ValueError: there is no `max_length`.
    """
    if model.config.is_encoder_decoder:
        raise NotImplementedError(f"{type(model).__name__} has an encoder: parallel_generate is for decoders alone")
    if getattr(model, "_is_stateful", False):
        raise NotImplementedError(
            f"{type(model).__name__} keeps a state that cannot be rewound: a window of guesses needs that; use generate without custom_generate"
        )
    if not model._supports_default_dynamic_cache():
        raise NotImplementedError(
            f"{type(model).__name__} has no key-value cache of the usual form; use generate without custom_generate"
        )
    mode = str(config.get_generation_mode().value)
    if mode not in ("greedy_search", "sample"):
        given = [
            f"{name} is {value}" for name in MODES if (value := getattr(config, name, None)) not in (None, False, 1)
        ]
        raise NotImplementedError(
            f"{', '.join(given)}: that is {mode.replace('_', ' ')}, and parallel_generate is for greedy text and samples; leave out one of them"
        )
    for name in ("output_attentions", "output_hidden_states"):
        if config.return_dict_in_generate and getattr(config, name, None):
            raise NotImplementedError(
                f"{name} is not offered: a window of guesses has others than one token at a time has; leave it out"
            )
    if config.max_length is None or math.isinf(config.max_length):
        raise ValueError("max_length is not set: pass max_new_tokens")


def model_inputs(
    given: dict[str, Any], columns: int
) -> tuple[Tensor | None, Tensor | None, tuple[str, ...], dict[str, Any]]:
    """Attention mask, position ids, names of arguments that are 0 everywhere, and the other arguments of a forward.

    Raises:
        NotImplementedError: there are others that depend on the row or the column, such as images.
    """
    given = {name: value for name, value in given.items() if value is not None and value != {}}
    if given.get("use_cache") is False and NAME in given:
        raise NotImplementedError(f"use_cache is False, and {NAME} was given: leave out one of them")
    given.pop(NAME, None)
    mask, position_ids = given.pop("attention_mask", None), given.pop("position_ids", None)
    for name in ("use_cache", "logits_to_keep", "cache_position"):
        given.pop(name, None)
    zeros = tuple(
        name for name in TOKEN_TYPES if isinstance(value := given.get(name), Tensor) and not bool(value.any())
    )
    extra = {name: value for name, value in given.items() if name not in zeros}
    others = [name for name, value in extra.items() if not isinstance(value, bool | int | float | str)]
    if others or not columns:
        raise NotImplementedError(
            f"the model was given {', '.join(others) or 'an empty prompt'}: parallel_generate reads tokens alone; use generate without custom_generate"
        )
    return mask, position_ids, zeros, extra


def processors_and_guidance(
    model: Any, logits_processor: Any, ids: Tensor, cache: Any, returned: bool, others_given: bool
) -> tuple[Processors, Guidance | None]:
    """The processors, and transformers' guidance if it can be read in a doubled batch; it stays among them, one by one, where that cannot be.

    Cannot: the cache has no rows or no room for negative prompts, or would come back with columns too many; the model does not read padded rows as it reads
    them alone; it is given other arguments, which are for the prompts alone.
    """
    others, guidance = taken_out(logits_processor, ids, model)
    if guidance is not None:
        longer = guidance.ids.shape[1] > ids.shape[1]
        held = cache is not None and cache.get_seq_length() > 0
        narrow = longer and (returned or isinstance(cache, StaticCache))
        trust = ModelCheck(model, Prompt(ids, 0), {}, padded=True).result().or_refuse()
        if held or narrow or others_given or trust.no_windows or trust.no_rows:
            return Processors(logits_processor), None
    return Processors(others), guidance


def streamer_of_generate() -> Any:
    """What `generate` was given as `streamer=`. It does not hand that on, and whoever reads from it would wait forever: so it is read off its frame."""
    frame = inspect.currentframe()
    for _ in range(5):
        frame = frame.f_back if frame is not None else None
        if frame is not None and frame.f_code.co_name == "generate" and "custom_generate" in frame.f_locals:
            return frame.f_locals.get("streamer")
    return None
