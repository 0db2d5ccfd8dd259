"""What the flows of this family share: files and the Hub, solving, and removing the noise of training."""

import os
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from huggingface_hub import PyTorchModelHubMixin, snapshot_download
from huggingface_hub.errors import HFValidationError
from torch import Tensor, nn

from parallel_decode._fingerprint import fingerprint
from parallel_decode.schedules import Schedule
from parallel_decode.selective import Selective
from parallel_decode.solution import Solution
from parallel_decode.solver import solve
from parallel_decode.system import LayeredSystem

if TYPE_CHECKING:
    from typing_extensions import Self


class Flow(nn.Module, PyTorchModelHubMixin):
    """A flow with a dataclass of its arguments, `noise_std` among them, which `save_pretrained` writes."""

    var: Tensor
    _hub_mixin_config: Any

    @property
    def noise_std(self) -> float | None:
        return self._hub_mixin_config.noise_std  # type: ignore[no-any-return]

    @noise_std.setter
    def noise_std(self, value: float | None) -> None:
        self._hub_mixin_config = replace(self._hub_mixin_config, noise_std=native(value))

    def fingerprint(self) -> str:
        """What a plan knows the flow by: a hash of the names and shapes of the weights, and of some of their values."""
        return fingerprint(self)

    def _drawn(
        self,
        system: LayeredSystem,
        schedule: Schedule | Selective | str,
        finish: Callable[[Tensor], Tensor] | None,
        *,
        tol: float | None,
        progress: bool,
        return_solution: bool,
        differentiable: bool,
    ) -> Tensor | tuple[Tensor, Solution]:
        """What `sample` returns: the system's solution, and what `finish` makes of it; it warns of images that are not finite."""
        if tol is None:
            tol = low_precision_tol(self.var)
        solution = solve(system, schedule, tol=tol, progress=progress, differentiable=differentiable)
        images = solution.value if finish is None else finish(solution.value)
        told = [
            return_solution and not status.succeeded for status in solution.status
        ]  # to the caller, by the solution
        finite = images.flatten(1).isfinite().all(1).tolist()
        if bad := [row for row in range(len(images)) if not (finite[row] or told[row])]:
            warnings.warn(f"images {bad} of {len(images)} are not finite: draw them from another z", stacklevel=3)
        return (images, solution) if return_solution else images

    def _tweedie(self, x: Tensor, log_prob: Callable[[Tensor], Tensor]) -> Tensor:
        """x + noise_std^2 grad log p(x)."""
        variance = self._check_denoising()
        with torch.inference_mode(False), torch.enable_grad():
            x = x.detach().clone().requires_grad_()  # a tensor of inference mode has no gradient, its clone has
            (score,) = torch.autograd.grad(log_prob(x).sum(), x)
        return x.detach() + variance * score

    def _check_denoising(self) -> float:
        """The variance of the noise."""
        if self.noise_std is None:
            raise ValueError(
                "denoising needs the standard deviation of the training noise: pass noise_std= to the flow"
            )
        if any(tensor.is_inference() for tensor in (*self.parameters(), *self.buffers())):
            raise ValueError(
                "denoising needs a gradient, and the flow's weights were made in torch.inference_mode(): load it outside"
            )
        return self.noise_std * self.noise_std

    @classmethod
    def from_checkpoint(cls, path: str | Path, **config: Any) -> "Self":
        """A flow from a file of weights."""
        raise NotImplementedError

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
    ) -> "Self":
        """A flow from a folder that `save_pretrained` wrote, or from a repository of the Hugging Face Hub.

        Args:
            pretrained_model_name_or_path: the folder, or the name of a repository.
            force_download, token, cache_dir, local_files_only, revision: see `huggingface_hub.snapshot_download`.
            config: arguments of the flow.

        Raises:
            FileNotFoundError: nothing is there.
            ValueError: see `from_checkpoint`.
        """
        name = pretrained_model_name_or_path
        if not os.path.lexists(name):
            try:
                name = snapshot_download(
                    str(name),
                    allow_patterns=["config.json", "model.safetensors"],
                    force_download=force_download,
                    token=token,
                    cache_dir=cache_dir,
                    local_files_only=local_files_only,
                    revision=revision,
                )
            except HFValidationError:
                raise FileNotFoundError(f"{name} does not exist, and is no name of a repository of the Hub") from None
        return cls.from_checkpoint(name, **config)


def native(value: Any) -> Any:
    """Numbers of numpy as Python's, which JSON can hold."""
    return value.item() if isinstance(value, np.generic) else value


def low_precision_tol(like: Tensor) -> float | None:
    """The unit roundoff: with twice that, images are half as far again from float32 as sequential ones are (docs/performance.md)."""
    device = like.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else like.dtype
    return torch.finfo(dtype).eps / 2 if dtype in (torch.bfloat16, torch.float16) else None
