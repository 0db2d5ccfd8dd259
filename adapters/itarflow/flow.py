"""The flow: density, sampling, iterative denoising, checkpoints."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from parallel_decode._options import check_at_least_one
from parallel_decode.adapters.itarflow.config import Config
from parallel_decode.adapters.itarflow.levels import FourierTimeEmbedding, Levels, levels_of
from parallel_decode.adapters.tarflow.guidance import Guidance, guide_gaussians, guide_scales
from parallel_decode.adapters.tarflow.images import ImageFlow, fixed
from parallel_decode.adapters.tarflow.inputs import Labels, native
from parallel_decode.adapters.tarflow.model import MetaBlock
from parallel_decode.adapters.tarflow.transformer import AttentionBlock
from parallel_decode.system import LayeredSystem

RULES = {"tarflow": guide_scales, "starflow": guide_gaussians}
VAR_RATE = 0.1  # of `update_prior`


class ITarFlow(ImageFlow):
    """An iTARFlow over images.

    Args:
        in_channels: channels of an image.
        img_size: height and width of an image, in pixels.
        patch_sizes: height and width of a patch; L = (img_size / patch size)^2.
        channels: width of the transformers, a multiple of 64 (the size of a head).
        num_blocks: blocks of the flow.
        layers_per_block: transformer layers of each block. These three are one number, or one for each block.
        nvp: whether a block scales (a and b) or only shifts (b).
        num_classes: classes that samples can be conditioned on; 0 for none.
        input_scale: images are multiplied by it before the first block.
        shared_backbone_layers: how many of the layers are the same ones in all blocks, and come first.
        noise_std: the noise level that images are drawn at where t is left out; may be set later.

    Raises:
        TypeError: an argument of another kind.
        ValueError: sizes below 1, or that do not divide; numbers out of their range.

    References:
        *Normalizing Flows with Iterative Denoising*, arXiv 2604.20041.

    Example:
        >>> import torch
        >>> from parallel_decode.adapters.itarflow import ITarFlow
        >>> flow = ITarFlow(in_channels=1, img_size=8, patch_sizes=[4, 2], channels=64, num_blocks=2, layers_per_block=[1, 2])
        >>> z, logdet = flow(torch.zeros(3, 1, 8, 8), t=0.3)
        >>> z.shape, logdet.shape
        (torch.Size([3, 16, 4]), torch.Size([3]))
        >>> images = flow.sample(2, t=0.3, schedule="sliding")
        >>> flow.denoise_iteratively(images, t=0.3, steps=4).shape
        torch.Size([2, 1, 8, 8])
    """

    Config = Config
    patch_sizes: tuple[int, ...] = fixed("patch_sizes")
    input_scale: float = fixed("input_scale")

    def __init__(
        self,
        in_channels: int,
        img_size: int,
        patch_sizes: Sequence[int] | int,
        channels: Sequence[int] | int,
        num_blocks: int,
        layers_per_block: Sequence[int] | int,
        nvp: bool = True,
        num_classes: int = 0,
        input_scale: float = 1.0,
        *,
        shared_backbone_layers: int = 0,
        noise_std: float | None = None,
    ) -> None:
        shape = in_channels, img_size, patch_sizes, channels, num_blocks, layers_per_block
        given = *shape, nvp, num_classes, input_scale, shared_backbone_layers, noise_std
        config = Config(*map(native, given))
        count = shared_backbone_layers
        shared = nn.ModuleList(AttentionBlock(config.channels[0]) for _ in range(count)) if count else None
        blocks = nn.ModuleList(
            MetaBlock(
                in_channels * size**2,
                width,
                (img_size // size) ** 2,
                layers - count,
                i % 2 == 1,
                nvp,
                num_classes,
                name="head_blocks",
                time_embed=FourierTimeEmbedding(width),
                shared_backbone=shared,
            )
            for i, (size, width, layers) in enumerate(
                zip(config.patch_sizes, config.channels, config.layers_per_block, strict=True)
            )
        )
        super().__init__(config, blocks)
        self.shared_backbone = shared

    @classmethod
    def skipped(cls, name: str) -> bool:
        """Whether a file's tensor of this name need not be read: a causal mask, or a shared layer, but for the first block's."""
        return super().skipped(name) or ("shared_backbone." in name and not name.startswith("blocks.0."))

    @classmethod
    def renamed(cls, name: str) -> str:
        """The name that this class has for a tensor of a public state dict: old ones have `attn_blocks` for `head_blocks`."""
        return name.replace(".attn_blocks.", ".head_blocks.")

    def forward(self, x: Tensor, y: Labels | None = None, t: Levels | None = None) -> tuple[Tensor, Tensor]:
        """Images to noise.

        Args:
            x: images with noise, shape (B, in_channels, img_size, img_size).
            y: classes, shape (B,), or one for all; negative for the unconditional branch, as is None.
            t: levels of the noise (standard deviations), shape (B, 1), or one for all; `noise_std` by default.

        Returns:
            z, shape (B, L, D) of the last block's patches, and log |det dz/dx|, shape (B,).

        Raises:
            TypeError: x or t is of the wrong kind.
            ValueError: x, y or t does not fit this flow.
        """
        self._check_images(x)
        return self._encoded(x, y, levels_of(t, len(x), self.noise_std, self.var).log())

    @torch.no_grad()
    def update_prior(self, z: Tensor) -> None:
        """Move `var` a tenth of the way to the mean square of z, shape (B, L, D): for the training of flows that only shift."""
        self._check_noise(z)
        self.var.lerp_(z.square().mean(0).to(self.var), VAR_RATE)

    def system(
        self,
        z: Tensor,
        *,
        y: Labels | None = None,
        t: Levels | None = None,
        guidance: float = 0.0,
        guide_rule: str = "tarflow",
        annealed_guidance: bool = False,
        guide_flows: int | None = None,
        attn_temp: float = 1.0,
        compile: bool = False,
    ) -> LayeredSystem:
        """Sampling from z, for `pd.solve`; `Solution.value` then holds images, shape (B, in_channels, img_size, img_size).

        Args:
            z: the noise to start from, shape (B, L, D); decoded in float32 at least.
            y: classes, shape (B,), or one for all; negative or None for the unconditional branch.
            t: noise levels of the images, shape (B, 1), or one for all; `noise_std` by default.
            guidance: strength of guidance, by a conditional and an unconditional pass in one doubled batch; 0 for none.
            guide_rule: "tarflow" moves the scales exp(a) and the shifts away from the unconditional ones (a TarFlow's own rule does so
                with a); "starflow" takes the Gaussian p_c^(1 + w) / p_u^w.
            annealed_guidance: let the strength rise linearly over the positions.
            guide_flows: how many blocks are guided, in the order of generation; by default all of them by "tarflow", and the first by
                "starflow".
            attn_temp: attention temperature of the unconditional branch.
            compile: on a CUDA device capture the windows as CUDA graphs, for this batch size, and keep them for the next
                calls; elsewhere, and with modules that were changed, it does nothing.

        Raises:
            TypeError: z, t or an option is of the wrong kind.
            ValueError: z, y or t of another shape or range than this flow's, or z not finite.
        """
        if guide_rule not in RULES:
            raise ValueError(f"guide_rule is {guide_rule!r}, expected {' or '.join(map(repr, RULES))}")
        blocks = 1 if guide_flows is None and guide_rule == "starflow" else guide_flows
        guide = Guidance(guidance, "ab", annealed_guidance, attn_temp, RULES[guide_rule], blocks)
        self._check_noise(z)
        return self._system(z, y, guide, compile, levels_of(t, len(z), self.noise_std, self.var).log())

    def denoised(self, x: Tensor, y: Labels | None = None, t: Levels | None = None) -> Tensor:
        """x + t^2 grad log p(x): the mean of the clean image given the noisy one, if p is right (Tweedie); see `forward`."""
        self._check_gradient()
        self._check_images(x)
        t = levels_of(t, len(x), self.noise_std, self.var)
        return self._stepped(x, t[..., None, None].square(), y, t=t)

    def denoise_iteratively(
        self,
        x: Tensor,
        y: Labels | None = None,
        *,
        t: Levels | None = None,
        t_end: float = 0.01,
        steps: int | None = None,
        stochastic: bool = False,
        clamp: bool = False,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Remove noise step by step: levels fall evenly from t to t_end, and each step goes towards the image that `denoised` gives.

        Args:
            x: images with noise, shape (B, in_channels, img_size, img_size), as `sample` draws them.
            y: classes, shape (B,), or one for all; negative or None for the unconditional branch.
            t: levels of the noise, shape (B, 1), or one for all; `noise_std` by default.
            t_end: the level of the last step, which is denoised to the end.
            steps: how many; by default one for every 0.01 of the largest level.
            stochastic: renew part of the noise at each step.
            clamp: keep every denoised image within [-1, 1].
            generator: for the noise that is renewed.

        Returns:
            images, shaped as x.

        Raises:
            TypeError: an argument is of the wrong kind.
            ValueError: an argument does not fit this flow, or t_end is not between 0 and every t.

        Example:
            >>> import torch
            >>> from parallel_decode.adapters.itarflow import ITarFlow
            >>> flow = ITarFlow(1, 4, patch_sizes=2, channels=64, num_blocks=2, layers_per_block=1, noise_std=0.3)
            >>> flow.denoise_iteratively(torch.zeros(2, 1, 4, 4), steps=3).shape
            torch.Size([2, 1, 4, 4])
        """
        self._check_images(x)
        t = levels_of(t, len(x), self.noise_std, self.var)
        if not bool((t_end <= t).all()) or not t_end > 0:
            raise ValueError(f"t_end is {t_end}, expected a number above 0, and none above t")
        steps = max(1, int(float(t.max()) / 0.01 + 1e-4)) if steps is None else steps
        check_at_least_one("steps", steps)
        levels = [t + (t_end - t) * (step / max(steps - 1, 1)) for step in range(steps)]
        for level, following in zip(levels, [*levels[1:], torch.zeros_like(t)], strict=True):
            clean = self.denoised(x, y, level)
            clean = clean.clamp(-1, 1) if clamp else clean
            ratio = (following / level)[..., None, None]
            noise = ratio * (x - clean)
            if stochastic:
                new = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
                noise = ratio * noise + (1 - ratio.square()).sqrt() * following[..., None, None] * new
            x = clean + noise
        return x

    def _clean(self, x: Tensor, options: Mapping[str, Any]) -> Tensor:
        return self.denoise_iteratively(x, options["y"], t=options.get("t"))

    def _check_denoising(self) -> None:  # of the level only where t is left out, as sampling does
        self._check_gradient()
