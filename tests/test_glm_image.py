"""GLM-Image: the tokens of `generate` and the pictures of diffusers' unmodified pipeline, on tiny random models.

Shapes: B pictures, P tokens of a prompt, L tokens of a preview, a picture and the end.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from torch import Tensor

import parallel_decode as pd
from parallel_decode.adapters.causal_lm.prompt import Prompt
from parallel_decode.adapters.image_tokens import generate_images
from parallel_decode.adapters.image_tokens.guesses import Preview
from parallel_decode.testing import check_system

pytest.importorskip("transformers.models.glm_image")

from parallel_decode.adapters.image_tokens.glm_image import GlmImage, glm_generate
from parallel_decode.adapters.image_tokens.pipelines import parallelize

hf: Any = transformers
START, END, PAD, IMAGE = 32, 33, 50, 51
V = 40
SCHEDULES = ("sequential", "auto", pd.Sliding(5), pd.Sliding(5, per_row=True), "jacobi")
PROMPTS = ("a red cat", "a dog", "a blue dog and a cat")
SETTINGS: Any = {"height": 128, "width": 192, "num_inference_steps": 1, "output_type": "np"}


@cache
def tiny() -> Any:
    torch.manual_seed(0)
    rotary = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}
    text: dict[str, Any] = {"vocab_size": 96, "vision_vocab_size": V, "hidden_size": 32, "intermediate_size": 48}
    text |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    text |= {"pad_token_id": PAD, "eos_token_id": END, "rope_parameters": rotary}
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "image_size": 32, "patch_size": 8, "intermediate_size": 16}
    codes = {"embed_dim": 8, "num_embeddings": 32, "latent_channels": 16}
    special = {"image_token_id": IMAGE, "image_start_token_id": START, "image_end_token_id": END}
    config = hf.GlmImageConfig(text_config=text, vision_config=vision, vq_config=codes, **special)
    model = hf.GlmImageForConditionalGeneration(config).eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.3)
    return model


def drawn(batch: int) -> dict[str, Tensor]:
    """What the processor gives for pictures of 4 x 6 tokens, after previews of 2 x 3."""
    ids = torch.tensor([[60, 64, 65, 66, 67, START], [PAD, PAD, 60, 61, 62, START], [PAD, 70, 71, 72, 73, START]])
    shapes, counts = torch.tensor([[1, 4, 6], [1, 2, 3]] * batch), torch.tensor([2] * batch)
    ids = ids[-batch:]
    return {
        "input_ids": ids,
        "attention_mask": (ids != PAD).long(),
        "image_grid_thw": shapes,
        "images_per_sample": counts,
    }


def edited(batch: int) -> dict[str, Tensor]:
    """What the processor gives for pictures of 4 x 6 tokens, made of others of 2 x 3."""
    ids = torch.tensor([[PAD, 60, START, *[IMAGE] * 6, END, 61, START], [62, 63, START, *[IMAGE] * 6, END, 64, START]])
    ids = ids[torch.arange(batch) % 2]
    shapes, counts = torch.tensor([[1, 2, 3], [1, 4, 6]] * batch), torch.tensor([2] * batch)
    pixels = torch.randn(6 * batch, 3 * 8 * 8, generator=torch.Generator().manual_seed(0))
    return {
        "input_ids": ids,
        "attention_mask": (ids != PAD).long(),
        "image_grid_thw": shapes,
        "images_per_sample": counts,
        "pixel_values": pixels,
    }


def sequential(inputs: dict[str, Tensor], seed: int = 0, **options: Any) -> tuple[Tensor, Tensor]:
    """Prompt and tokens by the model's own `generate`, and the state of the generator after it."""
    model = tiny()
    torch.manual_seed(seed)
    counts = inputs["image_grid_thw"][: int(inputs["images_per_sample"][0])].prod(1)
    length = int(counts.sum() if "pixel_values" not in inputs else counts[-1]) + 1  # as of the pipeline
    found = model.generate(**inputs, max_new_tokens=length, **options)
    return found, torch.get_rng_state()


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize(
    "options", ({"do_sample": False}, {"do_sample": True, "temperature": 0.9, "top_k": 20}), ids=str
)
@pytest.mark.parametrize("batch", (1, 3))
@pytest.mark.parametrize("inputs", (drawn, edited))
def test_tokens_are_those_of_generate(inputs: Any, batch: int, options: dict[str, Any], schedule: Any) -> None:
    given = inputs(batch)
    expected, state = sequential(given, **options)
    torch.manual_seed(0)
    found = tiny().generate(
        **given,
        max_new_tokens=expected.shape[1] - given["input_ids"].shape[1],
        custom_generate=glm_generate,
        schedule=schedule,
        **options,
    )
    assert torch.equal(found, expected) and torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(0)
    images = generate_images(tiny(), given, schedule=schedule, **options)
    assert torch.equal(images.tokens, expected[:, given["input_ids"].shape[1] :]) and images.pixels is None
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("inputs", (drawn, edited))
def test_padding_with_the_token_that_ends_a_picture_is_none(inputs: Any) -> None:
    given = inputs(3)
    given["input_ids"] = given["input_ids"].where(given["attention_mask"] == 1, END)
    expected, _ = sequential(given, do_sample=False)
    images = generate_images(tiny(), given, do_sample=False)
    assert torch.equal(images.tokens, expected[:, given["input_ids"].shape[1] :])


@pytest.fixture
def endless() -> Iterator[Any]:
    """The model draws all tokens, whatever they are."""
    config = tiny().generation_config
    config.eos_token_id = None
    yield tiny()
    config.eos_token_id = END


def test_windows_read_several_tokens_in_a_pass(endless: Any) -> None:
    images = generate_images(endless, drawn(1), schedule=pd.Sliding(5), do_sample=True)
    assert images.solution.passes < images.tokens.shape[1] == 31


def test_tokens_depend_on_the_pictures_that_are_edited() -> None:
    given = edited(1)
    other = given | {"pixel_values": -given["pixel_values"]}
    assert not torch.equal(*(generate_images(tiny(), inputs, do_sample=False).tokens for inputs in (given, other)))


def test_rows_that_end_early_are_padded_as_in_generate() -> None:
    ends = 0
    for seed in range(8):
        expected, state = sequential(drawn(3), seed, do_sample=True)
        torch.manual_seed(seed)
        images = generate_images(tiny(), drawn(3), schedule=pd.Sliding(5), do_sample=True)
        assert torch.equal(images.tokens, expected[:, 6:]) and torch.equal(torch.get_rng_state(), state)
        ends += int((images.tokens == PAD).any(1).sum())
    assert ends > 0


@pytest.mark.parametrize("guess", ("preview", "above", "left", "last", "n-gram"))
def test_no_guess_changes_the_tokens(guess: str) -> None:
    expected, _ = sequential(drawn(3), do_sample=True)
    torch.manual_seed(0)
    images = generate_images(tiny(), drawn(3), schedule=pd.Sliding(9), guess=guess, do_sample=True)
    assert torch.equal(images.tokens, expected[:, 6:])


@pytest.mark.parametrize("sampling", ("maximal", "speculative"))
def test_couplings_draw_tokens_of_the_head(sampling: str) -> None:
    tokens = generate_images(tiny(), drawn(3), sampling=sampling, schedule=pd.Sliding(5), do_sample=True).tokens
    assert bool(((tokens < V) | (tokens == PAD)).all())


def test_the_preview_is_enlarged_to_the_picture() -> None:
    guess = Preview((2, 2), (4, 4))
    guess.begin([[90, 91]])
    first = [1, 1, 2, 2]
    assert guess.draft(0, [90, 91, 1, 2, 3, 4], [], 99) == ([1, 1, 2, 2, 1, 1, 2, 2, 3, 3, 4, 4, 3, 3, 4, 4], 3)
    assert guess.draft(0, [90, 91, 1], [2, 3, 4, *first], 3) == ([1, 1, 2], 3)  # predictions are of the preview, too
    assert guess.draft(0, [90, 91, 1, 2], [], 99) == ([1, 2], 2)  # above, in the preview itself
    assert guess.draft(0, [90, 91, *range(20)], [], 4) == ([], 0)  # beyond the picture


def test_a_preview_is_refused_where_none_is_drawn() -> None:
    with pytest.raises(ValueError, match="no small picture is drawn"):
        generate_images(tiny(), edited(1), guess="preview")


def test_rows_of_preview_and_picture_are_told_in_order(endless: Any) -> None:
    rows: list[tuple[int, list[int]]] = []
    images = generate_images(
        endless, drawn(1), do_sample=True, on_row=lambda _, row, tokens: rows.append((row, tokens.tolist()))
    )
    assert [row for row, _ in rows] == list(range(6)) and [len(tokens) for _, tokens in rows] == [3, 3, 6, 6, 6, 6]
    assert [token for _, tokens in rows for token in tokens] == images.tokens[0, :30].tolist()


def test_the_description_is_a_system_as_others() -> None:
    from parallel_decode.adapters.causal_lm import CausalLM

    model = GlmImage(tiny())
    request = model.request(drawn(3))
    system = CausalLM(model, request.ids, 31, attention_mask=request.mask, position_ids=request.position_ids)
    check_system(system)


def test_positions_behind_a_prompt_are_those_given_and_then_count_on() -> None:
    places = torch.tensor([[[0, 1, 7, 7]]])
    assert Prompt(torch.ones(1, 2), 4, None, places).position_ids.tolist() == [[[0, 1, 7, 7, 8, 9]]]
    assert Prompt(torch.ones(1, 2), 1, None, places).position_ids.tolist() == [[[0, 1, 7]]]
    with pytest.raises(ValueError, match="expected 5 columns"):
        Prompt(torch.ones(1, 5), 1, None, places)


def test_several_pictures_of_a_prompt_are_those_of_the_prompt_repeated(endless: Any) -> None:
    torch.manual_seed(1)
    several = generate_images(endless, drawn(1), num_images=3, do_sample=True).tokens
    torch.manual_seed(1)
    repeated = {name: value.repeat(3, *[1] * (value.dim() - 1)) for name, value in drawn(1).items()}
    assert torch.equal(several, generate_images(endless, repeated, do_sample=True).tokens)


def test_threads_share_a_model() -> None:
    model, sizes = tiny(), [(4, 6), (5, 3), (2, 9), (6, 6)]

    def draw(size: tuple[int, int]) -> Tensor:
        given = drawn(1) | {"image_grid_thw": torch.tensor([[1, *size], [1, 2, 3]])}
        return generate_images(model, given, do_sample=False, schedule=pd.Sliding(5)).tokens

    expected = [draw(size) for size in sizes]
    with ThreadPoolExecutor(4) as pool:
        assert all(map(torch.equal, pool.map(draw, sizes), expected))


@pytest.mark.parametrize(
    ("change", "message"),
    (
        ({"image_grid_thw": None}, "image_grid_thw is missing"),
        ({"images_per_sample": None}, "images_per_sample is missing"),
    ),
)
def test_what_the_processor_gives_is_needed(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate_images(tiny(), drawn(3) | change)


def test_guidance_and_caches_are_refused() -> None:
    with pytest.raises(ValueError, match="have no guidance"):
        generate_images(tiny(), drawn(1), guidance_scale=3.0)
    with pytest.raises(NotImplementedError, match="have no guidance"):
        tiny().generate(**drawn(1), max_new_tokens=9, guidance_scale=3.0, custom_generate=glm_generate)


# The pipeline -----------------------------------------------------------------------------------------------------------


@cache
def made() -> Any:
    """diffusers' pipeline, all parts tiny; the processor is GLM-Image's own, with a tokenizer of a few words."""
    diffusers = pytest.importorskip("diffusers")
    from transformers.models.glm_image.image_processing_pil_glm_image import GlmImageImageProcessorPil

    names = ("a", "red", "cat", "blue", "dog", "and", "4", "6", "13", "19")
    words = {name: 60 + i for i, name in enumerate(names)}
    words |= {"<start>": START, "<end>": END, "<pad>": PAD, "<image>": IMAGE, "<sop>": 52, "<eop>": 53, "<unk>": 54}
    inner: Any = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        padding_side="left",
        pad_token="<pad>",
        bos_token="<start>",
        eos_token="<end>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>", "grid_bos_token": "<sop>", "grid_eos_token": "<eop>"},
    )
    pictures = GlmImageImageProcessorPil(patch_size=8, temporal_patch_size=1, merge_size=1)
    template = "{% for m in messages %}{% for c in m['content'] %}{{ c['text'] }}{% endfor %}{% endfor %}"
    torch.manual_seed(0)
    model = tiny()
    text = hf.T5Config(vocab_size=384, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    transformer = diffusers.GlmImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        text_embed_dim=16,
        time_embed_dim=16,
        condition_dim=8,
        prior_vq_quantizer_codebook_size=V,
    )
    autoencoder = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8,) * 4,
        latent_channels=4,
        norm_num_groups=2,
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    pipeline = diffusers.GlmImagePipeline(
        hf.ByT5Tokenizer(),
        hf.GlmImageProcessor(pictures, tokenizer, chat_template=template),
        hf.T5EncoderModel(text).eval(),
        model,
        autoencoder,
        transformer,
        diffusers.FlowMatchEulerDiscreteScheduler(),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def pipeline(endless: Any) -> Iterator[Any]:
    """It draws grids to their end: where the model ends early the pipeline itself fails."""
    yield made()
    assert "generate" not in vars(endless)


def picture(pipeline: Any, prompt: Any, generator: torch.Generator | None = None, **options: Any) -> Any:
    torch.manual_seed(3)
    return pipeline(prompt, generator=generator, **SETTINGS, **options).images


@cache
def alone(prompt: tuple[str, ...], seed: int | None) -> Any:
    return picture(made(), list(prompt), None if seed is None else torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("batch", "seed", "schedule"),
    (
        (1, None, "auto"),
        (1, 5, pd.Sliding(5)),
        (3, None, pd.Sliding(5)),
        (3, 5, "jacobi"),
        (3, 5, "auto"),
    ),
)
def test_a_pipeline_draws_the_same_pictures(pipeline: Any, batch: int, seed: int | None, schedule: Any) -> None:
    report: dict[str, Any] = {}
    prompt = PROMPTS[:batch]
    expected = alone(prompt, seed)
    with parallelize(pipeline, schedule=schedule, report=report) as same:
        assert same is pipeline
        found = picture(same, list(prompt), None if seed is None else torch.Generator().manual_seed(seed))
    assert np.array_equal(found, expected) and found.shape == (len(prompt), 128, 192, 3) and found.std() > 0
    assert report["tokens"] == len(prompt) * (4 * 6 + 13 * 19 + 1)
    assert schedule == "auto" or report["passes"] < report["tokens"] / len(prompt)


@pytest.mark.parametrize("batch", (1, 3))
@pytest.mark.parametrize("greedy", (False, True))
def test_tokens_inside_a_pipeline_are_the_same(pipeline: Any, batch: int, greedy: bool) -> None:
    prompts = list(PROMPTS[:batch])

    def tokens() -> Tensor:
        generator = torch.Generator().manual_seed(7)
        found = pipeline.generate_prior_tokens(prompts, 128, 192, generator=generator)[0]
        assert isinstance(found, Tensor)
        return found

    model = pipeline.vision_language_encoder
    own = model.generate
    if greedy:  # the pipeline itself always samples
        model.generate = lambda **options: own(**options | {"do_sample": False})
    try:
        expected = tokens()
        with parallelize(pipeline, schedule=pd.Sliding(5)):
            assert torch.equal(tokens(), expected)
    finally:
        vars(model).pop("generate", None)


def test_called_plainly_it_stays_until_restored(pipeline: Any) -> None:
    report: dict[str, Any] = {}
    parallel = parallelize(pipeline, schedule="jacobi", report=report)
    assert type(pipeline).__name__ == "GlmImagePipeline" and parallel.transformer is pipeline.transformer
    assert np.array_equal(picture(parallel, ["a red cat"]), alone(("a red cat",), None)) and report["passes"] > 0
    report.clear()
    parallel.restore()
    parallel.restore()
    assert np.array_equal(picture(parallel, ["a red cat"]), alone(("a red cat",), None)) and not report


def test_attributes_are_the_pipelines(pipeline: Any) -> None:
    with parallelize(pipeline):
        parallel = parallelize(pipeline)
        parallel.note = 1
        assert pipeline.note == 1 and not hasattr(parallel, "nothing")
        del pipeline.note
        parallel.restore()


def test_an_exception_restores(pipeline: Any) -> None:
    before = dict(vars(pipeline.vision_language_encoder))
    with pytest.raises(ValueError, match="divisible"), parallelize(pipeline):
        pipeline("a red cat", height=100, width=192)
    with pytest.raises(ValueError, match="guess is 'sideways'"), parallelize(pipeline, guess="sideways"):
        picture(pipeline, ["a red cat"])
    assert vars(pipeline.vision_language_encoder) == before


def test_nested_and_crossed_the_newest_counts_and_all_is_restored(pipeline: Any) -> None:
    reports: list[dict[str, Any]] = [{}, {}]
    first = parallelize(pipeline, schedule="jacobi", report=reports[0])
    second = parallelize(pipeline, schedule="jacobi", report=reports[1])
    picture(pipeline, ["a red cat"])
    assert reports[1] and not reports[0]
    first.restore()  # not the newest
    reports[1].clear()
    picture(pipeline, ["a red cat"])
    assert reports[1] and not reports[0]
    second.restore()
    assert "generate" not in vars(pipeline.vision_language_encoder)


def test_a_generate_of_the_models_own_comes_back(pipeline: Any) -> None:
    model = pipeline.vision_language_encoder
    own = model.generate = lambda **options: type(model).generate(model, **options)
    try:
        with parallelize(pipeline, schedule="jacobi"):
            assert model.generate is not own
        assert model.generate is own
    finally:
        del model.generate


def test_other_pipelines_are_refused() -> None:
    class Other:
        vision_language_encoder = torch.nn.Linear(1, 1)

    with pytest.raises(TypeError, match="it has no vision_language_encoder"):
        parallelize(object())
    with pytest.raises(TypeError, match="is Linear"):
        parallelize(Other())
