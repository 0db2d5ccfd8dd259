"""The flow: sampling, checkpoints.

Shapes: B batch, C channels, H, W height and width of latents, F frames of a video.
"""

from typing import Any

import torch
from torch import Tensor

from parallel_decode.adapters.starflow.decoding import FlowSystem
from parallel_decode.adapters.starflow.density import Density
from parallel_decode.adapters.starflow.inputs import check_latents, first_frames, stretches, texts
from parallel_decode.adapters.tarflow.guidance import Guidance, guide_gaussians
from parallel_decode.adapters.tarflow.inverse import graphs_for
from parallel_decode.system import LayeredSystem


class StarFlow(Density):
    """A STARFlow over latents.

    Args:
        config: arguments by name, see `Config`; those of the published constructor that only matter in training are ignored.

    Raises:
        TypeError: an argument is missing, unknown or of the wrong kind.
        ValueError: one is out of its range, or some contradict one another.

    References:
        Gu et al., STARFlow: Scaling Latent Normalizing Flows for High-resolution Image Synthesis (arXiv 2506.06276).
        Gu et al., STARFlow-V: End-to-End Video Generative Modeling with Normalizing Flows (arXiv 2511.20462).

    Example:
        >>> import torch
        >>> from parallel_decode.adapters.starflow import StarFlow
        >>> shape = dict(in_channels=4, img_size=8, patch_size=2, channels=64, num_blocks=2, layers_per_block=[1, 2])
        >>> flow = StarFlow(**shape, rope=True, sos=True, seq_order="L2R", txt_size=3, txt_dim=5, cond_top_only=True, use_softplus=True)
        >>> text = torch.zeros(2, 3, 5)
        >>> latents = flow.sample(2, text=text, text_unconditional=text[:1], guidance=2.5, schedule="sliding")
        >>> z, logdet = flow(latents, text)
        >>> latents.shape, z.shape, logdet.shape
        (torch.Size([2, 4, 8, 8]), torch.Size([2, 4, 8, 8]), torch.Size([2]))
    """

    def system(
        self,
        z: Tensor,
        *,
        text: Tensor | None = None,
        text_unconditional: Tensor | None = None,
        guidance: float = 0.0,
        frames: Tensor | None = None,
        context_length: int | None = None,
        compile: bool = False,
    ) -> LayeredSystem:
        """Sampling from z, for `pd.solve`; `Solution.value` then holds latents, shaped as z.

        Of videos with more frames than `local_attn_window` the deep block is decoded over so many frames at a time: each window after the
        first begins with the last `context_length` frames, as if the video began there, and goes on from them.

        Args:
            z: the noise to start from, shape (B, C, H, W), or (B, F, C, H, W) for videos; decoded in float32 at least.
            text: what the text encoder made of the prompts, shape (B or 1, txt_size, txt_dim).
            text_unconditional: what it made of the empty prompt, likewise; with `guidance`.
            guidance: strength w of guidance towards p(x | text)^(1 + w) / p(x)^w, in one doubled batch, of the blocks that see the text; 0 for none.
            frames: the first frames of a video, shape (B or 1, fewer, C, H, W), which it goes on from; what z has there is not read.
            context_length: frames that a window has in common with the one before; all but one by default.
            compile: on a CUDA device capture the windows as CUDA graphs, for this batch size, and keep them for the next calls; elsewhere, and
                where windows of frames follow one another, it does nothing.

        Raises:
            TypeError: an argument is of the wrong kind.
            ValueError: one does not fit this flow, or z is not finite.
        """
        z, guide = self._noise(z), Guidance(guidance, rule=guide_gaussians)
        text = texts(self, text, text_unconditional, guidance, len(z))
        patches, size = self.patchify(z), self._size(z)
        known = patches[:, :0] if frames is None else self.patchify(first_frames(self, frames, z))
        parts = stretches(self, patches.shape[1], known.shape[1], context_length)
        known = self._through(self.transforms[:-1], known, size, None)[0] if known.shape[1] else known
        graphs = graphs_for(self, patches, size, guidance, known.shape) if compile else None
        return FlowSystem(self, patches, size, text, guide, known, parts, z.dim() == 5, graphs)

    def conditions(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Noise for texts."""
        if not self.config.txt_dim:
            return {}
        size, device = (self.config.txt_size, self.config.txt_dim), generator.device
        drawn = [torch.randn(rows, *size, generator=generator, device=device) for rows in (n, 1)]
        text, null = (one.to(self.noise_like) for one in drawn)
        return {"text": text, "text_unconditional": null}

    def _check_noise(self, z: Any) -> None:
        check_latents(self, "z", z)
