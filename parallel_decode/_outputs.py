"""Outputs: checked before the work, and whole or absent after it."""

import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def aside(path: Path) -> Iterator[Path]:
    """A file beside `path` to write to. It replaces `path` once it is written, and is removed if writing fails.

    Example:
        >>> folder = Path(tempfile.mkdtemp())
        >>> with aside(folder / "a.txt") as part:
        ...     _ = part.write_text("whole")
        >>> [file.name for file in folder.iterdir()]
        ['a.txt']
    """
    part = path.with_name(f".{uuid.uuid4().hex}.part")  # not longer than most names: `path` may be as long as can be
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def check_output(path: Path, size: int = 0) -> None:
    """Check that a file or folder can be written, by a temporary file in the folder that it lies in or would be made in.

    Args:
        path: of the output; it need not exist, nor its folder.
        size: how much will be written, in bytes.

    Raises:
        OSError: the path cannot be looked up: its name is too long, say.
        ValueError: a file is in the way, the folder is not writable, or its disk too full.
    """
    there = path
    while not _exists(there):
        there = there.parent
    if there != path and not there.is_dir():
        raise ValueError(f"{path} cannot be written: {there} is not a folder; choose another path")
    folder = there if there.is_dir() else there.parent
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0")
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror}; choose another path") from None
    if size > (free := shutil.disk_usage(folder).free):
        raise ValueError(
            f"{path} would take {size:,} bytes, and {free:,} are free: ask for less or choose another disk"
        )


def check_files(*files: Path) -> None:
    """Check that no folder is where a file will be written.

    Raises:
        ValueError: one is.
    """
    for file in files:
        if file.is_dir():
            raise ValueError(f"{file} is a folder, expected a file or nothing: choose another --out")


def _exists(path: Path) -> bool:
    """As `lexists`, but a name that is too long or a folder that may not be read is an error here, before the work."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True
