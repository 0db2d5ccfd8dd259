"""Training of a class-conditional model of image tokens: a tokenizer (VQ-VAE, arXiv 1711.00937), then a prior over its codes (LlamaGen, arXiv 2406.06525).

Shapes: B pictures of H x W pixels, L tokens, V codes, D channels of a code.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import VQModel
from torch import Tensor

from paper_repro.crop_training import Training
from paper_repro.data.crops import Draw
from parallel_decode.adapters.image_tokens.class_conditional import ClassConditional
from parallel_decode.adapters.image_tokens.prior import Prior

DECAY = 0.98  # of the moving averages that codes are
DEAD = 0.03  # of the average use: a code that is used less becomes a vector of the batch


class TokenizerTraining(Training):
    """A `VQModel` whose codes are moving averages of the vectors that they stand for.

    Args:
        channels: of its levels; each but the last halves both sides of the picture.
        codes: V.
        latents: D.
    """

    vq: Any
    book: Tensor
    counts: Tensor
    sums: Tensor

    def __init__(self, channels: tuple[int, ...] = (32, 32, 64), codes: int = 512, latents: int = 8) -> None:
        super().__init__()
        levels: dict[str, Any] = {
            "block_out_channels": channels,
            "down_block_types": ("DownEncoderBlock2D",) * len(channels),
            "up_block_types": ("UpDecoderBlock2D",) * len(channels),
        }
        vq: Any = VQModel(  # type: ignore[no-untyped-call]
            **levels,
            latent_channels=latents,
            num_vq_embeddings=codes,
            norm_num_groups=8,
            mid_block_add_attention=False,
            lookup_from_codebook=True,
        )
        self.vq, self.book = vq, vq.quantize.embedding.weight.requires_grad_(False)
        self.register_buffer("counts", torch.zeros(codes))
        self.register_buffer("sums", torch.zeros(codes, latents))

    def codes(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """The encoder's vectors, shape (B, L, D), and the nearest codes, shape (B, L), of pixels (B, 3, H, W) in [-1, 1]."""
        with torch.autocast(pixels.device.type, torch.bfloat16):
            vectors = self.vq.encode(pixels).latents.float().flatten(2).mT
        return vectors, torch.cdist(vectors.detach(), self.book.expand(len(vectors), -1, -1)).argmin(-1)

    def loss(self, pixels: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Of the reconstruction, and of the vectors' distance from their codes; moves the codes."""
        vectors, codes = self.codes(pixels)
        self._move(vectors.detach().flatten(0, 1), codes.flatten(), generator)
        chosen = self.book[codes]
        side = math.isqrt(codes.shape[1])
        passed = (vectors + (chosen - vectors).detach()).mT.reshape(len(vectors), -1, side, side)
        with torch.autocast(pixels.device.type, torch.bfloat16):
            difference = self.vq.decoder(self.vq.post_quant_conv(passed)).float() - pixels
        distance: Tensor = difference.abs().mean() + difference.square().mean()
        return distance + 0.25 * F.mse_loss(vectors, chosen)

    def _move(self, vectors: Tensor, codes: Tensor, generator: torch.Generator) -> None:
        chosen = F.one_hot(codes, len(self.book)).float()
        self.counts.lerp_(chosen.sum(0), 1 - DECAY)
        self.sums.lerp_(chosen.T @ vectors, 1 - DECAY)
        dead = self.counts < DEAD * self.counts.mean()
        fresh = vectors[torch.randint(len(vectors), (len(self.book),), generator=generator)]
        self.counts[dead] = self.counts.mean()
        self.sums[dead] = fresh[dead] * self.counts[dead, None]
        self.book.copy_(self.sums / self.counts[:, None])


class PriorTraining(Training):
    """The cross entropy of the next code, with a tenth of the labels left out for guidance.

    Args:
        prior: of codes; it alone is trained.
        tokenizer: trained.
    """

    def __init__(self, prior: Prior, tokenizer: TokenizerTraining) -> None:
        super().__init__()
        self.model, self.codes = ClassConditional(prior), tokenizer.codes

    def logits(self, pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, L, V), and the codes (B, L)."""
        with torch.no_grad():
            _, codes = self.codes(pixels)
        ids = torch.cat([labels[:, None] + self.model.tokens, codes[:, :-1]], 1)
        places = torch.arange(ids.shape[1]).expand_as(ids)
        with torch.autocast(pixels.device.type, torch.bfloat16):
            output = self.model(ids, position_ids=places, use_cache=False)
        return output.logits.float(), codes

    def loss(self, pixels: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """In nats per token."""
        none = torch.rand(labels.shape, generator=generator) < 0.1
        logits, codes = self.logits(pixels, labels.masked_fill(none, self.model.num_classes))
        return F.cross_entropy(logits.flatten(0, 1), codes.flatten())

    @torch.no_grad()
    def judged(self, draw: Draw, count: int = 256) -> dict[str, float]:
        """Of so many crops: nats per token, the mean entropy of what the prior expects, and the perplexity of the codes alone."""
        logits, codes = self.logits(*draw(count, torch.Generator().manual_seed(0)))
        share = torch.bincount(codes.flatten(), minlength=logits.shape[-1]) / codes.numel()
        return {
            "nats per token": F.cross_entropy(logits.flatten(0, 1), codes.flatten()).item(),
            "entropy": torch.special.entr(logits.softmax(-1)).sum(-1).mean().item(),
            "perplexity of the codes": torch.special.entr(share).sum().exp().item(),
        }
