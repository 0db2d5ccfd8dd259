"""Images by windows have the tokens of transformers' own sequential loops: Janus, Emu3 and ImageGPT, on tiny random models.

Shapes: B pictures, P tokens of a prompt, L tokens of an image.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from torch import Tensor

import parallel_decode as pd
from parallel_decode.adapters.image_tokens import Images, generate_images

ROWS, WIDTH = 3, 5  # of Emu3's picture
BEGIN, EOL, EOF, EOI, EOS = 6, 9, 8, 7, 4  # in Emu3's vocabulary
SCHEDULES = ("sequential", "auto", pd.Sliding(5), pd.Sliding(5, per_row=True), "jacobi")
DECODING: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 0.9, "top_k": 20},
    "sampled by the defaults": {"do_sample": True},
    "guided": {"do_sample": True, "top_k": 0, "top_p": 0.9, "guidance_scale": 3.0},
}


class Family(NamedTuple):
    """A tiny model, what its processor would give for three pictures, and what transformers makes of it."""

    model: Any
    inputs: dict[str, Any]
    sequential: Callable[..., Tensor]
    ids: range  # that tokens may have
    shape: tuple[int, ...]  # of a picture
    guided: bool = True

    def some(self, batch: int) -> dict[str, Any]:
        """The inputs of the last pictures."""
        return {name: value if name == "clusters" else value[-batch:] for name, value in self.inputs.items()}


def randomized(kind: Any, config: Any) -> Any:
    """A model with weights by which scores differ enough for the order of sums not to matter, and pictures differ from each other."""
    torch.manual_seed(5)
    model = kind(config)
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.25)
    return model.eval()


@cache
def janus() -> Family:
    size = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    vq = {
        "embed_dim": 8,
        "num_embeddings": 64,
        "double_latent": False,
        "latent_channels": 16,
        "base_channels": 32,
        "channel_multiplier": [1, 1],
    }
    vq |= {
        "num_res_blocks": 1,
        "projection_dim": 32,
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "image_token_embed_dim": 32,
    }
    vision = {
        **size,
        "num_hidden_layers": 1,
        "image_size": 32,
        "patch_size": 8,
        "projection_dim": 32,
        "num_image_tokens": 16,
    }
    text = {
        **size,
        "vocab_size": 96,
        "num_hidden_layers": 2,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = transformers.JanusConfig(text_config=text, vision_config=vision, vq_config=vq, image_token_id=7)
    model = randomized(transformers.JanusForConditionalGeneration, config)
    model.generation_config.generation_kwargs = {"boi_token_id": 5}
    model.generation_config.update(pad_token_id=0, bos_token_id=1)
    ids = torch.tensor([[0, 0, 1, 9, 11, 5], [1, 8, 9, 10, 30, 5], [0, 1, 9, 20, 31, 5]])

    def sequential(inputs: dict[str, Any], guidance_scale: float | None = 1, **options: Any) -> Tensor:
        if guidance_scale is None or guidance_scale > 1:
            try:
                return model.generate(**inputs, generation_mode="image", guidance_scale=guidance_scale, **options)  # type: ignore[no-any-return]
            except TypeError as error:
                if "prefill_chunk_size" not in str(error):
                    raise
                pytest.skip("its own generate fails in this version of transformers (5.17)")
        return unguided_janus(model, inputs, **options)

    return Family(model, {"input_ids": ids, "attention_mask": (ids != 0).long()}, sequential, range(64), (3, 8, 8))


@torch.no_grad()
def unguided_janus(
    model: Any, inputs: dict[str, Any], do_sample: bool, temperature: float = 1.0, top_k: int = 50
) -> Tensor:
    """What `generate` would do without guidance, where it crashes: one position after the other, without a cache."""
    vectors, mask = model.get_input_embeddings()(inputs["input_ids"]), inputs["attention_mask"]
    tokens: list[Tensor] = []
    for _ in range(model.model.vision_model.config.num_image_tokens):
        hidden = model.model.language_model(inputs_embeds=vectors, attention_mask=mask, use_cache=False)[0]
        scores = model.model.generation_head(hidden[:, -1]) / temperature
        scores = scores.masked_fill(scores < scores.topk(top_k).values[:, -1:], -torch.inf)
        token = scores.softmax(-1).multinomial(1) if do_sample else scores.argmax(-1, keepdim=True)
        tokens.append(token)
        vectors = torch.cat([vectors, model.prepare_embeddings_for_image_generation(token)], 1)
        mask = torch.cat([mask, torch.ones_like(token)], 1)
    return torch.cat(tokens, 1)


@cache
def emu3() -> Family:
    special = [
        "pad",
        "a",
        "b",
        "c",
        "<|extra_204|>",
        "<|image start|>",
        "<|image token|>",
        "<|image end|>",
        "<|extra_201|>",
        "<|extra_200|>",
        "<image>",
    ]
    names = special + [f"word {i}" for i in range(21)] + [f"<|visual token {i:06d}|>" for i in range(64)]
    vq = {
        "codebook_size": 64,
        "base_channels": 32,
        "channel_multiplier": [1, 1],
        "num_res_blocks": 1,
        "attn_resolutions": [],
        "hidden_size": 32,
    }
    text = {
        "vocab_size": len(names),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    text |= {
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": 3,
        "eos_token_id": EOS,
    }
    known = {name: i for i, name in enumerate(names)}
    config = transformers.Emu3Config(vq_config=vq, text_config=text, vocabulary_map=known)
    model = randomized(transformers.Emu3ForConditionalGeneration, config)
    visual = model.vocabulary_mapping.image_tokens
    after = {ROWS * (WIDTH + 1) + i: [token] for i, token in enumerate((EOF, EOI, EOS), 1)}

    def allowed(row: int, text: Tensor) -> list[int]:  # that of transformers' documentation
        count = len(text) - int((text == BEGIN).nonzero()[0])
        return after.get(count) or ([EOL] if count % (WIDTH + 1) == 0 else visual)

    def sequential(inputs: dict[str, Any], **options: Any) -> Tensor:
        given = {name: value for name, value in inputs.items() if name != "image_sizes"}
        length = inputs["input_ids"].shape[1]
        found = model.generate(**given, **options, prefix_allowed_tokens_fn=allowed, max_new_tokens=100)
        return found[:, length:]  # type: ignore[no-any-return]

    ids = torch.tensor([[0, 0, 3, 12, 13, 5, BEGIN], [3, 11, 12, 13, 20, 5, BEGIN], [0, 3, 21, 22, 23, 5, BEGIN]])
    away = torch.tensor([[0, 3, 14, 15], [3, 16, 17, 18], [0, 3, 14, 14]])
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long(), "image_sizes": [[ROWS, WIDTH]] * 3}
    inputs |= {"negative_prompt_ids": away, "negative_prompt_attention_mask": (away != 0).long()}
    return Family(model, inputs, sequential, range(len(special) + 21, len(names)), (3, 2 * ROWS, 2 * WIDTH))


@cache
def imagegpt() -> Family:
    config = transformers.ImageGPTConfig(vocab_size=65, n_positions=36, n_embd=32, n_layer=2, n_head=2)
    model = randomized(transformers.ImageGPTForCausalImageModeling, config)

    def sequential(inputs: dict[str, Any], **options: Any) -> Tensor:
        found = model.generate(inputs["input_ids"], max_length=37, **options)
        return found[:, inputs["input_ids"].shape[1] :]  # type: ignore[no-any-return]

    ids = torch.tensor([[64, 1, 2, 3, 4, 5, 6, 7], [64, 8, 8, 8, 8, 8, 8, 8], [64, 63, 60, 9, 9, 9, 9, 9]])
    clusters = torch.linspace(-1, 1, 64 * 3).view(64, 3)
    return Family(model, {"input_ids": ids, "clusters": clusters}, sequential, range(64), (3, 6, 6), guided=False)


FAMILIES: dict[str, Callable[[], Family]] = {"Janus": janus, "Emu3": emu3, "ImageGPT": imagegpt}
CASES = [(name, decoding) for name in FAMILIES for decoding in DECODING if name != "ImageGPT" or decoding != "guided"]
each_family = pytest.mark.parametrize("name", FAMILIES)


def options_of(name: str, decoding: str) -> dict[str, Any]:
    """Of a call; Janus is not guided where that is not asked for."""
    return ({"guidance_scale": 1} if name == "Janus" else {}) | DECODING[decoding]


@cache
def truth(name: str, decoding: str, batch: int) -> tuple[Tensor, Tensor]:
    """The tokens of transformers, and the state of the generator afterwards."""
    family = FAMILIES[name]()
    inputs = family.some(batch)
    if name == "Emu3" and "guidance_scale" not in DECODING[decoding]:
        inputs = {part: value for part, value in inputs.items() if not part.startswith("negative")}
    torch.manual_seed(1)
    return family.sequential(inputs, **options_of(name, decoding)), torch.get_rng_state()


def drawn(name: str, decoding: str, batch: int, **options: Any) -> Images:
    family = FAMILIES[name]()
    torch.manual_seed(1)
    return generate_images(family.model, family.some(batch), **options_of(name, decoding) | options)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("name", "decoding"), CASES)
def test_a_schedule_changes_tokens_or_leaves_the_generator_elsewhere(
    name: str, decoding: str, batch: int, schedule: Any
) -> None:
    expected, state = truth(name, decoding, batch)
    assert len(set(expected.flatten().tolist())) > 6  # a picture of one colour would tell nothing
    images = drawn(name, decoding, batch, schedule=schedule)
    assert torch.equal(images.tokens, expected)
    assert torch.equal(torch.get_rng_state(), state)


def impossible(text: list[int], most: int) -> list[int]:
    """A draft of ids that there are not."""
    return [10**6] * most


@pytest.mark.parametrize("guess", ["grid", "left", "last", "n-gram", "repeat", impossible])
@each_family
def test_a_guess_changes_tokens(name: str, guess: Any) -> None:
    images = drawn(name, "sampled", 3, schedule=pd.Sliding(5), guess=guess)
    assert torch.equal(images.tokens, truth(name, "sampled", 3)[0])


@each_family
def test_right_guesses_save_no_pass(name: str) -> None:
    expected = truth(name, "greedy", 1)[0][0].tolist()
    prompt = {"Janus": 5, "Emu3": 6, "ImageGPT": 8}[name]  # tokens without padding
    own = [max(0, token - FAMILIES[name]().ids.start) for token in expected]

    def oracle(text: list[int], most: int) -> list[int]:
        return own[len(text) - prompt :][:most]

    images = drawn(name, "greedy", 1, schedule=pd.Sliding(8), guess=oracle)
    assert images.solution.passes <= len(expected) // 8 + 4


def test_prescribed_tokens_cost_passes() -> None:
    wrong = drawn("Emu3", "greedy", 1, schedule=pd.Sliding(5), guess=lambda text, most: [0] * most)
    assert wrong.solution.passes <= ROWS * WIDTH + 1  # and not one for each of ROWS * (WIDTH + 1) + 3


@pytest.mark.parametrize("decoding", ["greedy", "guided"])
def test_padding_spoils_pictures_of_emu3(decoding: str) -> None:
    family = emu3()
    options = DECODING[decoding] | {"do_sample": False, "top_p": None, "top_k": None}
    together = generate_images(family.model, family.inputs, schedule=pd.Sliding(4), **options)
    for row in range(3):
        kept, known = family.inputs["attention_mask"][row] > 0, family.inputs["negative_prompt_attention_mask"][row] > 0
        alone = {"input_ids": family.inputs["input_ids"][row : row + 1, kept], "image_sizes": [[ROWS, WIDTH]]}
        alone["negative_prompt_ids"] = family.inputs["negative_prompt_ids"][row : row + 1, known]
        assert torch.equal(generate_images(family.model, alone, **options).tokens[0], together.tokens[row])


def test_a_head_with_a_hook_is_read_by_its_weight_alone() -> None:
    family, expected = emu3(), truth("Emu3", "greedy", 3)[0]
    hook = family.model.lm_head.register_forward_hook(lambda module, inputs, logits: -logits)
    try:
        inputs = {name: value for name, value in family.inputs.items() if not name.startswith("negative")}
        turned = family.sequential(inputs, do_sample=False)
        images = drawn("Emu3", "greedy", 3, schedule=pd.Sliding(5))
    finally:
        hook.remove()
    assert torch.equal(images.tokens, turned) and not torch.equal(turned, expected)


def test_guidance_of_emu3_has_no_prompt_of_its_own_by_default() -> None:
    family = emu3()
    inputs = {name: value for name, value in family.some(3).items() if not name.startswith("negative")}
    options: dict[str, Any] = {"do_sample": False, "guidance_scale": 2.5}
    assert torch.equal(generate_images(family.model, inputs, **options).tokens, family.sequential(inputs, **options))


@pytest.mark.parametrize("scale", [None, 0, 1])
def test_a_scale_that_guides_nothing_guides_janus_or_none_is_not_its_default(scale: float | None) -> None:
    family = janus()
    expected = family.sequential(family.inputs, guidance_scale=scale, do_sample=False)
    assert torch.equal(
        generate_images(family.model, family.inputs, do_sample=False, guidance_scale=scale).tokens, expected
    )
    assert torch.equal(expected, truth("Janus", "greedy", 3)[0]) == (scale is not None)


@each_family
def test_several_images_of_a_prompt_are_not_those_of_repeated_prompts(name: str) -> None:
    family = FAMILIES[name]()
    two = drawn(name, "sampled", 2, num_images=2, schedule=pd.Sliding(5), guidance_scale=3.0 if family.guided else None)
    torch.manual_seed(1)
    inputs = family.some(2)
    for part, value in inputs.items():
        if part != "clusters":
            inputs[part] = value.repeat_interleave(2, 0) if isinstance(value, Tensor) else value * 2
    options = DECODING["sampled"] | ({"guidance_scale": 3.0} if family.guided else {})
    assert torch.equal(two.tokens, family.sequential(inputs, **options))
    assert two.pixels is not None and two.pixels.shape == (4, *family.shape)


@pytest.mark.parametrize("schedule", ["sequential", pd.Sliding(5, per_row=True)], ids=str)
@each_family
def test_rows_come_twice_or_late_or_are_others(name: str, schedule: Any) -> None:
    seen: dict[int, list[tuple[int, list[int]]]] = {0: [], 1: [], 2: []}
    images = drawn(name, "sampled", 3, schedule=schedule, on_row=lambda p, r, t: seen[p].append((r, t.tolist())))
    width, first = {"Janus": (4, 0), "Emu3": (WIDTH + 1, 0), "ImageGPT": (6, 1)}[name]
    for picture, tokens in enumerate(images.tokens.tolist()):
        tokens = {"Janus": tokens, "Emu3": tokens[:-3], "ImageGPT": [None, *tokens]}[
            name
        ]  # one pixel of its row was given
        rows = [[t for t in tokens[at : at + width] if t is not None] for at in range(0, len(tokens), width)]
        assert seen[picture] == list(enumerate(rows, first))


def test_pixels_are_not_those_of_the_tokens() -> None:
    def scaled(decoded: Tensor) -> Tensor:
        return (decoded / 2 + 0.5).clamp(0, 1)

    found = {name: drawn(name, "sampled", 3, schedule=pd.Sliding(5)) for name in FAMILIES}
    tokens = {name: images.tokens for name, images in found.items()}
    whole = torch.cat([imagegpt().inputs["input_ids"][:, 1:], tokens["ImageGPT"]], 1).view(3, 6, 6)
    with torch.no_grad():
        expected = {
            "Janus": scaled(janus().model.decode_image_tokens(tokens["Janus"])).permute(0, 3, 1, 2),
            "Emu3": scaled(emu3().model.decode_image_tokens(image_tokens=tokens["Emu3"], height=ROWS, width=WIDTH)),
            "ImageGPT": scaled(imagegpt().inputs["clusters"][whole]).permute(0, 3, 1, 2),
        }
    for name, images in found.items():
        assert images.pixels is not None and torch.equal(images.pixels, expected[name])
        pictures = images.to_pil()
        assert len(pictures) == 3 and pictures[0].mode == "RGB" and pictures[0].size == images.pixels.shape[:1:-1]


def test_imagegpt_has_no_colours_or_draws_no_whole_picture() -> None:
    family = imagegpt()
    beginning = {"input_ids": torch.full((2, 1), 64)}
    expected = family.sequential(beginning, do_sample=False)
    images = generate_images(family.model, beginning, do_sample=False)
    assert torch.equal(images.tokens, expected) and images.tokens.shape == (2, 36)
    assert images.pixels is None
    with pytest.raises(ValueError, match="clusters"):
        images.to_pil()


@pytest.mark.parametrize("sampling", ["gumbel", "maximal", "speculative"])
@each_family
def test_a_generator_is_not_all_that_chance_comes_from(name: str, sampling: str) -> None:
    family = FAMILIES[name]()
    options = options_of(name, "sampled") | {"sampling": sampling, "schedule": pd.Sliding(5)}

    def tokens(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return generate_images(family.model, family.some(3), generator=generator, **options).tokens

    state = torch.get_rng_state()
    first = tokens(3)
    assert torch.equal(first, tokens(3)) and not torch.equal(first, tokens(4))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("sampling", ["maximal", "speculative"])
@each_family
def test_couplings_draw_what_a_picture_cannot_hold(name: str, sampling: str, guided: bool) -> None:
    family = FAMILIES[name]()
    scale = {"guidance_scale": 3.0 if guided else 1} if family.guided else {}
    images = drawn(name, "sampled", 3, sampling=sampling, schedule="jacobi", **scale)
    tokens = images.tokens
    if name == "Emu3":
        assert tokens[:, -3:].tolist() == [[EOF, EOI, EOS]] * 3
        tokens = tokens[:, :-3].view(3, ROWS, WIDTH + 1)
        assert bool((tokens[..., -1] == EOL).all())
        tokens = tokens[..., :-1]
    assert family.ids.start <= int(tokens.min()) and int(tokens.max()) < family.ids.stop
    assert len({str(picture.tolist()) for picture in tokens}) == 3


BAD: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("Janus", {"input_ids": None}, {}, "input_ids"),
    ("Emu3", {"input_ids": torch.ones(2, 3)}, {}, "expected token ids"),
    ("ImageGPT", {"input_ids": [[64]]}, {}, "return_tensors"),
    ("Emu3", {"attention_mask": torch.ones(3, 2)}, {}, r"attention_mask has shape \(3, 2\)"),
    ("Emu3", {"image_sizes": None}, {}, "return_for_image_generation=True"),
    ("Emu3", {"image_sizes": [[3, 5], [3, 5], [5, 3]]}, {}, "expected one size for all"),
    ("Emu3", {"image_sizes": [[3, 0]] * 3}, {}, "expected one size for all"),
    ("Emu3", {"input_ids": torch.full((3, 7), 11)}, {}, r"end with <\|image token\|>"),
    (
        "Emu3",
        {"negative_prompt_ids": torch.ones(1, 4).long(), "negative_prompt_attention_mask": None},
        {"guidance_scale": 3.0},
        "has 1 rows, expected 3",
    ),
    ("ImageGPT", {"input_ids": torch.zeros(3, 4).long()}, {}, "expected 64 and then"),
    ("ImageGPT", {"input_ids": torch.full((3, 2), 64)}, {}, "expected 64 and then"),
    ("ImageGPT", {"input_ids": torch.tensor([[64] + [0] * 36])}, {}, "less than 36 pixels"),
    ("ImageGPT", {"attention_mask": torch.tensor([[0] + [1] * 7] * 3)}, {}, "equally long"),
    ("ImageGPT", {"clusters": torch.zeros(3, 3)}, {}, r"clusters has shape \(3, 3\)"),
    ("ImageGPT", {}, {"guidance_scale": 3.0}, "no prompt to be guided by"),
    ("Janus", {}, {"sampling": "greedy"}, "sampling is 'greedy'"),
    ("Janus", {}, {"num_images": 0}, "num_images is 0"),
    ("Janus", {}, {"guess": "above left"}, "guess is 'above left'"),
    ("Janus", {}, {"guess": "preview"}, "no small picture"),
    ("Janus", {}, {"schedule": "fast"}, "schedule"),
]


@pytest.mark.parametrize(("name", "wrong", "options", "message"), BAD)
def test_a_bad_argument_is_taken(name: str, wrong: dict[str, Any], options: dict[str, Any], message: str) -> None:
    family = FAMILIES[name]()
    inputs = {part: value for part, value in (family.inputs | wrong).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        generate_images(family.model, inputs, **options)


def test_chameleon_is_not_refused_or_could_draw_after_all() -> None:
    names = ["<image>", "<racm3:break>", "<eoss>", *(f"IMGIMG{letter}Z" for letter in "ABCD"), *map(str, range(9))]
    vq = {
        "embed_dim": 4,
        "num_embeddings": 4,
        "latent_channels": 4,
        "base_channels": 32,
        "channel_multiplier": [1, 1],
        "num_res_blocks": 1,
    }
    known = {name: i for i, name in enumerate(names)}
    config = transformers.ChameleonConfig(
        vocab_size=len(names),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vq_config=vq,
        vocabulary_map=known,
    )
    model = randomized(transformers.ChameleonForConditionalGeneration, config)
    logits = model(torch.tensor([[8, 9]])).logits
    assert bool((logits[..., 3:7] == torch.finfo(logits.dtype).min).all())
    assert not hasattr(model.model.vqmodel, "decoder")
    with pytest.raises(NotImplementedError, match="Chameleon cannot draw"):
        generate_images(model, {"input_ids": torch.tensor([[8, 9]])})


def test_another_model_is_taken() -> None:
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
        )
    )
    with pytest.raises(NotImplementedError, match="LlamaForCausalLM is no model of image tokens"):
        generate_images(model, {"input_ids": torch.tensor([[1]])})
