"""Flows over the patches of images, conditioned on classes: `TarFlow` and `ITarFlow`.

Shapes: B batch, L positions, D values of a patch; of the last block where blocks differ.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel_decode.adapters.tarflow.base import Flow
from parallel_decode.adapters.tarflow.config import FlowConfig
from parallel_decode.adapters.tarflow.decoding import FlowSystem
from parallel_decode.adapters.tarflow.guidance import Guidance
from parallel_decode.adapters.tarflow.inputs import Labels, as_labels, check_floats, labels_of
from parallel_decode.adapters.tarflow.inverse import graphs_for
from parallel_decode.system import LayeredSystem


def fixed(name: str) -> Any:
    """An argument that the weights depend on: to be read and not to be set."""
    return property(lambda flow: getattr(flow.config, name))


class ImageFlow(Flow):
    """A flow over the patches of images.

    Attributes:
        var: of z, shape (L, D): learned where the blocks only shift.
        patch_sizes: of each block.
        input_scale: images are multiplied by it before the first block.
    """

    var: Tensor
    in_channels: int = fixed("in_channels")
    img_size: int = fixed("img_size")
    nvp: bool = fixed("nvp")
    num_classes: int = fixed("num_classes")
    patch_sizes: tuple[int, ...]
    input_scale: float = 1.0

    def __init__(self, config: FlowConfig, blocks: nn.ModuleList) -> None:
        super().__init__(config)
        self.blocks = blocks
        last: Any = blocks[-1]
        self.register_buffer("var", torch.ones(len(last.pos_embed), last.patch_dim))

    @property
    def noise_like(self) -> Tensor:
        return self.var

    @property
    def lengths(self) -> list[int]:
        return [len(block.pos_embed) for block in self.blocks]  # type: ignore[arg-type]

    def patchify(self, x: Tensor) -> Tensor:
        """Images (B, in_channels, img_size, img_size) to the patches that the first block takes, (B, L, D)."""
        return _patches(x, self.patch_sizes[0]) * self.input_scale

    def unpatchify(self, x: Tensor) -> Tensor:
        """Patches of the first block (B, L, D) to images (B, in_channels, img_size, img_size)."""
        return _image(x, self.patch_sizes[0], self.img_size) / self.input_scale

    def repatched(self, x: Tensor, at: int, to: int) -> Tensor:
        """The patches of one block as another takes them."""
        size, other = self.patch_sizes[at], self.patch_sizes[to]
        return x if size == other else _patches(_image(x, size, self.img_size), other)

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

    def conditions(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        """All classes in turn."""
        return {"y": torch.arange(n, device=self.var.device) % self.num_classes} if self.num_classes else {}

    def _as_given(self, options: Mapping[str, Any]) -> dict[str, Any]:
        return {**options, "y": as_labels(options.get("y"))}

    def _check_noise(self, z: Any) -> None:
        check_floats("z", z, tuple(self.var.shape), self.var.device)

    def _check_images(self, x: Any) -> None:
        check_floats("x", x, (self.in_channels, self.img_size, self.img_size), self.var.device)

    def _encoded(self, x: Tensor, y: Labels | None, *given: Tensor) -> tuple[Tensor, Tensor]:
        """z and log |det dz/dx|; `given` is what blocks are conditioned on besides classes."""
        self._check_images(x)
        y = labels_of(y, len(x), self.num_classes, x.device)
        x = self.patchify(x)
        logdet = x.new_full((len(x),), math.log(self.input_scale) * self.var.numel())
        for index, block in enumerate(self.blocks):
            x, term = block(self.repatched(x, index - 1, index) if index else x, y, *given)
            logdet = logdet + term
        return x, logdet

    def _system(
        self, z: Tensor, y: Labels | None, guidance: Guidance, compile: bool, t: Tensor | None = None
    ) -> LayeredSystem:
        z = self._noise(z)
        y = labels_of(y, len(z), self.num_classes, z.device)
        compile = compile and z.is_cuda and not any(block.changed() for block in self.transforms)
        graphs = graphs_for(self, z, y is None, *vars(guidance).values()) if compile else None
        return FlowSystem(self, z, y, guidance, graphs, t)


def _patches(x: Tensor, size: int) -> Tensor:
    """Images (B, C, H, W) to patches (B, L, C size^2)."""
    return F.unfold(x, size, stride=size).transpose(1, 2)


def _image(x: Tensor, size: int, img_size: int) -> Tensor:
    """Patches (B, L, C size^2) to images (B, C, img_size, img_size)."""
    return F.fold(x.transpose(1, 2), (img_size, img_size), size, stride=size)
