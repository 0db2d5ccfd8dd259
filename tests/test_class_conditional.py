"""Class-conditional models of image tokens: their own sequential tokens and distribution, LlamaGen's weights, the shipped model, its training."""

import itertools
import shutil
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import VQModel
from PIL import Image
from scipy.stats import chisquare  # type: ignore[import-untyped]
from torch import Tensor
from transformers import LlamaConfig
from typer.testing import CliRunner

import parallel_decode as pd
from paper_repro.__main__ import app as paper
from paper_repro.crop_training import fit
from paper_repro.data.crops import crops
from paper_repro.image_tokens import PriorTraining, TokenizerTraining
from parallel_decode.adapters.image_tokens import generate_images
from parallel_decode.adapters.image_tokens.class_conditional import PHOTOGRAPHS, ClassConditional, photographs
from parallel_decode.adapters.image_tokens.cli import app
from parallel_decode.adapters.image_tokens.prior import Prior

V, CLASSES = 16, 3
SCHEDULES: tuple[Any, ...] = ("sequential", "auto", "jacobi", pd.Sliding(5), pd.Sliding(5, per_row=True))


def prior(codes: int = V, rows: int = 4, columns: int = 4, **more: Any) -> Prior:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": codes, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "bos_token_id": None, "eos_token_id": None}
    sizes |= {"initializer_range": 0.3, "num_classes": CLASSES, "rows": rows, "columns": columns}
    return Prior(LlamaConfig(**sizes | more))


@cache
def tiny() -> ClassConditional:
    """4 x 4 tokens, 8 x 8 pixels."""
    levels: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    }
    model = prior()
    vq: Any = VQModel(  # type: ignore[no-untyped-call]
        block_out_channels=(8, 8), latent_channels=4, num_vq_embeddings=V, norm_num_groups=4, **levels
    )
    return ClassConditional(model, vq).eval()


def one_by_one(model: ClassConditional, labels: Tensor, seed: int | None, scale: float = 1.0, top_k: int = V) -> Tensor:
    """The tokens without cache and windows; greedily without a seed."""
    net: Any = model.model
    generator = torch.Generator().manual_seed(seed or 0)
    x = labels.new_zeros(len(labels), 0)

    def logits(labels: Tensor) -> Tensor:
        embedded = torch.cat([net.classes(labels)[:, None], net.model.embed_tokens(x)], 1)
        hidden = net.model(inputs_embeds=embedded, use_cache=False).last_hidden_state
        last: Tensor = net.lm_head(hidden[:, -1])
        return last

    with torch.no_grad():
        for _ in range(model.length):
            scores, without = logits(labels), logits(torch.full_like(labels, CLASSES))
            scores = without + scale * (scores - without) if scale > 1 else scores
            scores = scores.masked_fill(scores < scores.topk(top_k).values[:, -1:], -torch.inf)
            drawn = scores.argmax(-1, keepdim=True)
            if seed is not None:
                drawn = torch.multinomial(scores.softmax(-1), 1, generator=generator)
            x = torch.cat([x, drawn], 1)
    return x


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_tokens_are_those_of_one_by_one(batch: int, scale: float) -> None:
    model, labels = tiny(), torch.tensor([2, 0, 3])[:batch]
    for seed, top_k in ((None, V), (5, V), (5, 6)):
        expected = one_by_one(model, labels, seed, scale, top_k)
        for schedule in SCHEDULES:
            found = generate_images(
                model,
                {"labels": labels},
                schedule=schedule,
                do_sample=seed is not None,
                guidance_scale=scale,
                top_k=top_k,
                generator=torch.Generator().manual_seed(seed or 0),
            )
            assert torch.equal(found.tokens, expected), (seed, top_k, schedule)


@pytest.mark.parametrize("guess", ["left", "last", "repeat", "n-gram", lambda text, most: [0, 1, 2, 3]], ids=str)
def test_guesses_change_no_token(guess: Any) -> None:
    model, labels = tiny(), torch.tensor([2, 0, 3])
    expected = one_by_one(model, labels, 5, 3.0)
    for schedule in (pd.Sliding(5, per_row=True), "jacobi"):
        generator = torch.Generator().manual_seed(5)
        options: dict[str, Any] = {"schedule": schedule, "guess": guess, "guidance_scale": 3, "generator": generator}
        assert torch.equal(generate_images(model, {"labels": labels}, **options).tokens, expected), schedule


def test_windows_need_fewer_forwards_and_rows_are_told_in_order() -> None:
    told: list[tuple[int, int, list[int]]] = []
    images = generate_images(
        tiny(),
        {"labels": torch.tensor([1])},
        schedule=pd.Sliding(8),
        do_sample=False,
        on_row=lambda *row: told.append((row[0], row[1], row[2].tolist())),
    )
    assert images.solution.passes < 16
    assert told == [(0, row, images.tokens[0, 4 * row : 4 * row + 4].tolist()) for row in range(4)]


@cache
def exact(scale: float) -> tuple[ClassConditional, dict[tuple[int, ...], float]]:
    """A model of 2 x 2 tokens of 3 codes, and the probability of each picture of class 1."""
    model = ClassConditional(prior(codes=3, rows=2, columns=2))
    pictures = list(itertools.product(range(3), repeat=4))
    ids = torch.tensor(pictures)

    def logits(label: int) -> Any:
        prompt = torch.full((len(ids), 1), 3 + label)
        with torch.no_grad():
            return model(torch.cat([prompt, ids[:, :-1]], 1), position_ids=torch.arange(4)[None]).logits

    guided = logits(CLASSES) + scale * (logits(1) - logits(CLASSES))
    chances = guided.log_softmax(-1).gather(2, ids[..., None]).sum((1, 2)).double().exp()
    return model, dict(zip(pictures, (chances / chances.sum()).tolist(), strict=True))


@pytest.mark.parametrize(("schedule", "scale"), [("jacobi", 1.0), (pd.Sliding(3, per_row=True), 2.0)], ids=str)
@pytest.mark.parametrize("sampling", ["gumbel", "maximal", "speculative"])
def test_pictures_come_as_often_as_they_should(sampling: str, schedule: Any, scale: float) -> None:
    model, chances = exact(scale)
    generator, n = torch.Generator().manual_seed(2), 2000
    images = generate_images(
        model,
        {"labels": torch.tensor([1])},
        schedule=schedule,
        sampling=sampling,
        guidance_scale=scale,
        num_images=n,
        generator=generator,
    )
    counts = dict.fromkeys(chances, 0)
    for picture in images.tokens.tolist():
        counts[tuple(picture)] += 1
    often = [picture for picture, chance in chances.items() if n * chance >= 5]
    found, expected = [counts[p] for p in often], [n * chances[p] for p in often]
    assert max(expected) > 4 * min(expected)  # a uniform draw would be seen
    assert chisquare([*found, n - sum(found)], [*expected, n - sum(expected)]).pvalue > 1e-3


def llamagen(key_heads: int, rows: int = 3) -> dict[str, Tensor]:
    """Random weights of LlamaGen's names: 2 layers, 2 heads of 8 channels, 3 classes."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "tok_embeddings": (V, 16),
        "cls_embedding.embedding_table": (CLASSES + 1, 16),
        "norm": (16,),
        "output": (V, 16),
    }
    for layer in range(2):
        own = {
            "attention.wqkv": (16 + 16 * key_heads, 16),
            "attention.wo": (16, 16),
            "attention_norm": (16,),
            "ffn_norm": (16,),
        }
        own |= {"feed_forward.w1": (24, 16), "feed_forward.w2": (16, 24), "feed_forward.w3": (24, 16)}
        shapes |= {f"layers.{layer}.{name}": shape for name, shape in own.items()}
    return {f"{name}.weight": torch.randn(shape, generator=generator) * 0.4 for name, shape in shapes.items()}


def reference(state: dict[str, Tensor], label: int, tokens: list[int], key_heads: int, columns: int = 3) -> Tensor:
    """Logits of every position by LlamaGen's description: complex rotations, one query at a time; the class has rotation 0."""
    w = {name.removesuffix(".weight"): weight for name, weight in state.items()}

    def normed(h: Tensor, name: str) -> Tensor:
        return h / (h.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[name]

    def turned(head: Tensor, t: int) -> Tensor:
        row, column = divmod(t - 1, columns)
        angles = torch.tensor([row, row * 10000**-0.5, column, column * 10000**-0.5])
        pairs = torch.view_as_complex(head.reshape(4, 2)) * torch.polar(torch.ones(4), angles) * (t > 0)
        return torch.view_as_real(pairs).flatten()

    h = torch.cat([w["cls_embedding.embedding_table"][label][None], w["tok_embeddings"][tokens]])
    for layer in ("layers.0.", "layers.1."):
        normal = normed(h, layer + "attention_norm")
        q, k, v = torch.split(normal @ w[layer + "attention.wqkv"].T, [16, 8 * key_heads, 8 * key_heads], 1)
        out = torch.zeros(len(h), 16)
        for t, head in itertools.product(range(len(h)), range(2)):
            mine, theirs = 8 * head, 8 * (head * key_heads // 2)
            query = turned(q[t, mine : mine + 8], t)
            keys = torch.stack([turned(k[s, theirs : theirs + 8], s) for s in range(t + 1)])
            out[t, mine : mine + 8] = (keys @ query / 8**0.5).softmax(0) @ v[: t + 1, theirs : theirs + 8]
        h = h + out @ w[layer + "attention.wo"].T
        normal = normed(h, layer + "ffn_norm")
        gate = torch.nn.functional.silu(normal @ w[layer + "feed_forward.w1"].T)
        h = h + (gate * (normal @ w[layer + "feed_forward.w3"].T)) @ w[layer + "feed_forward.w2"].T
    return normed(h, "norm") @ w["output"].T


@pytest.mark.parametrize("key_heads", [1, 2])
def test_llamagens_weights_give_its_logits_and_its_tokens(key_heads: int) -> None:
    state = llamagen(key_heads)
    model = ClassConditional.from_llamagen(state, head_dim=8, rows=3)
    images = generate_images(model, {"labels": torch.tensor([2])}, schedule=pd.Sliding(4), do_sample=False)
    tokens = images.tokens[0].tolist()
    logits = reference(state, 2, tokens[:-1], key_heads)
    assert logits.argmax(-1).tolist() == tokens and len(set(tokens)) > 3
    ids = torch.tensor([[V + 2, *tokens[:-1]]])
    torch.testing.assert_close(model(ids, position_ids=torch.arange(9)[None]).logits[0], logits, rtol=1e-4, atol=1e-5)
    assert images.pixels is None


def test_other_weights_are_not_taken_for_llamagens() -> None:
    state = llamagen(2)
    captions = {name: weight for name, weight in state.items() if "cls" not in name} | {
        "cls_embedding.cap_proj.fc1.weight": torch.zeros(1)
    }
    for wrong in (captions, {"model": torch.zeros(1)}, {}):
        with pytest.raises(ValueError, match="not of a class-conditional LlamaGen"):
            ClassConditional.from_llamagen(wrong, head_dim=8)
    with pytest.raises(ValueError, match="multiple of head_dim = 64"):
        ClassConditional.from_llamagen(state)


@pytest.mark.parametrize("half", [False, True])
def test_a_folder_gives_the_same_pictures(tmp_path: Path, half: bool) -> None:
    model = ClassConditional(prior(), tiny().tokenizer)
    model.save_pretrained(tmp_path)
    if half:
        ClassConditional.from_pretrained(tmp_path).half().save_pretrained(tmp_path)
    again = ClassConditional.from_pretrained(tmp_path)
    assert {weight.dtype for weight in again.parameters()} == {torch.float32}
    first, second = (generate_images(m, {"labels": torch.tensor([0, 1])}, do_sample=False) for m in (model, again))
    if half:
        for mine, theirs in zip(model.parameters(), again.parameters(), strict=True):
            assert torch.equal(mine.half().float(), theirs)
    else:
        assert torch.equal(first.tokens, second.tokens)
        assert first.pixels is not None and second.pixels is not None and torch.equal(first.pixels, second.pixels)
    assert not list(tmp_path.glob("*.bin")) and not list(tmp_path.glob("*.pt"))


@pytest.mark.parametrize(
    "damage", ["no folder", "no weights", "cut weights", "cut config", "another prior", "other config"]
)
def test_a_damaged_folder_is_told(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "model"
    tiny().save_pretrained(folder)
    config, weights = folder / "config.json", folder / "model.safetensors"
    match damage:
        case "no folder":
            shutil.rmtree(folder)
        case "no weights":
            weights.unlink()
        case "cut weights":
            weights.write_bytes(weights.read_bytes()[:1000])
        case "cut config":
            config.write_text(config.read_text()[:100])
        case "another prior":
            config.write_text(config.read_text().replace('"hidden_size": 32', '"hidden_size": 64'))
        case "other config":
            config.write_text("[1]")
    with pytest.raises(ValueError, match="cannot be read, expected a folder that save_pretrained wrote"):
        ClassConditional.from_pretrained(folder)


@pytest.mark.parametrize(
    "inputs",
    [
        {},
        {"labels": 3},
        {"labels": torch.tensor(3)},
        {"labels": torch.ones(2)},
        {"labels": torch.tensor([4])},
        {"labels": torch.tensor([-1])},
    ],
)
def test_labels_that_there_are_not_are_refused(inputs: Any) -> None:
    with pytest.raises(ValueError, match="labels"):
        generate_images(tiny(), inputs)


def test_parts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="16 codes, expected the prior's 8"):
        ClassConditional(prior(codes=8), tiny().tokenizer)
    with pytest.raises(ValueError, match=r"config.rows is 0"):
        prior(rows=0)
    with pytest.raises(ValueError, match="head_dim is 6"):
        prior(head_dim=6)


def test_the_shipped_model_draws_the_same_tokens_by_every_schedule() -> None:
    assert sum(file.stat().st_size for file in PHOTOGRAPHS.iterdir()) < 10e6
    labels = torch.tensor([0, 8])
    first, second = (
        generate_images(
            photographs(), {"labels": labels}, schedule=schedule, generator=torch.Generator().manual_seed(0)
        )
        for schedule in (pd.Sliding(12), "sequential")
    )
    assert torch.equal(first.tokens, second.tokens)
    assert first.solution.passes < 200
    assert first.pixels is not None and first.pixels.shape == (2, 3, 64, 64)
    assert float(first.pixels.std()) > 0.02 and len(set(first.tokens.flatten().tolist())) > 50


def test_the_command_draws_and_compares(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path / "model")
    out = tmp_path / "drawn.png"
    words = f"--model {tmp_path / 'model'} --n 9 --class 2,1 --compare --schedule 5 --out {out}".split()
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "sequential: 16 forwards" in done.output and "the same tokens" in done.output
    with Image.open(out) as picture:
        assert picture.size == (64, 16)


@pytest.mark.parametrize(
    "words",
    [
        "--n 0",
        "--class a",
        "--class 77",
        "--temperature 0",
        "--top-k -1",
        "--schedule fast",
        "--sampling best",
        "--guess none",
        "--out x.bmp",
        "--out none/x.png",
        "--model nowhere",
        "--schedule 0",
        "--seed -1",
    ],
)
def test_the_command_says_in_one_line_what_is_wrong(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny().save_pretrained("model")
    done = CliRunner().invoke(app, ["--model", "model", "--n", "1", *words.split()])
    assert done.exit_code == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert words.split()[-1].removeprefix("-") in done.stderr


def test_the_command_names_the_extra_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "parallel_decode.adapters.image_tokens.class_conditional")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    done = CliRunner().invoke(app, ["--n", "1"])
    assert done.exit_code == 2 and done.stderr.startswith("error: diffusers is missing: pip install")


def trainings() -> tuple[TokenizerTraining, PriorTraining]:
    torch.manual_seed(0)
    tokenizer = TokenizerTraining((8, 8), codes=V, latents=4)
    return tokenizer, PriorTraining(prior(rows=4, columns=4), tokenizer)


def test_a_training_that_was_stopped_goes_on_with_the_same_losses(tmp_path: Path) -> None:
    draw = crops([torch.rand(3, 90, 300, generator=torch.Generator().manual_seed(0)) for _ in range(CLASSES)], size=8)
    options: dict[str, Any] = {"steps": 6, "batch": 4, "lr": 1e-2, "save_every": 2}
    begun, again = trainings(), trainings()
    pairs: Any = zip(("tokenizer", "prior"), begun, again, strict=True)
    for name, first, second in pairs:
        losses = list(fit(first, draw, tmp_path / f"{name} in one", **options))
        stopped = list(itertools.islice(fit(second, draw, tmp_path / name, **options), 3))
        with torch.no_grad():  # what the file does not hold has to be drawn again
            for weight in second.parameters():
                weight.add_(1)
        resumed = list(fit(second, draw, tmp_path / name, **options))
        assert stopped == losses[:3] and resumed == losses[2:]
    with pytest.raises(ValueError, match="another size"):
        next(fit(TokenizerTraining((16, 8), codes=V, latents=4), draw, tmp_path / "tokenizer", **options))


def test_codes_that_nothing_uses_are_used_again() -> None:
    training = trainings()[0]
    training.book[:-1] = 100.0  # all vectors are next to one code
    pixels = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        assert len(set(training.codes(pixels)[1].flatten().tolist())) == 1
        for step in range(5):
            training.loss(pixels, torch.zeros(8), torch.Generator().manual_seed(step))
        assert len(set(training.codes(pixels)[1].flatten().tolist())) > V // 2


def test_crops_that_are_held_out_are_never_seen() -> None:
    picture = torch.zeros(3, 100, 400)
    picture[:, :, 300:] = 1
    generator = torch.Generator().manual_seed(0)
    assert float(crops([picture])(50, generator)[0].max()) == 0
    assert float(crops([picture], held_out=True)(50, generator)[0].min()) > 0.999


@pytest.mark.slow
def test_the_training_command_writes_a_model_that_draws(tmp_path: Path) -> None:
    few = ["--tokenizer-steps", "2", "--prior-steps", "2", "--batch", "2", "--layers", "1", "--channels", "8", "--half"]
    done = CliRunner().invoke(paper, ["image-tokens", "--out", str(tmp_path), *few])
    assert done.exit_code == 0, done.output
    assert "held out: nats per token" in done.output
    model = ClassConditional.from_pretrained(tmp_path / "model")
    assert generate_images(model, {"labels": torch.tensor([9])}).pixels is not None
