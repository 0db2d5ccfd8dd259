"""What was learnt on this machine, kept for other processes: small JSON files in the user's cache folder.

The environment variable `PARALLEL_DECODE_CACHE` names another folder, or is "off". Files that are damaged, and folders that cannot be read or written, are
as if they were not there.
"""

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from parallel_decode._outputs import aside

MOST = 1000  # files of a kind; beyond that the oldest go


def folder() -> Path | None:
    """Where the files are; None if nothing is kept."""
    chosen = os.environ.get("PARALLEL_DECODE_CACHE", "")
    if chosen:
        return None if chosen.lower() == "off" else Path(chosen)
    try:
        import platformdirs
    except ImportError:
        return None
    return Path(platformdirs.user_cache_dir("parallel_decode", appauthor=False))


def recall(kind: str, key: str) -> Any:
    """What was remembered under this key, or None."""
    path = _path(kind, key)
    if path is None:
        return None
    try:
        content = json.loads(path.read_bytes())
        return content["value"] if content["name"] == path.stem else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def remember(kind: str, key: str, value: Any) -> None:
    """Keep a value that JSON can hold. A reader sees all of it, or what was there before."""
    path = _path(kind, key)
    if path is None:
        return
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with aside(path) as part:
            part.write_text(json.dumps({"name": path.stem, "value": value}))
        files = list(path.parent.iterdir())
        if len(files) > MOST:
            for old in sorted(files, key=lambda file: file.stat().st_mtime)[: len(files) - MOST]:
                old.unlink(missing_ok=True)


def _path(kind: str, key: str) -> Path | None:
    there = folder()
    return None if there is None else there / kind / f"{hashlib.sha256(key.encode()).hexdigest()}.json"
