"""Language models: the tokens of `generate`, whatever the window, the guess and the model."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria, dynamic_module_utils

import parallel_decode as pd
from parallel_decode.adapters import causal_lm
from parallel_decode.adapters.causal_lm import Adaptive, CausalLM, NGram, cache, parallel_generate
from parallel_decode.adapters.causal_lm.cache import NAME, Slots
from parallel_decode.adapters.causal_lm.guidance import Guidance
from parallel_decode.adapters.causal_lm.reader import Reader
from parallel_decode.adapters.causal_lm.stopping import Generation
from parallel_decode.schedules import Schedule
from parallel_decode.testing import check_system
from parallel_decode.tokens import Choice, Gumbel, Maximal, Speculative
from tests import zoo

V, PAD = 48, 0
hf: Any = transformers
SMALL: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "initializer_range": 0.3,
    "pad_token_id": PAD,
    "eos_token_id": None,
    "bos_token_id": None,
    "max_position_embeddings": 256,
}
MODELS = ("GPT-2", "Llama", "Mistral", "Qwen3", "Gemma 3")


def make(name: str) -> Any:
    torch.manual_seed(0)
    if name == "GPT-2":
        names = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 256, "vocab_size": V, "initializer_range": 0.3}
        return hf.GPT2LMHeadModel(hf.GPT2Config(**names, bos_token_id=None, eos_token_id=None, pad_token_id=PAD)).eval()
    if name == "Llama":
        return hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL)).eval()
    if name == "Mistral":
        return hf.MistralForCausalLM(hf.MistralConfig(**SMALL, sliding_window=9)).eval()
    if name == "Qwen3":
        return hf.Qwen3ForCausalLM(hf.Qwen3Config(**SMALL)).eval()
    kinds = ["sliding_attention", "full_attention"]
    more = {"sliding_window": 9, "layer_types": kinds, "query_pre_attn_scalar": 16}
    return hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**SMALL, **more)).eval()


def prompts(batch: int) -> dict[str, Tensor]:
    return zoo.prompts(batch, 2, V)


class Third(StoppingCriteria):
    """A row ends where it has three tokens that 3 divides."""

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        return (input_ids[:, 12:] % 3 == 0).sum(1) >= 3


@dataclass(frozen=True, repr=False)
class Alternating(Schedule):
    """Windows of one and of five, as a schedule that learns may have them, at each row's own front."""

    @property
    def ragged(self) -> bool:
        return True

    def window(self, front: int, length: int) -> range:
        return range(front, min(length, front + (5 if front % 3 == 1 else 1)))


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "repetition penalty": {"repetition_penalty": 1.4},
    "no-repeat n-gram": {"no_repeat_ngram_size": 2},
    "stopping criterion": {"stopping_criteria": [Third()]},
    "end of text": {"eos_token_id": list(range(1, 6)), "min_new_tokens": 4},
    "scores": {
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
        "eos_token_id": [3, 4, 5, 6],
    },
    "scores, and a criterion": {
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
        "eos_token_id": [3, 4],
        "stopping_criteria": [Third()],
    },
}
HOW: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.9, "top_k": 12, "top_p": 0.95},
}


def both(model: Any, options: dict[str, Any], **own: Any) -> tuple[Any, Any]:
    results = []
    for more in ({}, {"custom_generate": parallel_generate, **own}):
        torch.manual_seed(5)
        results.append((model.generate(**options, **more), torch.rand(1)))
    (expected, after), (found, after_too) = results
    assert torch.equal(after, after_too)  # the generator is left where generate leaves it
    return expected, found


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", MODELS)
def test_the_tokens_are_those_of_generate(name: str, case: str, batch: int, how: str) -> None:
    model = make(name)
    options = {**prompts(batch), **CASES[case], **HOW[how], "max_new_tokens": 24, "pad_token_id": PAD}
    for own in (
        {"schedule": "sequential"},
        {"schedule": "auto"},
        {"schedule": Alternating()},
        {"schedule": "jacobi-gs"},
        {"schedule": pd.Sliding(6), "guess": "last"},
        {"schedule": pd.Jacobi(freeze=False)},
        {"schedule": pd.Sliding(5, per_row=True), "guess": "n-gram"},
    ):
        expected, found = both(model, options, **own)
        if "scores" not in case:
            assert torch.equal(expected, found), own
            continue
        assert torch.equal(expected.sequences, found.sequences), own
        for name_of in ("scores", "logits"):
            torch.testing.assert_close(
                torch.stack(getattr(found, name_of)), torch.stack(getattr(expected, name_of)), atol=1e-4, rtol=1e-4
            )
        assert found[NAME].get_seq_length() == expected[NAME].get_seq_length()
        again: dict[str, Any] = {"input_ids": torch.full((batch, 1), 7), "use_cache": True}
        columns = expected.sequences.shape[1]
        again["attention_mask"] = torch.cat(
            [prompts(batch)["attention_mask"], torch.ones(batch, columns - 12)], 1
        ).long()
        again["position_ids"] = again["attention_mask"].sum(1, keepdim=True) - 1
        with torch.no_grad():
            a, b = (model(**again, **{NAME: result[NAME]}).logits for result in (expected, found))
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["GPT-2", "Llama", "Mistral"])
def test_it_is_a_system_like_others(name: str) -> None:
    model = make(name).double()
    inputs = prompts(2)
    system = CausalLM(model, inputs["input_ids"], 10, attention_mask=inputs["attention_mask"])
    points = torch.randint(2, V, (2, 10), generator=torch.Generator().manual_seed(2))
    check_system(system, points=points)
    expected = model.generate(**inputs, do_sample=False, max_new_tokens=10, pad_token_id=PAD)[:, 12:]
    for schedule in ("sequential", "sliding", "jacobi", "jacobi-gs", "auto", Adaptive()):
        assert torch.equal(pd.solve(system, schedule).value, expected)


@pytest.mark.parametrize("keep_ended", [False, True])
@pytest.mark.parametrize("criteria", [False, True])
@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("name", ["Llama", "Mistral"])
def test_the_system_inside_generate_is_one_like_others(
    name: str, sampled: bool, criteria: bool, keep_ended: bool
) -> None:
    inputs = prompts(3)
    ends: list[Any] = [transformers.EosTokenCriteria(eos_token_id=[3, 4, 5, 6])]
    system = Generation(
        make(name).double(),
        inputs["input_ids"],
        12,
        attention_mask=inputs["attention_mask"],
        choice=Gumbel(3, torch.device("cpu")) if sampled else None,
        guess=NGram(),
        ends=[*ends, Third()] if criteria else ends,
        pad=PAD,
        keep=(keep_ended, False),
        keep_ended=keep_ended,
        stream=None,
    )
    points = torch.randint(2, V, (3, 12), generator=torch.Generator().manual_seed(2))
    check_system(system, points=points)
    pd.solve(system, pd.Sliding(4))
    assert int(system.lengths.max()) <= 12 and int(system.lengths.min()) < 12, "no row ended: nothing was tried"


@pytest.mark.parametrize("choice", [Maximal, Speculative])
def test_couplings_keep_the_promises_of_what_draws_anew(choice: type[Choice]) -> None:
    inputs = prompts(3)
    check_system(
        CausalLM(make("Llama"), inputs["input_ids"], 12, attention_mask=inputs["attention_mask"], choice=choice())
    )


def test_text_ends_where_generate_ends_it_also_in_sweeps_over_everything() -> None:
    model, inputs = make("Llama"), prompts(3)
    options = {
        **inputs,
        "eos_token_id": list(range(1, 14)),
        "do_sample": False,
        "max_new_tokens": 60,
        "pad_token_id": PAD,
    }
    expected = model.generate(**options)
    assert expected.shape[1] < 72
    for schedule in (pd.Jacobi(freeze=False), pd.Jacobi(), "jacobi-gs"):
        assert torch.equal(model.generate(**options, custom_generate=parallel_generate, schedule=schedule), expected)


def test_a_sampled_text_is_a_solution_in_every_schedule() -> None:
    model, inputs = make("Llama"), prompts(2)
    values = []
    for schedule in ("sequential", "jacobi", pd.Sliding(4, per_row=True)):
        torch.manual_seed(0)
        choice = Gumbel(2, torch.device("cpu"))
        system = CausalLM(model, inputs["input_ids"], 10, attention_mask=inputs["attention_mask"], choice=choice)
        values += [pd.solve(system, schedule).value, pd.solve(system, schedule).value]
    assert all(torch.equal(value, values[0]) for value in values)


@pytest.mark.parametrize("guess", ["last", "n-gram", "repeat"])
@pytest.mark.parametrize("sampling", ["gumbel", "maximal", "speculative"])
def test_samples_have_the_models_distribution(sampling: str, guess: str) -> None:
    torch.manual_seed(0)
    config = {**SMALL, "vocab_size": 6, "initializer_range": 0.4, "hidden_size": 16, "num_hidden_layers": 1}
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**config)).eval()
    prompt, length, rows = torch.tensor([[2, 3, 2, 3]]), 3, 3000
    texts = torch.cartesian_prod(*[torch.arange(6)] * length)
    with torch.no_grad():
        logits = model(torch.cat([prompt.expand(len(texts), -1), texts], 1)).logits[:, 3:-1]
        scores = logits / 0.7
        log_p = scores.log_softmax(-1).gather(-1, texts[..., None])[..., 0].sum(1)
        drawn = []
        for seed in range(2):
            torch.manual_seed(seed)
            drawn.append(
                model.generate(
                    prompt.repeat(rows, 1),
                    custom_generate=parallel_generate,
                    schedule=pd.Sliding(3, per_row=True),
                    sampling=sampling,
                    guess=guess,
                    do_sample=True,
                    temperature=0.7,
                    top_k=0,
                    max_new_tokens=length,
                    pad_token_id=0,
                )[:, 4:]
            )
    counts = torch.zeros(len(texts))
    counts.index_add_(0, torch.cat(drawn) @ torch.tensor([36, 6, 1]), torch.ones(2 * rows))
    expected = log_p.exp() * 2 * rows
    rare = expected < 5
    f = [*counts[~rare].tolist(), counts[rare].sum().item()]
    e = [*expected[~rare].double().tolist(), expected[rare].double().sum().item()]
    e = [value * sum(f) / sum(e) for value in e]
    statistic = sum((a - b) ** 2 / b for a, b in zip(f, e, strict=True))
    p_value = torch.special.gammaincc(
        torch.tensor((len(f) - 1) / 2), torch.tensor(statistic / 2)
    ).item()  # of chi-square
    assert p_value > 1e-3


def test_drafts_that_come_true_save_forwards() -> None:
    model = make("Llama")
    options = {**prompts(1), "do_sample": False, "max_new_tokens": 40, "pad_token_id": PAD}
    truth: list[int] = model.generate(**options)[0].tolist()
    report: dict[str, Any] = {}

    def knows(text: Sequence[int], most: int) -> Sequence[int]:
        return truth[len(text) : len(text) + most]

    found = model.generate(
        **options, custom_generate=parallel_generate, schedule=pd.Sliding(8), guess=knows, report=report
    )
    assert found[0].tolist() == truth
    assert report["forwards"] == 5 and report["tokens_per_forward"] == 8


def test_rows_advance_on_their_own_and_leave_when_they_end(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("Qwen3")
    inputs = prompts(3)
    options = {**inputs, "do_sample": False, "max_new_tokens": 40, "pad_token_id": PAD}
    truth = model.generate(**options)
    seen: list[int] = []
    read = Reader.read

    def noted(self: Reader, x: Tensor, *more: Any) -> Tensor:
        seen.append(len(x))
        return read(self, x, *more)

    model.generate(**options, custom_generate=parallel_generate)  # the model is tried
    monkeypatch.setattr(Reader, "read", noted)

    def knows(text: Sequence[int], most: int) -> Sequence[int]:  # the first row alone
        line = truth[0].tolist()
        return line[len(text) : len(text) + most] if line[: len(text)] == list(text) else []

    reports: list[dict[str, Any]] = [{}, {}]
    for per_row, report in zip((False, True), reports, strict=True):
        own = {"schedule": pd.Sliding(8, per_row=per_row), "guess": knows, "report": report}
        assert torch.equal(model.generate(**options, custom_generate=parallel_generate, **own), truth)
    assert seen[0] == 3 > min(seen)  # the first row was done, and left
    assert reports[1]["forwards"] <= reports[0]["forwards"]


def test_holes_are_moved_together(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("Llama")
    options: dict[str, Any] = {
        **prompts(3),
        "do_sample": False,
        "max_new_tokens": 150,
        "pad_token_id": PAD,
        "no_repeat_ngram_size": 2,
    }
    truth = model.generate(**options)
    moves: list[int] = []
    compact = Slots._compact
    monkeypatch.setattr(cache, "HOLES", 8)

    def counted(slots: Slots, most: int) -> None:
        moves.append(most)
        compact(slots, most)

    monkeypatch.setattr(Slots, "_compact", counted)
    texts = [
        row[mask.bool()].tolist() for row, mask in zip(truth, _longer(options["attention_mask"], 150), strict=True)
    ]

    def sometimes(text: Sequence[int], most: int) -> Sequence[int]:  # each row in its turn
        row = next(i for i, line in enumerate(texts) if line[: len(text)] == text)
        return texts[row][len(text) : len(text) + most] if len(text) // 20 % 3 == row else []

    report: dict[str, Any] = {}
    own = {"schedule": pd.Sliding(8, per_row=True), "guess": sometimes, "report": report}
    assert torch.equal(model.generate(**options, custom_generate=parallel_generate, **own), truth)
    assert moves and report["forwards"] < 130


def _longer(mask: Tensor, by: int) -> Tensor:
    return torch.cat([mask, torch.ones(len(mask), by, dtype=mask.dtype)], 1)


class Stream:
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


def test_streams_final_tokens_alone() -> None:
    model, stream = make("Llama"), Stream()
    options = {**prompts(1), "do_sample": False, "max_new_tokens": 24, "pad_token_id": PAD, "eos_token_id": [3, 4, 5]}
    found = model.generate(**options, custom_generate=parallel_generate, stream=stream)
    assert stream.tokens == found[0].tolist() and stream.ended


class Counting(LogitsProcessor):
    """Has a state: forbids the token whose number is how often it was called."""

    calls = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.calls += 1
        scores[:, self.calls % V] = -torch.inf
        return scores


class Even(LogitsProcessor):
    is_pure = True

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores[torch.arange(len(scores)), (input_ids[:, -1] + 1) % V] = -torch.inf
        return scores


def test_processors_with_a_state_get_one_position_at_a_time() -> None:
    model = make("Llama")
    options = {**prompts(2), "do_sample": False, "max_new_tokens": 20, "pad_token_id": PAD}
    truth = model.generate(**options, logits_processor=[Counting()])
    with pytest.warns(UserWarning, match="Counting may have a state"):
        found = model.generate(**options, logits_processor=[Counting()], custom_generate=parallel_generate)
    assert torch.equal(found, truth)
    truth = model.generate(**options, logits_processor=[Even()])
    assert torch.equal(model.generate(**options, logits_processor=[Even()], custom_generate=parallel_generate), truth)


NEGATIVES: dict[str, dict[str, Tensor]] = {
    "none": {},
    "shorter": {"negative_prompt_ids": torch.tensor([[5, 6, 7], [9, 8, 7], [5, 5, 5]])},
    "padded": {
        "negative_prompt_ids": torch.tensor([[5, 6, 7], [PAD, 8, 7], [PAD, PAD, 5]]),
        "negative_prompt_attention_mask": torch.tensor([[1, 1, 1], [0, 1, 1], [0, 0, 1]]),
    },
    "longer": {"negative_prompt_ids": torch.randint(2, 30, (3, 30), generator=torch.Generator().manual_seed(3))},
}


@pytest.mark.parametrize("negative", NEGATIVES)
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", ["GPT-2", "Llama", "Mistral", "Gemma 3"])
def test_guidance_reads_a_doubled_batch(name: str, how: str, negative: str) -> None:
    """Every row of a left-padded batch is what transformers' unbatched guidance makes of it."""
    model = make(name)
    options = {**prompts(3), **HOW[how], **NEGATIVES[negative], "guidance_scale": 3.0}
    options |= {"max_new_tokens": 16, "pad_token_id": PAD, "eos_token_id": [3, 4]}
    torch.manual_seed(0)
    truth = model.generate(**options)
    plain = {key: value for key, value in options.items() if key not in {"guidance_scale", *NEGATIVES[negative]}}
    torch.manual_seed(0)
    assert not torch.equal(model.generate(**plain), truth), "guidance changes nothing here"
    for schedule in ("auto", "sequential", pd.Sliding(5), pd.Sliding(5, per_row=True), "jacobi-gs"):
        report: dict[str, Any] = {}
        torch.manual_seed(0)
        found = model.generate(**options, custom_generate=parallel_generate, schedule=schedule, report=report)
        assert torch.equal(found, truth), schedule
        assert report["passes"] <= 16


def test_guidance_where_the_model_numbers_positions_by_the_mask() -> None:
    torch.manual_seed(0)
    names = {
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "word_embed_proj_dim": 32,
    }
    config = {"vocab_size": V, "max_position_embeddings": 128, "init_std": 0.3, "pad_token_id": PAD}
    model = hf.OPTForCausalLM(hf.OPTConfig(**names, **config, bos_token_id=None, eos_token_id=None)).eval()
    options: dict[str, Any] = {**prompts(3), **NEGATIVES["padded"], "guidance_scale": 3.0, "do_sample": False}
    options |= {"max_new_tokens": 16, "pad_token_id": PAD}
    truth = model.generate(**options)
    for schedule in ("auto", pd.Sliding(5, per_row=True)):
        assert torch.equal(model.generate(**options, custom_generate=parallel_generate, schedule=schedule), truth)


def test_guidance_with_a_static_cache_that_has_no_room_for_a_longer_negative_prompt() -> None:
    model = make("Llama")
    options: dict[str, Any] = {**prompts(3), **NEGATIVES["longer"], "guidance_scale": 3.0, "do_sample": False}
    options |= {"max_new_tokens": 12, "pad_token_id": PAD, "cache_implementation": "static"}
    truth = model.generate(**options)
    with pytest.warns(UserWarning, match="UnbatchedClassifierFreeGuidance"):
        assert torch.equal(model.generate(**options, custom_generate=parallel_generate), truth)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("batch", [1, 2])
def test_prompts_of_one_token(name: str, batch: int) -> None:
    model = make(name)
    options: dict[str, Any] = {"input_ids": torch.tensor([[5], [7]])[:batch], "do_sample": False, "max_new_tokens": 15}
    truth = model.generate(**options, pad_token_id=PAD)
    for schedule in ("auto", "jacobi", pd.Sliding(4, per_row=True)):
        found = model.generate(**options, pad_token_id=PAD, custom_generate=parallel_generate, schedule=schedule)
        assert torch.equal(found, truth)


def test_a_guided_system_is_a_system_like_others() -> None:
    ids, inputs = NEGATIVES["longer"]["negative_prompt_ids"][:, :14], prompts(3)
    negative = Guidance(2.0, ids, torch.ones_like(ids), torch.arange(14).expand(3, -1))
    system = CausalLM(
        make("Llama"), inputs["input_ids"], 12, attention_mask=inputs["attention_mask"], guidance=negative
    )
    check_system(system, points=torch.randint(2, V, (3, 12), generator=torch.Generator().manual_seed(2)))


@pytest.mark.parametrize("negative", NEGATIVES)
def test_guidance_in_the_outputs(negative: str) -> None:
    model = make("Llama")
    options: dict[str, Any] = {**prompts(3), **NEGATIVES[negative], "do_sample": False, "max_new_tokens": 12}
    options |= {
        "pad_token_id": PAD,
        "guidance_scale": 1.7,
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
    }
    truth = model.generate(**options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if negative == "longer" else "error")  # one by one
        found = model.generate(**options, custom_generate=parallel_generate, schedule=pd.Sliding(4))
    assert torch.equal(found.sequences, truth.sequences)
    for kind in ("scores", "logits"):
        for a, b in zip(found[kind], truth[kind], strict=True):
            torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)
    assert found[NAME].get_seq_length() == truth[NAME].get_seq_length()
    mask = torch.cat([options["attention_mask"], torch.ones(3, 11)], 1)[:, None, :, None]
    for a, b in zip(found[NAME].layers, truth[NAME].layers, strict=True):
        torch.testing.assert_close(a.keys * mask, b.keys * mask, atol=1e-4, rtol=1e-4)


def test_guidance_with_a_cache_of_ones_own_is_one_position_at_a_time() -> None:
    model = make("Llama")
    options: dict[str, Any] = {**prompts(1), "do_sample": False, "max_new_tokens": 12}
    options |= {"pad_token_id": PAD, "guidance_scale": 1.5}
    caches = []
    for _ in range(2):
        cache = hf.DynamicCache(config=model.config)
        with torch.no_grad():
            model(options["input_ids"][:, :-1], **{NAME: cache})
        caches.append(cache)
    truth = model.generate(**options, **{NAME: caches[0]})
    with pytest.warns(UserWarning, match="UnbatchedClassifierFreeGuidance"):
        found = model.generate(**options, **{NAME: caches[1]}, custom_generate=parallel_generate)
    assert torch.equal(found, truth)


@pytest.mark.parametrize(
    "more",
    [
        {"min_length": 20, "eos_token_id": 3},
        {"forced_eos_token_id": 5},
        {"suppress_tokens": [7, 8], "begin_suppress_tokens": [9]},
        {"bad_words_ids": [[5], [6, 7]]},
        {"prefix_allowed_tokens_fn": lambda row, ids: [2 + row, 10 + int(ids[-1]) % 7, 20]},
        {"exponential_decay_length_penalty": (5, 1.3), "eos_token_id": 3},
    ],
)
def test_processors_of_text(more: dict[str, Any]) -> None:
    model = make("Llama")
    for how in HOW.values():
        options = {**prompts(3), **how, "max_new_tokens": 20, "pad_token_id": PAD, **more}
        for schedule in ("auto", pd.Sliding(5, per_row=True)):
            expected, found = both(model, options, schedule=schedule)
            assert torch.equal(expected, found)


def test_static_caches() -> None:
    options = {
        **prompts(2),
        "do_sample": False,
        "max_new_tokens": 20,
        "pad_token_id": PAD,
        "cache_implementation": "static",
    }
    options["disable_compile"] = True
    for name in ("Llama", "Qwen3"):
        expected, found = both(make(name), options, schedule=pd.Sliding(5))
        assert torch.equal(expected, found)
    with pytest.raises(NotImplementedError, match="cannot be rewound"):
        make("Mistral").generate(**options, custom_generate=parallel_generate)


def test_the_form_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path))
    model, stream = make("Llama"), Stream()
    options = {**prompts(1), "do_sample": False, "max_new_tokens": 12, "pad_token_id": PAD}
    folder = str(Path(causal_lm.__file__).parent / "hub")
    hub = {"custom_generate": folder, "trust_remote_code": True}
    found = model.generate(**options, **hub, schedule=pd.Sliding(4), streamer=stream)
    assert torch.equal(found, model.generate(**options)) and stream.ended

    words = tokenizers.Tokenizer(tokenizers.models.BPE())
    words.pre_tokenizer, words.decoder = tokenizers.pre_tokenizers.ByteLevel(False), tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    words.train_from_iterator([], tokenizers.trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False))
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=words)
    ends = tokenizer.decode(found[0, 16:18])
    expected = model.generate(**options, tokenizer=tokenizer, stop_strings=[ends])
    assert expected.shape[1] == 18
    assert torch.equal(model.generate(**options, **hub, tokenizer=tokenizer, stop_strings=[ends]), expected)
    criteria = [transformers.StopStringCriteria(tokenizer, [ends])]
    assert torch.equal(
        model.generate(**options, custom_generate=parallel_generate, stopping_criteria=criteria), expected
    )


def test_what_is_refused_says_why() -> None:
    model, inputs = make("Llama"), {**prompts(1), "max_new_tokens": 5, "pad_token_id": PAD}
    for options, error, match in (
        ({"num_beams": 2}, NotImplementedError, "num_beams is 2"),
        ({"return_dict_in_generate": True, "output_attentions": True}, NotImplementedError, "output_attentions"),
        ({"schedule": "slow"}, ValueError, "schedule is 'slow'"),
        ({"guess": "oracle"}, ValueError, "guess is 'oracle'"),
        ({"guess": 3}, TypeError, "guess is 3"),
        ({"do_sample": True, "sampling": "beam"}, ValueError, "sampling is 'beam'"),
    ):
        with pytest.raises(error, match=match):
            model.generate(**inputs, **options, custom_generate=parallel_generate)
    with pytest.raises(NotImplementedError, match=r"inputs_embeds|empty prompt"):
        model.generate(
            inputs_embeds=torch.randn(1, 3, 32), max_new_tokens=5, pad_token_id=PAD, custom_generate=parallel_generate
        )
    mamba = hf.MambaForCausalLM(
        hf.MambaConfig(vocab_size=V, hidden_size=16, num_hidden_layers=1, state_size=4, pad_token_id=PAD)
    ).eval()
    with pytest.raises(NotImplementedError, match="cannot be rewound"):
        mamba.generate(inputs["input_ids"], max_new_tokens=5, custom_generate=parallel_generate)
    with pytest.raises(TypeError, match="Adaptive is for language models"):
        pd.solve(pd.from_function(lambda x: x * 0, torch.zeros(1, 3)), Adaptive())


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", ["GPT-2", "Llama", "Qwen3"])
def test_inputs_behind_the_prompt_are_those_that_the_model_prepares(name: str, padded: bool) -> None:
    given = prompts(3 if padded else 1)
    ids, mask = given["input_ids"], given["attention_mask"] if padded else None
    system = CausalLM(make(name), ids, 20, attention_mask=mask)
    x, reader, first = system.initial(), system.reader, ids.shape[1] + 3
    assert reader.plain
    own = reader._prepared(x, first, 4, 2)
    reader.plain = False
    theirs = reader._prepared(x, first, 4, 2)
    theirs = {key: value for key, value in theirs.items() if value is not None}
    assert own.keys() == theirs.keys()
    for key, value in own.items():
        assert (
            torch.equal(value, theirs[key])
            if isinstance(value, Tensor)
            else value is theirs[key] or value == theirs[key]
        )
