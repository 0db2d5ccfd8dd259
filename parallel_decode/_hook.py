"""The system's own turn after each pass: it may end rows, hold rows back, and write guesses (`TriangularSystem.after_pass`).

Shapes: B batch rows, L positions, *E the event.
"""

import torch
from torch import Tensor

from parallel_decode._acceptance import Acceptance, Accepted
from parallel_decode._fronts import Fronts
from parallel_decode._rows import Rows
from parallel_decode._tolerance import bits, event_any


def after_pass(rows: Rows, fronts: Fronts, accepted: Accepted, acceptance: Acceptance) -> Accepted:
    """Ask the system what of a pass is to hold.

    Args:
        rows: whose iterate has the values of the pass.
        fronts: before the pass.
        accepted: what the pass made final.
        acceptance: is told of what was written.

    Raises:
        ValueError: the system returned fronts that it may not.
    """
    system, x = rows.system, rows.x
    proposed = torch.full((len(x),), accepted.fronts) if isinstance(accepted.fronts, int) else accepted.fronts
    before = x.clone() if acceptance.watches else None
    returned = system.after_pass(x, proposed.clone())
    alike = isinstance(returned, Tensor) and (returned.dtype, returned.device) == (proposed.dtype, proposed.device)
    as_proposed = alike and torch.equal(returned, proposed)
    if not as_proposed:
        _check(returned, proposed, fronts, type(system).__name__)
    held = not as_proposed and bool((returned < proposed).any())
    if before is not None:
        acceptance.written(None if held else event_any(bits(x) != bits(before)))
    if as_proposed:
        return accepted
    host = returned.long()
    return accepted._replace(fronts=host, on_device=None)


def _check(returned: Tensor, proposed: Tensor, fronts: Fronts, name: str) -> None:
    expected = f"expected {len(proposed)} whole numbers on the host: those given ({proposed.tolist()}), {fronts.length} for rows that ended"
    if (
        not isinstance(returned, Tensor)
        or returned.shape != proposed.shape
        or returned.is_floating_point()
        or not returned.device.type == "cpu"
    ):
        raise ValueError(f"{name}.after_pass returned {returned!r}, {expected}")
    beyond = (returned > proposed) & (returned != fronts.length)
    if bool((beyond | (returned < fronts.host)).any()) or int(returned.min()) <= fronts.min:
        raise ValueError(
            f"{name}.after_pass returned fronts {returned.tolist()} where they were {fronts.host.tolist()} before the pass, {expected}, "
            "or less to hold a row back, but never behind where it was, and the slowest row has to move on"
        )
