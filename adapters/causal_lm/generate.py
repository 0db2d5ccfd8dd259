"""`parallel_generate`: what transformers' `generate` calls in place of its own loop."""

import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.generation.utils import GenerateDecoderOnlyOutput

from parallel_decode.adapters.causal_lm.adaptive import Adaptive
from parallel_decode.adapters.causal_lm.arguments import (
    model_inputs,
    processors_and_guidance,
    refuse,
    streamer_of_generate,
)
from parallel_decode.adapters.causal_lm.bounded import Until
from parallel_decode.adapters.causal_lm.cache import NAME
from parallel_decode.adapters.causal_lm.stopping import Generation, longest
from parallel_decode.schedules import Schedule, Sequential
from parallel_decode.selective import Selective, as_schedule
from parallel_decode.solver import solve
from parallel_decode.tokens.choices import Choice, Greedy, Gumbel, Maximal, Speculative
from parallel_decode.tokens.guesses import Guess, Last, Row, as_guess

SAMPLING: dict[str, Callable[[int, torch.device, torch.Generator | None], Choice]] = {
    "gumbel": Gumbel,
    "maximal": lambda batch, device, generator: Maximal(generator),
    "speculative": lambda batch, device, generator: Speculative(generator),
}


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
    differently, here as in every method that reads several tokens at once.) A model is checked before its first window, by four short forwards over the beginning of the
    prompt: one that cannot be read in windows is decoded one token at a time, with a warning, or refused. What is gained depends on how
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
        report: a dictionary, to be filled with forwards, tokens, tokens_per_forward, passes, seconds and the `Solution` (without the forwards of that check).
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
    streamer = streamer_of_generate() if stream is None else stream
    try:
        if sampling not in SAMPLING:
            raise ValueError(f"sampling is {sampling!r}, expected one of {', '.join(map(repr, SAMPLING))}")
        choice = SAMPLING[sampling](len(input_ids), input_ids.device, generator) if config.do_sample else Greedy()
        chosen = Adaptive() if schedule == "auto" else as_schedule(schedule)
        drafts = as_guess(guess)
        drafts = Last() if isinstance(chosen, Sequential) else drafts  # which nothing would read
        own = {"choice": choice, "guess": drafts, "stream": streamer}
        system = _system(model, input_ids.long(), logits_processor, stopping_criteria, config, model_kwargs, own)
        if why := _one_by_one(system, chosen):
            warnings.warn(f"{why}: tokens are decoded one by one", stacklevel=2)
            chosen = Sequential()
        elif system.reach < system.length and isinstance(chosen, Schedule):
            chosen = Until(
                tol=chosen.tol, start=chosen.start, correction=chosen.correction, schedule=chosen, end=system.reach
            )
        if stream is not None:
            stream.put(input_ids.cpu())
        try:
            solution = solve(system, chosen)
            length = int(system.lengths.max())
            choice.finish(length)
            cache = _left(system, solution.value, length) if system.returned else None
        except BaseException:
            system.slots.take_back(system.given)
            raise
    finally:
        if streamer is not None:
            streamer.end()
    text = torch.cat([system.prompt.ids, solution.value[:, :length]], 1)
    if report is not None:
        forwards, tokens = system.reader.forwards[0], int(system.lengths.sum())
        report |= {"forwards": forwards, "tokens": tokens, "tokens_per_forward": tokens / max(1, forwards) / len(text)}
        report |= {"passes": solution.passes, "seconds": time.perf_counter() - began, "solution": solution}
    if not config.return_dict_in_generate:
        return text
    kept: Any = [
        tuple(part[:length]) if wanted else None for part, wanted in zip(system.kept, system.keep, strict=True)
    ]
    return GenerateDecoderOnlyOutput(sequences=text, scores=kept[0], logits=kept[1], **{NAME: cache})  # type: ignore[arg-type]


def _system(
    model: Any,
    ids: Tensor,
    logits_processor: Any,
    criteria: Any,
    config: Any,
    given: dict[str, Any],
    own: dict[str, Any],
) -> Generation:
    """What is to be solved.

    Args:
        model, ids, logits_processor, criteria, config: what `generate` passes.
        given: arguments of the model.
        own: choice, guess and stream.
    """
    refuse(model, config)
    (batch, columns), outputs = ids.shape, bool(config.return_dict_in_generate)
    cache = given.get(NAME)
    returned = getattr(cache, "_is_user_defined", False) or (outputs and given.get("use_cache") is not False)
    mask, position_ids, zeros, extra = model_inputs(given, columns)
    others = bool(zeros or extra)
    processors, guidance = processors_and_guidance(model, logits_processor, ids, cache, returned, others)
    if mask is None and cache is not None and (known := getattr(config, "_mask_length", columns)) > columns:
        mask = ids.new_ones(batch, known)  # generate leaves out a mask of ones
    pad = getattr(config, "_pad_token_tensor", None)
    return Generation(
        model,
        ids,
        max(1, int(min(config.max_length, longest(criteria))) - columns),
        attention_mask=mask,
        position_ids=position_ids,
        processors=processors,
        cache=cache,
        guidance=guidance,
        zeros=zeros,
        extra=extra,
        ends=criteria,
        pad=None if pad is None else int(pad),
        keep=(bool(outputs and config.output_scores), bool(outputs and config.output_logits)),
        keep_ended=outputs or returned,
        returned=returned,
        **own,
    )


def _one_by_one(system: Generation, schedule: Schedule | Selective) -> str:
    """Why tokens have to be decoded one by one, if they do and would not be anyway."""
    if names := system.processors.unknown:
        return (
            f"{', '.join(names)} may have a state (a processor of your own that is a function of a row's tokens and logits says so by an attribute "
            "is_pure = True)"
        )
    if isinstance(schedule, Sequential):
        return ""
    bounded = system.reach < system.length and (
        system.reach < 2 or not isinstance(schedule, Schedule) or not schedule.freezes
    )
    if isinstance(schedule, Adaptive) and not bounded and system.model_check.built_in:  # it asks when it wants a window
        return ""
    trust = system.trust.or_refuse()
    return trust.no_windows or (trust.no_rows if bounded else "")


def _left(system: Generation, x: Tensor, length: int) -> Any:
    """The cache that was given, with all columns but the last, in every row."""
    wanted = system.layout.columns + length - 1
    first = system.slots.align(wanted)
    if first < wanted:
        with torch.no_grad():
            system._read(x, first, wanted - first, 1)
    if system.guidance is not None:
        system.slots.select(torch.arange(len(x), device=x.device))
    return system.slots.give_back()
