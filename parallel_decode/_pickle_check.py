"""What `torch.save` writes of a state dict, checked as data before `torch.load` acts on it.

`torch.load(weights_only=True)` runs no foreign code, but calls what it allows with any arguments: `bytearray(10**12)`, an OrderedDict of a
list again and again, tuples of tuples as names. Of a checked pickle everything takes time and memory in proportion to its length.
"""

import math
import pickletools
from collections.abc import Mapping
from typing import Any, NamedTuple

_ITEM_SIZES = {
    f"torch {name}Storage": size
    for size, names in ((8, "Double Long"), (4, "Float Int"), (2, "Half BFloat16 Short"), (1, "Char Byte Bool"))
    for name in names.split()
}
_DICT, _TENSOR, _PARAMETER = (
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
)
_NUMBERS = ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "NEWTRUE", "NEWFALSE")
_CONSTANTS = (*_NUMBERS, "BINUNICODE", "NONE", "EMPTY_DICT", "EMPTY_LIST")


class _Global(NamedTuple):
    name: str


class _Made(NamedTuple):
    """What a global made; of a storage also its length."""

    by: str
    length: int = 0


def check_pickle(pickled: bytes, sizes: Mapping[str, int]) -> None:
    """Go through a pickle without calling anything.

    Args:
        pickled: the pickle of protocol 2.
        sizes: bytes of each storage, by its key.

    Raises:
        Exception: of any type: the pickle holds something else than names, tensors over these storages, and plain values.
    """
    stack: list[Any] = []
    below: list[list[Any]] = []
    memo: dict[int, Any] = {}
    value: Any
    for opcode, value, _ in pickletools.genops(pickled):
        match opcode.name:
            case "PROTO" | "STOP":
                pass
            case "MARK":
                below.append(stack)
                stack = []
            case "BINPUT" | "LONG_BINPUT":
                memo[value] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[value])
            case "GLOBAL":
                stack.append(_Global(value))
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(opcode.name[-1])
                stack[-count:] = [tuple(stack[-count:])]
            case "TUPLE":
                items, stack = stack, below.pop()
                stack.append(tuple(items))
            case "APPENDS":
                stack = below.pop()
            case "SETITEMS":
                items, stack = stack, below.pop()
                _check_names(items[::2])
            case "SETITEM":
                _check_names(stack[-2:-1])
                del stack[-2:]
            case "APPEND":
                stack.pop()
            case "BUILD":
                stack.pop()
                if stack[-1] != _Made(_DICT):
                    raise ValueError("it holds attributes of something else than a dict")
            case "BINPERSID":
                stack.append(_storage(stack.pop(), sizes))
            case "REDUCE":
                arguments = stack.pop()
                stack.append(_made(stack.pop(), arguments))
            case name if name in _CONSTANTS:
                stack.append(value)
            case name:
                raise ValueError(f"it holds {name}, which torch.save does not write of a state dict")


def _check_names(names: list[Any]) -> None:
    other = [name for name in names if not isinstance(name, str)]
    if other:  # which are not shown: a few bytes make tuples of tuples that take forever to print, or to hash
        raise ValueError(f"it holds a {type(other[0]).__name__} as a name, expected a string")


def _storage(identity: Any, sizes: Mapping[str, int]) -> _Made:
    _, kind, key, _, length = identity
    if not isinstance(kind, _Global) or kind.name not in _ITEM_SIZES or type(key) is not str or type(length) is not int:
        raise ValueError("it holds a storage of something else than plain numbers")
    if sizes.get(key) != length * _ITEM_SIZES[kind.name]:
        raise ValueError(f"its storage {key!r} has {sizes.get(key)} bytes, expected {length} numbers of {kind.name}")
    return _Made("storage", length)


def _made(function: Any, arguments: Any) -> _Made:
    name = function.name if isinstance(function, _Global) else f"a call of a {type(function).__name__}"
    if name == _TENSOR:
        storage, offset, shape, strides = arguments[:4]
        if not isinstance(storage, _Made) or storage.by != "storage" or len(shape) != len(strides) or len(shape) > 8:
            raise ValueError("it holds a tensor without a storage, a shape and strides")
        if not all(type(n) is int and n >= 0 for n in (offset, *shape, *strides)):
            raise ValueError("it holds a tensor whose shape, strides or offset are not whole numbers >= 0")
        last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        if math.prod(shape) > storage.length or (0 not in shape and last >= storage.length):
            raise ValueError(f"it holds a tensor of shape {shape} over a storage of {storage.length} numbers")
    elif not ((name == _DICT and arguments == ()) or (name == _PARAMETER and arguments[0] == _Made(_TENSOR))):
        raise ValueError(f"it holds {name}, expected a state dict: names and tensors of plain numbers alone")
    return _Made(_TENSOR if name == _PARAMETER else name)
