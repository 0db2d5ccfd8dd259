"""Dead leaves: images drawn by a model of how natural images come about."""

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from paper_repro.data.images import HELD_OUT_SEED, drawn_reference

SMALLEST, LARGEST = 1.0, 16.0
"""Radii of the discs, in pixels."""
DISCS = 384
"""Discs that are drawn at once: fewer take more rounds, and more end up hidden behind others."""


class Leaves:
    """Colour images (3, 32, 32) of discs that occlude each other, as leaves on the ground do.

    The radii follow the power law r^-3, whose images look the same at every scale; with sharp edges between even
    regions, they share the heavy-tailed differences of neighbouring pixels and the power spectrum, falling about as the
    inverse square of the frequency, of natural images. Colours are uniform and independent.

    References:
        Lee, Mumford and Huang, Occlusion Models for Natural Images: A Statistical Study of a Scale-Invariant Dead
        Leaves Model, International Journal of Computer Vision 41 (2001).

    >>> images, labels = Leaves().batch(2, torch.Generator().manual_seed(0))
    >>> images.shape, labels
    (torch.Size([2, 3, 32, 32]), None)
    """

    img_size, in_channels, num_classes = 32, 3, 0

    def __init__(self, root: Path | None = None) -> None:
        """`root` is not read: nothing is stored."""

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, None]:
        """`size` images (size, 3, 32, 32)."""
        return torch.stack([self._image(generator) for _ in range(size)]), None

    def held_out(self) -> tuple[Tensor, None]:
        """256 others."""
        return self.batch(256, torch.Generator().manual_seed(HELD_OUT_SEED))

    def reference(self, batch_size: int) -> Iterator[Tensor]:
        """2,048 others again, by batches (B, 3, 32, 32)."""
        return drawn_reference(self, batch_size)

    def _image(self, generator: torch.Generator) -> Tensor:
        """One image, drawn front to back: a point has the colour of the first disc that covers it.

        Each pixel is the mean of four points, so that edges are smooth.
        """
        fine = 2 * self.img_size
        line = (torch.arange(fine) + 0.5) / 2  # in pixels
        points = torch.cartesian_prod(line, line)
        colours = torch.empty(fine * fine, 3)
        bare = torch.arange(fine * fine)  # the points that no disc covers yet
        while len(bare):
            radius, down, right, *colour = torch.rand(6, DISCS, generator=generator)
            radius = SMALLEST / (1 - radius * (1 - (SMALLEST / LARGEST) ** 2)).sqrt()  # of density r^-3
            centre = torch.stack([down, right], 1) * (self.img_size + 2 * LARGEST) - LARGEST
            reaches = ((centre + radius[:, None] > 0) & (centre - radius[:, None] < self.img_size)).all(1)
            covers = torch.cdist(points[bare], centre[reaches]) < radius[reaches]  # (points, discs)
            covered = covers.any(1)
            first = covers[covered].byte().argmax(1)
            colours[bare[covered]] = torch.stack(colour, 1)[reaches][first] * 2 - 1
            bare = bare[~covered]
        return F.avg_pool2d(colours.T.reshape(1, 3, fine, fine), 2)[0]
