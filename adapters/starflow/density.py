"""The flow as a density: its networks, and what they say of latents.

Shapes: B batch, C channels, H, W height and width of latents, F frames of a video, N patches of a frame, D values of a patch.
"""

import math
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from parallel_decode.adapters.starflow.config import Config
from parallel_decode.adapters.starflow.inputs import check_latents, check_text
from parallel_decode.adapters.starflow.model import Denoiser, MetaBlock
from parallel_decode.adapters.starflow.transformer import Rope
from parallel_decode.adapters.tarflow.base import Flow
from parallel_decode.adapters.tarflow.inputs import native

_IGNORED = ("use_checkpoint", "use_checkpoint_mlp", "use_mm_attn")  # of training, or without effect as published
_DENOISER_SCALE = 0.3  # by which the published denoiser was trained


class Density(Flow):
    """The density of a STARFlow, see there."""

    Config = Config
    condition = "text"
    constants = (".attn_mask", ".freqs_cos", ".freqs_sin", "var")

    def __init__(self, **config: Any) -> None:
        try:
            made = Config(**{name: native(value) for name, value in config.items() if name not in _IGNORED})
        except TypeError as error:
            raise TypeError(str(error).replace("Config.__init__()", "StarFlow")) from None
        super().__init__(made)
        self.blocks = nn.ModuleList(
            MetaBlock(made, index) if made.layers(index) else nn.Identity() for index in range(made.num_blocks)
        )
        if made.learnable_self_denoiser:
            self.learnable_self_denoiser = Denoiser(made)

    @property
    def transforms(self) -> list[Any]:
        """The blocks that are not left out."""
        return [block for block in self.blocks if not isinstance(block, nn.Identity)]

    @property
    def lengths(self) -> list[int]:
        """L of each block, for images of `img_size`."""
        places = (self.config.img_size // self.config.patch_size) ** 2
        return [places] * len(self.transforms)

    @property
    def noise_like(self) -> Tensor:
        side = self.config.img_size
        return self.deep.proj_in.weight.new_empty(1).expand(self.config.in_channels, side, side)

    @property
    def deep(self) -> MetaBlock:
        """The deep block, which is decoded first."""
        return cast(MetaBlock, self.blocks[-1])

    def patchify(self, x: Tensor) -> Tensor:
        """Latents (B, C, H, W) or (B, F, C, H, W) to patches (B, F, N, D), of one frame where there is none."""
        p = self.config.patch_size
        x = x if x.dim() == 5 else x[:, None]
        x = x.reshape(*x.shape[:3], x.shape[3] // p, p, x.shape[4] // p, p)
        return x.permute(0, 1, 3, 5, 4, 6, 2).flatten(4).flatten(2, 3)

    def unpatchify(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Patches (B, F, N, D) of so high and wide frames to videos (B, F, C, H, W)."""
        p, (height, width) = self.config.patch_size, size
        x = x.reshape(*x.shape[:2], height, width, p, p, -1).permute(0, 1, 6, 2, 4, 3, 5)
        return x.reshape(*x.shape[:3], height * p, width * p)

    def rows(self, block: nn.Module, patches: Tensor) -> tuple[Tensor, int]:
        """Patches (B, F, N, D) as rows of a block, (B, F N, D) or (B F, N, D), and the frames in each."""
        apart = self.config.shallow_block_local and block is not self.deep
        return (patches.flatten(0, 1), 1) if apart else (patches.flatten(1, 2), patches.shape[1])

    def angles(self, block: nn.Module, text: int, frames: int, size: tuple[int, int]) -> Tensor | None:
        """Of the inputs of a block, see `Rope`; None without rotary positions."""
        if not self.config.rope:
            return None
        deep, side = block is self.deep, self.config.pt_seq_len or self.config.img_size // self.config.patch_size
        shape = self.config.shape(deep)
        rope = Rope(shape.head_dim, side, self.config.txt_size > 0, shape.rope_1d)
        return rope(text, frames, *size)

    def _through(
        self, blocks: Iterable[nn.Module], x: Tensor, size: tuple[int, int], text: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Patches (B, F, N, D) through blocks, in the direction of density, and the log-determinant, shape (B,)."""
        shape, total = x.shape, x.new_zeros(len(x))
        for block in blocks:
            rows, frames = self.rows(block, x)
            seen = text if block.sees_text else None
            angles = self.angles(block, 0 if seen is None else seen.shape[1], frames, size)
            rows, term = block(rows, seen, angles, shape[2])
            x, total = rows.reshape(shape), total + term.view(shape[0], -1).sum(1)
        return x, total

    def forward(self, x: Tensor, text: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Latents to noise.

        Args:
            x: latents, shape (B, C, H, W), or (B, F, C, H, W) of a video.
            text: what the text encoder made of the prompts, shape (B or 1, txt_size, txt_dim).

        Returns:
            z, shaped as x, and log |det dz/dx|, shape (B,).

        Raises:
            TypeError: x or text is no tensor.
            ValueError: x or text does not fit this flow; a video of more frames than `local_attn_window`, whose samples have no
                density in closed windows.
        """
        check_latents(self, "x", x)
        text = check_text(self, text, len(x))
        patches, size = self.patchify(x), self._size(x)
        window = self.config.local_attn_window
        if window is not None and patches.shape[1] > window:
            raise ValueError(f"x has {patches.shape[1]} frames, expected at most {window}, those of local_attn_window")
        patches, logdet = self._through(self.transforms, patches, size, text)
        return self.unpatchify(patches, size).view(x.shape), logdet

    def _size(self, x: Tensor) -> tuple[int, int]:
        return x.shape[-2] // self.config.patch_size, x.shape[-1] // self.config.patch_size

    def log_prob(self, x: Tensor, text: Tensor | None = None) -> Tensor:
        """Log-density of latents in nats, shape (B,): z is standard normal."""
        z, logdet = self(x, text)
        return logdet - 0.5 * (z.square() + math.log(2 * math.pi)).flatten(1).sum(1)  # type: ignore[no-any-return]

    def _check_denoising(self) -> None:
        if not self.config.learnable_self_denoiser:
            super()._check_denoising()

    def denoised(self, x: Tensor, text: Tensor | None = None) -> Tensor:
        """Latents without the noise of training: by the learned denoiser where there is one, else x + noise_std^2 grad log p(x).

        Args:
            x: latents, shape (B, C, H, W), or (B, F, C, H, W) of videos.
            text: what the text encoder made of the prompts, shape (B or 1, txt_size, txt_dim).

        Raises:
            TypeError: x is no tensor.
            ValueError: x or text does not fit this flow, or the flow has neither a denoiser nor the `noise_std` of its training.
        """
        check_latents(self, "x", x)
        if not self.config.learnable_self_denoiser:
            return self._stepped(x, self._variance(), text)
        denoiser, text = self.learnable_self_denoiser, check_text(self, text, len(x))
        text = text if denoiser.sees_text else None
        patches, size = self.patchify(x), self._size(x)
        frames = patches.shape[1]
        with torch.no_grad():
            angles = self.angles(denoiser, 0 if text is None else text.shape[1], frames, size)
            noise = denoiser(patches.flatten(1, 2), text, angles, frames if x.dim() == 5 else None)
        return x - _DENOISER_SCALE * self.unpatchify(noise.view(patches.shape), size).view(x.shape).to(x.dtype)
