"""A system that is checked, with what to check it on.

Shapes: B batch rows, L positions, *E the event.
"""

import torch
from torch import Tensor

from parallel_decode._tolerance import event_all
from parallel_decode.schedules import GaussSeidelJacobi, Jacobi, JacobiGaussSeidel, Schedule, Sliding
from parallel_decode.solver import solve
from parallel_decode.system import TriangularSystem
from parallel_decode.window import Window


class Subject:
    """A system that is checked, with what to check it on.

    Attributes:
        system: the system.
        where: what messages begin with.
        solution: by sequential decoding, (B, L, *E).
        first, other: two iterates that differ in most places.
        atol: see `check_system`.

    Args:
        points: see `check_system`.
    """

    def __init__(self, system: TriangularSystem, points: Tensor | None, atol: float | None, where: str) -> None:
        self.system, self.where = system, where
        guess = system.initial().clone()
        length = system.length
        self.require(
            guess.dim() >= 2 and guess.shape[1] == length,
            f"initial() has shape {tuple(guess.shape)}, expected (batch, {length}, *event)",
        )
        self.atol = 0.0
        self.compare(system.initial(), guess, "initial() differs between two calls")
        eps = torch.finfo(guess.dtype).eps if guess.is_floating_point() else 0.0
        self.atol = eps**0.5 if atol is None else atol
        self.solution = solve(system, "sequential").value
        self.first, self.other = self._two_points(guess, points)

    def require(self, condition: bool, message: str) -> None:
        if not condition:
            raise AssertionError(f"{self.where}{message}")

    def compare(self, got: Tensor, expected: Tensor, message: str, positions: range | None = None) -> None:
        """Raise where the two (B, n, *E) differ by more than atol * (1 + |expected|).

        `{at}` in the message is the first such place, or what `positions` says it is.
        """
        if got.is_floating_point():
            same = torch.isclose(got, expected, rtol=self.atol, atol=self.atol, equal_nan=True)
        else:
            same = got == expected
        bad = (~event_all(same).all(0)).nonzero()
        if len(bad):
            at = int(bad[0, 0])
            self.require(False, message.replace("{at}", str(at if positions is None else positions[at])))

    def full(self, x: Tensor) -> Tensor:
        """f everywhere, (B, L, *E)."""
        return self.system.evaluate(x, Window.full(self.system.length)).clone()

    def schedules(self) -> list[Schedule]:
        small = max(2, self.system.length // 5)
        return [Jacobi(), GaussSeidelJacobi(small), JacobiGaussSeidel(small), Sliding(small)]

    def _two_points(self, guess: Tensor, points: Tensor | None) -> tuple[Tensor, Tensor]:
        if points is not None:
            return points.clone(), points.roll(1, dims=1)
        if guess.is_floating_point():
            noise = torch.randn(guess.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(guess)
            return self.solution.nan_to_num(0, 0, 0) + noise, guess.nan_to_num(0, 0, 0) - noise
        return self.solution, self.solution.roll(1, dims=1)
