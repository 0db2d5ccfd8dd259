"""The networks: blocks of the flow, and the learned denoiser; parameters and buffers are named as in the published checkpoints.

Shapes: B batch, L patches (positions), D values of a patch, W positions of the window, C channels.
"""

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from parallel_decode.adapters.starflow.config import Config
from parallel_decode.adapters.starflow.network import Condition, Network
from parallel_decode.adapters.tarflow.changes import built
from parallel_decode.adapters.tarflow.model import embedding
from parallel_decode.cached import KeyValueStorage, Reads
from parallel_decode.window import Window

_UNIT = math.log(math.e - 1)  # softplus of it is 1


@built
class MetaBlock(Network):
    """One block of the flow: an affine autoregressive transform whose scale and shift are a causal transformer's.

    Attributes:
        flip: whether it reads the patches from last to first: over all, or with `temporal_causal` within each frame.
        nvp: that it scales, as the TarFlow's of this name.
    """

    nvp = True

    def __init__(self, config: Config, index: int) -> None:
        deep = index == config.num_blocks - 1
        sees_text = config.txt_dim > 0 and (deep or not config.cond_top_only)
        super().__init__(config, deep, config.layers(index), 2, sees_text)
        self.flip = index % 2 == (config.seq_order == "R2L")
        self.within, self.softplus, self.clip = config.temporal_causal > 0, config.use_softplus, config.soft_clip
        dim, side = self.proj_in.in_features, config.img_size // config.patch_size
        self.sos_embed = embedding(1, 1, dim) if config.sos else None
        self.pos_embed = None if config.rope else embedding(side**2, self.proj_in.out_features)
        size = (config.pt_seq_len or side) ** 2 + config.txt_size
        self.register_buffer("attn_mask", torch.ones(size, size).tril())  # nothing reads it

    def permuted(self, x: Tensor, each: int) -> Tensor:
        """Patches (B, L, D), so many in each frame, in the block's order, and back."""
        if not self.flip:
            return x
        return x.reshape(len(x), -1, each, x.shape[2]).flip(2).flatten(1, 2) if self.within else x.flip(1)

    def condition(self, text: Tensor | None, values: Tensor, angles: Tensor | None) -> Condition:
        """What is read first, the start embedding before the patches that are given; see `Network.conditioned`."""
        if self.sos_embed is not None:
            values = torch.cat([self.sos_embed.expand(len(values), -1, -1).to(values), values], 1)
        found = self.conditioned(text, values, angles)
        if self.pos_embed is None:
            return found
        places = self.pos_embed.flip(0) if self.flip else self.pos_embed
        return replace(found, places=F.pad(places, (0, 0, found.text_size, 1)))

    def affine(
        self,
        x: Tensor,
        condition: Condition,
        reads: Reads,
        storage: KeyValueStorage | None = None,
        with_text: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Scale and shift at the window's positions, but position 0 if nothing is read for it: shape (B, W, D), float32 at least; see `hidden`."""
        out = self.proj_out(self.hidden(x, condition, reads, storage, with_text)).to(
            torch.promote_types(x.dtype, torch.float32)
        )
        out = self.clip * torch.tanh(out / self.clip) if self.clip else out
        a, b = out.chunk(2, dim=-1)
        scale = F.softplus(a + _UNIT) if self.softplus else a.exp()
        if (
            self.sos_embed is None and condition.text is not None
        ):  # position 0 is that of z, though inputs come before it
            first = reads.targets(torch.arange(x.shape[1], device=x.device).expand(len(x), -1))[..., None] == 0
            scale, b = scale.masked_fill(first, 1), b.masked_fill(first, 0)
        return scale, b

    def forward(self, x: Tensor, text: Tensor | None, angles: Tensor | None, each: int) -> tuple[Tensor, Tensor]:
        """z, shape (B, L, D), and the log-determinant, shape (B,)."""
        x = self.permuted(x, each)
        condition = self.condition(text, x[:, :0], angles)
        reads = Reads(Window.full(x.shape[1]), x.shape[1], condition.prefix)
        scale, shift = self.affine(x, condition, reads)
        z = reads.complete((reads.targets(x) - shift) / scale, x)
        return self.permuted(z, each), -scale.log().sum((1, 2))


class Denoiser(Network):
    """The learned denoiser: a transformer that sees all of an image, and of a video a window of frames."""

    def __init__(self, config: Config) -> None:
        super().__init__(config, False, 8, 1, config.conditional_denoiser and config.txt_dim > 0)
        self.ahead, self.window = config.temporal_causal, config.denoiser_window

    def forward(self, x: Tensor, text: Tensor | None, angles: Tensor | None, frames: int | None) -> Tensor:
        """What it takes for noise in patches (B, L, D); `frames` of a video, None for images."""
        length = x.shape[1]
        condition = self.conditioned(text, x[:, :0], angles)
        size = condition.text_size
        reads = Reads(Window.full(length + 1), length + 1, size)  # one more, so that the last patch is read
        reads.causal = False
        if frames is not None and self.ahead:
            at = torch.arange(size + length, device=x.device) - size
            frame, last = at // (length // frames), at.clamp(min=0) // (length // frames) + self.ahead - 1
            reads.mask = (at < 0) | (frame <= last[:, None])
            if self.window is not None:
                reads.mask &= (at < 0) | (frame >= frame[:, None] + self.ahead - 1 - self.window)
        return self.proj_out(self.hidden(x, condition, reads)[:, -length:])  # type: ignore[no-any-return]
