"""Training images in [-1, 1] with their labels."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor


@dataclass(frozen=True)
class Digits:
    """scikit-learn's 1797 handwritten digits (8 x 8), drawn at 16 x 16 under small random affine maps.

    Turning, scaling and shifting a digit a little leaves it the same digit, and keeps a flow from learning
    the few images by heart. Every tenth image is held out.
    """

    images: Tensor  # (N, 1, 8, 8) in [-1, 1]
    labels: Tensor  # (N,)
    held_out_images: Tensor
    held_out_labels: Tensor

    img_size, in_channels, num_classes = 16, 1, 10

    @classmethod
    def load(cls) -> "Digits":
        digits = load_digits()
        images = torch.from_numpy(digits.images).float()[:, None] / 8 - 1
        labels = torch.from_numpy(digits.target)
        held_out = torch.arange(len(labels)) % 10 == 9
        return cls(images[~held_out], labels[~held_out], images[held_out], labels[held_out])

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """`size` training images (size, 1, 16, 16), each under a random affine map, and their labels (size,)."""
        chosen = torch.randint(len(self.labels), (size,), generator=generator)
        draw = torch.rand(4, size, generator=generator) * 2 - 1
        angle, scale, shift = draw[0] * math.radians(8), 1 + 0.08 * draw[1], draw[2:] / 8
        return self._drawn(self.images[chosen], angle, scale, shift), self.labels[chosen]

    def held_out(self) -> tuple[Tensor, Tensor]:
        """The held-out images, upright, and their labels."""
        none = torch.zeros(len(self.held_out_labels))
        return self._drawn(self.held_out_images, none, none + 1, none.expand(2, -1)), self.held_out_labels

    def _drawn(self, images: Tensor, angle: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
        theta = torch.stack([torch.stack([cos, -sin, shift[0]], 1), torch.stack([sin, cos, shift[1]], 1)], 1)
        grid = F.affine_grid(theta, [len(images), 1, self.img_size, self.img_size], align_corners=False)
        drawn = F.grid_sample(images + 1, grid, mode="bicubic", padding_mode="zeros", align_corners=False)
        return drawn.clamp(0, 2) - 1
