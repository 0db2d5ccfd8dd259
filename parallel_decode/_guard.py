"""Values that are not finite: a bad guess beyond the front is not taken, and what is not finite at the front ends its row.

Shapes: B batch rows, L positions, W positions of the window, *E the event.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from parallel_decode._acceptance import Acceptance, Accepted
from parallel_decode._fronts import Fronts
from parallel_decode._tolerance import Tolerance, event_all, like
from parallel_decode.window import Window


class NotFinite(ArithmeticError):
    """Some values of a pass are not finite, and the system's positions are not in the order that the guard needs.

    Attributes:
        x: the iterate before the pass, shape (B, L, *E).
        new: what the pass gave, of the same shape.
    """

    def __init__(self, x: Tensor, new: Tensor) -> None:
        super().__init__("a sweep gave values that are not finite: solve a system whose positions are in order")
        self.x, self.new = x, new


class Guarded(NamedTuple):
    """A pass that may be taken.

    Attributes:
        new: the values to take, shape (B, W, *E).
        accepted: the fronts; L for rows that end here. Its `finite` is False.
        ended: row to its first position that is not finite, and the value there, shape (*E).
    """

    new: Tensor
    accepted: Accepted
    ended: dict[int, tuple[int, Tensor]]


def guard(
    x: Tensor,
    window: Window,
    new: Tensor,
    old: Tensor,
    fronts: Fronts,
    tol: Tolerance,
    acceptance: Acceptance,
    evaluate: Callable[[Window], Tensor],
) -> Guarded:
    """A pass again, where some new values are not finite.

    Beyond the front such a value is only a guess: the position keeps its old one. At the front it may still come from
    a tail that overflows inside the system (0 * inf is NaN), so that position is evaluated alone, as sequential
    decoding would. If it is not finite even then, the row ends there and holds up nobody.

    Args:
        x: the iterate, shape (B, L, *E); the tail of a row that overflowed is set to 0 here.
        window, new, old, fronts, tol: as for `Acceptance.accept`.
        acceptance: one that is `guarded`.
        evaluate: f at the positions of a window, for the present x.
    """
    new = fronts.hold(new, old, window)
    usable = event_all(new.isfinite())
    new = torch.where(like(usable, new), new, old)
    accepted = acceptance.accept(window, new, old, fronts, tol, usable)._replace(finite=False)
    here = fronts.device
    front = here if accepted.on_device is None else accepted.on_device
    stuck = (front == here) & (here < fronts.length)
    if window.shift is None:
        stuck &= here == fronts.min  # the others can wait until they are the slowest
    if not stuck.any():
        return Guarded(new, accepted, {})
    acceptance.written(None)  # it does not know of what follows
    x[stuck[:, None] & (torch.arange(fronts.length, device=x.device) >= here[:, None])] = 0
    shift = None if window.shift is None else here.clamp(max=fronts.length - 1) - fronts.min
    alone = evaluate(Window(range(fronts.min, fronts.min + 1), window.changed_from, shift))
    finite = event_all(alone.isfinite())[:, 0]
    new[stuck] = window.take(x)[stuck]
    offset = here - window.start
    mended = stuck & finite
    new[mended, offset[mended]] = alone[mended, 0]
    ended = {row: (int(here[row]), alone[row, 0].clone()) for row in (stuck & ~finite).nonzero()[:, 0].tolist()}
    front = torch.where(stuck, torch.where(finite, here + 1, fronts.length), front)
    return Guarded(new, accepted._replace(fronts=front.cpu(), on_device=front), ended)
