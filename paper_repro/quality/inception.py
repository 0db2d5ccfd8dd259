"""The Inception network that the Frechet inception distance is defined by (arXiv 1512.00567, as of 2015-12-05).

It is the graph of the published TensorFlow weights and not torchvision's: means leave the padding out, and the last
block takes a maximum where the others take a mean. The names are those of the published file.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Kernel = int | tuple[int, int]
Spec = tuple[int, Kernel] | tuple[int, Kernel, int]  # output channels, kernel, stride
Step = str | Spec | list[Spec]  # a pool by name, a convolution, or convolutions side by side

ROW, COLUMN = (1, 7), (7, 1)
POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False),
    "max": partial(F.max_pool2d, kernel_size=3, stride=1, padding=1),
    "halve": partial(F.max_pool2d, kernel_size=3, stride=2),
}


class Convolution(nn.Module):
    """A convolution, batch normalisation with stored statistics, and a rectifier; it keeps the size at stride 1."""

    def __init__(self, inputs: int, outputs: int, kernel: Kernel, stride: int = 1, *, keeps_size: bool = True) -> None:
        super().__init__()
        height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (height // 2, width // 2) if keeps_size and stride == 1 else (0, 0)
        self.conv = nn.Conv2d(inputs, outputs, (height, width), stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """Branches side by side, their channels concatenated.

    A branch is a chain of steps. Its convolutions are named `branch` where it has one, else `branch_1`, `branch_2`, ...
    and `branch_3a`, `branch_3b` where they are side by side.
    """

    def __init__(self, inputs: int, branches: dict[str, list[Step]]) -> None:
        super().__init__()
        self.branches = [self._branch(inputs, name, steps) for name, steps in branches.items()]

    def _branch(self, channels: int, name: str, steps: list[Step]) -> list[Sequence[Callable[[Tensor], Tensor]]]:
        chain: list[Sequence[Callable[[Tensor], Tensor]]] = []
        number, single = 0, sum(not isinstance(step, str) for step in steps) == 1
        for step in steps:
            if isinstance(step, str):
                chain.append([POOLS[step]])
                continue
            number += 1
            specs = step if isinstance(step, list) else [step]
            letters = "ab" if isinstance(step, list) else [""]
            modules = [Convolution(channels, *spec) for spec in specs]
            for module, letter in zip(modules, letters, strict=True):
                self.add_module(name if single else f"{name}_{number}{letter}", module)
            chain.append(modules)
            channels = sum(spec[0] for spec in specs)
        return chain

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for chain in self.branches:
            y = x
            for parallel in chain:
                y = torch.cat([function(y) for function in parallel], 1)
            outputs.append(y)
        return torch.cat(outputs, 1)


def _at_35(inputs: int, pooled: int) -> Mixed:
    return Mixed(
        inputs,
        {
            "branch1x1": [(64, 1)],
            "branch5x5": [(48, 1), (64, 5)],
            "branch3x3dbl": [(64, 1), (96, 3), (96, 3)],
            "branch_pool": ["mean", (pooled, 1)],
        },
    )


def _at_17(c: int) -> Mixed:
    return Mixed(
        768,
        {
            "branch1x1": [(192, 1)],
            "branch7x7": [(c, 1), (c, ROW), (192, COLUMN)],
            "branch7x7dbl": [(c, 1), (c, COLUMN), (c, ROW), (c, COLUMN), (192, ROW)],
            "branch_pool": ["mean", (192, 1)],
        },
    )


def _at_8(inputs: int, pool: str) -> Mixed:
    fork: Step = [(384, (1, 3)), (384, (3, 1))]
    return Mixed(
        inputs,
        {
            "branch1x1": [(320, 1)],
            "branch3x3": [(384, 1), fork],
            "branch3x3dbl": [(448, 1), (384, 3), fork],
            "branch_pool": [pool, (192, 1)],
        },
    )


class Network(nn.Module):
    """From images (N, 3, 299, 299), of which 128 is subtracted and that are divided by 128, to features (N, 2048)."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Convolution(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = Convolution(32, 32, 3, keeps_size=False)
        self.Conv2d_2b_3x3 = Convolution(32, 64, 3)
        self.Conv2d_3b_1x1 = Convolution(64, 80, 1)
        self.Conv2d_4a_3x3 = Convolution(80, 192, 3, keeps_size=False)
        self.Mixed_5b = _at_35(192, 32)
        self.Mixed_5c = _at_35(256, 64)
        self.Mixed_5d = _at_35(288, 64)
        self.Mixed_6a = Mixed(
            288,
            {"branch3x3": [(384, 3, 2)], "branch3x3dbl": [(64, 1), (96, 3), (96, 3, 2)], "pool": ["halve"]},
        )
        self.Mixed_6b = _at_17(128)
        self.Mixed_6c = _at_17(160)
        self.Mixed_6d = _at_17(160)
        self.Mixed_6e = _at_17(192)
        self.Mixed_7a = Mixed(
            768,
            {
                "branch3x3": [(192, 1), (320, 3, 2)],
                "branch7x7x3": [(192, 1), (192, ROW), (192, COLUMN), (192, 3, 2)],
                "pool": ["halve"],
            },
        )
        self.Mixed_7b = _at_8(1280, "mean")
        self.Mixed_7c = _at_8(2048, "max")

    def forward(self, x: Tensor) -> Tensor:
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(POOLS["halve"](x)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(POOLS["halve"](x))))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        return self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x))).mean((2, 3))  # type: ignore[no-any-return]
