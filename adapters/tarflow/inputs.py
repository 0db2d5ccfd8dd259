"""What users hand to a flow: each function returns it as the flow takes it, or raises a ValueError (a TypeError for the wrong kind).

Shapes: B batch.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from parallel_decode._options import check_at_least_one

Labels = Tensor | Sequence[int] | NDArray[Any] | int
_INTEGERS = tuple(getattr(torch, f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64))
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def as_labels(y: Labels | None) -> Tensor | None:
    """Classes as int64, shape (B,), or () for one class of all."""
    if y is None:
        return None
    if isinstance(y, Tensor):
        labels = y
    else:
        try:
            array = np.asarray(y)
            labels = torch.from_numpy(
                array.astype(array.dtype.newbyteorder("="), order="C")
            )  # a copy, as torch takes it
        except (TypeError, ValueError, RuntimeError, OverflowError):
            raise ValueError(f"y is {y!r:.80}, expected a whole number, or a tensor or list of them") from None
    if labels.dtype not in _INTEGERS or labels.layout != torch.strided or labels.dim() > 1:
        raise ValueError(
            f"y is {labels.dtype} of shape {tuple(labels.shape)}, expected whole numbers of shape (batch,), or one number"
        )
    whole = labels.long()
    # beyond int64 they turn negative, which stands for no class
    return whole.clamp(min=0).where(whole >= 0, torch.iinfo(torch.int64).max) if labels.dtype == torch.uint64 else whole


def labels_of(y: Labels | None, batch: int, num_classes: int, device: torch.device) -> Tensor | None:
    """Classes as int64 of shape (B,), on the device of the flow."""
    labels = as_labels(y)
    if labels is None:
        return None
    if not num_classes:
        raise ValueError("y was given, and this flow has no classes: leave it out")
    if labels.shape not in ((), (batch,)):
        raise ValueError(
            f"y is {labels.dtype} of shape {tuple(labels.shape)}, expected whole numbers of shape ({batch},), or one number"
        )
    if labels.is_meta and device.type != "meta":
        raise ValueError(f"y is on the meta device, which holds no values, and the flow on {device}")
    if labels.numel() and readable(labels) and (largest := int(labels.max())) >= num_classes:
        raise ValueError(f"y holds class {largest}, expected numbers below {num_classes}, or negative for none")
    return labels.to(device).expand(batch)


def readable(value: Tensor) -> bool:
    """Whether values may be looked at: not while functions of them are transformed, compiled or captured."""
    if value.is_meta or torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    return not (value.is_cuda and torch.cuda.is_current_stream_capturing())


def check_floats(name: str, value: Any, shape: tuple[int, ...], device: torch.device) -> None:
    """Raise unless it is a tensor of floats, (B, *shape), on the device of the flow."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}, expected a tensor of shape {_batch(shape)}")
    if value.shape[1:] != shape or value.dim() != len(shape) + 1 or value.dtype not in FLOATS:
        raise ValueError(
            f"{name} is {value.dtype} of shape {tuple(value.shape)}, expected floats of shape {_batch(shape)}"
        )
    if value.device != device:
        raise ValueError(f"{name} is on {value.device} and the flow on {device}: move one of them")


def _batch(shape: tuple[int, ...]) -> str:
    return f"(batch, {', '.join(map(str, shape))})"


def standard_normal(n: Any, like: Tensor, generator: Any) -> Tensor:
    """Noise to start n samples from, (n, *like.shape), in float32 at least."""
    check_at_least_one("n", n)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(
            f"generator is {generator!r}, expected a torch.Generator, such as torch.Generator().manual_seed(0)"
        )
    if generator is not None and generator.device != like.device:
        raise ValueError(
            f"generator is on {generator.device} and the flow on {like.device}: make it by torch.Generator('{like.device}')"
        )
    dtype = torch.promote_types(like.dtype, torch.float32)
    if n * like.numel() * dtype.itemsize > torch.iinfo(torch.int64).max:
        raise ValueError(f"n is {n}, more samples than there are addresses for: draw fewer at a time")
    return torch.randn(n, *like.shape, generator=generator, dtype=dtype, device=like.device)


def native(value: Any) -> Any:
    """Numbers of numpy as Python's, which JSON can hold."""
    return value.item() if isinstance(value, np.generic) else value
