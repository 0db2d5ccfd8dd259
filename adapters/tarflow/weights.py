"""The weights of a block as its forward takes them, and how they are prepared for decoding.

At small batches the time of a pass is that of calling its operations: prepared weights are in the type that is computed in, transposed where
that is faster, and called without modules around them. What somebody changed is called as it is (`changes.py`).

Shapes: N positions of all rows, B batch (twice that with guidance), L positions, C channels.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from parallel_decode.cached.graphs import Graphs

HEAD_DIM = 64
Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Weights:
    """The functions and embeddings of a block.

    Attributes:
        dtype: what is computed in.
        proj_in, proj_out: functions.
        layers: of the transformer, see `model.attend`.
        pos_embed: in the block's order, shape (L, C).
        condition: shape (B or 1, 1, C), or None.
        temperature: of each row's attention, shape (B, 1, 1, 1), or None.
    """

    dtype: torch.dtype
    proj_in: Function
    proj_out: Function
    layers: Sequence[Any]
    pos_embed: Tensor
    condition: Tensor | None
    temperature: Tensor | None = None
    size: ClassVar[int] = 0  # inputs before the first position

    def select(self, rows: Tensor) -> "Weights":
        """The same for some rows of the batch."""
        some = None if self.condition is None else self.condition[rows] if len(self.condition) > 1 else self.condition
        return replace(self, condition=some, temperature=None if self.temperature is None else self.temperature[rows])

    def kept(self, graphs: Graphs, name: Hashable) -> "Weights":
        """The same at the addresses that CUDA graphs have captured under this name."""
        layers = [function for layer in self.layers if isinstance(layer, tuple) for function in layer]
        prepared = [part for part in (self.proj_in, self.proj_out, *layers) if isinstance(part, (Linear, Norm))]
        tensors = [self.pos_embed, *(tensor for part in prepared for tensor in (part.weight, part.bias))]
        first, kept = graphs.first(name, (self, tensors))
        if [t.shape for t in kept] != [t.shape for t in tensors]:
            raise RuntimeError("modules were replaced or hooked to since the windows were captured: make a new system")
        for old, new in zip(kept, tensors, strict=True):
            if old.data_ptr() != new.data_ptr():
                old.copy_(new)
        rows = [
            None if value is None else graphs.keep((name, index), value)
            for index, value in enumerate((self.condition, self.temperature))
        ]
        return replace(first, condition=rows[0], temperature=rows[1])


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear module as this package built it, of prepared weights."""

    weight: Tensor  # (in, out)
    bias: Tensor

    @staticmethod
    def of(module: nn.Module, dtype: torch.dtype) -> "Linear":
        weight, bias = cast(Tensor, module.weight).to(dtype).t(), cast(Tensor, module.bias).to(dtype)
        if weight.device.type == "cpu":
            weight = weight.contiguous()  # up to twice as fast for few rows
        return Linear(weight, bias)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)

    def add_to(self, h: Tensor, x: Tensor) -> Tensor:
        """h + self(x); h is overwritten where it has the type of the weights and nothing is to be differentiated."""
        if not torch.is_grad_enabled() and h.dtype == self.weight.dtype:
            return h.addmm_(x, self.weight).add_(self.bias)
        return h + self(x)


@dataclass(frozen=True, slots=True)
class Norm:
    """A normalising module, likewise; in float32 at least, whatever the type of what goes in."""

    weight: Tensor
    bias: Tensor
    eps: float
    dtype: torch.dtype

    @staticmethod
    def of(module: nn.Module, dtype: torch.dtype) -> "Norm":
        weight, bias = cast(Tensor, module.weight), cast(Tensor, module.bias)
        wide = torch.promote_types(weight.dtype, torch.float32)
        return Norm(weight.to(wide), bias.to(wide), cast(float, module.eps), dtype)

    def __call__(self, h: Tensor) -> Tensor:
        wide = self.weight.dtype
        h = h if h.dtype == wide else h.to(wide)
        y = torch.layer_norm(h, self.weight.shape, self.weight, self.bias, self.eps)
        return y if self.dtype == wide else y.to(self.dtype)


@dataclass(frozen=True, slots=True)
class Called:
    """A module as it is, in `dtype`."""

    module: nn.Module
    dtype: torch.dtype

    def __call__(self, x: Tensor, *more: Any) -> Tensor:
        own = next((p.dtype for p in self.module.parameters() if p.is_floating_point()), self.dtype)
        with torch.autocast(x.device.type, self.dtype, enabled=own != self.dtype):
            return self.module(x, *more).to(self.dtype)  # type: ignore[no-any-return]
