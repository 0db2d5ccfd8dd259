"""Arrays and plain values out of pickles, without running what a pickle asks for.

A pickle is a program: it may name any function and call it. Here it may name only what numpy's arrays are pickled with,
and gets stand-ins for most of that, because numpy's own constructors trust what they are given.
"""

import codecs
import io
import pickle
import re
from typing import Any

import numpy as np


class _Dtype:
    """Stands in for `numpy.dtype`: integers, floats and booleans, and nothing else."""

    order = "="

    def __init__(self, code: bytes | str, *_: object) -> None:
        if not re.fullmatch("b1|[iuf][1248]", text(code)):
            raise pickle.UnpicklingError(f"it holds an array of type {code!r}, not of numbers")
        self.code = text(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if text(state[1]) not in ("<", ">", "|", "="):
            raise pickle.UnpicklingError(f"it holds an array of byte order {state[1]!r}")
        self.order = text(state[1])

    def read(self, content: bytes) -> np.ndarray[Any, np.dtype[Any]]:
        return np.frombuffer(content, np.dtype(self.order + self.code))


class _Array:
    """Stands in for `numpy.ndarray`, and for the function that makes an empty one to be filled."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, state: tuple[Any, tuple[int, ...], _Dtype, bool, bytes]) -> None:
        _, shape, dtype, by_column, content = state
        self.value = dtype.read(content).reshape(shape, order="F" if by_column else "C")


def _scalar(dtype: _Dtype, content: bytes) -> int | float | bool:
    value: int | float | bool = dtype.read(content).item()
    return value


ALLOWED = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): codecs.encode,  # how Python 3 writes bytes that Python 2 can read
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _Array for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which arrays do not need: nothing was run")
        return ALLOWED[module, name]


def text(value: bytes | str) -> str:
    """What Python 2 wrote as str is bytes here."""
    return value.decode("latin1") if isinstance(value, bytes) else value


def read_pickle(content: bytes) -> dict[str, Any]:
    """The dictionary that was pickled, by Python 2 or 3, with its arrays.

    Values may be numbers, strings, bytes, lists, tuples, dictionaries, and arrays of numbers (not inside others).

    Args:
        content: the pickle, of protocol 0 to 4; arrays at protocol 5 name a function that is not allowed.

    Raises:
        Exception: of nearly any type where the pickle is damaged; `pickle.UnpicklingError` where it names what
            arrays do not need, or holds no dictionary.

    >>> read_pickle(pickle.dumps({b"data": np.arange(3), "labels": [2, 1, 0]}, protocol=4))
    {'data': array([0, 1, 2]), 'labels': [2, 1, 0]}
    """
    value = _Unpickler(io.BytesIO(content), encoding="bytes").load()
    if not isinstance(value, dict):
        raise pickle.UnpicklingError(f"it holds a {type(value).__name__}, not a dictionary")
    return {text(key): item.value if isinstance(item, _Array) else item for key, item in value.items()}
