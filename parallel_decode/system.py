"""What the solver solves: triangular systems x_l = f_l(x_<l), and chains of them.

Shapes: B batch rows, L positions, W positions of a window, *E the event (what one position holds; () for a token).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping
from types import MappingProxyType

from torch import Tensor

from parallel_decode.window import Window


class TriangularSystem(ABC):
    """A system x_l = f_l(x_<l), l = 0..L-1, for every row of a batch: position l depends on earlier positions alone.

    `parallel_decode.testing.check_system` tries whether an implementation keeps its promises.

    Attributes:
        lipschitz: optional constants C, shape (L, L), strictly lower triangular, with
            |f_l(x) - f_l(y)| <= sum_m C[l, m] |x_m - y_m| in the maximum norm of the event.
            With them `solve(..., verify=True)` turns residuals into error bounds.
        ragged: whether `evaluate` takes windows with a `shift`, where every row has positions of its own.
        deterministic: False where `evaluate` draws anew at every call (the coupling of Speculative Jacobi Decoding, say). A
            solution is then a sample of the model's distribution, and its status says so.
        ordered: False where positions are numbered otherwise than in the order of their dependencies. Only sweeps over everything
            (`Jacobi(freeze=False)`) solve such a system, and a value that is not finite raises `NotFinite`.
        identity: as of a `LayeredSystem`.
        cost_key, gain_key: the keys under which `Auto` remembers its measurements: systems with equal `cost_key` take equally long
            for a pass, and systems with equal `gain_key` converge alike. None, if nothing is to be remembered.
    """

    lipschitz: Tensor | None = None
    ragged: bool = False
    deterministic: bool = True
    ordered: bool = True
    identity: Mapping[str, str | int | float] = MappingProxyType({})
    cost_key: Hashable | None = None
    gain_key: Hashable | None = None

    @property
    @abstractmethod
    def length(self) -> int:
        """L, the number of positions."""

    @abstractmethod
    def initial(self) -> Tensor:
        """The first guess, shape (B, L, *E), the same at every call. It sets the batch, dtype and device.

        `solve` calls it once, before the first pass: a system that keeps state (a cache, tokens counted) begins anew here.
        """

    @abstractmethod
    def evaluate(self, x: Tensor, window: Window) -> Tensor:
        """f at the window's positions.

        Args:
            x: the iterate, shape (B, L, *E). Not to be written to.
            window: which positions, and what changed since the last call.

        Returns:
            f(x)[:, window.slice], shape (B, W, *E), with the dtype of x. Row b may depend on row b of x alone, and
            position l on positions before l alone: nothing at or after the window's last position is read, whatever
            it holds.
        """

    def after_pass(self, x: Tensor, fronts: Tensor) -> Tensor:
        """Called after every pass, before its positions become final: a system may end rows, hold rows back, and write guesses.

        Args:
            x: the iterate, shape (B, L, *E). Positions at and beyond the front that is returned for a row may be written to; those of a row
                that ends, from where it ended.
            fronts: how many leading positions of each row would be final now, shape (B,), on the host.

        Returns:
            The fronts that hold, shape (B,): for each row the one given; L, if the row has ended, with all its positions written; or
            a smaller one, to hold the row back (not behind the front it had before this pass, and the slowest row has to move on).
        """
        return fronts

    def select(self, rows: Tensor) -> "TriangularSystem | None":
        """The system of some rows alone, with the state that was kept for them; None if that is not offered.

        Args:
            rows: indices into the batch, rising, on the device of the iterate, shape (number of rows that stay,).
        """
        return None

    def resource(self) -> object | None:
        """What evaluation writes to (a cache): two solves may not use it at once, and the second raises. None for a system without state."""
        return self


class LayeredSystem(ABC):
    """A chain of triangular systems, each built from the solution of the one before (the blocks of a flow).

    Layers have the same rows, or some have several for each of the others', next to one another (the frames of a video).

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

    def walk(self, solve_layer: Callable[[int, Callable[[], TriangularSystem]], Tensor]) -> Tensor:
        """Solve each layer given the solution of the one before; returns the output.

        Args:
            solve_layer: takes the layer's index and a function that builds its system, and returns its solution.
        """
        value: Tensor | None = None
        for index in range(self.depth):
            before = value
            value = solve_layer(index, lambda index=index, before=before: self.layer(index, before))  # type: ignore[misc]
        if value is None:
            raise ValueError(f"{type(self).__name__} has {self.depth} layers, expected at least one")
        return self.output(value)
