"""What `Adaptive` learnt of a model, kept for other processes: costs by width and rows, how often drafts come true, how windows move, and what may be lost."""

import math

from parallel_decode import _disk_cache
from parallel_decode._learnt import numbers, table
from parallel_decode.adapters.causal_lm.memory import Memory, RowCosts

KIND = "adaptive"


def save(name: str, costs: dict[int, RowCosts], memory: Memory) -> None:
    """Keep what is known now."""
    known = {
        "costs": [[rows, *(each.timings[apart].measured() for apart in (False, True))] for rows, each in costs.items()],
        "records": [[kind, *record.first, *record.further] for kind, record in memory.records.items()],
        "pace": memory.pace.k if memory.pace.known else None,
        "allowance": [memory.allowance.left, memory.allowance.lost],
    }
    _disk_cache.remember(KIND, name, known)


def load(name: str, costs: dict[int, RowCosts], memory: Memory) -> None:
    """Take over what another process knew; what is not as `save` wrote it is as if it was not there."""
    known = _disk_cache.recall(KIND, name)
    try:
        tables = {int(rows): (table(together), table(apart)) for rows, together, apart in known["costs"]}
        records = {int(kind): numbers(counts) for kind, *counts in known["records"]}
        pace = None if known["pace"] is None else max(1.0, *numbers([known["pace"]]))
        left, lost = (float(passes) for passes in known["allowance"])
        if not math.isfinite(left + lost):
            raise ValueError("what may be lost is no number")
        if not all(a <= b and c <= d for a, b, c, d in records.values()):
            raise ValueError("more drafts came true than there were")
    except (KeyError, TypeError, ValueError, OverflowError):
        return
    memory.allowance.restore(left, lost)
    for rows, (together, apart) in tables.items():
        if together and rows > 0 and rows not in costs:
            costs[rows] = RowCosts(rows)
            costs[rows].restore(together, apart)
    for kind, counts in records.items():
        record = memory.record(kind)
        record.first, record.further = counts[:2], counts[2:]
    if pace is not None:
        memory.pace.k, memory.pace.known = pace, True
