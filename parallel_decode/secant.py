"""The secant correction: how a position follows its neighbour, learnt from the passes themselves.

Shapes: B batch rows, L positions, W positions of the window, *E the event, E its size, K = E times the number of lags.
"""

import math
from dataclasses import dataclass
from numbers import Integral, Real

import torch
import torch.nn.functional as F
from torch import Tensor

from parallel_decode.correction import Correction, Memory
from parallel_decode.system import Window


@dataclass(frozen=True)
class SecantCorrection(Correction):
    """The change of a position passed on to those that follow it within the same pass, by a Jacobian learnt on the way.

    A pass moves the positions by c = x_new - x_old. Jacobi has c_l = r_l = f_l(x_old) - x_old[l], as though nothing before
    l moved; to first order, with lags k,
        c_l = r_l + sum_k J_k c_{l-k}.
    J_k, one for each row and shared by its positions, is the ridge regression of the changes of f_l on those of
    x_{l-k} between two evaluations of l: what a secant is to a tangent. Pairs of changes are weighted by the inverse of
    their length, of both changes together, so that neither a large step nor f moving for other reasons than
    x_{l-k} rules the estimate. No evaluation is added, and what is learnt serves positions that no window has reached yet.

    It pays where f_l hangs mostly on the neighbour, as in flows over image patches. Its time is that of a few products of
    (W, E) by (E, K) and a solve of (K, K) for each row: for events of up to some hundred values.

    Attributes:
        lags: which neighbours, in positions; (1, w) adds the patch above in images of w patches a row, read line by line.
        order: how many links of neighbours a change is passed on by.
        decay: what the pairs of the pass before weigh, against 1 for those of this pass.
        ridge: the penalty on J, against the pairs of one pass: the larger, the nearer to Jacobi.

    Raises:
        TypeError: an option is of the wrong kind.
        ValueError: lags are not different whole numbers of 1 or more, `order` is less than 1, `decay` is not in [0, 1), or
            `ridge` is not positive.

    References:
        The secant condition is Broyden's (1965); the correction, with the exact Jacobian, is DEER's (arXiv 2309.12252).

    Example:
        >>> import torch, parallel_decode as pd
        >>> def f(x):  # x_l = 1 - 0.9 x_{l-1}
        ...     return 1 - 0.9 * torch.nn.functional.pad(x, (1, -1))
        >>> system = pd.from_function(f, torch.zeros(1, 200, dtype=torch.float64))
        >>> secant = pd.SecantCorrection(order=32)
        >>> [pd.solve(system, pd.Jacobi(correction=c)).passes for c in (None, secant)]
        [200, 9]
    """

    lags: tuple[int, ...] = (1,)
    order: int = 4
    decay: float = 0.8
    ridge: float = 0.05

    def __post_init__(self) -> None:
        if not isinstance(self.lags, tuple) or not all(_is(lag, Integral) for lag in (*self.lags, self.order)):
            raise TypeError(f"lags is {self.lags!r} and order {self.order!r}, expected a tuple of ints and an int")
        if not self.lags or min(self.lags) < 1 or len(set(self.lags)) < len(self.lags):
            raise ValueError(f"lags is {self.lags}, expected one or more different numbers of positions, each at least 1")
        if self.order < 1:
            raise ValueError(f"order is {self.order}, expected at least 1")
        if not _is(self.decay, Real) or not _is(self.ridge, Real):
            raise TypeError(f"decay is {self.decay!r} and ridge {self.ridge!r}, expected numbers")
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay is {self.decay}, expected at least 0 and less than 1")
        if not 0 < self.ridge < math.inf:
            raise ValueError(f"ridge is {self.ridge}, expected a finite number above 0")

    def correct(self, x: Tensor, fx: Tensor, window: Window, memory: Memory) -> tuple[Tensor, Memory]:
        with torch.autocast(x.device.type, enabled=False):
            f, old = _wide(fx), _wide(x)
            jacobian, memory = self._learn(old, f, window, memory)
            residual, carried = f - window.take(old), None
            size, step = f.shape[2], window.positions.step
            links = [  # a neighbour outside the window does not move
                (lag // step, j)
                for lag, j in zip(self.lags, jacobian.split(size, 1), strict=False)
                if lag % step == 0 and lag // step < f.shape[1]
            ]
            for _ in range(self.order if links else 0):
                change = residual if carried is None else residual + carried
                carried = sum(F.pad(change[:, :-k] @ j, (0, 0, k, 0)) for k, j in links)
            if carried is None:
                return fx, memory
            new = f + carried
            return torch.where(new.isfinite(), new, f).to(fx.dtype).view(fx.shape), memory

    def _learn(self, x: Tensor, f: Tensor, window: Window, memory: Memory) -> tuple[Tensor, Memory]:
        """The Jacobian of each row, transposed, shape (B, K, E), and the memory.

        The memory holds what each position was last computed from and to, shape (B, L, K + E), NaN where it never was;
        and the weighted products of all pairs of changes, shape (B, K + E, K + E).
        """
        inputs = [window.take(F.pad(x, (0, 0, lag, -lag))) for lag in self.lags if lag < x.shape[1]]
        pair = torch.cat((*inputs, f), 2)
        if memory is None:
            shape = len(x), x.shape[1], pair.shape[2]
            memory = pair.new_full(shape, math.nan), pair.new_zeros(shape[0], shape[2], shape[2])
        seen, products = memory
        change = (pair - window.take(seen)).nan_to_num_(0, 0, 0)
        window.put(seen, pair)
        length = torch.linalg.vector_norm(change, dim=2, keepdim=True)
        weight = (length * length.sum(1, keepdim=True)).clamp_(min=torch.finfo(f.dtype).tiny).rsqrt_()
        change = change * weight  # the trace of their products is 1, whatever the scale
        products = torch.baddbmm(products, change.mT, change, beta=self.decay)
        n, size = pair.shape[2] - f.shape[2], f.shape[2]
        penalised = products[:, :n, :n].clone()
        penalised.diagonal(dim1=1, dim2=2).add_(self.ridge / size)
        return torch.linalg.solve_ex(penalised, products[:, :n, n:])[0], (seen, products)


def _wide(x: Tensor) -> Tensor:
    """(B, W, *E) as (B, W, E), in float32 at least."""
    return (x.flatten(2) if x.dim() > 2 else x[..., None]).to(torch.promote_types(x.dtype, torch.float32))


def _is(value: object, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)
