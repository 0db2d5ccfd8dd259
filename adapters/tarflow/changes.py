"""What somebody changed in a flow: hooks, wrappers, replaced modules.

Decoding takes the weights out of modules that are as this package built them, which is faster than calling them. A layer in which anything
was changed is called as it is; what decoding never calls (a whole block, the flow) may not be changed.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from parallel_decode.cached import KeyValueStorage, Reads
from parallel_decode.window import Window

if TYPE_CHECKING:
    from parallel_decode.adapters.tarflow.flow import TarFlow
    from parallel_decode.adapters.tarflow.model import MetaBlock

Kind = TypeVar("Kind", bound=type[nn.Module])
_FORWARDS: dict[type[nn.Module], Callable[..., Any]] = {
    kind: kind.forward for kind in (nn.Linear, nn.Sequential, nn.GELU)
}
_POSITIONS = 8  # that changed modules are tried on


def built(kind: Kind) -> Kind:
    """Register a class of the modules that this package builds, with its forward as it is now."""
    _FORWARDS[kind] = kind.forward
    return kind


def as_built(module: nn.Module, kinds: Sequence[type[nn.Module]]) -> bool:
    """Whether a module and those inside it are of these types, in this order, and unchanged."""
    modules = _inside(module)
    return [*map(type, modules)] == [*kinds] and all(map(_unchanged, modules))


def _inside(module: nn.Module) -> list[nn.Module]:
    """As `module.modules()`, in a quarter of the time, which every call of `sample` takes."""
    found = [module]
    for child in module._modules.values():
        found += () if child is None else _inside(child)
    return found


def uncompiled(module: nn.Module) -> nn.Module:
    """What `torch.compile` wraps, which computes the same."""
    inner = getattr(module, "_orig_mod", module)
    return module if _hooked(module) else inner


def _unchanged(module: nn.Module) -> bool:
    forward = getattr(module.forward, "__func__", None)  # that of the instance, which may have one of its own
    if forward is None or forward is not _FORWARDS.get(type(module)) or _hooked(module):
        return False
    if isinstance(module, nn.GELU):
        return module.approximate == "none"
    if isinstance(
        module, (nn.Linear, nn.LayerNorm)
    ):  # with a bias, and no subclass of Tensor, which may compute otherwise
        return [*map(type, module._parameters.values())] == [nn.Parameter, nn.Parameter]
    return True


def _hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or _has_any_global_hook()  # type: ignore[no-untyped-call]
    )


def check_called(flow: nn.Module, blocks: Iterable[nn.Module]) -> None:
    """Raise a ValueError if the flow or one of its blocks was changed, which sampling inverts without calling it."""
    if _hooked(flow) or "forward" in vars(flow):
        raise ValueError(
            "the flow has hooks, or a forward that was replaced: sampling inverts its blocks without calling it. Remove them "
            "to draw samples (of torch.nn.modules.module for global hooks; accelerate: unwrap_model(flow, keep_fp32_wrapper=False))"
        )
    for index, block in enumerate(blocks):
        if not _unchanged(uncompiled(block)):
            raise ValueError(
                f"block {index} is a {type(block).__name__} with hooks or a forward of its own: sampling inverts a block without "
                "calling it. Change modules inside of it, which are called, or remove this to draw samples"
            )


def check_decodable(flow: "TarFlow") -> None:
    """Raise a ValueError if samples would not be the inverse of `forward` as it is now."""
    check_called(flow, flow.blocks)
    for index, block in enumerate(flow.blocks):
        block = cast("MetaBlock", block)
        with torch.autocast(flow.var.device.type, enabled=False):
            decodable = not block.changed() or _decodes_as_forward(block, flow.var.shape[1])
        if not decodable:
            raise ValueError(
                f"modules of block {index} were changed, and give a position other values when it is read by itself than among "
                "all: they are random (dropout: call flow.eval()), or mix positions or rows (dynamic quantisation, batch "
                "normalisation), or keep no cache. Decoding in parallel needs functions of each position"
            )


@torch.no_grad()
def _decodes_as_forward(block: "MetaBlock", dim: int) -> bool:
    """Whether windows of one row give what a forward over two rows gives, on a few positions of noise."""
    like, storage, size = block.pos_embed, KeyValueStorage(), min(_POSITIONS, len(block.pos_embed))
    if size < 2:  # nothing is read
        return True
    x = torch.randn(2, size, dim, generator=torch.Generator().manual_seed(0)).to(like)
    x[1], x[0, size // 2 :] = 10 * x[1], 10 * x[0, size // 2 :]  # so that a range over several of them would differ
    reads = Reads(Window.full(size), size)
    whole = torch.stack(block.affine(reads.take(x), block.weights(None), reads))[:, :1]
    weights, parts = block.weights(None, like.dtype), []
    for positions in (range(size // 2), range(size // 2, size)):
        known = storage.claim(block, inputs=size)
        reads = Reads.of(Window(positions, positions.start), size, known=known, device=like.device)
        parts.append(torch.stack(block.affine(reads.take(x[:1]), weights, reads, storage)))
    atol = torch.finfo(like.dtype).eps ** 0.5 * (1 + float(whole.nan_to_num().abs().max()))
    return torch.allclose(torch.cat(parts, 2), whole, rtol=0, atol=atol, equal_nan=True)
