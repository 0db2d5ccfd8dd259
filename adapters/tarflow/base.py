"""What all flows of this family share: drawing samples, and removing the noise of training."""

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from parallel_decode.adapters.tarflow.inputs import native, standard_normal
from parallel_decode.adapters.tarflow.saved import Saved
from parallel_decode.schedules import Schedule
from parallel_decode.selective import Selective
from parallel_decode.solution import Solution
from parallel_decode.solver import solve
from parallel_decode.system import LayeredSystem

REDRAWS = 3  # of rows that are not finite


class Flow(Saved):
    """A stack of affine autoregressive blocks: `TarFlow`, `ITarFlow` and `StarFlow`.

    A subclass makes the blocks, and says by `forward`, `log_prob`, `system` and `denoised` what they are conditioned on.

    Attributes:
        blocks: in the direction from samples to noise.
        condition: the argument that says what is drawn.
    """

    blocks: nn.ModuleList
    condition: ClassVar[str] = "y"

    @property
    def transforms(self) -> list[Any]:
        """The blocks that are decoded."""
        return list(self.blocks)

    @property
    def lengths(self) -> list[int]:
        """L of each block that is decoded."""
        raise NotImplementedError

    @property
    def noise_like(self) -> Tensor:
        """A tensor of the shape of one sample's noise, and of the flow's type and device."""
        raise NotImplementedError

    @property
    def noise_std(self) -> float | None:
        return self.config.noise_std  # type: ignore[no-any-return]

    @noise_std.setter
    def noise_std(self, value: float | None) -> None:
        self._hub_mixin_config = replace(self.config, noise_std=native(value))

    def log_prob(self, x: Tensor, *args: Any, **given: Any) -> Tensor:
        """Log-density of samples in nats, shape (B,); see the flow's own."""
        raise NotImplementedError

    def system(self, z: Tensor, *args: Any, **options: Any) -> LayeredSystem:
        """Sampling, for `pd.solve`; see the flow's own."""
        raise NotImplementedError

    def denoised(self, x: Tensor, *args: Any, **given: Any) -> Tensor:
        """Samples without the noise of training; see the flow's own."""
        raise NotImplementedError

    def conditions(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        """What `system` needs to draw n examples."""
        return {}

    def example(
        self, batch_size: int, *, z: Tensor | None = None, generator: torch.Generator | None = None, **options: Any
    ) -> LayeredSystem:
        """A system such as `sample` solves, for `pd.calibrate`: noise of its own, and all classes in turn, or noise for texts.

        Args:
            batch_size: B.
            z: draw noise of the shape of its rows, where a flow takes several.
            generator: for the noise; one with a fixed seed by default.
            options: see `system`; those that are None are left out.
        """
        generator = torch.Generator(self.noise_like.device).manual_seed(0) if generator is None else generator
        noise = standard_normal(batch_size, self.noise_like if z is None else z[0], generator)
        given = {name: value for name, value in options.items() if value is not None}
        return self.system(noise, **(self.conditions(batch_size, generator) | given))

    def sample(
        self,
        n: int | None = None,
        *,
        z: Tensor | None = None,
        schedule: Schedule | Selective | str = "auto",
        tol: float | None = None,
        denoise: bool = False,
        generator: torch.Generator | None = None,
        progress: bool = False,
        return_solution: bool = False,
        differentiable: bool = False,
        **options: Any,
    ) -> Tensor | tuple[Tensor, Solution]:
        """Draw images, latents or videos.

        Args:
            n: how many, at least 1; may be left out where z, or classes or texts, say it.
            z: the noise to start from, see `system`; drawn from a standard normal by default. Rows that are not finite are then drawn
                again from other noise, three times at most (not if `differentiable`), the whole batch beside them.
            schedule: see `pd.solve`; a name, a schedule, or a `pd.Plan`. The default finds the fastest as it runs.
            tol: see `pd.solve`; under bfloat16 or float16 the default is half the machine epsilon of that type.
            denoise: remove the noise of training, see `denoised`; an `ITarFlow` does so in many steps, see `denoise_iteratively`.
            generator: for the noise.
            progress: show a bar.
            return_solution: also return the `pd.Solution`.
            differentiable: let the samples have gradients with respect to z, texts and the parameters, see `pd.solve`; not together
                with `denoise`.
            options: what to draw (classes `y`, or `text`), `guidance`, `compile` and others, see `system`.

        Returns:
            what `system` gives, on the scale that the flow was trained on; with `return_solution` also the solution (of the first
            draw, whose value is not denoised).

        Raises:
            TypeError: an argument is of the wrong kind.
            ValueError: arguments that contradict one another or do not fit this flow, or modules that were changed so that they
                cannot be decoded.
        """
        options = self._as_given(options)
        what = options.get(self.condition)
        rows = {n} if n is not None else set()
        if z is not None:
            self._check_noise(z)
            rows.add(len(z))
        if isinstance(what, Tensor) and what.dim() and (len(what) != 1 or not rows):  # one may be for all
            rows.add(len(what))
        if len(rows) != 1:
            asked = sorted(rows) or "no number of"
            raise ValueError(f"n={n}, z and {self.condition} ask for {asked} samples, expected one number")
        if denoise:
            self._check_denoising()
        if denoise and differentiable:
            raise ValueError(
                "denoise takes a gradient step, which differentiable=True cannot follow: leave out one of them"
            )
        count = rows.pop()
        for attempt in range(1 if z is not None or differentiable else 1 + REDRAWS):
            noise = standard_normal(count, self.noise_like, generator) if z is None else z
            system = self.system(noise, **options)  # of the whole batch, which plans and captured windows are made for
            bound = _low_precision_tol(self.noise_like) if tol is None else tol
            found = solve(system, schedule, tol=bound, progress=progress, differentiable=differentiable)
            drawn = self._clean(found.value, options) if denoise else found.value
            if attempt == 0:
                samples, solution = drawn, found
            else:
                samples = samples.where(_finite(samples), drawn)
            if _finite(samples).all():
                break
        told = [return_solution and not s.succeeded for s in solution.status]  # to the caller, by the solution
        if bad := [row for row, good in enumerate(_finite(samples).flatten().tolist()) if not (good or told[row])]:
            warnings.warn(f"images {bad} of {count} are not finite: draw them from another z", stacklevel=2)
        return (samples, solution) if return_solution else samples

    def _as_given(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Options of sampling; what has a row for each sample as tensors."""
        return dict(options)

    def _check_noise(self, z: Any) -> None:
        """Raise unless z has the shape of noise."""
        raise NotImplementedError

    def _noise(self, z: Any) -> Tensor:
        """z as it is decoded, in float32 at least."""
        self._check_noise(z)
        if z.is_meta:
            raise ValueError("the flow is on the meta device, which holds no values: load its weights before sampling")
        if not z.isfinite().all():
            raise ValueError("z holds values that are not finite, expected noise")
        wide = torch.promote_types(torch.promote_types(z.dtype, self.noise_like.dtype), torch.float32)
        return z.to(wide)  # type: ignore[no-any-return]

    def _clean(self, x: Tensor, options: Mapping[str, Any]) -> Tensor:
        """Samples without the noise of training; `options` are those of sampling."""
        return self.denoised(x, options.get(self.condition))

    def _check_denoising(self) -> None:
        """Raise a ValueError if that cannot be."""
        if self.noise_std is None:
            raise ValueError(
                "denoising needs the standard deviation of the training noise: pass noise_std= to the flow"
            )
        self._check_gradient()

    def _variance(self) -> float:
        """Of the noise of training."""
        self._check_denoising()
        return self.noise_std * self.noise_std  # type: ignore[operator]

    def _check_gradient(self) -> None:
        if any(tensor.is_inference() for tensor in (*self.parameters(), *self.buffers())):
            raise ValueError(
                "denoising needs a gradient, and the flow's weights were made in torch.inference_mode(): load it outside"
            )

    def _stepped(self, x: Tensor, variance: float | Tensor, *args: Any, **given: Any) -> Tensor:
        """x + variance grad log p(x)."""
        with torch.inference_mode(False), torch.enable_grad():
            x = x.detach().clone().requires_grad_()  # a tensor of inference mode has no gradient, its clone has
            (score,) = torch.autograd.grad(self.log_prob(x, *args, **given).sum(), x)
        return x.detach() + variance * score


def _finite(x: Tensor) -> Tensor:
    """Which samples are finite, shape (B, 1, ..., 1)."""
    return x.isfinite().flatten(1).all(1).view(-1, *[1] * (x.dim() - 1))


def _low_precision_tol(like: Tensor) -> float | None:
    """The unit roundoff: with twice that, images are half as far again from float32 as sequential ones are (docs/performance.md)."""
    device = like.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else like.dtype
    return torch.finfo(dtype).eps / 2 if dtype in (torch.bfloat16, torch.float16) else None
