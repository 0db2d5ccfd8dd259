"""Causal corrections: what a fixed-point pass may add without losing its finite end (theorem 5)."""

from abc import ABC, abstractmethod

from torch import Tensor

from parallel_decode.window import Window


class Correction(ABC):
    """x_new[l] = f_l(x_old) + g_l(x_new[<l]) - g_l(x_old[<l]) with a causal g.

    g = 0 is Jacobi; g = f linearised is Newton (DEER, arXiv 2309.12252), its diagonal quasi-DEER, the identity Picard.
    Where nothing before l moved the correction is zero, so the front still moves by one at every pass.
    A correction is a frozen set of options; what it remembers between passes is the `memory` that the solver keeps for it.
    """

    @abstractmethod
    def correct(
        self, x: Tensor, fx: Tensor, window: Window, memory: tuple[Tensor, ...] | None
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """The corrected values of one pass.

        Args:
            x: the iterate x_old, shape (B, L, *E). Not to be written to.
            fx: f(x) at the window's positions, shape (B, W, *E). Where a position of a row is final, fx equals x.
            window: the window of this pass, with `take` and `put` for values at its positions. Positions outside it do not move.
            memory: what the last call returned, a tuple of tensors that have the batch as first dimension (rows that are
                done may leave it between two passes); None on the first pass of a layer, and after a value that was not finite.

        Returns:
            The new values at the window's positions, shape (B, W, *E), and the memory for the next pass. The added term
            has to be exactly zero at a position before which nothing moved.
        """
