"""The conformance check: does a system keep the promises that `solve` builds on?"""

from collections.abc import Callable

import torch
from torch import Tensor

from parallel_decode._checks import check
from parallel_decode._subject import Subject
from parallel_decode.solver import solve
from parallel_decode.system import LayeredSystem, TriangularSystem


@torch.no_grad()
def check_system(
    system: TriangularSystem | LayeredSystem, *, points: Tensor | None = None, atol: float | None = None
) -> None:
    """Try a system, ours or a user's, against the contract of `TriangularSystem`; every layer of a `LayeredSystem`.

    It tries: shapes and dtypes, that the iterate is not written to, that the same inputs give the same outputs (within `atol`), that a
    change at l moves nothing at or before l, that rows do not leak into one another (NaN neither), that windows agree with
    the full evaluation, that NaN at and after a window's last position has no effect, that rows with windows of their own and rows that go on
    alone get the same (for systems that offer it), and that every schedule, with corrections too, ends at the sequential answer. Of a system with
    `after_pass`: that no front goes back and nothing final changes, and that it can be solved again.

    A system that is not `deterministic` is tried for shapes, for writing to the iterate, and for its `after_pass` alone.

    Args:
        system: the system; a batch of at least two rows also tries the rows.
        points: values to try, shape (B, L, *E), for a system without layers whose values mean something special (token ids,
            say); by default the initial guess, the solution, and for floats normal noise.
        atol: the largest difference, absolute plus relative, that counts as equal; by default 0 for integers and the
            square root of the machine epsilon for floats, since the same sum over another window, or elsewhere in memory, may round differently.

    Raises:
        AssertionError: a promise is broken; it says which, and at which position.

    Example:
        >>> import torch, parallel_decode as pd
        >>> from parallel_decode.testing import check_system
        >>> check_system(pd.from_function(lambda x: x.cumsum(1), torch.zeros(2, 4)))
        Traceback (most recent call last):
        AssertionError: not triangular: a change at position 0 moves f at position 0, f may depend on earlier positions alone
    """
    if isinstance(system, TriangularSystem):
        check(Subject(system, points, atol, ""))
        return
    if points is not None:
        raise ValueError("points are for a system without layers: check each layer by itself")

    def check_layer(index: int, make: Callable[[], TriangularSystem]) -> Tensor:
        layer = make()
        check(Subject(layer, None, atol, f"layer {index}: "))
        return solve(layer, "sequential").value

    system.walk(check_layer)
