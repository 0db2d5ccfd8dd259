"""A small TarFlow, and what to draw from it."""

from typing import Any

import torch
from torch import Tensor

from parallel_decode.adapters.tarflow import TarFlow


def flow(nvp: bool = True, num_classes: int = 0, **options: Any) -> TarFlow:
    """A small flow whose weights are random enough to make every position depend on those before."""
    torch.manual_seed(0)
    made = TarFlow(1, 8, 2, 64, 3, 2, nvp=nvp, num_classes=num_classes, **options)
    for name, p in made.named_parameters():
        torch.nn.init.normal_(p, std=0.03 if "proj_out" in name else 0.15)
    made.var.uniform_(0.5, 2)
    return made.double()


def noise(batch: int = 3) -> Tensor:
    return torch.randn(batch, 16, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def labels(num_classes: int) -> Tensor | None:
    return torch.tensor([0, -1, 2]) if num_classes else None


class Evil:
    """Its pickle would run code."""

    def __reduce__(self) -> Any:
        return (print, ("code from a pickle ran",))
