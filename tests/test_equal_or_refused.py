"""What users bring to `parallel_generate`: the text and the cache of `generate`, or a refusal."""

import threading
import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import peft
import pytest
import torch
import transformers
from torch import Tensor
from transformers import (
    DynamicCache,
    EosTokenCriteria,
    MaxLengthCriteria,
    StaticCache,
    StoppingCriteria,
    TextIteratorStreamer,
)

import parallel_decode as pd
from parallel_decode.adapters.causal_lm import CausalLM, adaptive, model_check, parallel_generate, tuner
from parallel_decode.adapters.causal_lm import cache as cache_module
from parallel_decode.adapters.causal_lm.cache import NAME, ROOM, FixedLayer, Slots
from parallel_decode.tokens import Gumbel
from tests.test_causal_lm import HOW, MODELS, PAD, SMALL, Stream, V, both, make, prompts

hf: Any = transformers
WINDOWS: dict[str, dict[str, Any]] = {
    "auto": {"schedule": "auto"},
    "windows": {"schedule": pd.Sliding(6, per_row=True)},
    "jacobi": {"schedule": "jacobi", "guess": "last"},
}


def said(ids: Tensor, mask: Tensor, seed: int) -> dict[str, Tensor]:
    """A conversation's next turn: what was said, and six tokens more."""
    new = torch.randint(2, V, (len(ids), 6), generator=torch.Generator().manual_seed(seed))
    ones = torch.ones(len(ids), ids.shape[1] + 6 - mask.shape[1], dtype=torch.long)
    return {"input_ids": torch.cat([ids, new], 1), "attention_mask": torch.cat([mask, ones], 1)}


def content(cache: Any) -> list[Tensor]:
    return [part for layer in cache.layers for part in (layer.keys, layer.values)]


@pytest.mark.parametrize("own", WINDOWS)
@pytest.mark.parametrize("new_alone", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_a_cache_is_left_as_generate_leaves_it(name: str, batch: int, new_alone: bool, own: str) -> None:
    model = make(name)
    more = {"do_sample": False, "max_new_tokens": 14, "pad_token_id": PAD, "eos_token_id": [3, 4]}
    caches = [DynamicCache(config=model.config) for _ in range(3)]
    given: dict[str, Any] = prompts(batch)
    for turn in range(3):
        ways: list[dict[str, Any]] = [{}, {"custom_generate": parallel_generate, **WINDOWS[own]}]
        ways.append(ways[turn % 2])  # the third changes between them
        asked = dict(given)
        if new_alone and turn:
            asked["input_ids"] = asked["input_ids"][:, caches[0].get_seq_length() :]
        texts = [model.generate(**asked, **more, **way, **{NAME: c}) for way, c in zip(ways, caches, strict=True)]
        assert torch.equal(texts[0], texts[1]) and torch.equal(texts[0], texts[2])
        for cache in caches[1:]:
            assert cache.get_seq_length() == caches[0].get_seq_length()
            assert [type(layer) for layer in cache.layers] == [type(layer) for layer in caches[0].layers]
            for found, expected in zip(content(cache), content(caches[0]), strict=True):
                torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        whole = (
            torch.cat([given["input_ids"][:, : -asked["input_ids"].shape[1]], texts[0]], 1) if new_alone else texts[0]
        )
        given = said(whole, given["attention_mask"], turn)


def test_a_static_cache_of_ones_own_goes_on() -> None:
    model = make("Llama")
    caches = [StaticCache(config=model.config, max_cache_len=64) for _ in range(2)]
    given: dict[str, Any] = prompts(2)
    for turn in range(2):
        more = {"do_sample": False, "max_new_tokens": 10, "pad_token_id": PAD}
        texts = [
            model.generate(**given, **more, **{NAME: cache}, **own)
            for cache, own in zip(
                caches, ({}, {"custom_generate": parallel_generate, "schedule": pd.Sliding(6)}), strict=True
            )
        ]
        assert torch.equal(*texts)
        assert int(caches[0].get_seq_length()) == int(caches[1].get_seq_length())
        given = said(texts[0], given["attention_mask"], turn)


class Broken(StoppingCriteria):
    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        if input_ids.shape[1] > 18:
            raise ArithmeticError("broken")
        return torch.zeros(len(input_ids), dtype=torch.bool)


@pytest.mark.parametrize("static", [False, True])
def test_after_an_error_the_cache_is_as_it_was_and_the_stream_ends(static: bool) -> None:
    model = make("Llama")
    more = {"do_sample": False, "max_new_tokens": 14, "pad_token_id": PAD, "custom_generate": parallel_generate}
    cache: Any = StaticCache(config=model.config, max_cache_len=64) if static else DynamicCache(config=model.config)
    first = model.generate(**prompts(2), **more, **{NAME: cache})
    given, held, stream = said(first, prompts(2)["attention_mask"], 0), int(cache.get_seq_length()), Stream()
    with pytest.raises(ArithmeticError):
        model.generate(**given, **more, **{NAME: cache}, stopping_criteria=[Broken()], stream=stream)
    assert int(cache.get_seq_length()) == held and stream.ended
    again = model.generate(**given, **more, **{NAME: cache})
    assert torch.equal(again, model.generate(**given, do_sample=False, max_new_tokens=14, pad_token_id=PAD))


def test_a_cache_longer_than_the_prompt_is_refused() -> None:
    model, cache = make("Llama"), DynamicCache()
    more = {"do_sample": False, "max_new_tokens": 14, "pad_token_id": PAD, "custom_generate": parallel_generate}
    model.generate(**prompts(1), **more, **{NAME: cache})
    with pytest.raises(ValueError, match="the cache holds 25 columns, and there are 12 of tokens and 12"):
        model.generate(**prompts(1), **more, **{NAME: cache})


def test_storage_grows_with_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """From where it is not small any more; 8 bytes a column."""
    monkeypatch.setattr(cache_module, "SMALL", 8 * 200)
    layer = FixedLayer(100)
    layer.update(torch.zeros(1, 1, 100, 2), torch.zeros(1, 1, 100, 2))
    moves, held = 0, None
    for count in range(1, 3001):
        layer.update(torch.full((1, 1, 1, 2), float(count)), torch.zeros(1, 1, 1, 2))
        assert bool(layer.storage) is (100 + count >= 200)
        if layer.storage:
            moves, held = moves + (layer.storage[0] is not held), layer.storage[0]
            assert layer.storage[0].shape[2] <= 100 + 1.5 * count + ROOM
    assert moves < 10
    assert layer.keys is not None and torch.equal(layer.keys[0, 0, 100:, 0], torch.arange(1.0, 3001))


# PEFT -----------------------------------------------------------------------------------------------------------------------------------------


pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # by PEFT


def adapted(config: Any) -> Any:
    torch.manual_seed(1)
    return peft.get_peft_model(make("Llama"), config).eval()


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("how", HOW)
def test_lora_is_used(batch: int, how: str) -> None:
    base = make("Llama")
    model = adapted(peft.LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False))
    options = {**prompts(batch), **HOW[how], "max_new_tokens": 20, "pad_token_id": PAD}
    for own in WINDOWS.values():
        expected, found = both(model, options, **own)
        assert torch.equal(expected, found)
        assert not torch.equal(found, base.generate(**options))


def test_rows_with_adapters_of_their_own() -> None:
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False)
    model = adapted(config)
    model.add_adapter("other", config)
    options = {
        **prompts(3),
        "do_sample": False,
        "max_new_tokens": 30,
        "pad_token_id": PAD,
        "eos_token_id": [3, 4, 5, 6],
    }
    options["adapter_names"] = ["default", "other", "__base__"]
    for own in WINDOWS.values():
        expected, found = both(model, options, **own)
        assert torch.equal(expected, found)


@pytest.fixture
def schedule(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A schedule's name; "auto at once" is "auto" that wants a window for its first pass, as where much is known of the model's configuration."""
    name, *at_once = str(request.param).split(maxsplit=1)
    if at_once:
        monkeypatch.setattr(tuner, "CHECK", 0.0)
        monkeypatch.setattr(tuner.Tuner, "_best", lambda *_: 4)
    return name


@pytest.mark.parametrize(
    "config",
    [
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    ],
    ids=lambda config: type(config).__name__,
)
@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")
@pytest.mark.parametrize("schedule", ["auto", "auto at once", "sequential"], indirect=True)
@pytest.mark.filterwarnings("ignore:Both `past_key_values` and `cache`:FutureWarning")  # PEFT 0.21 on transformers 5.24
def test_soft_prompts_are_refused(config: Any, schedule: str) -> None:
    model = adapted(config)
    options = {**prompts(1), "do_sample": False, "max_new_tokens": 8, "pad_token_id": PAD}
    model.generate(**options)
    with pytest.raises(NotImplementedError, match="soft prompts"):
        model.generate(**options, custom_generate=parallel_generate, schedule=schedule)


# Models ---------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["auto", "auto at once", "sequential"], indirect=True)
def test_models_without_a_cache_are_refused(schedule: str) -> None:
    config = hf.OpenAIGPTConfig(vocab_size=V, n_embd=32, n_layer=1, n_head=2, n_positions=64)
    with pytest.raises(NotImplementedError, match="no key-value cache"):
        hf.OpenAIGPTLMHeadModel(config).eval().generate(
            prompts(1)["input_ids"], max_new_tokens=8, custom_generate=parallel_generate, schedule=schedule
        )


@pytest.mark.parametrize("kind", ["phi3", "phimoe", "llama", "dynamic"])
@pytest.mark.parametrize("batch", [1, 3])
def test_rotary_embeddings_that_change_with_the_length(kind: str, batch: int) -> None:
    torch.manual_seed(0)
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 20, "factor": 4.0}
    rope |= {"short_factor": [1.0] * 8, "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 9.0]}
    small = {**SMALL, "rope_parameters": rope, "max_position_embeddings": 80}
    model: Any
    if kind == "phi3":
        model = hf.Phi3ForCausalLM(hf.Phi3Config(**small, original_max_position_embeddings=20, sliding_window=None))
    elif kind == "phimoe":
        moe = {"original_max_position_embeddings": 20, "num_local_experts": 4, "sliding_window": None}
        rope |= {"short_mscale": 1.0, "long_mscale": 1.2}
        model = hf.PhimoeForCausalLM(hf.PhimoeConfig(**small, **moe))
    elif kind == "llama":
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**small))
    else:
        dynamic = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
        model = hf.LlamaForCausalLM(
            hf.LlamaConfig(**SMALL | {"rope_parameters": dynamic, "max_position_embeddings": 20})
        )
    model.eval()
    options = {**prompts(batch), "do_sample": False, "max_new_tokens": 20, "pad_token_id": PAD, "eos_token_id": [3, 4]}
    for own in WINDOWS.values():
        report: dict[str, Any] = {}
        expected, found = both(model, options, report=report, **own)
        assert torch.equal(expected, found)
    truth = model.generate(**options | {"eos_token_id": None})

    def knows(text: Sequence[int], most: int) -> Sequence[int]:
        line = truth[0].tolist()
        return line[len(text) : len(text) + most] if line[: len(text)] == list(text) else []

    more = options | {"eos_token_id": None, "custom_generate": parallel_generate, "report": report}
    if batch == 1:
        found = model.generate(**more, schedule=pd.Sliding(20), guess=knows)
        assert torch.equal(found, truth)
        assert report["forwards"] == 1 + 11 + (kind == "dynamic")  # columns 0 to 19 at once, and 11 after the change
    with pytest.warns(UserWarning, match="rotary embedding"):
        found = model.generate(**more, schedule=pd.Jacobi(freeze=False))
    assert torch.equal(found, truth)


def test_distances_in_columns_of_the_cache_beyond_the_check() -> None:
    """GPT-Neo's local attention counts slots of the cache: a prompt longer than the check's shows it."""
    torch.manual_seed(0)
    kinds = [[["local"], 2]]
    small = {"vocab_size": V, "hidden_size": 32, "num_layers": 2, "num_heads": 2, "initializer_range": 0.3}
    config = hf.GPTNeoConfig(
        **small, attention_types=kinds, window_size=40, pad_token_id=PAD, max_position_embeddings=256
    )
    model = hf.GPTNeoForCausalLM(config).eval()
    ids = torch.randint(2, V, (3, 60), generator=torch.Generator().manual_seed(1))
    options = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 40}
    for own in WINDOWS.values():
        expected, found = both(model, {**options, "pad_token_id": PAD, "eos_token_id": None}, **own)
        assert torch.equal(expected, found)


def test_a_text_may_end_before_the_model_has_no_positions_left() -> None:
    torch.manual_seed(0)
    config = hf.GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=32, vocab_size=V, initializer_range=0.3)
    model = hf.GPT2LMHeadModel(config).eval()
    options = {
        **prompts(1),
        "do_sample": False,
        "max_new_tokens": 200,
        "pad_token_id": PAD,
        "eos_token_id": list(range(24)),
    }
    expected = model.generate(**options)
    for own in WINDOWS.values():
        assert torch.equal(expected, model.generate(**options, custom_generate=parallel_generate, **own))
    assert expected.shape[1] < 32
    options["eos_token_id"] = None
    for own in ({}, {"custom_generate": parallel_generate, "schedule": pd.Sliding(16)}):
        with pytest.raises(IndexError):
            model.generate(**options, **own)


@pytest.mark.filterwarnings("ignore:.*quantize:UserWarning", "ignore:torch.ao.quantization:DeprecationWarning")
@pytest.mark.parametrize("schedule", ["sequential", "windows"])
@pytest.mark.parametrize("more", [{}, {"guidance_scale": 1.5}], ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_a_quantised_model_is_decoded_as_it_rounds(batch: int, more: dict[str, Any], schedule: str) -> None:
    """Dynamic int8 quantisation scales each forward's activations by their largest: with other tokens, or other rows, a token is another thing."""
    quantize: Any = torch.ao.quantization.quantize_dynamic
    model = quantize(make("Llama"), {torch.nn.Linear}, dtype=torch.qint8)
    options = {**prompts(batch), "do_sample": False, "max_new_tokens": 24, "pad_token_id": PAD, **more}
    own = {
        "custom_generate": parallel_generate,
        "schedule": "sequential" if schedule == "sequential" else pd.Sliding(6),
    }
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = model.generate(**options, **own)
    one_by_one = [str(w.message) for w in caught if "one by one" in str(w.message)]
    assert len(one_by_one) == (schedule == "windows" or "guidance_scale" in more)
    assert torch.equal(found, model.generate(**options))


@pytest.mark.filterwarnings("ignore:.*quantize:UserWarning", "ignore:torch.ao.quantization:DeprecationWarning")
def test_rows_of_a_quantised_model_stay_together() -> None:
    quantize: Any = torch.ao.quantization.quantize_dynamic
    model = quantize(make("Llama"), {torch.nn.Linear}, dtype=torch.qint8)
    ids = torch.randint(2, V, (6, 12), generator=torch.Generator().manual_seed(1))
    options = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 60}
    expected, found = both(model, options | {"pad_token_id": PAD, "eos_token_id": [3, 4, 5]}, schedule="sequential")
    assert torch.equal(expected, found) and bool((expected[:, -1] == PAD).any()), "no row ended before the others"


def test_a_model_in_training_mode() -> None:
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, attention_dropout=0.3)).train()
    options = {**prompts(1), "do_sample": True, "max_new_tokens": 8, "pad_token_id": PAD}
    with pytest.warns(UserWarning, match="training mode"):
        expected, found = both(model, options, schedule=pd.Sliding(6))
    assert torch.equal(expected, found)


# Options --------------------------------------------------------------------------------------------------------------------------------------


class Ends(StoppingCriteria):
    """A criterion of one's own that knows a token at the end."""

    eos_token_id = torch.tensor([3])

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        return input_ids[:, -1] % 5 == 3


CRITERIA: dict[str, Callable[[], list[Any]]] = {
    "a length": lambda: [MaxLengthCriteria(20)],
    "two lengths": lambda: [MaxLengthCriteria(30), MaxLengthCriteria(19)],
    "a token at the end": lambda: [Ends()],
    "a subclass": lambda: [type("Mine", (EosTokenCriteria,), {})(eos_token_id=[3, 4, 5])],
}


@pytest.mark.parametrize("criteria", CRITERIA)
@pytest.mark.parametrize("batch", [1, 3])
def test_criteria_of_ones_own(criteria: str, batch: int) -> None:
    model = make("Llama")
    options = {**prompts(batch), "do_sample": False, "max_new_tokens": 40, "pad_token_id": PAD}
    for own in WINDOWS.values():
        expected, found = both(model, options | {"stopping_criteria": CRITERIA[criteria]()}, **own)
        assert torch.equal(expected, found)


@pytest.mark.parametrize("batch", [1, 3])
def test_prefixes_of_a_trie(batch: int) -> None:
    """A function that knows only what may be said raises at what may not, and drafts are often that."""
    model, asked = make("Llama"), []
    allowed = {token: [2 + (3 * token + i) % (V - 2) for i in range(4)] for token in range(V)}

    def follow(row: int, ids: Tensor) -> list[int]:
        line = ids.tolist()[12:]
        for before, after in pairwise(line):
            if after not in allowed[before]:
                asked.append(line)
                raise KeyError(f"{before} is not followed by {after}")
        return allowed[int(ids[-1])]

    options = {**prompts(batch), "do_sample": False, "max_new_tokens": 24, "pad_token_id": PAD}
    for own in WINDOWS.values():
        expected, found = both(model, options | {"prefix_allowed_tokens_fn": follow}, **own)
        assert torch.equal(expected, found)
    assert asked, "no impossible prefix was tried"

    def never(row: int, ids: Tensor) -> list[int]:
        if len(ids) > 16:
            raise KeyError("the trie ends here")
        return list(range(2, V))

    with pytest.raises(KeyError, match="ends here"):
        model.generate(
            **options, prefix_allowed_tokens_fn=never, custom_generate=parallel_generate, schedule=pd.Sliding(6)
        )


class Poison(transformers.LogitsProcessor):
    """Scores that nothing can be drawn from, after every second token: none of 40 being one of them is not to be feared."""

    is_pure = True

    def __init__(self, value: float, column: int) -> None:
        self.value, self.column = value, column

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        bad = (input_ids[:, -1] % 2 == 1) & (input_ids.shape[1] > self.column)
        return torch.where(bad[:, None], self.value, scores)


@pytest.mark.parametrize("sampling", ["gumbel", "maximal", "speculative"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_cannot_be_drawn_raises_as_in_generate(value: float, sampling: str) -> None:
    model = make("Llama")
    options = {**prompts(2), "do_sample": True, "max_new_tokens": 24, "pad_token_id": PAD}
    options["logits_processor"] = [Poison(value, 15)]
    with pytest.raises(RuntimeError, match="probability tensor"):
        model.generate(**options)
    for own in WINDOWS.values():
        with pytest.raises(RuntimeError, match="probability tensor"):
            model.generate(**options, custom_generate=parallel_generate, sampling=sampling, **own)


def test_what_drafts_alone_cannot_be_drawn_from_does_no_harm() -> None:
    model = make("Llama")
    options = {**prompts(2), "do_sample": True, "max_new_tokens": 30, "pad_token_id": PAD}
    torch.manual_seed(5)
    line = model.generate(**options)[:, 12:]
    missing = next(token for token in range(2, V) if not bool((line == token).any()))

    class Unsaid(Poison):
        def __call__(self, input_ids: Any, scores: Any) -> Any:
            return torch.where((input_ids[:, -1] == missing)[:, None], float("nan"), scores)

    options["logits_processor"] = [Unsaid(0, 0)]
    expected, found = both(
        model, options, schedule=pd.Sliding(5, per_row=True), guess=lambda text, most: [missing] * most
    )
    assert torch.equal(expected, found)


def test_types_of_tokens_and_images() -> None:
    options: Any = {**prompts(2), "do_sample": False, "max_new_tokens": 8, "pad_token_id": PAD}
    model, ids = make("GPT-2"), options["input_ids"]
    for own in WINDOWS.values():
        expected, found = both(model, options | {"token_type_ids": torch.zeros_like(ids)}, **own)
        assert torch.equal(expected, found)
    assert not torch.equal(found, model.generate(**options)), "GPT-2 adds an embedding for type 0"
    with pytest.raises(NotImplementedError, match="token_type_ids"):
        model.generate(**options, token_type_ids=torch.ones_like(ids), custom_generate=parallel_generate)
    config = hf.GenerationConfig(max_length=20, do_sample=False, pad_token_id=PAD)
    with pytest.raises(NotImplementedError, match="mm_encoder_outputs"):
        parallel_generate(model, ids, generation_config=config, mm_encoder_outputs={"image": torch.zeros(1)})


def test_ids_of_other_types_and_words_that_are_forced() -> None:
    model = make("Llama")
    options: Any = {**prompts(2), "do_sample": False, "max_new_tokens": 8, "pad_token_id": PAD}
    expected, found = both(model, options | {"input_ids": options["input_ids"].int()})
    assert torch.equal(expected, found) and expected.dtype == found.dtype
    with pytest.raises((NotImplementedError, ValueError), match="force_words_ids"):
        model.generate(**options, force_words_ids=[[5]], custom_generate=parallel_generate)
    with pytest.raises(NotImplementedError, match="prompt_lookup_num_tokens is 3"):
        model.generate(**options, prompt_lookup_num_tokens=3, custom_generate=parallel_generate)
    more = options | {"use_cache": False, "return_dict_in_generate": True}
    expected, found = both(model, more)
    assert torch.equal(expected.sequences, found.sequences) and found.get(NAME) is expected.get(NAME) is None


def test_a_streamer_of_generate_is_served() -> None:
    model, text = make("Llama"), prompts(1)

    class Words:
        def decode(self, ids: Any, **kwargs: Any) -> str:
            return "".join(f"{int(token)} " for token in ids)

    streamer = TextIteratorStreamer(Words(), timeout=60)  # type: ignore[arg-type]
    options = {**text, "do_sample": False, "max_new_tokens": 12, "pad_token_id": PAD}
    expected = model.generate(**options)[0].tolist()
    own = {"custom_generate": parallel_generate, "schedule": pd.Sliding(5)}
    thread = threading.Thread(target=lambda: model.generate(**options, **own, streamer=streamer))
    thread.start()
    found = [int(word) for word in "".join(streamer).split()]
    thread.join()
    assert found == expected


# Sampling in threads --------------------------------------------------------------------------------------------------------------------------


def test_threads_draw_noise_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model, lock = make("Llama"), threading.Lock()
    used: list[tuple[float, ...]] = []
    draw, finish = Gumbel._draw, Gumbel.finish

    def noted(self: Any, generator: torch.Generator) -> Tensor:
        noise = draw(self, generator)
        if generator is self.generator:
            self.__dict__.setdefault("all", []).append(noise)
        return noise

    def done(self: Any, length: int) -> None:
        with lock:
            used.extend(tuple(noise.flatten()[:4].tolist()) for noise in self.all[:length])
        finish(self, length)

    monkeypatch.setattr(Gumbel, "_draw", noted)
    monkeypatch.setattr(Gumbel, "finish", done)
    options = {**prompts(1), "do_sample": True, "max_new_tokens": 20, "pad_token_id": PAD}
    own = {"custom_generate": parallel_generate, "schedule": pd.Sliding(6)}
    threads = [threading.Thread(target=lambda: [model.generate(**options, **own) for _ in range(8)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(used) == 4 * 8 * 20 and len(set(used)) == len(used)


@pytest.mark.parametrize("sampling", ["gumbel", "maximal", "speculative"])
def test_a_generator_of_ones_own(sampling: str) -> None:
    model = make("Llama")
    options = {**prompts(2), "do_sample": True, "max_new_tokens": 20, "pad_token_id": PAD}
    before = torch.get_rng_state()
    texts = [
        model.generate(
            **options,
            custom_generate=parallel_generate,
            schedule=pd.Sliding(6),  # couplings depend on the windows, and those of "auto" on time
            sampling=sampling,
            generator=torch.Generator().manual_seed(seed),
        )
        for seed in (5, 5, 6)
    ]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])
    if sampling == "gumbel":
        torch.manual_seed(5)
        assert torch.equal(texts[0], model.generate(**options))


# What a check has to see ------------------------------------------------------------------------------------------------------------------------


def same(model: Any, batch: int, **more: Any) -> None:
    options = {**prompts(batch), "do_sample": False, "max_new_tokens": 24, "pad_token_id": PAD, **more}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*decoded one by one")
        for own in WINDOWS.values():
            expected, found = both(model, options, **own)
            assert torch.equal(expected, found), own


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("lengths", ["prompts alone", "tokens alone", "means"])
def test_steering_by_hooks(lengths: str, when: str, batch: int) -> None:
    """Hooks that look at how many tokens are read, put in place before or after the model was tried."""
    model = make("Llama")
    vector = torch.randn(32, generator=torch.Generator().manual_seed(3))
    hooks: dict[str, Any] = {
        "prompts alone": lambda module, given, out: out + vector if out.shape[1] > 1 else out,
        "tokens alone": lambda module, given, out: out + vector if out.shape[1] == 1 else out,
        "means": lambda module, given, out: out - out.mean(1, keepdim=True) * 0.5,
    }
    if when == "after":
        same(model, batch)
    model.model.layers[0].mlp.register_forward_hook(hooks[lengths])
    same(model, batch)


@pytest.mark.parametrize("name", ["Llama", "Mistral"])
def test_hooks_that_know_the_rows(name: str) -> None:
    model = make(name)
    vectors = torch.randn(3, 1, 32, generator=torch.Generator().manual_seed(3))
    model.model.layers[0].mlp.register_forward_pre_hook(lambda module, given: (given[0] + vectors[: len(given[0])],))
    same(model, 3, eos_token_id=list(range(3, 9)))


class Remembers(hf.LlamaForCausalLM):  # type: ignore[misc]
    """What it gives depends on how many prompts there are, which it keeps for the tokens after them, as models of images and text keep offsets of positions."""

    in_place = False
    offset = torch.zeros(1)

    def forward(self, input_ids: Any = None, **more: Any) -> Any:
        cache = more.get(NAME)
        if cache is None or cache.get_seq_length() == 0:
            if self.in_place:
                self.offset.fill_(3.0 * len(input_ids))
            else:
                self.offset = torch.full((1, 1, 1), 3.0 * len(input_ids))
        output = super().forward(input_ids=input_ids, **more)
        output.logits = output.logits + self.offset * torch.arange(V).cos()
        return output


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_check_in_the_middle_of_a_text_leaves_no_trace(
    batch: int, in_place: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It puts back what forwards set; models that may hide what they keep are checked before the first token."""
    monkeypatch.setattr(tuner, "CHECK", 0.0)
    if not in_place:
        monkeypatch.setattr(model_check, "OWN", (*model_check.OWN, "tests."))
    monkeypatch.setattr(adaptive, "_MEMORIES", {})
    checks = MagicMock(side_effect=model_check._check)
    monkeypatch.setattr(model_check, "_check", checks)
    model = Remembers(make("Llama").config).eval()
    model.in_place = in_place
    options = {**prompts(batch), "do_sample": False, "max_new_tokens": 60, "pad_token_id": PAD}
    texts = [[token for token in text if token != PAD] for text in model.generate(**options).tolist()]

    def right(text: list[int], most: int) -> list[int]:
        return next((whole[len(text) : len(text) + most] for whole in texts if whole[: len(text)] == text), [])

    expected, found = both(model, options, guess=right)
    assert torch.equal(expected, found) and checks.call_count == 1


@pytest.mark.parametrize("error", [torch.OutOfMemoryError(""), NotImplementedError("it cannot")])
def test_a_check_that_fails_in_the_middle_of_a_text_loses_nothing(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuner, "CHECK", 0.0)
    monkeypatch.setattr(adaptive, "_MEMORIES", {})
    read = MagicMock(side_effect=error)
    monkeypatch.setattr(model_check, "Reader", lambda *args: SimpleNamespace(read=read))
    ids = torch.randint(2, V, (6, 12), generator=torch.Generator().manual_seed(1))
    options = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 60}
    model = make("Llama")
    texts = model.generate(**options, pad_token_id=PAD).tolist()

    def right(text: list[int], most: int) -> list[int]:
        return next(whole[len(text) : len(text) + most] for whole in texts if whole[: len(text)] == text)

    ends = {"pad_token_id": PAD, "eos_token_id": [3, 4, 5]}  # rows leave the batch
    with pytest.warns(UserWarning, match=f"{error or 'OutOfMemoryError'}: tokens are decoded one by one"):
        expected, found = both(model, options | ends, guess=right)
    assert torch.equal(expected, found) and read.call_count == 1
    with pytest.raises(type(error)):
        both(model, options | ends, schedule=pd.Sliding(4))


def test_rows_that_have_to_go_in_step_are_known_before_a_check() -> None:
    for name in ("Mistral", "Llama"):
        system = CausalLM(make(name), prompts(3)["input_ids"], 400)
        assert system.in_step == (name == "Mistral") and "trust" not in vars(system)


def test_a_forward_replaced_after_the_check() -> None:
    model = make("Llama")
    same(model, 1)
    part = model.model.layers[0].mlp
    forward = part.forward
    part.forward = lambda h: forward(h) - forward(h).mean(1, keepdim=True)
    same(model, 1)


def test_a_prompt_of_equal_tokens_hides_nothing() -> None:
    torch.manual_seed(2)
    config = hf.MptConfig(d_model=32, n_heads=2, n_layers=2, vocab_size=V, max_seq_len=256, initializer_range=0.3)
    model = hf.MptForCausalLM(config).eval()
    model.generate(torch.tensor([[5], [7]]), max_new_tokens=4, pad_token_id=PAD, custom_generate=parallel_generate)
    same(model, 3, do_sample=True, temperature=1.5, max_new_tokens=60)


@pytest.mark.parametrize("batch", [1, 3])
def test_sliding_windows_over_a_cache_that_does_not_know_of_them(batch: int) -> None:
    """`DynamicCache()` without a configuration keeps everything, and the model's masks count its columns."""
    kinds = {"sliding_window": 9, "use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"]}
    torch.manual_seed(0)
    for model in (hf.Qwen3ForCausalLM(hf.Qwen3Config(**SMALL, **kinds)).eval(), make("Gemma 3")):
        for own in WINDOWS.values():
            caches = [DynamicCache(), DynamicCache()]
            more = {**prompts(batch), "do_sample": False, "max_new_tokens": 40, "pad_token_id": PAD}
            expected = model.generate(**more, **{NAME: caches[0]})
            found = model.generate(**more, **{NAME: caches[1]}, custom_generate=parallel_generate, **own)
            assert torch.equal(expected, found)
            for a, b in zip(*map(content, caches), strict=True):
                torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_guidance_with_types_of_tokens() -> None:
    same(make("GPT-2"), 2, guidance_scale=1.5, token_type_ids=torch.zeros(2, 12, dtype=torch.long))


def test_guidance_where_the_padding_is_no_token() -> None:
    model = make("Llama")
    model.config.pad_token_id = V
    same(model, 1, guidance_scale=1.5, pad_token_id=V)


@pytest.mark.parametrize("length", [5, 12, 13])
def test_criteria_of_length_that_are_met_at_once(length: int) -> None:
    same(make("Llama"), 3, stopping_criteria=[MaxLengthCriteria(length)])


def test_caches_that_do_not_fit_are_refused() -> None:
    model, ids = make("Mistral"), prompts(3)["input_ids"]
    more = {"do_sample": False, "max_new_tokens": 4, "pad_token_id": PAD, "custom_generate": parallel_generate}
    for rows, columns, match in ((1, 6, "holds 1 rows, and the prompts are 3"), (3, 12, "the cache holds 12 columns")):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(input_ids=ids[:rows, :columns], **{NAME: cache})
        with pytest.raises(ValueError, match=match):
            model.generate(ids, **more, **{NAME: cache})
        with pytest.raises(NotImplementedError, match="use_cache is False"):
            model.generate(ids, **more, **{NAME: cache}, use_cache=False)
    with pytest.raises(ValueError, match="the guess drafted tokens from 99 to 99"):
        model.generate(ids, **more, guess=lambda text, most: [99])


def test_mixed_precision_is_checked_as_it_computes() -> None:
    model = make("Llama")
    options = {**prompts(1), "do_sample": False, "max_new_tokens": 8, "pad_token_id": PAD}
    with torch.autocast("cpu", torch.bfloat16):
        model.generate(**options, custom_generate=parallel_generate, schedule=pd.Sliding(6))  # no warning


def test_layers_of_a_sliding_window_are_given_back_no_longer_than_generate_leaves_them() -> None:
    """Whatever was read last: while windows may be taken back, such a layer keeps more than its window."""
    config = make("Gemma 3").config
    slots = Slots(DynamicCache(config=config), 1, 4)
    slots.record()
    for count in (12, 7):
        for index in range(config.num_hidden_layers):
            slots.cache.update(torch.zeros(1, 1, count, 16), torch.zeros(1, 1, count, 16), index)
    given = slots.give_back()
    assert [layer.keys.shape[2] for layer in given.layers] == [config.sliding_window - 1, 19]
    given.update(torch.zeros(1, 1, 1, 16), torch.zeros(1, 1, 1, 16), 0)
    assert given.layers[0].keys.shape[2] == config.sliding_window - 1
