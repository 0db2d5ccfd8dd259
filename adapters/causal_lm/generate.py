"""`parallel_generate`: what transformers' `generate` calls in place of its own loop."""

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
from parallel_decode.adapters.causal_lm.guidance import taken_out
from parallel_decode.adapters.causal_lm.stopping import Generation
from parallel_decode.adapters.causal_lm.system import CausalLM
from parallel_decode.schedules import Schedule
from parallel_decode.selective import as_schedule
from parallel_decode.solver import solve
from parallel_decode.tokens.choices import Choice, Greedy, Gumbel, Maximal, Speculative
from parallel_decode.tokens.guesses import Guess, Row, as_guess
from parallel_decode.tokens.processors import Processors

SAMPLING: dict[str, Callable[[int, torch.device], Choice]] = {
    "gumbel": Gumbel,
    "maximal": lambda batch, device: Maximal(),
    "speculative": lambda batch, device: Speculative(),
}
# Scores nearer than this may change places between two kernels; 2^-18 in other types.
TIE_TOLERANCE = {torch.bfloat16: 2.0**-6, torch.float16: 2.0**-8}


def parallel_generate(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any = None,
    stopping_criteria: Any = None,
    generation_config: Any = None,
    schedule: Schedule | str = "auto",
    guess: Guess | str | Callable[[Row, int], Sequence[int]] = "n-gram",
    sampling: str = "gumbel",
    strict: bool = False,
    stream: Any = None,
    report: dict[str, Any] | None = None,
    **model_kwargs: Any,
) -> Any:
    """Decode in windows of guesses: `model.generate(**inputs, custom_generate=parallel_generate, ...)`.

    Greedy text is `generate`'s, token for token (in float32; see `strict` for less), and so is a sample for the same seed. What is gained depends on how
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
        strict: in bfloat16 two kernels may break a near tie of two tokens differently, in any method that reads several tokens at once; True
            chooses again, by a forward of one token, wherever the two best scores are so near. All rows then go in step. For greedy text alone.
        stream: a streamer (`generate` keeps `streamer=` to itself). It gets the prompt, and then final tokens alone.
        report: a dictionary, to be filled with forwards, tokens, tokens_per_forward, passes, seconds, ties (near ties chosen again) and the `Solution`.
        model_kwargs: what the model gets besides.

    Returns:
        What `generate` returns.

    Raises:
        NotImplementedError: beams, encoders, attentions or hidden states as outputs, caches that cannot be rewound.
        ValueError, TypeError: an option is not as expected.

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
    if strict and config.do_sample:
        raise ValueError("strict is for greedy text: leave it out where do_sample is True")
    batch, columns = input_ids.shape
    length = config.max_length - columns
    cache, outputs = model_kwargs.pop("past_key_values", None), config.return_dict_in_generate
    of_logits, guidance = taken_out(logits_processor, input_ids, model)
    if guidance is not None:
        longer = guidance.ids.shape[1] > columns
        held = cache is not None and cache.get_seq_length() > 0
        # The cache has no rows or no room for negative prompts, or would come back with columns too many: one by one.
        if held or (longer and (outputs or isinstance(cache, StaticCache))):
            of_logits, guidance = logits_processor, None
    processors = Processors(of_logits)
    if processors.unknown:
        warnings.warn(
            f"{', '.join(processors.unknown)} may have a state, so tokens are decoded one by one; a processor of your own that is a function of "
            "a row's tokens and logits says so by an attribute is_pure = True",
            stacklevel=2,
        )
    model_kwargs = {key: value for key, value in model_kwargs.items() if value is not None}
    mask, position_ids = model_kwargs.pop("attention_mask", None), model_kwargs.pop("position_ids", None)
    for name in ("use_cache", "logits_to_keep", "cache_position"):
        model_kwargs.pop(name, None)
    others = [key for key, value in model_kwargs.items() if isinstance(value, Tensor)]
    if others or not columns:
        raise NotImplementedError(
            f"the model was given {', '.join(others) or 'an empty prompt'}: parallel_generate reads tokens alone; use generate without custom_generate"
        )
    pad = getattr(config, "_pad_token_tensor", None)
    system = Generation(
        model,
        input_ids,
        length,
        attention_mask=mask,
        position_ids=position_ids,
        processors=processors,
        choice=SAMPLING[sampling](batch, input_ids.device) if config.do_sample else Greedy(),
        guess=as_guess(guess),
        cache=cache,
        tie_tolerance=TIE_TOLERANCE.get(model.dtype, 2.0**-18) if strict else 0.0,
        guidance=guidance,
        extra=model_kwargs,
        ends=stopping_criteria,
        pad=None if pad is None else int(pad),
        keep=(bool(outputs and config.output_scores), bool(outputs and config.output_logits)),
        keep_ended=bool(outputs),
        stream=stream,
    )
    chosen = Adaptive() if schedule == "auto" else as_schedule(schedule)
    if processors.unknown:
        chosen = as_schedule("sequential")
    if stream is not None:
        stream.put(input_ids.cpu())
    solution = solve(system, chosen)
    length = int(system.lengths.max())
    system.choice.finish(length)
    if stream is not None:
        stream.end()
    text = torch.cat([input_ids, solution.value[:, :length]], 1)
    if report is not None:
        counts = {key: system.counts[key] for key in ("forwards", "ties")}
        report |= counts | {"tokens": int(system.lengths.sum()), "passes": solution.passes}
        report |= {"tokens_per_forward": report["tokens"] / max(1, counts["forwards"]) / batch}
        report |= {"seconds": time.perf_counter() - began, "solution": solution}
    if not outputs:
        return text
    kept: Any = [
        tuple(part[:length]) if wanted else None for part, wanted in zip(system.kept, system.keep, strict=True)
    ]
    return GenerateDecoderOnlyOutput(
        sequences=text,  # type: ignore[arg-type]
        scores=kept[0],
        logits=kept[1],
        past_key_values=_cache(system, solution.value, length),
    )


def _cache(system: CausalLM, x: Tensor, length: int) -> Any:
    """The cache with all columns but the last, in every row."""
    wanted = system.layout.columns + length - 1
    first = system.slots.align(wanted)
    if first < wanted:
        with torch.no_grad():
            system._forward(x, first, wanted - first, 1)
    if system.guidance is not None:
        system.slots.select(torch.arange(len(x), device=x.device))
    return system.slots.cache


def _refuse(model: Any, config: Any) -> None:
    if model.config.is_encoder_decoder:
        raise NotImplementedError(f"{type(model).__name__} has an encoder: parallel_generate is for decoders alone")
    if getattr(model, "_is_stateful", False):
        raise NotImplementedError(
            f"{type(model).__name__} keeps a state that cannot be rewound: a window of guesses needs that; use generate without custom_generate"
        )
    if config.num_beams and config.num_beams > 1:
        raise NotImplementedError(
            f"num_beams is {config.num_beams}: beams are compared at every token, so nothing can be guessed ahead; use num_beams=1"
        )
    if getattr(config, "penalty_alpha", None) or getattr(config, "dola_layers", None):
        raise NotImplementedError(
            "contrastive search and DoLa read more than logits: leave out penalty_alpha and dola_layers"
        )
    for name in ("output_attentions", "output_hidden_states"):
        if config.return_dict_in_generate and getattr(config, name, None):
            raise NotImplementedError(
                f"{name} is not offered: a window of guesses has others than one token at a time has; leave it out"
            )
    if config.max_length is None or math.isinf(config.max_length):
        raise ValueError("max_length is not set: pass max_new_tokens")
