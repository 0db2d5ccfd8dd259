"""Labelled crops of the photographs that come with scikit-image and scikit-learn.

Shapes: B crops of 3 channels and H x W pixels.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

SHORT, LEAST, MOST = 320, 64, 192  # pixels: a photograph's shorter side, and the side of a crop
HELD_OUT = 0.25  # of a photograph's width, at its right
Draw = Callable[[int, torch.Generator], tuple[Tensor, Tensor]]
# of the classes, as captions say them
NAMES = "an astronaut", "a cat", "coffee", "a rocket", "a motorcycle", "galaxies", "tissue", "a retina", "a temple", "a flower"  # fmt: skip


def photographs() -> list[Tensor]:
    """Ten of them, in the order of their classes, each (3, H, W) in [-1, 1]."""
    from skimage import data
    from sklearn.datasets import load_sample_images

    pictures = [data.astronaut(), data.chelsea(), data.coffee(), data.rocket(), data.stereo_motorcycle()[0]]
    pictures += [data.hubble_deep_field(), data.immunohistochemistry(), data.retina(), *load_sample_images().images]
    tensors = (torch.from_numpy(picture.copy()).permute(2, 0, 1) / 127.5 - 1 for picture in pictures)
    return [_resized(picture, SHORT / min(picture.shape[1:])) for picture in tensors]


def crops(pictures: list[Tensor], size: int = 64, held_out: bool = False) -> Draw:
    """A function of B and a generator, to crops (B, 3, size, size) and their classes (B,).

    Places and scales are random, and half of the crops are mirrored. The right quarter of each picture is held out.

    Args:
        pictures: each (3, H, W).
        size: of a crop, in pixels.
        held_out: draw from that quarter, in place of the rest.

    Example:
        >>> draw = crops([torch.rand(3, 320, 400)])
        >>> [part.shape for part in draw(2, torch.Generator().manual_seed(0))]
        [torch.Size([2, 3, 64, 64]), torch.Size([2])]
    """
    borders = [round((1 - HELD_OUT) * picture.shape[2]) for picture in pictures]
    pairs = zip(pictures, borders, strict=True)
    regions = [picture[:, :, border:] if held_out else picture[:, :, :border] for picture, border in pairs]

    def draw(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        classes = torch.randint(len(regions), (count,), generator=generator)
        return torch.stack([_crop(regions[label], size, generator) for label in classes.tolist()]), classes

    return draw


def _crop(region: Tensor, size: int, generator: torch.Generator) -> Tensor:
    scale, down, right, mirrored = torch.rand(4, generator=generator).tolist()
    side = round(LEAST * (min(MOST, *region.shape[1:]) / LEAST) ** scale)
    top, left = int(down * (region.shape[1] - side + 1)), int(right * (region.shape[2] - side + 1))
    crop = _resized(region[:, top : top + side, left : left + side], size / side)
    return crop.flip(2) if mirrored < 0.5 else crop


def _resized(picture: Tensor, scale: float) -> Tensor:
    size = [round(scale * side) for side in picture.shape[1:]]
    return F.interpolate(picture[None], size, mode="bilinear", antialias=True)[0].clamp(-1, 1)
