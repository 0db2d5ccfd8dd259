"""Prompts in, images out: a flow between a text encoder of transformers and an autoencoder of diffusers.

Shapes: B batch, C channels of the latents, H, W height and width, F frames of a video, S the text's length, T its width.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from parallel_decode._options import check_kind
from parallel_decode.adapters.starflow.flow import StarFlow
from parallel_decode.solution import Solution


class Pipeline:
    """A flow with what its latents and texts belong to.

    Args:
        flow: the flow.
        vae: a `diffusers.AutoencoderKL` (of videos for each frame), or an `AutoencoderKLWan`.
        tokenizer: of transformers.
        text_encoder: a `transformers.T5EncoderModel`, or another with `last_hidden_state`.
        template: what a prompt is put into, the empty one of guidance too; the published video model was trained with
            "Noise Level 500:\\nA video with 16 fps:\\n{}\\n\\n in a 16:9 aspect ratio.\\n".
        temporal_scale: what latents of all frames but the first were multiplied by in training (0.6 of the published video model).

    Raises:
        ValueError: the flow reads no text, or channels or widths of two parts differ.

    Example:
        >>> from diffusers import AutoencoderKL
        >>> from transformers import ByT5Tokenizer, T5Config, T5EncoderModel
        >>> from parallel_decode.adapters.starflow import Pipeline, StarFlow
        >>> shape = dict(in_channels=4, img_size=4, patch_size=1, channels=64, num_blocks=2, layers_per_block=[1, 1], rope=True, sos=True)
        >>> flow = StarFlow(**shape, txt_size=8, txt_dim=16, cond_top_only=True, use_softplus=True)
        >>> encoder = T5EncoderModel(T5Config(vocab_size=384, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
        >>> starflow = Pipeline(flow, AutoencoderKL(latent_channels=4), ByT5Tokenizer(), encoder)
        >>> starflow.sample(prompts=["a corgi in a hat"], guidance=2.5).shape
        torch.Size([1, 3, 4, 4])
    """

    def __init__(
        self,
        flow: StarFlow,
        vae: Any,
        tokenizer: Any,
        text_encoder: Any,
        *,
        template: str = "{}",
        temporal_scale: float = 1.0,
    ) -> None:
        latents = getattr(vae.config, "latent_channels", None) or getattr(vae.config, "z_dim", None)
        for what, own, others in (
            ("txt_dim", flow.config.txt_dim, text_encoder.config.hidden_size),
            ("in_channels", flow.config.in_channels, latents),
        ):
            if own != others:
                raise ValueError(
                    f"{what} of the flow is {own}, and the module beside it has {others}: expected the same"
                )
        if template.count("{}") != 1:
            raise ValueError(f"template is {template!r}, expected a text with one {{}} for the prompt")
        self.flow, self.vae, self.tokenizer, self.text_encoder = flow, vae, tokenizer, text_encoder
        self.template, self.temporal_scale = template, temporal_scale

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """What the text encoder makes of prompts, shape (B, S, T), zeros where they are padded."""
        words = self.tokenizer(
            [self.template.replace("{}", prompt) for prompt in prompts],
            padding="max_length",
            truncation=True,
            max_length=self.flow.config.txt_size,
            return_tensors="pt",
        ).to(self.text_encoder.device)
        mask = words["attention_mask"]
        states = self.text_encoder(input_ids=words["input_ids"], attention_mask=mask).last_hidden_state
        return (states * mask[..., None]).to(self.flow.noise_like)  # type: ignore[no-any-return]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images, shape (B, 3, height, width), of latents (B, C, H, W); of videos (B, frames, 3, height, width) of (B, F, C, H, W)."""
        config, x = self.vae.config, latents.to(self.vae.device, self.vae.dtype)
        if x.dim() == 5 and self.temporal_scale != 1:
            x = torch.cat([x[:, :1], x[:, 1:] / self.temporal_scale], 1)
        if hasattr(config, "temperal_downsample"):  # an autoencoder of videos
            mean, std = (x.new_tensor(values)[:, None, None] for values in (config.latents_mean, config.latents_std))
            videos = (x * std + mean).view(len(x), -1, *x.shape[-3:]).transpose(1, 2)
            y = self.vae.decode(videos).sample.transpose(1, 2)
            return y if x.dim() == 5 else y[:, 0]  # type: ignore[no-any-return]
        x = x / config.scaling_factor + (config.shift_factor or 0.0)
        y = self.vae.decode(x.flatten(0, -4)).sample
        return y.view(*x.shape[:-3], *y.shape[1:])  # type: ignore[no-any-return]

    def sample(
        self, prompts: Sequence[str], *, guidance: float = 0.0, **options: Any
    ) -> Tensor | tuple[Tensor, Solution]:
        """Draw an image, or a video, for each prompt.

        Args:
            prompts: the texts, one at least; those with more than `txt_size` tokens are cut.
            guidance: see `StarFlow.system`, against the empty prompt.
            options: of `StarFlow.sample`: `z` (of videos (B, F, C, H, W)), `schedule`, `denoise`, `return_solution` and others.

        Returns:
            images, shape (B, 3, height, width), or (B, frames, 3, height, width), on the autoencoder's scale, [-1, 1] or a little beyond; with
            `return_solution` also the solution, whose value is latents.

        Raises:
            TypeError: prompts are no list of strings.
            ValueError: there are none, or see `StarFlow.sample`.
        """
        if not isinstance(prompts, (list, tuple)) or not all(isinstance(prompt, str) for prompt in prompts):
            raise TypeError(f"prompts is {prompts!r:.80}, expected a list of strings")
        if not prompts:
            raise ValueError("prompts is empty, expected at least one string")
        check_kind("guidance", guidance, (int, float), "a number")
        null = self.encode([""]) if guidance else None
        text = self.encode(prompts)
        found = self.flow.sample(len(prompts), text=text, text_unconditional=null, guidance=guidance, **options)
        if options.get("return_solution"):
            latents, solution = cast(tuple[Tensor, Solution], found)
            return self.decode(latents), solution
        return self.decode(cast(Tensor, found))
