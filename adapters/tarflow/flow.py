"""The flow: density, sampling, checkpoints."""

import inspect
import math
import warnings
from collections.abc import Sequence
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from parallel_decode._fingerprint import fingerprint
from parallel_decode.adapters.tarflow import checkpoint
from parallel_decode.adapters.tarflow.decoding import FlowSystem, Guidance
from parallel_decode.adapters.tarflow.model import MetaBlock
from parallel_decode.adapters.tarflow.weights import HEAD_DIM
from parallel_decode.cached.graphs import graphs_of
from parallel_decode.schedules import Schedule
from parallel_decode.selective import Selective
from parallel_decode.solution import Solution
from parallel_decode.solver import solve
from parallel_decode.system import LayeredSystem


class TarFlow(nn.Module, PyTorchModelHubMixin):
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
        noise_std: standard deviation of the noise that the images were trained with, for `denoise=True`.

    Raises:
        ValueError: sizes that do not divide.

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

    var: Tensor

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
        if img_size % patch_size:
            raise ValueError(f"img_size is {img_size}, expected a multiple of patch_size, {patch_size}")
        if noise_std is not None and not noise_std >= 0:
            raise ValueError(f"noise_std is {noise_std}, expected a number >= 0")
        if channels % HEAD_DIM:
            raise ValueError(
                f"channels is {channels}, expected a multiple of {HEAD_DIM}, the size of an attention head"
            )
        self.in_channels, self.img_size, self.patch_size = in_channels, img_size, patch_size
        self.nvp, self.num_classes, self.noise_std = nvp, num_classes, noise_std
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

    def forward(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Images to noise.

        Args:
            x: images, shape (B, in_channels, img_size, img_size).
            y: classes, shape (B,); negative for the unconditional branch, as is None.

        Returns:
            z, shape (B, L, D), and log |det dz/dx|, shape (B,).
        """
        x = self.patchify(x)
        logdet = x.new_zeros(x.shape[0])
        for block in self.blocks:
            x, term = block(x, y)
            logdet = logdet + term
        return x, logdet

    def log_prob(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Log-density of images in nats, shape (B,): z is normal with variance `var`."""
        z, logdet = self(x, y)
        normal: Tensor = 0.5 * (z.square() / self.var + self.var.log() + math.log(2 * math.pi)).sum((1, 2))
        return logdet - normal  # type: ignore[no-any-return]

    def system(
        self,
        z: Tensor,
        *,
        y: Tensor | None = None,
        guidance: float = 0.0,
        guide_what: str = "ab",
        annealed_guidance: bool = False,
        attn_temp: float = 1.0,
        compile: bool = False,
    ) -> LayeredSystem:
        """Sampling from z, for `pd.solve`; `Solution.value` then holds images, shape (B, in_channels, img_size, img_size).

        Args:
            z: the noise to start from, shape (B, L, D).
            y: classes, shape (B,); negative or None for the unconditional branch.
            guidance: strength of guidance, by a conditional and an unconditional pass in one doubled batch; 0 for none.
            guide_what: which of the transform's "a" (log-scale) and "b" (shift) are guided.
            annealed_guidance: let the strength rise linearly over the positions.
            attn_temp: attention temperature of the unconditional branch.
            compile: on a CUDA device capture the windows as CUDA graphs, for this batch size, and keep them for the next
                calls; elsewhere it does nothing.

        Raises:
            ValueError: z or y of another shape or range than this flow's.
        """
        if z.shape[1:] != self.var.shape or z.dim() != 3 or not z.is_floating_point():
            raise ValueError(
                f"z is {z.dtype} of shape {tuple(z.shape)}, expected floats of shape (batch, {', '.join(map(str, self.var.shape))})"
            )
        if z.device != self.var.device:
            raise ValueError(f"z is on {z.device} and the flow on {self.var.device}: move one of them")
        if y is not None:
            if not self.num_classes:
                raise ValueError("y was given, and this flow has no classes: leave it out")
            if y.shape != z.shape[:1] or y.is_floating_point() or y.dtype == torch.bool:
                raise ValueError(
                    f"y is {y.dtype} of shape {tuple(y.shape)}, expected whole numbers of shape ({len(z)},)"
                )
            if len(y) and int(y.max()) >= self.num_classes:
                raise ValueError(
                    f"y holds class {int(y.max())}, expected numbers below {self.num_classes}, or negative for none"
                )
        guide = Guidance(guidance, guide_what, annealed_guidance, attn_temp)
        graphs = None
        if compile and z.is_cuda:
            autocast = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
            options = guidance, guide_what, annealed_guidance, attn_temp
            graphs = graphs_of(self, (z.shape, z.dtype, z.device, y is None, autocast, options))
        return FlowSystem(self, z, y, guide, graphs)

    def example(
        self, batch_size: int, *, y: Tensor | None = None, generator: torch.Generator | None = None, **options: Any
    ) -> LayeredSystem:
        """A system such as `sample` solves, for `pd.calibrate`: noise of its own, and all classes in turn.

        Args:
            batch_size: B.
            y: classes, shape (B,).
            generator: for the noise; one with a fixed seed by default.
            options: see `system`.
        """
        generator = torch.Generator(self.var.device).manual_seed(0) if generator is None else generator
        dtype = torch.promote_types(self.var.dtype, torch.float32)
        z = torch.randn(batch_size, *self.var.shape, generator=generator, dtype=dtype, device=self.var.device)
        if y is None and self.num_classes:
            y = torch.arange(batch_size) % self.num_classes
        return self.system(z, y=y, **options)

    def fingerprint(self) -> str:
        """What a plan knows the flow by: a hash of the names and shapes of the weights, and of some of their values."""
        return fingerprint(self)

    def sample(
        self,
        n: int | None = None,
        *,
        z: Tensor | None = None,
        y: Tensor | Sequence[int] | int | None = None,
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
            n: how many; may be left out where z or a tensor y says it.
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
            ValueError: arguments that contradict one another or do not fit this flow.
        """
        labels = None if y is None or isinstance(y, int) else torch.as_tensor(y).reshape(-1)
        rows = {len(t) for t in (z, labels) if t is not None} | ({n} if n is not None else set())
        if len(rows) != 1:
            raise ValueError(f"n={n}, z and y ask for {sorted(rows) or 'no number of'} samples, expected one number")
        if denoise:
            self._noise_variance()
        if denoise and differentiable:
            raise ValueError(
                "denoise takes a gradient step, which differentiable=True cannot follow: leave out one of them"
            )
        if z is None:
            dtype = torch.promote_types(self.var.dtype, torch.float32)
            z = torch.randn(rows.pop(), *self.var.shape, generator=generator, dtype=dtype, device=self.var.device)
        if isinstance(y, int):
            labels = torch.full((len(z),), y)
        system = self.system(z, y=labels, **options)
        if tol is None:
            tol = _low_precision_tol(self.var)
        solution = solve(system, schedule, tol=tol, progress=progress, differentiable=differentiable)
        if not return_solution and (bad := [row for row, s in enumerate(solution.status) if not s.succeeded]):
            warnings.warn(f"images {bad} of {len(z)} are not finite: draw them from another z", stacklevel=2)
        images = self.denoised(solution.value, labels) if denoise else solution.value
        return (images, solution) if return_solution else images

    def denoised(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """x + noise_std^2 grad log p(x): the mean of the clean image given the noisy one, if p is right (Tweedie).

        Raises:
            ValueError: the flow does not know the `noise_std` of its training.
        """
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (score,) = torch.autograd.grad(self.log_prob(x, y).sum(), x)
        return x.detach() + self._noise_variance() * score

    def _noise_variance(self) -> float:
        if self.noise_std is None:
            raise ValueError(
                "denoising needs the standard deviation of the training noise: pass noise_std= to the flow"
            )
        return self.noise_std**2

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
        """
        path = Path(path)
        if path.is_dir():
            config = checkpoint.folder_config(path, set(inspect.signature(cls.__init__).parameters) - {"self"}) | config
            path = path / "model.safetensors"
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} does not exist: give a .pth or .safetensors file, or a folder that holds one"
            )
        state = checkpoint.load(path)
        flow = cls(**checkpoint.config(state, config.get("in_channels"), path) | config)
        try:
            flow.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(f"{path} does not fit this configuration: {error}") from None
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


def _low_precision_tol(like: Tensor) -> float | None:
    """The unit roundoff: with twice that, images are half as far again from float32 as sequential ones are (docs/performance.md)."""
    device = like.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else like.dtype
    return torch.finfo(dtype).eps / 2 if dtype in (torch.bfloat16, torch.float16) else None
