"""Grids of images."""

from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure
from torch import Tensor


def grid(rows: Mapping[str, Tensor], path: Path, title: str) -> None:
    """One line of images (N, C, H, W) in [-1, 1] for each name."""
    count = max(len(images) for images in rows.values())
    figure = Figure(figsize=(1.5 + count, 1.05 * len(rows) + 0.4), layout="constrained")
    axes = figure.subplots(len(rows), count, squeeze=False)
    for line, (name, images) in zip(axes, rows.items(), strict=True):
        for one in line:
            one.set_axis_off()
        for one, image in zip(line, images.detach().float().cpu(), strict=False):
            shown = ((image + 1) / 2).nan_to_num(0.5).clamp(0, 1).permute(1, 2, 0).numpy()
            one.imshow(shown[..., 0] if shown.shape[-1] == 1 else shown, cmap="gray", vmin=0, vmax=1)
        line[0].text(-0.15, 0.5, name, transform=line[0].transAxes, ha="right", va="center", fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110)
