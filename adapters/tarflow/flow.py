"""The flow: density, sampling, checkpoints."""

import inspect
import math
import os
from functools import partial
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel_decode._weight_files import fill, read_weights
from parallel_decode.adapters.tarflow import checkpoint
from parallel_decode.adapters.tarflow.decoding import FlowSystem, Guidance
from parallel_decode.adapters.tarflow.family import Flow, native
from parallel_decode.adapters.tarflow.inputs import Labels, as_labels, check_floats, labels_of, standard_normal
from parallel_decode.adapters.tarflow.model import MetaBlock
from parallel_decode.cached.graphs import graphs_of
from parallel_decode.schedules import Schedule
from parallel_decode.selective import Selective
from parallel_decode.solution import Solution
from parallel_decode.system import LayeredSystem


def _fixed(name: str) -> Any:
    """An argument that the weights depend on: to be read and not to be set."""
    return property(lambda flow: getattr(flow._hub_mixin_config, name))


class TarFlow(Flow):
    """A TarFlow over images.

    Args:
        in_channels: channels of an image.
        img_size: height and width of an image, in pixels.
        patch_size: height and width of a patch; L = (img_size / patch_size)^2.
        channels: width of the transformers, a multiple of 64 (the size of a head).
        num_blocks: blocks of the flow.
        layers_per_block: transformer layers of each block.
        nvp: whether a block scales (a and b) or only shifts (b).
        num_classes: classes that samples can be conditioned on; 0 for none.
        noise_std: standard deviation of the noise that the images were trained with, for `denoise=True`; may be set later.

    Raises:
        TypeError: an argument of another kind.
        ValueError: sizes below 1, or that do not divide; `noise_std` that is negative or not finite.

    Example:
        >>> import torch
        >>> from parallel_decode.adapters.tarflow import TarFlow
        >>> flow = TarFlow(in_channels=1, img_size=8, patch_size=2, channels=64, num_blocks=2, layers_per_block=1)
        >>> z, logdet = flow(torch.zeros(3, 1, 8, 8))
        >>> z.shape, logdet.shape
        (torch.Size([3, 16, 4]), torch.Size([3]))
        >>> flow.sample(2, schedule="sliding").shape
        torch.Size([2, 1, 8, 8])
    """

    in_channels: int = _fixed("in_channels")
    img_size: int = _fixed("img_size")
    patch_size: int = _fixed("patch_size")
    nvp: bool = _fixed("nvp")
    num_classes: int = _fixed("num_classes")

    def __init__(
        self,
        in_channels: int,
        img_size: int,
        patch_size: int,
        channels: int,
        num_blocks: int,
        layers_per_block: int,
        nvp: bool = True,
        num_classes: int = 0,
        noise_std: float | None = None,
    ) -> None:
        super().__init__()
        given = in_channels, img_size, patch_size, channels, num_blocks, layers_per_block, nvp, num_classes, noise_std
        self._hub_mixin_config: Any = checkpoint.Config(*map(native, given))  # what `save_pretrained` writes
        length, dim = (img_size // patch_size) ** 2, in_channels * patch_size**2
        self.blocks = nn.ModuleList(
            MetaBlock(dim, channels, length, layers_per_block, i % 2 == 1, nvp, num_classes) for i in range(num_blocks)
        )
        self.register_buffer("var", torch.ones(length, dim))  # of z: learned where the blocks only shift
        self.register_load_state_dict_pre_hook(_without_masks)  # type: ignore[no-untyped-call]

    def patchify(self, x: Tensor) -> Tensor:
        """Images (B, in_channels, img_size, img_size) to patches (B, L, D)."""
        return F.unfold(x, self.patch_size, stride=self.patch_size).transpose(1, 2)

    def unpatchify(self, x: Tensor) -> Tensor:
        """Patches (B, L, D) to images (B, in_channels, img_size, img_size)."""
        return F.fold(x.transpose(1, 2), (self.img_size, self.img_size), self.patch_size, stride=self.patch_size)

    def forward(self, x: Tensor, y: Labels | None = None) -> tuple[Tensor, Tensor]:
        """Images to noise.

        Args:
            x: images, shape (B, in_channels, img_size, img_size).
            y: classes, shape (B,), or one for all; negative for the unconditional branch, as is None.

        Returns:
            z, shape (B, L, D), and log |det dz/dx|, shape (B,).

        Raises:
            TypeError: x is no tensor.
            ValueError: x or y does not fit this flow.
        """
        check_floats("x", x, (self.in_channels, self.img_size, self.img_size), self.var.device)
        y = labels_of(y, len(x), self.num_classes, x.device)
        x = self.patchify(x)
        logdet = x.new_zeros(x.shape[0])
        for block in self.blocks:
            x, term = block(x, y)
            logdet = logdet + term
        return x, logdet

    def log_prob(self, x: Tensor, y: Labels | None = None) -> Tensor:
        """Log-density of images in nats, shape (B,): z is normal with variance `var`."""
        z, logdet = self(x, y)
        normal: Tensor = 0.5 * (z.square() / self.var + self.var.log() + math.log(2 * math.pi)).sum((1, 2))
        return logdet - normal  # type: ignore[no-any-return]

    def system(
        self,
        z: Tensor,
        *,
        y: Labels | None = None,
        guidance: float = 0.0,
        guide_what: str = "ab",
        annealed_guidance: bool = False,
        attn_temp: float = 1.0,
        compile: bool = False,
    ) -> LayeredSystem:
        """Sampling from z, for `pd.solve`; `Solution.value` then holds images, shape (B, in_channels, img_size, img_size).

        Args:
            z: the noise to start from, shape (B, L, D); decoded in float32 at least.
            y: classes, shape (B,), or one for all; negative or None for the unconditional branch.
            guidance: strength of guidance, by a conditional and an unconditional pass in one doubled batch; 0 for none.
            guide_what: which of the transform's "a" (log-scale) and "b" (shift) are guided.
            annealed_guidance: let the strength rise linearly over the positions.
            attn_temp: attention temperature of the unconditional branch.
            compile: on a CUDA device capture the windows as CUDA graphs, for this batch size, and keep them for the next
                calls; elsewhere, and with modules that were changed, it does nothing.

        Raises:
            TypeError: z is no tensor.
            ValueError: z or y of another shape or range than this flow's, or z not finite.
        """
        check_floats("z", z, tuple(self.var.shape), self.var.device)
        if z.is_meta:
            raise ValueError("the flow is on the meta device, which holds no values: load its weights before sampling")
        if not z.isfinite().all():
            raise ValueError("z holds values that are not finite, expected noise")
        z = z.to(torch.promote_types(torch.promote_types(z.dtype, self.var.dtype), torch.float32))
        y = labels_of(y, len(z), self.num_classes, z.device)
        guide = Guidance(guidance, guide_what, annealed_guidance, attn_temp)
        graphs = None
        if compile and z.is_cuda and not any(block.changed() for block in self.blocks):  # type: ignore[operator]
            autocast = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
            options = guidance, guide_what, annealed_guidance, attn_temp
            graphs = graphs_of(self, (z.shape, z.dtype, z.device, y is None, autocast, options))
        return FlowSystem(self, z, y, guide, graphs)

    def example(
        self, batch_size: int, *, y: Labels | None = None, generator: torch.Generator | None = None, **options: Any
    ) -> LayeredSystem:
        """A system such as `sample` solves, for `pd.calibrate`: noise of its own, and all classes in turn.

        Args:
            batch_size: B.
            y: classes, shape (B,), or one for all.
            generator: for the noise; one with a fixed seed by default.
            options: see `system`.
        """
        generator = torch.Generator(self.var.device).manual_seed(0) if generator is None else generator
        z = standard_normal(batch_size, self.var, generator)
        if y is None and self.num_classes:
            y = torch.arange(batch_size) % self.num_classes
        return self.system(z, y=y, **options)

    def sample(
        self,
        n: int | None = None,
        *,
        z: Tensor | None = None,
        y: Labels | None = None,
        schedule: Schedule | Selective | str = "auto",
        tol: float | None = None,
        denoise: bool = False,
        generator: torch.Generator | None = None,
        progress: bool = False,
        return_solution: bool = False,
        differentiable: bool = False,
        **options: Any,
    ) -> Tensor | tuple[Tensor, Solution]:
        """Draw images.

        Args:
            n: how many, at least 1; may be left out where z or a list of classes says it.
            z: the noise to start from, shape (B, L, D); drawn from a standard normal by default.
            y: classes, shape (B,), or one for all; negative or None for the unconditional branch.
            schedule: see `pd.solve`; a name, a schedule, or a `pd.Plan`. The default finds the fastest as it runs.
            tol: see `pd.solve`; under bfloat16 or float16 the default is half the machine epsilon of that type.
            denoise: take one gradient step of the log-likelihood, which removes the noise of training; needs `noise_std`.
            generator: for the noise.
            progress: show a bar.
            return_solution: also return the `pd.Solution`.
            differentiable: let the images have gradients with respect to z and the parameters, see `pd.solve`; not together with
                `denoise`.
            options: `guidance`, `compile` and others, see `system`.

        Returns:
            images, shape (B, in_channels, img_size, img_size), on the scale that the flow was trained on; with
            `return_solution` also the solution (whose value is not denoised).

        Raises:
            TypeError: an argument is of the wrong kind.
            ValueError: arguments that contradict one another or do not fit this flow, or modules that were changed so that they
                cannot be decoded.
        """
        labels = as_labels(y)
        if z is not None:
            check_floats("z", z, tuple(self.var.shape), self.var.device)
        rows = {len(t) for t in (z, labels) if t is not None and t.dim()} | ({n} if n is not None else set())
        if len(rows) != 1:
            raise ValueError(f"n={n}, z and y ask for {sorted(rows) or 'no number of'} samples, expected one number")
        if denoise:
            self._check_denoising()
        if denoise and differentiable:
            raise ValueError(
                "denoise takes a gradient step, which differentiable=True cannot follow: leave out one of them"
            )
        if z is None:
            z = standard_normal(rows.pop(), self.var, generator)
        system = self.system(z, y=labels, **options)
        finish = partial(self.denoised, y=labels) if denoise else None
        return self._drawn(
            system,
            schedule,
            finish,
            tol=tol,
            progress=progress,
            return_solution=return_solution,
            differentiable=differentiable,
        )

    def denoised(self, x: Tensor, y: Labels | None = None) -> Tensor:
        """x + noise_std^2 grad log p(x): the mean of the clean image given the noisy one, if p is right (Tweedie).

        Args:
            x: images, shape (B, in_channels, img_size, img_size).
            y: classes, shape (B,), or one for all; negative or None for the unconditional branch.

        Raises:
            TypeError: x is no tensor.
            ValueError: x or y does not fit this flow, or the flow does not know the `noise_std` of its training.
        """
        check_floats("x", x, (self.in_channels, self.img_size, self.img_size), self.var.device)
        return self._tweedie(x, partial(self.log_prob, y=y))

    @classmethod
    def from_checkpoint(cls, path: str | Path, **config: Any) -> "TarFlow":
        """A flow from a file of weights, such as Apple's, or from a folder that `save_pretrained` wrote.

        Args:
            path: a .pth or .safetensors file, or a folder.
            config: arguments of `TarFlow`; what is left out is read off the weights. They leave open how many channels an image
                has: 3 are assumed if a patch of 3 channels would be square, else 1; pass `in_channels` for others.

        Raises:
            FileNotFoundError: nothing is there.
            ValueError: the file is damaged, or holds something else than a TarFlow, or one of another configuration.
                Weights that are not finite are loaded; images drawn with them are not finite, of which `sample` warns.
        """
        path = Path(path)
        if os.path.isdir(path):  # Path.is_dir raises where a name is too long
            config = checkpoint.folder_config(path, set(inspect.signature(cls.__init__).parameters) - {"self"}) | config
            path = path / "model.safetensors"
        if not os.path.isfile(path):
            raise FileNotFoundError(
                f"{path} does not exist: give a .pth or .safetensors file, or a folder that holds one"
            )
        state = read_weights(path, skip=".attn_mask")
        config = checkpoint.config(state, config, path)
        with torch.device("meta"):
            flow = cls(**config)
        fill(flow, state, path)
        return flow.eval()


def digits() -> TarFlow:
    """The class-conditional flow over 16 x 16 digits that comes with the package.

    It has 4 blocks of 2 layers, patches of one pixel (L = 256) and 10 classes, and was trained on scikit-learn's
    digits by `python -m paper_repro train`. Its images go from -1 to 1.

    Example:
        >>> from parallel_decode.adapters.tarflow import digits
        >>> digits().sample(2, y=3, schedule="sliding").shape
        torch.Size([2, 1, 16, 16])
    """
    with as_file(files("parallel_decode.adapters.tarflow") / "assets" / "digits") as folder:
        return TarFlow.from_checkpoint(folder)


def _without_masks(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for key in [key for key in state if key.startswith(prefix) and key.endswith(".attn_mask")]:
        del state[key]
