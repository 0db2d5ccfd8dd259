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
from parallel_decode.adapters.tarflow.changes import built, unchanged
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
        self.network = config.shape(deep), config.layers(index)
        self.patch_dim, side = self.proj_in.in_features, config.img_size // config.patch_size
        self.sos_embed = embedding(1, 1, self.patch_dim) if config.sos else None
        self.pos_embed = None if config.rope else embedding(side**2, self.proj_in.out_features)

    def permuted(self, x: Tensor, each: int) -> Tensor:
        """Patches (B, L, D), so many in each frame, in the block's order, and back."""
        if not self.flip:
            return x
        return x.reshape(len(x), -1, each, x.shape[2]).flip(2).flatten(1, 2) if self.within else x.flip(1)

    def condition(self, text: Tensor | None, known: Tensor, angles: Tensor | None) -> Condition:
        """What is read first: a text, the start embedding, and patches that are known (B, any, D); see `Network.conditioned`."""
        if self.sos_embed is not None:
            known = torch.cat([self.sos_embed.expand(len(known), -1, -1).to(known), known], 1)
        places = self.pos_embed.flip(0) if self.pos_embed is not None and self.flip else self.pos_embed
        copied = text is not None and not known.shape[1]
        return replace(self.conditioned(text, known, angles, places), copied=copied)

    def for_check(self, dtype: torch.dtype | None) -> Condition:
        """What decoding is checked with, see `changes`: a text of noise, without rotary positions."""
        like, text = self.proj_in.weight, None
        if self.sees_text:
            text = torch.randn(2, 3, self.txt_dim, generator=torch.Generator().manual_seed(1)).to(like)
        return self.condition(text, like.new_empty(2, 0, self.patch_dim), None)

    def changed(self) -> bool:
        """Whether modules in it were hooked to, wrapped or replaced."""
        return not all(map(unchanged, self.children()))

    def affine(
        self, values: Tensor, given: Condition, reads: Reads, storage: KeyValueStorage | None = None
    ) -> tuple[Tensor, Tensor]:
        """a, the logarithm of the scale, and b, the shift, at the window's positions but position 0 if nothing is read for it; see `hidden`.

        Returns:
            Each of shape (B, W, D), float32 at least.
        """
        if not reads.size:
            return values, values
        wide = torch.promote_types(values.dtype, torch.float32)
        out = self.proj_out(self.hidden(values, given, reads, storage)).to(wide)
        out = self.clip * torch.tanh(out / self.clip) if self.clip else out
        a, b = out.chunk(2, dim=-1)
        a = F.softplus(a + _UNIT).log() if self.softplus else a
        if given.copied:
            positions = torch.arange(reads.stop - given.size + 1, device=values.device).expand(len(values), -1)
            first = reads.targets(positions)[..., None] == 0
            a, b = a.masked_fill(first, 0), b.masked_fill(first, 0)
        return a, b

    def forward(self, x: Tensor, text: Tensor | None, angles: Tensor | None, each: int) -> tuple[Tensor, Tensor]:
        """z, shape (B, L, D), and the log-determinant, shape (B,)."""
        x = self.permuted(x, each)
        given = self.condition(text, x[:, :0], angles)
        reads = Reads(Window.full(x.shape[1]), x.shape[1], given.size, device=x.device)
        a, b = self.affine(reads.take(F.pad(x, (0, 0, given.size, 0))), given, reads)
        z = reads.complete((reads.targets(x) - b) * (-a).exp(), x)
        return self.permuted(z, each), -a.sum((1, 2))


class Denoiser(Network):
    """The learned denoiser: a transformer that sees all of an image, and of a video a window of frames."""

    def __init__(self, config: Config) -> None:
        super().__init__(config, False, 8, 1, config.conditional_denoiser and config.txt_dim > 0)
        self.ahead, self.window = config.temporal_causal, config.denoiser_window

    def forward(self, x: Tensor, text: Tensor | None, angles: Tensor | None, frames: int | None) -> Tensor:
        """What it takes for noise in patches (B, L, D); `frames` of a video, None for images."""
        length, given = x.shape[1], self.conditioned(text, x[:, :0], angles)
        size, window = given.size, Window.full(length + 1)  # one more, so that the last patch is read
        reads = Reads(window, length + 1, size, device=x.device)
        reads.causal = False
        if frames is not None and self.ahead:
            at = reads.inputs()[0] - size
            frame, last = at // (length // frames), at.clamp(min=0) // (length // frames) + self.ahead - 1
            reads.mask = (at < 0) | (frame <= last[:, None])
            if self.window is not None:
                reads.mask &= (at < 0) | (frame >= frame[:, None] + self.ahead - 1 - self.window)
        values = reads.take(F.pad(x, (0, 0, size, 0)))
        return self.proj_out(self.hidden(values, given, reads)[:, -length:])  # type: ignore[no-any-return]
