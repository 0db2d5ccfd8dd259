"""TarFlow (Zhai et al., *Normalizing Flows are Capable Generative Models*, arXiv 2412.06329), decoded in parallel.

A TarFlow is a stack of causal transformers over image patches. Each block maps x to z_l = (x_l - b_l(x_<l)) exp(-a_l(x_<l))
in one pass; its inverse x_l = z_l exp(a_l(x_<l)) + b_l(x_<l) is a triangular system, and sampling is a chain of
them, the last block first. Parameters and buffers are named as in Apple's public checkpoints, which load as they are.

Shapes: B batch, L patches (positions), D values of a patch, C channels of the transformer, H heads, T positions read.
"""

import inspect
import json
import math
import pickle
import warnings
from collections.abc import Sequence
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from parallel_decode.schedules import Schedule, Selective
from parallel_decode.solution import Solution
from parallel_decode.solver import solve
from parallel_decode.system import LayeredSystem, TriangularSystem, Window

HEAD_DIM = 64


def _layer_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """LayerNorm in float32 (float64 stays float64), whatever the precision around it."""
    wide = torch.promote_types(x.dtype, torch.float32)
    y = F.layer_norm(x.to(wide), norm.normalized_shape, norm.weight.to(wide), norm.bias.to(wide), norm.eps)
    return y.to(x.dtype)


class _Cache:
    """Keys and values of one attention layer for all L positions, written in place."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.keys = self.values = torch.empty(0)

    def write(self, at: slice, stop: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v, shape (B, H, T, 64), at the positions `at`; return all before `stop`."""
        if self.keys.shape[0] != k.shape[0] or self.keys.dtype != k.dtype:
            shape = (*k.shape[:2], self.length, k.shape[3])
            self.keys, self.values = k.new_zeros(shape), v.new_zeros(shape)
        self.keys[:, :, at], self.values[:, :, at] = k, v
        return self.keys[:, :, :stop], self.values[:, :, :stop]


class _Read:
    """What one call of a block reads, and how it attends to what is cached.

    Position l is computed by the transformer at position l - 1. Read are the positions just before those of the window, and
    all from the first that changed: a cached key belongs to the values that the positions up to its own hold now.
    """

    def __init__(self, window: Window, index: Tensor) -> None:
        wanted = window.positions
        wanted = wanted[1:] if wanted[0] == 0 else wanted  # position 0 depends on nothing
        first, self.stop = min(wanted[0] - 1, window.changed), wanted[-1]
        self.at = slice(first, self.stop)
        self.out = slice(wanted[0] - 1 - first, None, wanted.step)
        self.causal = first == 0
        self.mask = None if first in (0, self.stop - 1) else index[: self.stop] <= index[self.at, None]


class Attention(nn.Module):
    """Causal self-attention, with keys and values in fixed storage while it decodes."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.heads = channels // HEAD_DIM
        self.norm = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(
        self, x: Tensor, cache: _Cache | None = None, read: _Read | None = None, temp: Tensor | None = None
    ) -> Tensor:
        # x: (B, T, C); temp: (B, 1, 1, 1), the attention temperature of each row
        qkv = self.qkv(_layer_norm(self.norm, x)).unflatten(2, (3 * self.heads, HEAD_DIM)).transpose(1, 2)
        q, k, v = qkv.chunk(3, dim=1)
        if temp is not None:
            q = (q / temp).to(q.dtype)
        mask, causal = None, True
        if cache is not None and read is not None:
            k, v = cache.write(read.at, read.stop, k, v)
            mask, causal = read.mask, read.causal
        y: Tensor = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=HEAD_DIM**-0.5)
        return self.proj(y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class MLP(nn.Module):
    """Two linear layers around a GELU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.main = nn.Sequential(nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.main(_layer_norm(self.norm, x))  # type: ignore[no-any-return]


class AttentionBlock(nn.Module):
    """A transformer layer."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.attention = Attention(channels)
        self.mlp = MLP(channels)

    def forward(
        self, x: Tensor, cache: _Cache | None = None, read: _Read | None = None, temp: Tensor | None = None
    ) -> Tensor:
        x = x + self.attention(x, cache, read, temp)
        return x + self.mlp(x)  # type: ignore[no-any-return]


class MetaBlock(nn.Module):
    """One block of the flow: an affine autoregressive transform whose a and b are a causal transformer's."""

    def __init__(
        self, patch_dim: int, channels: int, num_patches: int, num_layers: int, flip: bool, nvp: bool, num_classes: int
    ) -> None:
        super().__init__()
        self.flip, self.nvp = flip, nvp
        self.proj_in = nn.Linear(patch_dim, channels)
        self.pos_embed = nn.Parameter(torch.randn(num_patches, channels) * 1e-2)
        self.class_embed = nn.Parameter(torch.randn(num_classes, 1, channels) * 1e-2) if num_classes else None
        self.attn_blocks = nn.ModuleList(AttentionBlock(channels) for _ in range(num_layers))
        self.proj_out = nn.Linear(channels, patch_dim * (2 if nvp else 1))
        nn.init.zeros_(self.proj_out.weight)

    def permuted(self, x: Tensor, dim: int = 1) -> Tensor:
        """x in the block's order, and back: every second block reads the patches from last to first."""
        return x.flip(dim) if self.flip else x

    def condition(self, y: Tensor | None) -> Tensor | None:
        """The class embedding, shape (B or 1, 1, C): their mean where y is None or negative; None without classes."""
        if self.class_embed is None:
            return None
        mean = self.class_embed.mean(0, keepdim=True)
        y = None if y is None else y.to(mean.device)
        return mean if y is None else torch.where((y < 0)[:, None, None], mean, self.class_embed[y.clamp(min=0)])

    def affine(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """(a, b) for the position after each, from the transformer's output."""
        out = self.proj_out(h)
        out = out.to(torch.promote_types(out.dtype, torch.float32))
        a, b = out.chunk(2, dim=-1) if self.nvp else (torch.zeros_like(out), out)
        return a, b

    def forward(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """z, shape (B, L, D), and the log-determinant, shape (B,)."""
        x = self.permuted(x)
        h = self.proj_in(x.to(self.proj_in.weight.dtype)) + self.permuted(self.pos_embed, 0)
        if (condition := self.condition(y)) is not None:
            h = h + condition
        for block in self.attn_blocks:
            h = block(h)
        a, b = (F.pad(s[:, :-1], (0, 0, 1, 0)) for s in self.affine(h))
        return self.permuted((x - b) * (-a).exp()), -a.sum((1, 2))


class Guidance:
    """How conditional and unconditional predictions combine (TarFlow, section on guidance).

    Attributes:
        scale: w in a_c + w (a_c - a_u); 0 leaves the unconditional pass out.
        what: which of "a" and "b" are guided.
        annealed: let w rise linearly over the positions, from 0 at the first to `scale` at the last.
        attn_temp: attention temperature of the unconditional branch.
    """

    def __init__(self, scale: float = 0.0, what: str = "ab", annealed: bool = False, attn_temp: float = 1.0) -> None:
        if not math.isfinite(scale) or scale < 0:
            raise ValueError(f"guidance is {scale}, expected a finite number >= 0")
        if set(what) - set("ab"):
            raise ValueError(f"guide_what is {what!r}, expected 'a', 'b', 'ab' or ''")
        if not (math.isfinite(attn_temp) and attn_temp > 0):
            raise ValueError(f"attn_temp is {attn_temp}, expected a finite number > 0")
        self.scale, self.what, self.annealed, self.attn_temp = scale, what, annealed, attn_temp

    def __bool__(self) -> bool:
        return self.scale > 0 and bool(self.what)

    def combine(self, a: Tensor, b: Tensor, positions: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """(2 B, W, D) -> (B, W, D): the conditional rows come first."""
        (a, a_u), (b, b_u) = a.chunk(2), b.chunk(2)
        w = self.scale * positions[:, None].to(a) / (length - 1) if self.annealed else self.scale
        return (a + w * (a - a_u) if "a" in self.what else a), (b + w * (b - b_u) if "b" in self.what else b)


class _BlockSystem(TriangularSystem):
    """The inverse of one block: x_l = z_l exp(a_l(x_<l)) + b_l(x_<l), in the block's order."""

    def __init__(self, block: MetaBlock, z: Tensor, y: Tensor | None, guidance: Guidance) -> None:
        self.block, self.z, self.guidance = block, z, guidance  # z: (B, L, D)
        self.index = torch.arange(z.shape[1], device=z.device)
        self.caches = [_Cache(z.shape[1]) for _ in block.attn_blocks]
        self.pos_embed = block.permuted(block.pos_embed, 0)
        self.condition, self.temp = block.condition(y), None
        if guidance:
            if self.condition is not None:
                both = self.condition, block.condition(None)
                self.condition = torch.cat([c.expand(len(z), -1, -1) for c in both if c is not None])
            if guidance.attn_temp != 1:
                temps = z.new_tensor([1.0, guidance.attn_temp])
                self.temp = temps.repeat_interleave(len(z))[:, None, None, None]

    @property
    def length(self) -> int:
        return self.z.shape[1]

    def initial(self) -> Tensor:
        return self.z

    def evaluate(self, x: Tensor, window: Window) -> Tensor:
        z = self.z[:, window.at]
        if window.positions[-1] == 0:  # the first position depends on nothing
            return z
        read = _Read(window, self.index)
        h = self.block.proj_in(x[:, read.at].to(self.block.proj_in.weight.dtype))
        if self.guidance:
            h = h.repeat(2, 1, 1)
        h = h + self.pos_embed[read.at]
        if self.condition is not None:
            h = h + self.condition
        for block, cache in zip(self.block.attn_blocks, self.caches, strict=True):
            h = block(h, cache, read, self.temp)
        a, b = self.block.affine(h[:, read.out])
        if self.guidance:
            at = self.index[window.at]
            a, b = self.guidance.combine(a, b, at[at > 0], self.length)
        if window.positions[0] == 0:
            a, b = (F.pad(s, (0, 0, 1, 0)) for s in (a, b))
        return (z * a.exp() + b).to(x.dtype)


class _FlowSystem(LayeredSystem):
    """Sampling: the inverses of the blocks, the last block first."""

    def __init__(self, flow: "TarFlow", z: Tensor, y: Tensor | None, guidance: Guidance) -> None:
        self.flow, self.z, self.y, self.guidance = flow, z, y, guidance

    @property
    def depth(self) -> int:
        return len(self.flow.blocks)

    def _block(self, index: int) -> MetaBlock:
        return self.flow.blocks[self.depth - 1 - index]  # type: ignore[return-value]

    def layer(self, index: int, value: Tensor | None) -> TriangularSystem:
        x = self.z * self.flow.var.sqrt().to(self.z) if value is None else self._block(index - 1).permuted(value)
        block = self._block(index)
        return _BlockSystem(block, block.permuted(x), self.y, self.guidance)

    def output(self, value: Tensor) -> Tensor:
        return self.flow.unpatchify(self._block(self.depth - 1).permuted(value))


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
    ) -> LayeredSystem:
        """Sampling from z, for `pd.solve`; `Solution.value` then holds images. See `sample` for the arguments.

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
        return _FlowSystem(self, z, y, Guidance(guidance, guide_what, annealed_guidance, attn_temp))

    @torch.no_grad()
    def sample(
        self,
        n: int | None = None,
        *,
        z: Tensor | None = None,
        y: Tensor | Sequence[int] | int | None = None,
        guidance: float = 0.0,
        guide_what: str = "ab",
        annealed_guidance: bool = False,
        attn_temp: float = 1.0,
        schedule: Schedule | Selective | str = "selective",
        tol: float | None = None,
        denoise: bool = False,
        generator: torch.Generator | None = None,
        progress: bool = False,
        return_solution: bool = False,
    ) -> Tensor | tuple[Tensor, Solution]:
        """Draw images.

        Args:
            n: how many; may be left out where z or a tensor y says it.
            z: the noise to start from, shape (B, L, D); drawn from a standard normal by default.
            y: classes, shape (B,), or one for all; negative or None for the unconditional branch.
            guidance: strength of guidance, by a conditional and an unconditional pass in one doubled batch; 0 for none.
            guide_what: which of the transform's "a" (log-scale) and "b" (shift) are guided.
            annealed_guidance: let the strength rise linearly over the positions.
            attn_temp: attention temperature of the unconditional branch.
            schedule: see `pd.solve`; the default is the paper's, the first block sequential and the others Jacobi.
            tol: see `pd.solve`; under bfloat16 or float16 the default is the machine epsilon of that type.
            denoise: take one gradient step of the log-likelihood, which removes the noise of training; needs `noise_std`.
            generator: for the noise.
            progress: show a bar.
            return_solution: also return the `pd.Solution`.

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
        if z is None:
            dtype = torch.promote_types(self.var.dtype, torch.float32)
            z = torch.randn(rows.pop(), *self.var.shape, generator=generator, dtype=dtype, device=self.var.device)
        if isinstance(y, int):
            labels = torch.full((len(z),), y)
        system = self.system(
            z,
            y=labels,
            guidance=guidance,
            guide_what=guide_what,
            annealed_guidance=annealed_guidance,
            attn_temp=attn_temp,
        )
        if tol is None:
            tol = _low_precision_tol(self.var)
        solution = solve(system, schedule, tol=tol, progress=progress)
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
            config = _folder_config(path) | config
            path = path / "model.safetensors"
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} does not exist: give a .pth or .safetensors file, or a folder that holds one"
            )
        state = _load(path)
        flow = cls(**_config(state, config.get("in_channels"), path) | config)
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
    with as_file(files("parallel_decode") / "assets" / "digits") as folder:
        return TarFlow.from_checkpoint(folder)


def _without_masks(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for key in [key for key in state if key.startswith(prefix) and key.endswith(".attn_mask")]:
        del state[key]


def _low_precision_tol(like: Tensor) -> float | None:
    """Two evaluations of the same thing differ by about the machine epsilon of the type that they are computed in."""
    device = like.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else like.dtype
    return torch.finfo(dtype).eps if dtype in (torch.bfloat16, torch.float16) else None


def _load(path: Path) -> dict[str, Tensor]:
    try:
        state = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{path} cannot be read as a checkpoint, it may be damaged or of another kind: {reason}"
        ) from None
    if not isinstance(state, dict) or "var" not in state or "blocks.0.proj_in.weight" not in state:
        raise ValueError(f"{path} is not a TarFlow checkpoint: it has no 'var' and 'blocks.0.proj_in.weight'")
    return state


def _folder_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} is a folder without config.json, expected one that save_pretrained wrote")
    try:
        config = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} cannot be read, it may be damaged: {error}") from None
    known = set(inspect.signature(TarFlow.__init__).parameters) - {"self"}
    if not isinstance(config, dict) or not config.keys() <= known:
        raise ValueError(f"{path} is not the configuration of a TarFlow, which holds {', '.join(sorted(known))}")
    return config


def _config(state: dict[str, Tensor], in_channels: int | None, path: Path) -> dict[str, Any]:
    """The arguments of TarFlow, from the shapes of its weights."""
    length, dim = state["var"].shape
    candidates = [in_channels] if in_channels else [3, 1]
    fitting = [c for c in candidates if dim % c == 0 and math.isqrt(dim // c) ** 2 == dim // c]
    if not fitting:
        raise ValueError(
            f"{path} has patches of {dim} values, no square of {candidates} channels: pass another in_channels"
        )
    patch_size = math.isqrt(dim // fitting[0])
    classes = state.get("blocks.0.class_embed")
    return {
        "in_channels": fitting[0],
        "img_size": math.isqrt(length) * patch_size,
        "patch_size": patch_size,
        "channels": state["blocks.0.proj_in.weight"].shape[0],
        "num_blocks": 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks.")),
        "layers_per_block": 1 + max(int(key.split(".")[3]) for key in state if key.startswith("blocks.0.attn_blocks.")),
        "nvp": state["blocks.0.proj_out.weight"].shape[0] == 2 * dim,
        "num_classes": 0 if classes is None else classes.shape[0],
    }
