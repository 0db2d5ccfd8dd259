"""Training of TarFlow's successors on labelled crops: an `ITarFlow` of images, and a `StarFlow` of latents with the autoencoder that they belong to.

Shapes: B pictures of H x W pixels, C channels of latents, S the texts' length, T their width.
"""

from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from paper_repro.crop_training import Training
from parallel_decode.adapters.itarflow import ITarFlow
from parallel_decode.adapters.starflow import StarFlow

DROPPED = 0.1  # share of labels and texts that are left out, for guidance
KL = 1e-6  # weight of the autoencoder's divergence from a standard normal
LEVELS = 0.05, 0.3  # of an iTARFlow's noise, uniformly between
LATENTS = 0.3  # of a STARFlow's


def nats(z: Tensor, logdet: Tensor) -> Tensor:
    """Negative log-likelihood per value, without its constant."""
    return (0.5 * z.square().flatten(1).sum(1) - logdet).mean() / z[0].numel()


class ITarFlowTraining(Training):
    """The likelihood of images with noise of random levels (arXiv 2604.20041).

    Args:
        flow: what is trained.
    """

    def __init__(self, flow: ITarFlow) -> None:
        super().__init__()
        self.flow = flow

    def loss(self, pixels: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """In nats per value, for pixels (B, 3, H, W) in [-1, 1]."""
        low, high = LEVELS
        t = low + (high - low) * torch.rand(len(pixels), 1, generator=generator)
        x = pixels + t[..., None, None] * torch.randn(pixels.shape, generator=generator)
        y = labels.masked_fill(torch.rand(labels.shape, generator=generator) < DROPPED, -1)
        with torch.autocast(pixels.device.type, torch.bfloat16):
            return nats(*self.flow(x, y, t))


class AutoencoderTraining(Training):
    """The error of pictures that are decoded from latents with noise, as a flow will draw them.

    Args:
        channels: of its levels; each but the last halves both sides of the picture.
        latents: C.
    """

    vae: Any

    def __init__(self, channels: tuple[int, ...] = (32, 32, 64), latents: int = 4) -> None:
        super().__init__()
        levels: dict[str, Any] = {
            "block_out_channels": channels,
            "down_block_types": ("DownEncoderBlock2D",) * len(channels),
            "up_block_types": ("UpDecoderBlock2D",) * len(channels),
        }
        self.vae = AutoencoderKL(**levels, latent_channels=latents, norm_num_groups=8, mid_block_add_attention=False)  # type: ignore[no-untyped-call]

    def loss(self, pixels: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """The error, and a little of the latents' divergence from a standard normal."""
        with torch.autocast(pixels.device.type, torch.bfloat16):
            found = self.vae.encode(pixels).latent_dist
            drawn = found.mean + found.std * torch.randn(found.mean.shape, generator=generator)
            difference = self.vae.decode(drawn).sample.float() - pixels
        distance: Tensor = difference.abs().mean() + difference.square().mean()
        divergence: Tensor = found.kl().mean()
        return distance + KL * divergence

    @torch.no_grad()
    def scale(self, pixels: Tensor) -> None:
        """Let latents have a standard deviation of one, as `vae.config.scaling_factor` says."""
        self.vae.register_to_config(scaling_factor=1 / float(self.vae.encode(pixels).latent_dist.mean.std()))


class StarFlowTraining(Training):
    """The likelihood of latents with noise, given a text for each label (arXiv 2506.06276).

    Args:
        flow: what is trained.
        vae: trained.
        texts: of every label, and of none, shape (labels + 1, S, T).
    """

    def __init__(self, flow: StarFlow, vae: Any, texts: Tensor) -> None:
        super().__init__()
        self.flow, self.encode, self.factor, self.texts = flow, vae.encode, vae.config.scaling_factor, texts

    def loss(self, pixels: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """In nats per value."""
        none = torch.rand(labels.shape, generator=generator) < DROPPED
        with torch.autocast(pixels.device.type, torch.bfloat16):
            with torch.no_grad():
                x = self.encode(pixels).latent_dist.mean.float() * self.factor
            x = x + LATENTS * torch.randn(x.shape, generator=generator)
            return nats(*self.flow(x, self.texts[labels.masked_fill(none, len(self.texts) - 1)]))
