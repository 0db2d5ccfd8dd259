"""`parallel_generate`: what transformers' `generate` calls in place of its own loop."""

import inspect
import math
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache
from transformers.generation.utils import GenerateDecoderOnlyOutput

from parallel_decode.adapters.causal_lm.adaptive import Adaptive
from parallel_decode.adapters.causal_lm.guidance import Guidance, taken_out
from parallel_decode.adapters.causal_lm.prompt import Prompt
from parallel_decode.adapters.causal_lm.stopping import Generation, longest
from parallel_decode.adapters.causal_lm.trial import tried
from parallel_decode.schedules import Schedule, Sequential
from parallel_decode.selective import as_schedule
from parallel_decode.solver import solve
from parallel_decode.tokens.choices import Choice, Greedy, Gumbel, Maximal, Speculative
from parallel_decode.tokens.guesses import Guess, Row, as_guess
from parallel_decode.tokens.processors import Processors

SAMPLING: dict[str, Callable[[int, torch.device, torch.Generator | None], Choice]] = {
    "gumbel": Gumbel,
    "maximal": lambda batch, device, generator: Maximal(generator),
    "speculative": lambda batch, device, generator: Speculative(generator),
}
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


def parallel_generate(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any = None,
    stopping_criteria: Any = None,
    generation_config: Any = None,
    schedule: Schedule | str = "auto",
    guess: Guess | str | Callable[[Row, int], Sequence[int]] = "n-gram",
    sampling: str = "gumbel",
    generator: torch.Generator | None = None,
    stream: Any = None,
    report: dict[str, Any] | None = None,
    **model_kwargs: Any,
) -> Any:
    """Decode in windows of guesses: `model.generate(**inputs, custom_generate=parallel_generate, ...)`.

    Greedy text is `generate`'s, token for token, and so is a sample for the same seed. (In bfloat16 two kernels may break a near tie of two tokens
    differently, here as in every method that reads several tokens at once.) A model is tried first, by three forwards over the beginning of the prompt: one
    that cannot be read in windows is decoded one token at a time, with a warning, or refused. What is gained depends on how
    much of the text can be guessed: on code, or on answers that repeat their prompt, 2 to 6 tokens a forward; on ordinary
    prose next to nothing, and then `schedule="auto"` decodes one token at a time, as `generate` does. Plain Jacobi decoding
    (`guess="last"`) gains on models that were trained for it alone.

    Args:
        model, input_ids, logits_processor, stopping_criteria, generation_config: what `generate` passes.
        schedule: "auto" (`Adaptive`), "sequential", `Sliding(width)`, or any other of this library.
        guess: what windows hold before the model has read them: "n-gram", "last" (Jacobi), "repeat", a `Guess`, or a function from
            the tokens so far and a number to the tokens that may follow. It never changes the text.
        sampling: where `do_sample`: "gumbel" (for a seed `generate`'s own sample), "maximal" or "speculative" (the same
            distribution, another sample, fewer passes at times).
        generator: for sampling, on the model's device; the default one if None. Threads that sample at the same time get independent samples.
        stream: a streamer: it gets the prompt, and then final tokens alone. That of `generate(streamer=...)` by default.
        report: a dictionary, to be filled with forwards, tokens, tokens_per_forward, passes, seconds and the `Solution`.
        model_kwargs: what the model gets besides.

    Returns:
        What `generate` returns.

    Raises:
        NotImplementedError: beams, encoders, inputs other than text, attentions or hidden states as outputs, models without a key-value cache or with one
            that cannot be rewound.
        ValueError, TypeError: an option is not as expected.
        RuntimeError: scores that nothing can be drawn from (NaN), as `generate` raises.

    References:
        Santilli et al., Accelerating Transformer Inference for Translation via Parallel Decoding (arXiv 2305.10427).
        Fu et al., Break the Sequential Dependency of LLM Inference Using Lookahead Decoding (arXiv 2402.02057).
        Teng et al., Accelerating Auto-regressive Text-to-Image Generation with Training-free Speculative Jacobi Decoding (arXiv 2410.01699).

    Example:
        >>> import torch, transformers
        >>> from parallel_decode.adapters.causal_lm import parallel_generate
        >>> config = transformers.LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
        >>> model = transformers.LlamaForCausalLM(config).eval()
        >>> inputs = {"input_ids": torch.tensor([[1, 5, 6, 7]]), "do_sample": False, "max_new_tokens": 12, "pad_token_id": 0}
        >>> fast = model.generate(**inputs, custom_generate=parallel_generate)
        >>> torch.equal(fast, model.generate(**inputs))
        True
    """
    began = time.perf_counter()
    config = generation_config if generation_config is not None else model.generation_config
    _refuse(model, config)
    if sampling not in SAMPLING:
        raise ValueError(f"sampling is {sampling!r}, expected one of {', '.join(map(repr, SAMPLING))}")
    batch, columns = input_ids.shape
    length = int(min(config.max_length, longest(stopping_criteria))) - columns
    input_ids = input_ids.long()
    cache, outputs = model_kwargs.pop("past_key_values", None), config.return_dict_in_generate
    returned = getattr(cache, "_is_user_defined", False) or bool(outputs and model_kwargs.get("use_cache") is not False)
    processors, guidance = _guidance(model, logits_processor, input_ids, cache, returned)
    if processors.unknown:
        warnings.warn(
            f"{', '.join(processors.unknown)} may have a state, so tokens are decoded one by one; a processor of your own that is a function of "
            "a row's tokens and logits says so by an attribute is_pure = True",
            stacklevel=2,
        )
    mask, position_ids, zeros, extra = _inputs(model_kwargs, columns)
    if mask is None and cache is not None and (known := getattr(config, "_mask_length", columns)) > columns:
        mask = input_ids.new_ones(batch, known)  # generate leaves out a mask of ones
    pad = getattr(config, "_pad_token_tensor", None)
    streamer = _streamer() if stream is None else None
    system = Generation(
        model,
        input_ids,
        length,
        attention_mask=mask,
        position_ids=position_ids,
        processors=processors,
        choice=SAMPLING[sampling](batch, input_ids.device, generator) if config.do_sample else Greedy(),
        guess=as_guess(guess),
        cache=cache,
        guidance=guidance,
        zeros=zeros,
        extra=extra,
        ends=stopping_criteria,
        pad=None if pad is None else int(pad),
        keep=(bool(outputs and config.output_scores), bool(outputs and config.output_logits)),
        keep_ended=bool(outputs) or returned,
        stream=streamer if stream is None else stream,
    )
    chosen = Adaptive() if schedule == "auto" else as_schedule(schedule)
    if processors.unknown:
        chosen = Sequential()
    elif not isinstance(chosen, Sequential) and system.trust.windows:
        warnings.warn(f"{system.trust.windows}: tokens are decoded one by one", stacklevel=2)
        chosen = Sequential()
    try:
        if stream is not None:
            stream.put(input_ids.cpu())
        solution = solve(system, chosen)
        length = int(system.lengths.max())
        system.choice.finish(length)
        left = _cache(system, solution.value, length) if returned else None
    except BaseException:
        system.slots.take_back(system.given)
        raise
    finally:
        if system.stream is not None:
            system.stream.end()
    text = torch.cat([input_ids, solution.value[:, :length]], 1)
    if report is not None:
        forwards, tokens = system.reader.forwards[0], int(system.lengths.sum())
        report |= {"forwards": forwards, "tokens": tokens, "tokens_per_forward": tokens / max(1, forwards) / batch}
        report |= {"passes": solution.passes, "seconds": time.perf_counter() - began, "solution": solution}
    if not outputs:
        return text
    kept: Any = [
        tuple(part[:length]) if wanted else None for part, wanted in zip(system.kept, system.keep, strict=True)
    ]
    return GenerateDecoderOnlyOutput(sequences=text, scores=kept[0], logits=kept[1], past_key_values=left)  # type: ignore[arg-type]


def _guidance(
    model: Any, logits_processor: Any, ids: Tensor, cache: Any, returned: bool
) -> tuple[Processors, Guidance | None]:
    """The processors, and transformers' guidance if it can be read in a doubled batch; it stays among them, one by one, where that cannot be.

    Cannot: the cache has no rows or no room for negative prompts, or would come back with columns too many; the model does not read padded rows as it reads
    them alone.
    """
    others, guidance = taken_out(logits_processor, ids, model)
    if guidance is not None:
        longer = guidance.ids.shape[1] > ids.shape[1]
        held = cache is not None and cache.get_seq_length() > 0
        if held or (longer and (returned or isinstance(cache, StaticCache))) or tried(model, Prompt(ids, 0), {}).rows:
            return Processors(logits_processor), None
    return Processors(others), guidance


def _inputs(
    given: dict[str, Any], columns: int
) -> tuple[Tensor | None, Tensor | None, tuple[str, ...], dict[str, Any]]:
    """Attention mask, position ids, names of arguments that are 0 everywhere, and the other arguments of a forward.

    Raises:
        NotImplementedError: there are others that depend on the row or the column, such as images.
    """
    given = {name: value for name, value in given.items() if value is not None and value != {}}
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


def _streamer() -> Any:
    """What `generate` was given as `streamer=`. It does not hand that on, and whoever reads from it would wait forever: so it is read off its frame."""
    frame = inspect.currentframe()
    for _ in range(5):
        frame = frame.f_back if frame is not None else None
        if frame is not None and frame.f_code.co_name == "generate" and "custom_generate" in frame.f_locals:
            return frame.f_locals.get("streamer")
    return None


def _cache(system: Generation, x: Tensor, length: int) -> Any:
    """The cache that was given, with all columns but the last, in every row."""
    wanted = system.layout.columns + length - 1
    first = system.slots.align(wanted)
    if first < wanted:
        with torch.no_grad():
            system._read(x, first, wanted - first, 1)
    if system.guidance is not None:
        system.slots.select(torch.arange(len(x), device=x.device))
    return system.slots.give_back()


def _refuse(model: Any, config: Any) -> None:
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
