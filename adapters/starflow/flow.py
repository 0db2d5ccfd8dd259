"""The flow: sampling, checkpoints.

Shapes: B batch, C channels, H, W height and width of latents, F frames of a video.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from parallel_decode._weight_files import fill
from parallel_decode.adapters.starflow import checkpoint
from parallel_decode.adapters.starflow.decoding import FlowSystem
from parallel_decode.adapters.starflow.density import Density
from parallel_decode.adapters.starflow.inputs import check_latents, first_frames, strength, stretches, texts
from parallel_decode.adapters.tarflow.inputs import standard_normal
from parallel_decode.schedules import Schedule
from parallel_decode.selective import Selective
from parallel_decode.solution import Solution
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
        check_latents(self, "z", z)
        if z.is_meta:
            raise ValueError("the flow is on the meta device, which holds no values: load its weights before sampling")
        if not z.isfinite().all():
            raise ValueError("z holds values that are not finite, expected noise")
        guidance = strength(guidance)
        text = texts(self, text, text_unconditional, guidance, len(z))
        z = z.to(torch.promote_types(torch.promote_types(z.dtype, self.var.dtype), torch.float32))
        patches, size = self.patchify(z), self._size(z)
        given = patches[:, :0] if frames is None else self.patchify(first_frames(self, frames, z))
        parts = stretches(self, patches.shape[1], given.shape[1], context_length)
        given = self._through(self.blocks[:-1], given, size, None)[0] if given.shape[1] else given
        return FlowSystem(self, patches, size, text, guidance, given, parts, z.dim() == 5, compile)

    def example(
        self, batch_size: int, *, z: Tensor | None = None, generator: torch.Generator | None = None, **options: Any
    ) -> LayeredSystem:
        """A system such as `sample` solves, for `pd.calibrate`: noise of its own for latents of `img_size`, and noise for texts.

        Args:
            batch_size: B.
            z: shape (1, C, H, W) or (1, F, C, H, W): draw noise of that shape instead.
            generator: for the noise; one with a fixed seed by default.
            options: see `system`.
        """
        generator = torch.Generator(self.var.device).manual_seed(0) if generator is None else generator
        names = ("text", "text_unconditional")[: 1 + (options.get("guidance", 0) > 0)] if self.config.txt_dim else ()
        like = self.var.new_empty(self.config.txt_size, self.config.txt_dim)
        options = {name: standard_normal(batch_size, like, generator) for name in names} | options
        return self.system(standard_normal(batch_size, self._like() if z is None else z[0], generator), **options)

    def _like(self) -> Tensor:
        side = self.config.img_size
        return self.var.new_empty(1).expand(self.config.in_channels, side, side)

    def sample(
        self,
        n: int | None = None,
        *,
        z: Tensor | None = None,
        text: Tensor | None = None,
        schedule: Schedule | Selective | str = "auto",
        tol: float | None = None,
        denoise: bool = False,
        generator: torch.Generator | None = None,
        progress: bool = False,
        return_solution: bool = False,
        differentiable: bool = False,
        **options: Any,
    ) -> Tensor | tuple[Tensor, Solution]:
        """Draw latents.

        Args:
            n: how many, at least 1; may be left out where z or a text says it.
            z: the noise to start from, shape (B, C, H, W), or (B, F, C, H, W) for videos; for images of `img_size` drawn from a standard
                normal by default.
            text: what the text encoder made of the prompts, shape (B, txt_size, txt_dim), or (1, ...) for all.
            schedule: see `pd.solve`; a name, a schedule, or a `pd.Plan`. The default finds the fastest as it runs.
            tol: see `pd.solve`; under bfloat16 or float16 the default is half the machine epsilon of that type.
            denoise: remove the noise of training, see `denoised`.
            generator: for the noise.
            progress: show a bar.
            return_solution: also return the `pd.Solution`.
            differentiable: let the latents have gradients with respect to z, the texts and the parameters, see `pd.solve`; not together with
                `denoise`.
            options: `guidance`, `text_unconditional` and others, see `system`.

        Returns:
            latents, shaped as z; with `return_solution` also the solution (whose value is not denoised).

        Raises:
            TypeError: an argument is of the wrong kind.
            ValueError: arguments that contradict one another or do not fit this flow, or modules with hooks that sampling never calls.
        """
        if z is not None:
            check_latents(self, "z", z)
        prompts = {len(text)} if isinstance(text, Tensor) and text.dim() == 3 and len(text) > 1 else set()
        rows = prompts | ({n} if n is not None else set()) | ({len(z)} if z is not None else set())
        rows = rows or ({1} if text is not None else set())
        if len(rows) != 1:
            raise ValueError(f"n={n}, z and text ask for {sorted(rows) or 'no number of'} samples, expected one number")
        if denoise:
            self._check_denoising()
        if denoise and differentiable:
            raise ValueError("denoise cannot be followed by differentiable=True: leave out one of them")
        if z is None:
            z = standard_normal(rows.pop(), self._like(), generator)
        system = self.system(z, text=text, **options)
        finish = partial(self.denoised, text=text) if denoise else None
        return self._drawn(
            system,
            schedule,
            finish,
            tol=tol,
            progress=progress,
            return_solution=return_solution,
            differentiable=differentiable,
        )

    @classmethod
    def from_checkpoint(cls, path: str | Path, **config: Any) -> "StarFlow":
        """A flow from a file of weights, such as Apple's, or from a folder that `save_pretrained` wrote.

        Args:
            path: a .pth or .safetensors file, or a folder.
            config: arguments of `StarFlow`, with the names of the published constructor; a folder has them.

        Raises:
            FileNotFoundError: nothing is there.
            TypeError, ValueError: the arguments are not a STARFlow's, see `Config`.
            ValueError: the file is damaged, or its weights are not of these arguments.
        """
        config, state = checkpoint.read(Path(path), config)
        with torch.device("meta"):
            flow = cls(**config)
        fill(flow, checkpoint.constants(flow, state) | state, path)
        return flow.eval()
