"""Other modules over the same parameters: copies of a tree of modules, some of them of another class."""

import functools
from collections.abc import Callable
from typing import Any

from torch import nn


def view(module: nn.Module, instead: Callable[[nn.Module], tuple[type[nn.Module], dict[str, Any]] | None]) -> nn.Module:
    """A tree of modules that shares all parameters and buffers with another, which stays as it is.

    The dictionaries that hold them are shared too, so that moving or loading the one moves or loads the other.

    Args:
        module: the root.
        instead: the class and further attributes that a module is to have there; None for its own.
    """
    seen: dict[int, nn.Module] = {}

    def copy(module: nn.Module) -> nn.Module:
        if id(module) not in seen:
            kind, extra = instead(module) or (type(module), {})
            twin = seen[id(module)] = object.__new__(kind)
            children = {name: child and copy(child) for name, child in module._modules.items()}
            twin.__dict__.update(module.__dict__ | {"_modules": children} | extra)
        return seen[id(module)]

    return copy(module)


@functools.cache
def mixed(mixin: type[nn.Module], kind: type[nn.Module]) -> type[nn.Module]:
    """The subclass of a library's (or a user's) class that has a mixin before it; its instances are pickled by these two."""
    return type(
        mixin.__name__ + kind.__name__, (mixin, kind), {"__module__": mixin.__module__, "__reduce_ex__": _reduce}
    )


def _reduce(self: Any, protocol: int) -> tuple[Any, ...]:
    mixin, kind = type(self).__bases__
    return _blank, (mixin, kind), self.__dict__


def _blank(mixin: type[nn.Module], kind: type[nn.Module]) -> nn.Module:
    return object.__new__(mixed(mixin, kind))  # type: ignore[arg-type]
