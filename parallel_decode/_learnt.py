"""What `Auto` learnt of a system, kept for other processes (`_disk_cache`): costs by width, and what windows gained."""

import math
import os
import platform
from collections.abc import Hashable
from typing import Any

import torch

from parallel_decode import _disk_cache
from parallel_decode._costs import Arm, Costs
from parallel_decode._gains import Count, Gains
from parallel_decode.system import TriangularSystem

KIND = "auto"


def name_of(system: TriangularSystem, options: Hashable) -> str | None:
    """What the system is known by, on such a machine; None where it does not say what it is, or nothing is kept."""
    if _disk_cache.folder() is None or not (identity := system.identity):
        return None
    kind = platform.machine(), torch.backends.cpu.get_cpu_capability(), os.cpu_count()
    machine = *kind, torch.get_num_threads(), torch.__version__
    return repr((machine, sorted(identity.items()), options))


def save(name: str, costs: Costs, gains: Gains) -> None:
    """Keep what is known now."""
    known = {
        "single": costs.single.measured(),
        "windows": [costs.windows[corrected].measured() for corrected in (False, True)],
        "counts": [(*arm, *count) for arm, count in gains.counts.items()],
        "turn": gains.turn,
        "left": costs.allowance.left,
    }
    _disk_cache.remember(KIND, name, known)


def load(name: str, costs: Costs, gains: Gains) -> bool:
    """Take over what another process knew, if anything; what is not as `save` wrote it is as if it was not there."""
    known = _disk_cache.recall(KIND, name)
    try:
        single = table(known["single"])
        windows = [table(known["windows"][corrected]) for corrected in (False, True)]
        if not math.isfinite(left := float(known["left"])):
            return False
        turn = numbers([known["turn"]])[0]
        counts = {Arm(int(width), bool(corrected)): Count(*numbers(c)) for width, corrected, *c in known["counts"]}
    except (KeyError, IndexError, TypeError, ValueError, OverflowError):
        return False
    gains.turn = turn
    gains.counts.update((arm, count) for arm, count in counts.items() if 1 < arm.width < 2**31)
    if single and not costs.ready:
        costs.restore(single, windows, left)
    return True


def table(rows: Any) -> list[tuple[int, float]]:
    """Sizes and their seconds; a ValueError or TypeError if they are none."""
    return [(int(size), numbers([seconds])[0]) for size, seconds in rows]


def numbers(values: list[Any]) -> list[float]:
    """Finite numbers above 0; a ValueError or TypeError if they are none."""
    found = [float(value) for value in values]
    if not all(math.isfinite(number) and number > 0 for number in found):
        raise ValueError(f"{values} are no counts")
    return found
