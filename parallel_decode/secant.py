"""The secant correction: how a position follows its neighbour, learnt from the passes themselves.

Shapes: B batch rows, L positions, W positions of the window, *E the event, E its size, K = E times the number of lags.
"""

import math
from dataclasses import dataclass
from functools import reduce
from numbers import Integral, Real

import torch
import torch.nn.functional as F
from torch import Tensor

from parallel_decode.correction import Correction
from parallel_decode.window import Window


@dataclass(frozen=True)
class SecantCorrection(Correction):
    """The change of a position propagated to the positions after it within the pass, by a Jacobian learnt on the way.

    A pass changes the positions by c = x_new - x_old. Jacobi takes c_l = r_l = f_l(x_old) - x_old[l], as though nothing
    before l changed. To first order in the neighbours at the lags k it is c_l = r_l + sum_k J_k c_{l-k}. J_k is a secant estimate: the ridge regression of the changes of f_l on those of x_{l-k}, from one evaluation of l
    to the next. Each row has its own, shared by all its positions, so it is known after two passes, also where no
    window has been yet. A pair of changes (dx, df) weighs 1 / |(dx, df)|, so that neither a large change, nor an f_l
    that changed for other reasons than x_{l-k}, dominates the estimate. No evaluation is added.

    It pays where f_l depends mostly on its neighbours, as over image patches. It costs a few products of (W, E) and
    (E, E) matrices a pass, and one solve of (K, K) for each row: little up to an E of some hundreds.

    Attributes:
        lags: how far back the neighbours are; (1, w) adds the patch above in images of w patches a row.
        order: number of steps a change is propagated; with W or more, the recurrence above is solved exactly.
        memory: how many passes the estimate remembers: the pairs of a pass weigh 1 - 1 / memory times as much at the next.
        ridge: the penalty on |J|^2 / E, where the pairs of a pass weigh 1 in all. More is nearer to Jacobi.

    Raises:
        TypeError: an option is of the wrong kind.
        ValueError: `lags` are not different numbers from 1 on, `order` or `memory` is less than 1, or `ridge` is not
            positive.

    References:
        Broyden, A class of methods for solving nonlinear simultaneous equations (1965): the secant condition.
        Lim et al., Parallelizing non-linear sequential models over the sequence length (arXiv 2309.12252): the same
        recurrence with the exact Jacobian.

    Example:
        >>> import torch, parallel_decode as pd
        >>> def f(x):  # x_l = 1 - 0.9 x_{l-1}
        ...     return 1 - 0.9 * torch.nn.functional.pad(x, (1, -1))
        >>> system = pd.from_function(f, torch.zeros(1, 200, dtype=torch.float64))
        >>> secant = pd.SecantCorrection(order=200, ridge=1e-6)
        >>> [pd.solve(system, pd.Jacobi(correction=c)).passes for c in (None, secant)]
        [200, 4]
    """

    lags: tuple[int, ...] = (1,)
    order: int = 2
    memory: int = 4
    ridge: float = 0.1

    def __post_init__(self) -> None:
        if not isinstance(self.lags, tuple) or not all(
            _is(lag, Integral) for lag in (*self.lags, self.order, self.memory)
        ):
            raise TypeError(
                f"lags is {self.lags!r}, order {self.order!r} and memory {self.memory!r}, expected a tuple of ints and two ints"
            )
        if not self.lags or min(self.lags) < 1 or len(set(self.lags)) < len(self.lags):
            raise ValueError(
                f"lags is {self.lags}, expected one or more different numbers of positions, each at least 1"
            )
        if self.order < 1 or self.memory < 1:
            raise ValueError(f"order is {self.order} and memory {self.memory}, expected at least 1 each")
        if not _is(self.ridge, Real):
            raise TypeError(f"ridge is {self.ridge!r}, expected a number")
        if not 0 < self.ridge < math.inf:
            raise ValueError(f"ridge is {self.ridge}, expected a finite number above 0")

    def correct(
        self, x: Tensor, fx: Tensor, window: Window, memory: tuple[Tensor, ...] | None
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        lags = [lag for lag in self.lags if lag < x.shape[1]]
        if not lags:
            return fx, None
        with torch.autocast(x.device.type, enabled=False):
            old, f = _wide(x), _wide(fx)
            inputs = [window.take(F.pad(old, (0, 0, lag, -lag))) for lag in lags]
            jacobians, memory = self._learn(torch.cat((*inputs, f), 2), x.shape[1], f.shape[2], window, memory)
            step = window.positions.step
            links = [  # a neighbour that is not in the window does not move
                (lag // step, j)
                for lag, j in zip(lags, jacobians, strict=True)
                if lag % step == 0 and lag // step < f.shape[1]
            ]
            residual = f - window.take(old)
            carried = torch.zeros_like(f)
            for _ in range(self.order if links else 0):
                change = residual + carried
                carried = reduce(torch.add, [F.pad(change[:, :-k] @ j, (0, 0, k, 0)) for k, j in links])
            new = f + carried
            new = torch.where(new.abs() <= torch.finfo(fx.dtype).max, new, f)
            return new.to(fx.dtype).view(fx.shape), memory

    def _learn(
        self, pair: Tensor, length: int, size: int, window: Window, memory: tuple[Tensor, ...] | None
    ) -> tuple[list[Tensor], tuple[Tensor, Tensor]]:
        """The Jacobian of each lag, transposed, shape (B, E, E), and the memory.

        `pair` holds what each position of the window is now computed from and to, shape (B, W, K + E). The memory is
        the same at the last evaluation of each position, shape (B, L, K + E), NaN before the first; and the products
        of all its weighted changes, shape (B, K + E, K + E).
        """
        batch, _, joint = pair.shape
        if memory is None:
            memory = pair.new_full((batch, length, joint), math.nan), pair.new_zeros(batch, joint, joint)
        seen, products = memory
        change = (pair - window.take(seen)).nan_to_num_(0, 0, 0)
        window.put(seen, pair)
        norm = torch.linalg.vector_norm(change, dim=2, keepdim=True)
        weight = (norm * norm.sum(1, keepdim=True)).clamp_(min=torch.finfo(pair.dtype).tiny).rsqrt_()
        change = change * weight  # the trace of its products is 1, whatever the scale
        products = torch.baddbmm(products, change.mT, change, beta=1 - 1 / self.memory)
        inputs = joint - size
        penalised = products[:, :inputs, :inputs].clone()
        penalised.diagonal(dim1=1, dim2=2).add_(self.ridge / size)
        jacobian = torch.linalg.solve_ex(penalised, products[:, :inputs, inputs:])[0]
        return [jacobian[:, i : i + size] for i in range(0, inputs, size)], (seen, products)


def _wide(x: Tensor) -> Tensor:
    """(B, W, *E) as (B, W, E), in float32 at least."""
    return (x.flatten(2) if x.dim() > 2 else x[..., None]).to(torch.promote_types(x.dtype, torch.float32))


def _is(value: object, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)
