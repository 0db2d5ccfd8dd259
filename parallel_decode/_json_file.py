"""JSON from files that anybody may have written: small, finite, and with each name once."""

import json
import math
import os
from pathlib import Path
from typing import Any

LARGEST = 2**20  # bytes; what is parsed may take some twenty times as much


def read_json(path: Path) -> Any:
    """What the file holds.

    Raises:
        FileNotFoundError: there is no such file, or it is a folder, say.
        ValueError: it is too large, no JSON, or holds numbers that are not finite or a name twice. The text does not name the file.
    """
    if not os.path.isfile(path):  # Path.is_file raises where a name is too long
        raise FileNotFoundError(f"{path} does not exist, or is not a file")
    size = path.stat().st_size
    if size > LARGEST:
        raise ValueError(f"it has {size:,} bytes, expected at most {LARGEST:,}")
    try:
        return json.loads(
            path.read_bytes(), object_pairs_hook=_unique, parse_constant=_finite_number, parse_float=_finite_number
        )
    except (OSError, RecursionError) as error:
        raise ValueError(f"it is not JSON that can be read: {error}") from None


def reason(error: BaseException) -> str:
    """An error of somebody else's code, on one line of bounded length."""
    text = f"it has no {error}" if isinstance(error, KeyError) else str(error)
    return " ".join(text.split())[:300] or type(error).__name__


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it holds {next(name for name in entries if names.count(name) > 1)!r} twice")
    return entries


def _finite_number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"it holds the number {text[:30]}, expected finite ones")
    return number
