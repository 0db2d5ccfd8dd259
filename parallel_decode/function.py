"""`from_function`: a system from any full-length causal map."""

from collections.abc import Callable

from torch import Tensor

from parallel_decode.system import TriangularSystem
from parallel_decode.window import Window


class _Function(TriangularSystem):
    def __init__(self, f: Callable[[Tensor], Tensor], initial: Tensor, lipschitz: Tensor | None) -> None:
        self._f, self._initial, self.lipschitz = f, initial, lipschitz

    @property
    def length(self) -> int:
        return self._initial.shape[1]

    def initial(self) -> Tensor:
        return self._initial

    def evaluate(self, x: Tensor, window: Window) -> Tensor:
        x = x.clone()
        x[:, window.positions[-1] :] = 0  # not needed, and 0 * inf inside f would spoil what is
        value = self._f(x)
        if not isinstance(value, Tensor):
            raise TypeError(f"f returned a {type(value).__name__}, expected a tensor of the shape of x")
        if value.shape != x.shape or value.dtype != x.dtype:
            raise ValueError(
                f"f returned {value.dtype} of shape {tuple(value.shape)} for x of {x.dtype} and shape {tuple(x.shape)}: "
                "it has to keep both"
            )
        return value[:, window.slice]

    def resource(self) -> None:
        return None


def from_function(
    f: Callable[[Tensor], Tensor], initial: Tensor, *, lipschitz: Tensor | None = None
) -> TriangularSystem:
    """A system from any full-length causal map.

    Args:
        f: takes x of shape (B, L, *E) and returns the same shape and dtype; its output at position l depends on
            x before l alone (and on the same row). A network that predicts the *next* position at l has to be shifted by
            one; `parallel_decode.testing.check_system` finds out, `solve` does not.
        initial: the first guess, shape (B, L, *E), floating or integer.
        lipschitz: see `TriangularSystem`.

    Raises:
        TypeError: `initial` or `lipschitz` is not a tensor.
        ValueError: `initial` has fewer than two dimensions, or `lipschitz` is not (L, L), nonnegative and strictly lower triangular.

    Example:
        >>> import torch, parallel_decode as pd
        >>> def f(x):  # x_l = 1 + x_{l-1} / 2
        ...     return 1 + torch.nn.functional.pad(x, (1, -1)) / 2
        >>> system = pd.from_function(f, torch.zeros(1, 5, dtype=torch.float64))
        >>> pd.solve(system).value
        tensor([[1.0000, 1.5000, 1.7500, 1.8750, 1.9375]], dtype=torch.float64)
    """
    if not callable(f):
        raise TypeError(f"f is {f!r}, expected a function of x")
    if not isinstance(initial, Tensor):
        raise TypeError(f"initial is a {type(initial).__name__}, expected a tensor of shape (batch, length, *event)")
    if initial.dim() < 2:
        raise ValueError(
            f"initial has shape {tuple(initial.shape)}, expected (batch, length, *event): add the missing dimension"
        )
    if lipschitz is not None:
        if not isinstance(lipschitz, Tensor):
            raise TypeError(f"lipschitz is a {type(lipschitz).__name__}, expected a tensor of shape (length, length)")
        length = initial.shape[1]
        if (
            lipschitz.shape != (length, length)
            or bool((lipschitz != lipschitz.tril(-1)).any())
            or bool((lipschitz < 0).any())
        ):
            raise ValueError(
                f"lipschitz has shape {tuple(lipschitz.shape)}, expected ({length}, {length}), zeros but below the diagonal, and nothing negative"
            )
    return _Function(f, initial, lipschitz)
