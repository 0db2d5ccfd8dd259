"""The flows of `scaling`: one factor varied at a time, and a size that is held out; images at any size.

Shapes: B images of a batch, C channels of an image, L positions.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from paper_repro.data import Images

FACTORS = ("resolution", "length", "width")


class Size(NamedTuple):
    """Of a flow.

    Attributes:
        side: height and width of an image, in pixels.
        patch: height and width of a patch, in pixels.
        channels: width of the transformers.
    """

    side: int
    patch: int
    channels: int

    @property
    def length(self) -> int:
        """L."""
        return (self.side // self.patch) ** 2

    @property
    def folder(self) -> str:
        """A name for its files."""
        return f"side{self.side}_patch{self.patch}_width{self.channels}"


class Sizes(NamedTuple):
    """The sizes of a scale.

    Attributes:
        base: what all others are varied from.
        varied: by factor, the sizes that differ from the base in that factor alone.
        held_out: beyond the base in every factor, and in no fit.
    """

    base: Size
    varied: dict[str, tuple[Size, ...]]
    held_out: Size

    def fitted(self) -> dict[Size, str]:
        """Each size that is fitted, and what is varied in it."""
        return {self.base: "base"} | {size: factor for factor, sizes in self.varied.items() for size in sizes}


SIZES = {
    "full": Sizes(
        Size(32, 2, 256),
        {
            "resolution": (Size(16, 1, 256), Size(64, 4, 256)),
            "length": (Size(32, 8, 256), Size(32, 4, 256)),
            "width": (Size(32, 2, 128), Size(32, 2, 512)),
        },
        Size(64, 2, 512),
    ),
    "quick": Sizes(
        Size(24, 4, 64),
        {
            "resolution": (Size(12, 2, 64), Size(48, 8, 64)),
            "length": (Size(24, 6, 64), Size(24, 3, 64), Size(24, 2, 64)),
            "width": (Size(24, 4, 128), Size(24, 4, 192)),
        },
        Size(48, 3, 128),
    ),
    "smoke": Sizes(
        Size(8, 2, 64),
        {"resolution": (Size(16, 4, 64),), "length": (Size(8, 4, 64),), "width": (Size(8, 2, 128),)},
        Size(16, 2, 128),
    ),
}


class Resized:
    """A data set at another size. Images that are scaled up show no more than they did.

    Args:
        images: the data set.
        img_size: height and width to give, in pixels.

    Example:
        >>> from paper_repro.data import Leaves
        >>> Resized(Leaves(), 8).batch(2, torch.Generator().manual_seed(0))[0].shape
        torch.Size([2, 3, 8, 8])
    """

    def __init__(self, images: Images, img_size: int) -> None:
        self.images, self.img_size = images, img_size
        self.in_channels, self.num_classes = images.in_channels, images.num_classes

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """`size` training images (size, C, img_size, img_size), and their labels (size,)."""
        x, y = self.images.batch(size, generator)
        return self._resized(x), y

    def held_out(self) -> tuple[Tensor, Tensor | None]:
        """The held-out images, and their labels."""
        x, y = self.images.held_out()
        return self._resized(x), y

    def reference(self, batch_size: int) -> Iterator[Tensor]:
        """The reference images (B, C, img_size, img_size)."""
        return map(self._resized, self.images.reference(batch_size))

    def _resized(self, x: Tensor) -> Tensor:
        return F.interpolate(x, (self.img_size, self.img_size), mode="bilinear", antialias=True)
