"""Images that come with Python packages, in [-1, 1], with their labels."""

import math
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from paper_repro.data.images import drawn_reference

# scikit-learn and scikit-image are imported when their images are asked for: the other sets do not need them.


class Digits:
    """scikit-learn's 1797 handwritten digits (8 x 8), drawn at 16 x 16 under small random affine maps.

    Turning, scaling and shifting a digit a little leaves it the same digit, and keeps a flow from learning
    the few images by heart. Every tenth image is held out.

    >>> images, labels = Digits().batch(2, torch.Generator().manual_seed(0))
    >>> images.shape, labels.shape
    (torch.Size([2, 1, 16, 16]), torch.Size([2]))
    """

    img_size, in_channels, num_classes = 16, 1, 10

    def __init__(self, root: Path | None = None) -> None:
        """`root` is not read: the images come with scikit-learn."""
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = torch.from_numpy(digits.images).float()[:, None] / 8 - 1  # (N, 1, 8, 8)
        labels = torch.from_numpy(digits.target)
        held_out = torch.arange(len(labels)) % 10 == 9
        self.images, self.labels = images[~held_out], labels[~held_out]
        self.held_out_images, self.held_out_labels = images[held_out], labels[held_out]

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

    def reference(self, batch_size: int) -> Iterator[Tensor]:
        """2,048 digits as `batch` draws them, the same at every call, by batches (B, 1, 16, 16)."""
        return drawn_reference(self, batch_size)

    def _drawn(self, images: Tensor, angle: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
        theta = torch.stack([torch.stack([cos, -sin, shift[0]], 1), torch.stack([sin, cos, shift[1]], 1)], 1)
        grid = F.affine_grid(theta, [len(images), 1, self.img_size, self.img_size], align_corners=False)
        drawn = F.grid_sample(images + 1, grid, mode="bicubic", padding_mode="zeros", align_corners=False)
        return drawn.clamp(0, 2) - 1


class Photographs:
    """32 x 32 crops of the photographs that come with scikit-image and scikit-learn, in colour, at random scales.

    There are seven: six to train on, and scikit-learn's flower is held out.
    """

    img_size, in_channels, num_classes = 32, 3, 0

    def __init__(self, root: Path | None = None) -> None:
        """`root` is not read: the images come with the packages."""
        from skimage import data as skimage_data
        from sklearn.datasets import load_sample_images

        china, flower = load_sample_images().images
        left, _, _ = skimage_data.stereo_motorcycle()
        ours = [
            skimage_data.astronaut(),
            skimage_data.chelsea(),
            skimage_data.coffee(),
            skimage_data.rocket(),
            left,
            china,
        ]
        self.photographs = [torch.from_numpy(p.copy()).permute(2, 0, 1).float() / 127.5 - 1 for p in ours]
        self.flower = torch.from_numpy(flower.copy()).permute(2, 0, 1).float() / 127.5 - 1

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, None]:
        """`size` crops (size, 3, 32, 32) of the training photographs."""
        chosen = torch.randint(len(self.photographs), (size,), generator=generator)
        return torch.stack([self._crop(self.photographs[i], generator) for i in chosen.tolist()]), None

    def held_out(self) -> tuple[Tensor, None]:
        """256 crops of the flower."""
        generator = torch.Generator().manual_seed(0)
        return torch.stack([self._crop(self.flower, generator) for _ in range(256)]), None

    def reference(self, batch_size: int) -> Iterator[Tensor]:
        """2,048 crops as `batch` draws them, the same at every call, by batches (B, 3, 32, 32)."""
        return drawn_reference(self, batch_size)

    def _crop(self, photograph: Tensor, generator: torch.Generator) -> Tensor:
        """A square of 32 to 256 pixels, drawn at 32 x 32, and mirrored half of the time."""
        scale, down, right, mirrored = torch.rand(4, generator=generator).tolist()
        side = round(32 * 8**scale)
        top, start = (
            int(share * (extent - side + 1)) for share, extent in zip((down, right), photograph.shape[1:], strict=True)
        )
        square = photograph[None, :, top : top + side, start : start + side]
        crop = F.interpolate(square, (32, 32), mode="area")[0]
        return crop.flip(2) if mirrored < 0.5 else crop
