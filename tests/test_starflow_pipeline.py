"""Prompts to images: a STARFlow between tiny random modules of transformers and diffusers."""

import re
from functools import cache
from typing import Any

import pytest
import tokenizers
import torch
import transformers as hf
from torch import Tensor

from parallel_decode.adapters.starflow import Pipeline, StarFlow

PROMPTS = ["a red cat", "a blue dog and a cat"]


@cache
def encoder() -> tuple[Any, Any]:
    """A tokenizer of a few words, and a text encoder."""
    words = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", "a", "red", "cat", "blue", "dog", "and"])}
    inner: Any = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.post_processor = tokenizers.processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    fast: Any = hf.PreTrainedTokenizerFast
    tokenizer = fast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    torch.manual_seed(0)
    config = hf.T5Config(vocab_size=9, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    model: Any = hf.T5EncoderModel(config)
    return tokenizer, model.eval()


@cache
def images_vae() -> Any:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(block_out_channels=(8, 8), latent_channels=4, norm_num_groups=4, layers_per_block=1)
    blocks = dict(down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2)
    return diffusers.AutoencoderKL(**sizes, **blocks, scaling_factor=0.5).eval()


@cache
def videos_vae() -> Any:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[True])
    return diffusers.AutoencoderKLWan(
        **sizes, latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[1.0, 2.0, 3.0, 4.0]
    ).eval()


def flow(**options: Any) -> StarFlow:
    torch.manual_seed(0)
    config: dict[str, Any] = dict(
        in_channels=4, img_size=4, patch_size=1, channels=32, num_blocks=2, layers_per_block=1, head_dim=20, rope=True, sos=True, txt_size=8,
        txt_dim=16, cond_top_only=True, use_softplus=True, seq_order="L2R", temporal_causal=2, shallow_block_local=True,
    )  # fmt: skip
    made = StarFlow(**config | options)
    for p in made.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return made.eval()


def test_prompts_give_the_images_of_their_texts() -> None:
    made, vae, (tokenizer, text_encoder) = flow(noise_std=0.1), images_vae(), encoder()
    starflow = Pipeline(made, vae, tokenizer, text_encoder)
    generator = torch.Generator().manual_seed(1)
    images, solution = starflow.sample(
        prompts=PROMPTS, guidance=2.0, denoise=True, generator=generator, schedule="sequential", return_solution=True
    )

    def encoded(prompt: str) -> Tensor:
        ids = torch.zeros(1, 8, dtype=torch.long)
        words = tokenizer(prompt)["input_ids"]
        ids[0, : len(words)] = torch.tensor(words)
        mask = (torch.arange(8) < len(words))[None]
        states = text_encoder(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        return states.where(mask[..., None], 0.0)  # type: ignore[no-any-return]

    with torch.no_grad():
        text = torch.cat([encoded(prompt) for prompt in PROMPTS])
        z = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1))
        latents = made.sample(z=z, text=text, text_unconditional=encoded(""), guidance=2.0, schedule="sequential")
        assert isinstance(latents, Tensor)
        expected = vae.decode(made.denoised(latents, text) / 0.5).sample
    assert isinstance(images, Tensor) and images.shape == (2, 3, 8, 8) and (images - expected).abs().max() < 1e-5
    assert (solution.value - latents).abs().max() < 1e-5
    plain = starflow.sample(prompts=PROMPTS, z=z, schedule="sequential")
    assert isinstance(plain, Tensor) and (plain - images).abs().max() > 1e-4, "neither text nor denoising counts"


def test_prompts_give_videos() -> None:
    made, z = flow(), torch.randn(2, 3, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    starflow = Pipeline(made, videos_vae(), *encoder(), template="a {} and", temporal_scale=0.5)
    videos = starflow.sample(prompts=PROMPTS, z=z, schedule="sequential")
    text = Pipeline(made, images_vae(), *encoder()).encode([f"a {prompt} and" for prompt in PROMPTS])
    latents = made.sample(z=z, text=text, schedule="sequential")
    assert isinstance(latents, Tensor) and isinstance(videos, Tensor) and videos.shape == (2, 5, 3, 8, 8)
    scaled = torch.stack([latents[:, 0], latents[:, 1] / 0.5, latents[:, 2] / 0.5], 2)  # channels before frames
    scaled = scaled * torch.tensor([1.0, 2.0, 3.0, 4.0])[:, None, None, None]
    scaled = scaled + torch.tensor([0.1, 0.2, 0.3, 0.4])[:, None, None, None]
    with torch.no_grad():
        expected = videos_vae().decode(scaled).sample
    assert (videos - expected.transpose(1, 2)).abs().max() < 1e-5
    single = starflow.decode(latents[:, 0])
    assert (single - videos[:, 0]).abs().max() < 1e-5, "an image is a video of one frame"


def test_an_autoencoder_of_images_decodes_each_frame() -> None:
    starflow = Pipeline(flow(), images_vae(), *encoder())
    latents = torch.randn(2, 3, 4, 4, 4)
    videos = starflow.decode(latents)
    assert videos.shape == (2, 3, 3, 8, 8)
    assert (videos[:, 1] - starflow.decode(latents[:, 1])).abs().max() < 1e-5


def test_parts_that_do_not_fit_are_refused() -> None:
    for options, message in (
        (dict(txt_dim=12), "txt_dim of the flow is 12, and the module beside it has 16"),
        (dict(in_channels=3), "in_channels of the flow is 3, and the module beside it has 4"),
    ):
        with pytest.raises(ValueError, match=message):
            Pipeline(flow(**options), images_vae(), *encoder())
    with pytest.raises(ValueError, match=re.escape("template is 'a cat', expected a text with one {}")):
        Pipeline(flow(), images_vae(), *encoder(), template="a cat")
    for prompts in ("a cat", None, [1]):
        with pytest.raises(TypeError, match=r"prompts is .*, expected a list of strings"):
            Pipeline(flow(), images_vae(), *encoder()).sample(prompts=prompts)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="prompts is empty, expected at least one string"):
        Pipeline(flow(), images_vae(), *encoder()).sample(prompts=[])
