"""What every benchmark writes beside its figures."""

import json
import math
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import parallel_decode
from parallel_decode._outputs import aside


def write(path: Path, figures: dict[str, Any]) -> None:
    """The figures as JSON, with the machine, the versions and the commit; a number that is not finite becomes null.

    Args:
        path: the file; its folder is made, and what was there is replaced at once, so that nobody reads half of it.
        figures: anything that JSON can hold.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "new" / "figures.json"
        >>> write(path, {"psnr_db": math.inf})
        >>> figures = json.loads(path.read_text())
        >>> sorted(figures), figures["psnr_db"]
        (['machine', 'psnr_db', 'versions'], None)
    """
    cuda = torch.cuda.is_available()
    machine = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
    }
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "parallel_decode": parallel_decode.__version__,
        "commit": _commit(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_finite({"machine": machine, "versions": versions, **figures}), indent=1, allow_nan=False)
    with aside(path) as part:
        part.write_text(text + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _commit() -> str | None:
    """Of the checkout that this file lies in; None in an installed wheel, or without git."""
    root = Path(parallel_decode.__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    try:
        git = ["git", "-C", str(root), "describe", "--always", "--dirty"]
        return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or None
    except OSError:
        return None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = (
        [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        if cpuinfo.exists()
        else []
    )
    return names[0] if names else platform.machine()
