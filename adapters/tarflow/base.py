"""What the flows of this family share: density, sampling, denoising, checkpoints.

Shapes: B batch, L positions, D values of a patch; of the last block where blocks differ.
"""

import math
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from typing_extensions import Self

from parallel_decode._fingerprint import fingerprint
from parallel_decode.adapters.tarflow import checkpoint
from parallel_decode.adapters.tarflow.decoding import FlowSystem
from parallel_decode.adapters.tarflow.guidance import Guidance
from parallel_decode.adapters.tarflow.inputs import Labels, as_labels, check_floats, labels_of, standard_normal
from parallel_decode.cached.graphs import graphs_of
from parallel_decode.schedules import Schedule
from parallel_decode.selective import Selective
from parallel_decode.solution import Solution
from parallel_decode.solver import solve
from parallel_decode.system import LayeredSystem

REDRAWS = 3  # of rows that are not finite
Made = TypeVar("Made", bound="Flow")


def fixed(name: str) -> Any:
    """An argument that the weights depend on: to be read and not to be set."""
    return property(lambda flow: getattr(flow._hub_mixin_config, name))


class Flow(nn.Module, PyTorchModelHubMixin):
    """A stack of affine autoregressive blocks over the patches of images: `TarFlow`, `ITarFlow`.

    A subclass makes the blocks, and says by `forward` and `system` what they are conditioned on.

    Attributes:
        var: of z, shape (L, D): learned where the blocks only shift.
        patch_sizes: of each block.
        input_scale: images are multiplied by it before the first block.
        Config: what the arguments may be.
    """

    var: Tensor
    blocks: nn.ModuleList
    in_channels: int = fixed("in_channels")
    img_size: int = fixed("img_size")
    nvp: bool = fixed("nvp")
    num_classes: int = fixed("num_classes")
    patch_sizes: tuple[int, ...]
    input_scale: float = 1.0
    Config: ClassVar[type[checkpoint.FlowConfig]]

    def _configure(self, config: checkpoint.FlowConfig) -> None:
        self._hub_mixin_config: Any = config  # what `save_pretrained` writes

    def _finish(self) -> None:
        """Once the blocks are made: the variances, and state dicts as they are found."""
        last: Any = self.blocks[-1]
        self.register_buffer("var", torch.ones(len(last.pos_embed), last.patch_dim))
        self.register_load_state_dict_pre_hook(_as_named)  # type: ignore[no-untyped-call]

    @classmethod
    def skipped(cls, name: str) -> bool:
        """Whether a file's tensor of this name need not be read: a causal mask."""
        return name.endswith(".attn_mask")

    @classmethod
    def renamed(cls, name: str) -> str:
        """The name that this class has for a tensor of a public state dict."""
        return name

    @property
    def noise_std(self) -> float | None:
        return self._hub_mixin_config.noise_std  # type: ignore[no-any-return]

    @noise_std.setter
    def noise_std(self, value: float | None) -> None:
        self._hub_mixin_config = replace(self._hub_mixin_config, noise_std=native(value))

    @property
    def lengths(self) -> list[int]:
        """L of each block."""
        return [len(block.pos_embed) for block in self.blocks]  # type: ignore[arg-type]

    def patchify(self, x: Tensor) -> Tensor:
        """Images (B, in_channels, img_size, img_size) to the patches that the first block takes, (B, L, D)."""
        return patches(x, self.patch_sizes[0]) * self.input_scale

    def unpatchify(self, x: Tensor) -> Tensor:
        """Patches of the first block (B, L, D) to images (B, in_channels, img_size, img_size)."""
        return image(x, self.patch_sizes[0], self.img_size) / self.input_scale

    def repatched(self, x: Tensor, at: int, to: int) -> Tensor:
        """The patches of one block as another takes them."""
        size, other = self.patch_sizes[at], self.patch_sizes[to]
        return x if size == other else patches(image(x, size, self.img_size), other)

    def _encoded(self, x: Tensor, *given: Tensor | None) -> tuple[Tensor, Tensor]:
        """z and log |det dz/dx|; `given` is what the blocks are conditioned on."""
        x = self.patchify(x)
        logdet = x.new_full((len(x),), math.log(self.input_scale) * self.var.numel())
        for index, block in enumerate(self.blocks):
            x, term = block(self.repatched(x, index - 1, index) if index else x, *given)
            logdet = logdet + term
        return x, logdet

    def log_prob(self, x: Tensor, y: Labels | None = None, **given: Any) -> Tensor:
        """Log-density of images in nats, shape (B,): z is normal with variance `var`.

        Args:
            x: images, shape (B, in_channels, img_size, img_size).
            y: classes, shape (B,), or one for all; negative or None for the unconditional branch.
            given: what else `forward` takes: t of an `ITarFlow`.

        Raises:
            TypeError: x is no tensor.
            ValueError: an argument does not fit this flow.
        """
        z, logdet = self(x, y, **given)
        normal: Tensor = 0.5 * (z.square() / self.var + self.var.log() + math.log(2 * math.pi)).sum((1, 2))
        return logdet - normal  # type: ignore[no-any-return]

    def system(self, *args: Any, **options: Any) -> LayeredSystem:
        """Sampling, for `pd.solve`; see the flow's own."""
        raise NotImplementedError

    def _system(
        self, z: Tensor, y: Labels | None, guidance: Guidance, compile: bool, t: Tensor | None = None
    ) -> LayeredSystem:
        check_floats("z", z, tuple(self.var.shape), self.var.device)
        if z.is_meta:
            raise ValueError("the flow is on the meta device, which holds no values: load its weights before sampling")
        if not z.isfinite().all():
            raise ValueError("z holds values that are not finite, expected noise")
        z = z.to(torch.promote_types(torch.promote_types(z.dtype, self.var.dtype), torch.float32))
        y = labels_of(y, len(z), self.num_classes, z.device)
        graphs = None
        if compile and z.is_cuda and not any(block.changed() for block in self.blocks):  # type: ignore[operator]
            autocast = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
            options = tuple(vars(guidance).values())
            graphs = graphs_of(self, (z.shape, z.dtype, z.device, y is None, autocast, options))
        return FlowSystem(self, z, y, guidance, graphs, t)

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

    def fingerprint(self) -> str:
        """What a plan knows the flow by: a hash of the names and shapes of the weights, and of some of their values."""
        return fingerprint(self)

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
            z: the noise to start from, shape (B, L, D); drawn from a standard normal by default. Rows that are not finite are then drawn
                again from other noise, three times at most (not if `differentiable`).
            y: classes, shape (B,), or one for all; negative or None for the unconditional branch.
            schedule: see `pd.solve`; a name, a schedule, or a `pd.Plan`. The default finds the fastest as it runs.
            tol: see `pd.solve`; under bfloat16 or float16 the default is half the machine epsilon of that type.
            denoise: remove the noise of training: by one gradient step of the log-likelihood (`denoised` of a `TarFlow`, which needs
                `noise_std`), or by many (`denoise_iteratively` of an `ITarFlow`).
            generator: for the noise.
            progress: show a bar.
            return_solution: also return the `pd.Solution`.
            differentiable: let the images have gradients with respect to z and the parameters, see `pd.solve`; not together with
                `denoise`.
            options: `guidance`, `compile` and others, see `system`; tensors among them have a row for each image.

        Returns:
            images, shape (B, in_channels, img_size, img_size), on the scale that the flow was trained on; with
            `return_solution` also the solution (of the first draw, whose value is not denoised).

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
            self._check_denoising(options)
        if denoise and differentiable:
            raise ValueError(
                "denoise takes a gradient step, which differentiable=True cannot follow: leave out one of them"
            )
        redraws = REDRAWS if z is None and not differentiable else 0
        noise = standard_normal(rows.pop(), self.var, generator) if z is None else z

        def draw(z: Tensor, labels: Tensor | None, options: Mapping[str, Any]) -> tuple[Tensor, Solution]:
            system = self.system(z, y=labels, **options)
            bound = _low_precision_tol(self.var) if tol is None else tol
            solution = solve(system, schedule, tol=bound, progress=progress, differentiable=differentiable)
            return self._clean(solution.value, labels, options) if denoise else solution.value, solution

        images, solution = draw(noise, labels, options)
        for _ in range(redraws):
            bad = (~images.flatten(1).isfinite().all(1)).nonzero()[:, 0]
            if not len(bad):
                break
            again = {name: _of_rows(value, bad) for name, value in options.items()} | {"compile": False}
            images = images.clone()
            images[bad] = draw(standard_normal(len(bad), self.var, generator), _of_rows(labels, bad), again)[0]
        finite = images.flatten(1).isfinite().all(1).tolist()
        told = [return_solution and not s.succeeded for s in solution.status]  # to the caller, by the solution
        if bad_rows := [row for row in range(len(noise)) if not (finite[row] or told[row])]:
            warnings.warn(f"images {bad_rows} of {len(noise)} are not finite: draw them from another z", stacklevel=2)
        return (images, solution) if return_solution else images

    def _clean(self, x: Tensor, y: Tensor | None, options: Mapping[str, Any]) -> Tensor:
        """Images without the noise of training; `options` are those of sampling."""
        raise NotImplementedError

    def _check_denoising(self, options: Mapping[str, Any]) -> None:
        """Raise a ValueError if that cannot be."""
        if any(tensor.is_inference() for tensor in (*self.parameters(), *self.buffers())):
            raise ValueError(
                "denoising needs a gradient, and the flow's weights were made in torch.inference_mode(): load it outside"
            )

    def _stepped(self, x: Tensor, variance: float | Tensor, y: Labels | None, **given: Any) -> Tensor:
        """x + variance grad log p(x)."""
        check_floats("x", x, (self.in_channels, self.img_size, self.img_size), self.var.device)
        with torch.inference_mode(False), torch.enable_grad():
            x = x.detach().clone().requires_grad_()  # a tensor of inference mode has no gradient, its clone has
            (score,) = torch.autograd.grad(self.log_prob(x, y, **given).sum(), x)
        return x.detach() + variance * score

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
        **config: Any,
    ) -> Self:
        """A flow from a folder that `save_pretrained` wrote, or from a repository of the Hugging Face Hub.

        Args:
            pretrained_model_name_or_path: the folder, or the name of a repository.
            force_download, token, cache_dir, local_files_only, revision: see `huggingface_hub.snapshot_download`.
            config: arguments of the flow.

        Raises:
            FileNotFoundError: nothing is there.
            ValueError: see `from_checkpoint`.
        """
        folder = checkpoint.folder(
            pretrained_model_name_or_path,
            force_download=force_download,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            revision=revision,
        )
        return cls.from_checkpoint(folder, **config)

    @classmethod
    def from_checkpoint(cls, path: str | Path, **config: Any) -> Self:
        """A flow from a file of weights, such as Apple's, or from a folder that `save_pretrained` wrote.

        Args:
            path: a .pth or .safetensors file, or a folder.
            config: arguments of the flow; what is left out is read off the weights. They leave open how many channels an image
                has: 3 are assumed if a patch of 3 channels would be square, else 1; pass `in_channels` for others.

        Raises:
            FileNotFoundError: nothing is there.
            ValueError: the file is damaged, or holds something else than such a flow, or one of another configuration.
                Weights that are not finite are loaded; images drawn with them are not finite, of which `sample` warns.
        """
        return checkpoint.load(cls, path, config)


def native(value: Any) -> Any:
    """Numbers of numpy as Python's, which JSON can hold."""
    return value.item() if isinstance(value, np.generic) else value


def patches(x: Tensor, size: int) -> Tensor:
    """Images (B, C, H, W) to patches (B, L, C size^2)."""
    return F.unfold(x, size, stride=size).transpose(1, 2)


def image(x: Tensor, size: int, img_size: int) -> Tensor:
    """Patches (B, L, C size^2) to images (B, C, img_size, img_size)."""
    return F.fold(x.transpose(1, 2), (img_size, img_size), size, stride=size)


def _of_rows(value: Any, rows: Tensor) -> Any:
    return value[rows.to(value.device)] if isinstance(value, Tensor) and value.dim() else value


def _as_named(flow: Flow, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name in [name for name in state if name.startswith(prefix)]:
        value = state.pop(name)
        if not name.endswith(".attn_mask"):
            state[prefix + flow.renamed(name.removeprefix(prefix))] = value


def _low_precision_tol(like: Tensor) -> float | None:
    """The unit roundoff: with twice that, images are half as far again from float32 as sequential ones are (docs/performance.md)."""
    device = like.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else like.dtype
    return torch.finfo(dtype).eps / 2 if dtype in (torch.bfloat16, torch.float16) else None
