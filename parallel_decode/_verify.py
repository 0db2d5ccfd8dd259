"""The residual of a solution, and what it says about the error (theorem 4).

Shapes: B batch rows, L positions, *E the event.
"""

import torch
from torch import Tensor

from parallel_decode._claims import Claim
from parallel_decode._tolerance import event_all, event_any, event_max
from parallel_decode.system import TriangularSystem
from parallel_decode.window import Window


def verified(system: TriangularSystem, x: Tensor, claim: Claim) -> tuple[Tensor, Tensor | None]:
    """|F(x) - x| in the maximum norm of the event, and with Lipschitz constants a bound on |x - x*|; each of shape (B, L).

    Floats are taken to be evaluated to L + 4 machine epsilons of the largest numbers that enter: |x| and |F(x)| up to a position.
    """
    if not x.numel():
        return torch.zeros(x.shape[:2], dtype=torch.float64), None if system.lipschitz is None else torch.zeros(
            x.shape[:2]
        )
    finite = x.isfinite()
    x = x.where(finite, torch.zeros_like(x))  # what is not would spoil what is before it
    claim.evaluating = True
    again = system.evaluate(x, Window.full(system.length))
    wide = x.dtype if x.is_floating_point() else torch.float64
    residual = event_max((again.to(wide) - x.to(wide)).abs())
    if not x.is_floating_point():  # large integers may be equal as floats
        residual = torch.where(event_any(again != x), residual.clamp(min=1), residual)
    residual[~event_all(finite)] = torch.nan
    if system.lipschitz is None:
        return residual, None
    constants = system.lipschitz.to(residual.device, torch.float64)
    r = residual.double()
    if x.is_floating_point():
        sizes = torch.maximum(event_max(x.abs()), event_max(again.abs())).double()
        reach = constants.sum(1) + 1  # what enters position l is bounded by these times the largest size before it
        r = r + (len(constants) + 4) * torch.finfo(x.dtype).eps * sizes.cummax(1).values * reach
    matrix = torch.eye(len(constants)).to(constants) - constants
    bound = torch.linalg.solve_triangular(matrix, r.T, upper=False, unitriangular=True).T
    return residual, (bound * (1 + 4 * len(constants) * torch.finfo(torch.float64).eps)).to(residual.dtype)
