"""Images in a grid, and as files."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.image import imsave
from numpy.typing import NDArray
from torch import Tensor

from parallel_decode._outputs import aside


def grid(images: Tensor, columns: int) -> NDArray[np.float32]:
    """Images (B, C, H, W) in [-1, 1] as one, a pixel apart, (height, width) or with 3 channels last, in [0, 1]."""
    images = ((images.float().cpu() + 1) / 2).clamp(0, 1)
    if len(images) > 1:
        images = F.pad(images, (1, 1, 1, 1), value=0.5)
    rows = -(-len(images) // columns)
    filled = torch.cat([images, images.new_zeros(rows * columns - len(images), *images.shape[1:])])
    tiled = filled.reshape(rows, columns, *images.shape[1:]).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    array: NDArray[np.float32] = (tiled[..., 0] if tiled.shape[-1] == 1 else tiled[..., :3]).numpy()
    return array


def save(path: Path, images: Tensor, columns: int) -> None:
    """Write them as a PNG."""
    with aside(path) as part:
        imsave(part, grid(images, columns), format="png", cmap="gray", vmin=0, vmax=1)
