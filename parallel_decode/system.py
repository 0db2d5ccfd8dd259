"""What the solver solves: triangular systems x_l = f_l(x_<l), and chains of them.

Shapes: B batch rows, L positions, W positions of a window, *E the event (what one position holds; () for a token).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor


class Window(NamedTuple):
    """The positions that one pass evaluates.

    Attributes:
        positions: what to evaluate, in rising order. Its step is 1 but for Jacobi-Gauss-Seidel.
        changed: from here on the iterate may differ from what the system last read. What a system keeps for earlier positions
            (a key-value cache) is good; it has to read again all from here to the last of `positions`. 0 on the first pass.
        shift: where every row has a window of its own, shape (B,), how many positions further on than `positions`, and
            `changed`, those of each row are (never past the end); None where all rows have the same. Only a
            system that says it is `ragged` meets it.
    """

    positions: range
    changed: int
    shift: Tensor | None = None

    @property
    def at(self) -> slice:
        """The positions as an index into dimension 1, where all rows have the same."""
        return slice(self.positions.start, self.positions.stop, self.positions.step)

    def indices(self, device: torch.device | None = None) -> Tensor:
        """The positions of each row, shape (B, W); (1, W) where all rows have the same."""
        index = torch.arange(*self.at.indices(self.positions.stop), device=device)[None]
        return index if self.shift is None else index + self.shift[:, None]

    def take(self, x: Tensor) -> Tensor:
        """The values at the window's positions: (B, L, *E) to (B, W, *E)."""
        if self.shift is None:
            return x[:, self.at]
        return x[torch.arange(len(x), device=x.device)[:, None], self.indices(x.device)]

    def put(self, x: Tensor, values: Tensor) -> None:
        """Write values, shape (B, W, *E), to the window's positions of x, shape (B, L, *E)."""
        if self.shift is None:
            x[:, self.at] = values
        else:
            x[torch.arange(len(x), device=x.device)[:, None], self.indices(x.device)] = values

    @classmethod
    def full(cls, length: int) -> "Window":
        """Every position, with nothing known from before."""
        return cls(range(length), 0)


class TriangularSystem(ABC):
    """A system x_l = f_l(x_<l), l = 0..L-1, for every row of a batch: position l depends on earlier positions alone.

    `parallel_decode.testing.check_system` tries whether an implementation keeps its promises.

    Attributes:
        lipschitz: optional constants C, shape (L, L), strictly lower triangular, with
            |f_l(x) - f_l(y)| <= sum_m C[l, m] |x_m - y_m| in the maximum norm of the event.
            With them `solve(..., verify=True)` turns residuals into error bounds.
        ragged: whether `evaluate` takes windows with a `shift`, where every row has positions of its own.
        identity: as of a `LayeredSystem`.
        cost_key, gain_key: what `Auto` remembers what it measured under: systems with equal `cost_key` take equally long
            for a pass, and with equal `gain_key` converge alike. None, if nothing is to be remembered.
    """

    lipschitz: Tensor | None = None
    ragged: bool = False
    identity: Mapping[str, str | int | float] = MappingProxyType({})
    cost_key: Hashable | None = None
    gain_key: Hashable | None = None

    @property
    @abstractmethod
    def length(self) -> int:
        """L, the number of positions."""

    @abstractmethod
    def initial(self) -> Tensor:
        """The first guess, shape (B, L, *E), the same at every call. It sets the batch, dtype and device."""

    @abstractmethod
    def evaluate(self, x: Tensor, window: Window) -> Tensor:
        """f at the window's positions.

        Args:
            x: the iterate, shape (B, L, *E). Not to be written to.
            window: which positions, and what changed since the last call.

        Returns:
            f(x)[:, window.at], shape (B, W, *E), with the dtype of x. Row b may depend on row b of x alone, and
            position l on positions before l alone: nothing at or after the window's last position is read, whatever
            it holds.
        """

    def passed(self, x: Tensor, fronts: Tensor) -> Tensor:
        """Called after every pass: here a system may end rows, and put better guesses in place of what is not final.

        Args:
            x: the iterate, shape (B, L, *E). Positions at and beyond a row's front may be written to.
            fronts: how many leading positions of each row are final, shape (B,), on the host.

        Returns:
            The fronts: those given, but L for a row that has ended, whose positions from its front on were written here.
        """
        return fronts

    def select(self, rows: Tensor) -> "TriangularSystem | None":
        """The system of some rows alone, which goes on with what was kept for them; None if that is not offered.

        Args:
            rows: indices into the batch, rising, shape (fewer,).
        """
        return None


class LayeredSystem(ABC):
    """A chain of triangular systems, each built from the solution of the one before (the blocks of a flow).

    Attributes:
        identity: what a `Plan` for it is a plan for: the model, the device, the type, the batch.
    """

    @property
    def identity(self) -> Mapping[str, str | int | float]:
        return {}

    @property
    @abstractmethod
    def depth(self) -> int:
        """The number of layers."""

    @abstractmethod
    def layer(self, index: int, value: Tensor | None) -> TriangularSystem:
        """The system of one layer, in the order of solving.

        Args:
            index: 0..depth-1.
            value: the solution of the layer before, shape (B, L, *E); None for the first.
        """

    @abstractmethod
    def output(self, value: Tensor) -> Tensor:
        """What `Solution.value` is to hold, from the solution of the last layer."""


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
        return value[:, window.at]


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
        TypeError: `initial` is not a tensor.
        ValueError: `initial` has fewer than two dimensions, or `lipschitz` is not (L, L) and strictly lower triangular.

    Example:
        >>> import torch, parallel_decode as pd
        >>> def f(x):  # x_l = 1 + x_{l-1} / 2
        ...     return 1 + torch.nn.functional.pad(x, (1, -1)) / 2
        >>> system = pd.from_function(f, torch.zeros(1, 5, dtype=torch.float64))
        >>> pd.solve(system).value
        tensor([[1.0000, 1.5000, 1.7500, 1.8750, 1.9375]], dtype=torch.float64)
    """
    if not isinstance(initial, Tensor):
        raise TypeError(f"initial is a {type(initial).__name__}, expected a tensor of shape (batch, length, *event)")
    if initial.dim() < 2:
        raise ValueError(
            f"initial has shape {tuple(initial.shape)}, expected (batch, length, *event): add the missing dimension"
        )
    if lipschitz is not None:
        length = initial.shape[1]
        if lipschitz.shape != (length, length) or bool((lipschitz != lipschitz.tril(-1)).any()):
            raise ValueError(
                f"lipschitz has shape {tuple(lipschitz.shape)}, expected ({length}, {length}) with zeros but below the diagonal"
            )
    return _Function(f, initial, lipschitz)
