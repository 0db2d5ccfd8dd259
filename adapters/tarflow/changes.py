"""What somebody changed in a flow: hooks, wrappers, replaced modules.

Decoding takes the weights out of modules that are as this package built them, which is faster than calling them. A layer in which anything
was changed is called as it is; what decoding never calls (a whole block, the flow) may not be changed.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from parallel_decode.cached import KeyValueStorage, Reads
from parallel_decode.window import Window

if TYPE_CHECKING:
    from parallel_decode.adapters.tarflow.base import Flow

Kind = TypeVar("Kind", bound=type[nn.Module])
_FORWARDS: dict[type[nn.Module], Callable[..., Any]] = {
    kind: kind.forward for kind in (nn.Linear, nn.Sequential, nn.ModuleList, nn.GELU, nn.Identity)
}
_POSITIONS = 8  # that changed modules are checked on


def built(kind: Kind) -> Kind:
    """Register a class of the modules that this package builds, with its forward as it is now."""
    _FORWARDS[kind] = kind.forward
    return kind


def as_built(module: nn.Module, kinds: Sequence[type[nn.Module]]) -> bool:
    """Whether a module and those inside it are of these types, in this order, and unchanged."""
    modules = _inside(module)
    complete = all(value is not None for each in modules for value in each._parameters.values())
    return [*map(type, modules)] == [*kinds] and complete and all(map(_unchanged, modules))


def unchanged(module: nn.Module) -> bool:
    """Whether a module and those inside it are of registered types, and unchanged."""
    return all(map(_unchanged, _inside(module)))


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
    if isinstance(module, (nn.Linear, nn.LayerNorm)):  # no subclass of Tensor, which may compute otherwise
        return {*map(type, module._parameters.values())} <= {nn.Parameter, type(None)}
    return True


def _hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or _has_any_global_hook()  # type: ignore[no-untyped-call]
    )


def check_decodable(flow: "Flow") -> None:
    """Raise a ValueError if samples would not be the inverse of `forward` as it is now."""
    if _hooked(flow) or "forward" in vars(flow):
        raise ValueError(
            "the flow has hooks, or a forward that was replaced: sampling inverts its blocks without calling it. Remove them "
            "to draw samples (of torch.nn.modules.module for global hooks; accelerate: unwrap_model(flow, keep_fp32_wrapper=False))"
        )
    for index, block in enumerate(flow.transforms):
        if not (_unchanged(uncompiled(block)) and hasattr(block, "affine")):
            raise ValueError(
                f"block {index} is a {type(block).__name__} with hooks or a forward of its own: sampling inverts a block without "
                "calling it. Change modules inside of it, which are called, or remove this to draw samples"
            )
        with torch.autocast(flow.noise_like.device.type, enabled=False):
            decodable = not block.changed() or _decodes_as_forward(block)
        if not decodable:
            raise ValueError(
                f"modules of block {index} were changed, and give a position other values when it is read by itself than among "
                "all: they are random (dropout: call flow.eval()), or mix positions or rows (dynamic quantisation, batch "
                "normalisation), or keep no cache. Decoding in parallel needs functions of each position"
            )


@torch.no_grad()
def _decodes_as_forward(block: Any) -> bool:
    """Whether windows of one row give what a forward over two rows gives, on a few positions of noise."""
    like, storage, given = next(block.parameters()), KeyValueStorage(), block.for_check(None)
    size = _POSITIONS if block.pos_embed is None else min(_POSITIONS, len(block.pos_embed))
    if size < 2:  # nothing is read
        return True
    prefix, middle = given.size, size // 2
    x = torch.randn(2, prefix + size, block.patch_dim, generator=torch.Generator().manual_seed(0)).to(like)
    x[1] *= 10  # so that a range over several of them would differ
    x[0, prefix + middle :] *= 10
    reads = Reads(Window.full(size), size, prefix, device=like.device)
    whole = torch.stack(block.affine(reads.take(x), given, reads))[:, :1]
    given, parts = block.for_check(like.dtype).select(torch.zeros(1, dtype=torch.long, device=like.device)), []
    for positions in (range(middle), range(middle, size)):
        known = storage.claim(block, inputs=prefix + size)
        reads = Reads.of(Window(positions, positions.start), size, prefix, known, like.device)
        parts.append(torch.stack(block.affine(reads.take(x[:1]), given, reads, storage)))
    atol = torch.finfo(like.dtype).eps ** 0.5 * (1 + float(whole.nan_to_num().abs().max()))
    return torch.allclose(torch.cat(parts, 2), whole, rtol=0, atol=atol, equal_nan=True)
