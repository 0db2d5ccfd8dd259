"""Random triangular systems, and the truth about them: plain sequential substitution, without the library.

Their arithmetic is the same at every call (full-length products in float64, where an absent dependency is a factor 0), so equality can
be asked for bit by bit.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

import parallel_decode as pd

SCHEDULES = (
    pd.Sequential(),
    pd.Jacobi(),
    pd.Jacobi(freeze=False),
    pd.GaussSeidelJacobi(1),
    pd.GaussSeidelJacobi(5),
    pd.JacobiGaussSeidel(1),
    pd.JacobiGaussSeidel(3),
    pd.Sliding(1),
    pd.Sliding(4),
    pd.Sliding(1000),
    pd.Sliding(4, per_row=True),
    pd.Sliding(1000, per_row=True),
    pd.Auto(),
)
EXAMPLES = int(os.environ.get("PARALLEL_DECODE_EXAMPLES", "200"))  # fewer where speed is the point (tests/mutants.py)
theorem = settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
sampled = settings(max_examples=max(EXAMPLES * 3 // 10, 5), deadline=None, derandomize=True)
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
KINDS = ("linear", "tanh", "event", "integer", "sparse", "badly scaled")


@dataclass(frozen=True)
class Problem:
    """A system f with a first guess; `weights` (B, L, L) say how strongly l depends on m."""

    kind: str
    f: Callable[[Tensor], Tensor]
    guess: Tensor
    weights: Tensor

    def system(self) -> "Rows":
        return Rows(self.f, self.guess)

    @property
    def length(self) -> int:
        return self.guess.shape[1]

    def truth(self) -> Tensor:
        """x_l = f_l(x_<l), one position after the other, from zeros; NaN after a row's first non-finite position."""
        x = torch.zeros_like(self.guess)
        for position in range(self.length):
            x[:, position] = self.f(x)[:, position]
        if x.is_floating_point():
            bad = ~x.isfinite().flatten(2).all(2) if x.dim() > 2 else ~x.isfinite()
            x[bad.long().cumsum(1) - bad.long() > 0] = torch.nan
        return x

    def depth(self, start: int = 0, stop: int | None = None) -> int:
        """The number of links of the longest chain of dependencies within start..stop, over the rows."""
        stop = self.length if stop is None else stop
        links = torch.zeros(self.length, dtype=torch.long)
        for position in range(start, stop):
            before = (self.weights[:, position, start:position] != 0).any(0).nonzero()[:, 0] + start
            links[position] = 1 + int(links[before].max()) if len(before) else 0
        return int(links[start:stop].max())


def problem(kind: str, batch: int, length: int, seed: int) -> Problem:
    """A random problem; the rows of a batch differ in how hard they are."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    hardness = torch.rand(batch, 1, 1, generator=g, dtype=torch.float64) * 1.5
    weights = normal(batch, length, length).tril(-1) * hardness
    if kind == "sparse":
        weights = weights * (torch.rand(weights.shape, generator=g) < 1.5 / length)
    constant, guess = normal(batch, length), normal(batch, length)
    if kind == "integer":
        factors = (weights * 5).long()
        offset = torch.randint(0, 50, (batch, length), generator=g)

        def integer(x: Tensor) -> Tensor:
            return (torch.einsum("blm,bm->bl", factors, x) + offset) % 11

        return Problem(kind, integer, torch.randint(0, 11, (batch, length), generator=g), factors)
    if kind == "event":
        mix, shift = normal(3, 3), normal(batch, length, 3)

        def event(x: Tensor) -> Tensor:
            return shift + torch.sin((weights[..., None] * (x @ mix)[:, None]).sum(2))

        return Problem(kind, event, normal(batch, length, 3), weights)
    if kind == "badly scaled":
        weights = weights * 10 ** (torch.rand(weights.shape, generator=g, dtype=torch.float64) * 12 - 8)
    squash = torch.tanh if kind in ("tanh", "sparse") else lambda y: y
    if kind == "overflowing":
        weights, squash = weights * 30, torch.sinh

    def f(x: Tensor) -> Tensor:
        return constant + squash((weights * x[:, None]).sum(2))

    return Problem(kind, f, guess, weights)


def problems(*kinds: str, max_length: int = 16) -> st.SearchStrategy[Problem]:
    """Problems of these kinds, of every small size."""
    return st.builds(
        problem, st.sampled_from(kinds), st.integers(1, 4), st.integers(1, max_length), st.integers(0, 2**31 - 1)
    )


def with_guess(problem: Problem, value: float) -> Problem:
    """The same problem, guessed to be `value` everywhere."""
    return replace(problem, guess=torch.full_like(problem.guess, value))


class Rows(pd.TriangularSystem):
    """A system from a full-length map of all rows that gives rows windows of their own, and lets rows go.

    Attributes:
        sizes: how many rows each evaluation had.
    """

    ragged = True

    def __init__(
        self, f: Callable[[Tensor], Tensor], guess: Tensor, rows: Tensor | None = None, sizes: list[int] | None = None
    ) -> None:
        self.f, self.guess = f, guess
        self.rows = torch.arange(len(guess)) if rows is None else rows
        self.sizes: list[int] = [] if sizes is None else sizes

    @property
    def length(self) -> int:
        return self.guess.shape[1]

    def initial(self) -> Tensor:
        return self.guess[self.rows]

    def evaluate(self, x: Tensor, window: pd.Window) -> Tensor:
        self.sizes.append(len(x))
        beyond = torch.arange(self.length) >= window.indices()[:, -1:]
        whole = torch.zeros_like(self.guess)
        whole[self.rows] = torch.where(beyond.view(*beyond.shape, *[1] * (x.dim() - 2)), torch.zeros_like(x), x)
        return window.take(self.f(whole)[self.rows])

    def select(self, rows: Tensor) -> "Rows":
        return Rows(self.f, self.guess, self.rows[rows], self.sizes)


def shift(x: Tensor) -> Tensor:
    return torch.nn.functional.pad(x, (1, -1))


def halves(batch: int = 2, length: int = 40, dtype: torch.dtype = torch.float64) -> pd.TriangularSystem:
    """x_l = 1 + x_{l-1} / 2, whose solution is 2 - 2^-l: error and residual halve with every pass."""
    return pd.from_function(lambda x: 1 + shift(x) / 2, torch.zeros(batch, length, dtype=dtype))


class Chain(pd.LayeredSystem):
    """Three layers x_l = z_l + tanh(x_{l-1}), each over the reversed solution of the one before."""

    def __init__(self, z: Tensor) -> None:
        self.z = z

    @property
    def depth(self) -> int:
        return 3

    def layer(self, index: int, value: Tensor | None) -> pd.TriangularSystem:
        z = self.z if value is None else value.flip(1)
        return pd.from_function(lambda x: z + torch.tanh(shift(x)), z)

    def output(self, value: Tensor) -> Tensor:
        return value * 2


def chain() -> Chain:
    return Chain(torch.randn(2, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64))


class RandomCorrection(pd.Correction):
    """x_new[l] = f_l(x_old) + g_l(x_new[<l]) - g_l(x_old[<l]) for a random causal g."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def correct(self, x: Tensor, fx: Tensor, window: pd.Window, memory: Any) -> tuple[Tensor, Any]:
        generator = torch.Generator().manual_seed(self.seed)
        weights = torch.randn(x.shape[1], x.shape[1], generator=generator, dtype=x.dtype).tril(-1)

        def g(y: Tensor, position: int) -> Tensor:
            return torch.einsum("m,bm...->b...", weights[position, :position], torch.cos(y[:, :position]))

        new = x.clone()
        for column, position in enumerate(window.positions):
            new[:, position] = fx[:, column] + (g(new, position) - g(x, position))
        passes = torch.zeros(len(x)) if memory is None else memory[0]
        return new[:, window.slice], (passes + 1,)


class Hooked(Rows):
    """Rows that use their turn after every pass: they end after a value that is an `end`, hold back at random, and guess at random.

    Attributes:
        ended: where each of the first rows ended; L as long as it has not.
        turns: how many passes there were.
    """

    def __init__(
        self,
        problem: Problem,
        seed: int = 0,
        *,
        ends: bool = True,
        holds: bool = True,
        guesses: bool = True,
        like: "Hooked | None" = None,
        rows: Tensor | None = None,
    ) -> None:
        super().__init__(problem.f, problem.guess, rows, None if like is None else like.sizes)
        self.problem, self.options = problem, {"ends": ends, "holds": holds, "guesses": guesses}
        batch, length = problem.guess.shape[:2]
        self.random: torch.Generator = like.random if like else torch.Generator().manual_seed(seed)
        self.seen: Tensor = like.seen if like else torch.zeros(batch, dtype=torch.long)
        self.ended: Tensor = like.ended if like else torch.full((batch,), length)

    def initial(self) -> Tensor:
        self.seen.zero_()
        self.ended.fill_(self.length)
        return super().initial()

    def is_end(self, values: Tensor) -> Tensor:
        """Which values, shape (n, *E), end a row."""
        values = values.flatten(1).sum(1)
        return values % 11 == 3 if self.problem.kind == "integer" else (values > 1.5) & (values < 2.5)

    def pad(self, x: Tensor, row: int, position: int) -> None:
        x[row, position:] = 7

    def truth(self) -> Tensor:
        x = self.problem.truth()
        for row in range(len(x) if self.options["ends"] else 0):
            ends = self.is_end(x[row].unsqueeze(-1)).nonzero()
            if len(ends):
                self.pad(x, row, int(ends[0]) + 1)
        return x

    def after_pass(self, x: Tensor, fronts: Tensor) -> Tensor:
        before = self.seen[self.rows]
        slowest = int(before.min())
        for row, number in enumerate(self.rows.tolist()):
            front = int(fronts[row])
            if int(self.ended[number]) < self.length:
                continue
            if self.options["holds"] and self._draw(3) == 0:
                front = max(int(before[row]), slowest + 1, front - self._draw(3))
            new = x[row, int(before[row]) : front].unsqueeze(-1)
            ends = self.is_end(new).nonzero() if self.options["ends"] and len(new) else new[:0]
            if len(ends):
                self.ended[number] = int(before[row]) + int(ends[0]) + 1
                self.pad(x, row, int(self.ended[number]))
                front = self.length
            elif self.options["guesses"] and self._draw(2) == 0 and front < self.length:
                start = front + self._draw(self.length - front)
                tail = x[row, start:]
                noise = torch.randn(tail.shape, generator=self.random, dtype=torch.float64) * 3
                x[row, start:] = noise.to(x.dtype) if x.is_floating_point() else noise.abs().to(x.dtype) % 11
            fronts[row] = front
        self.seen[self.rows] = fronts
        return fronts

    def _draw(self, below: int) -> int:
        return int(torch.randint(0, below, (), generator=self.random))

    def select(self, rows: Tensor) -> "Hooked":
        return Hooked(self.problem, like=self, rows=self.rows[rows], **self.options)


def watch_finals(system: pd.TriangularSystem, schedule: pd.Schedule, **options: Any) -> pd.Solution:
    """Solve, and see to it that fronts never go back and that what is final never changes."""
    last: list[tuple[Tensor, Tensor]] = []

    def look(p: pd.Pass) -> None:
        for front, x in last:
            assert bool((p.front >= front).all()), "a front went back"
            final = torch.arange(x.shape[1]) < front[:, None]
            assert torch.equal(p.x[final], x[final]), "a final value changed"
        assert int(p.front.min()) >= p.number
        last[:] = [(p.front.clone(), p.x.clone())]

    return pd.solve(system, schedule, callback=look, **options)


class Caching(Hooked):
    """It keeps what it read, as a key-value cache does, and sees to it that what it is not asked to read again is as it was."""

    def initial(self) -> Tensor:
        self.cache = torch.full_like(self.guess, 99)
        return super().initial()

    def evaluate(self, x: Tensor, window: pd.Window) -> Tensor:
        starts = torch.as_tensor(window.start).expand(len(x))
        before, width = window.positions.start - window.changed_from, window.positions[-1] - window.positions.start
        for row, number in enumerate(self.rows.tolist()):
            if int(self.ended[number]) < self.length:
                continue
            start = int(starts[row])
            first = max(start - before, 0)
            assert torch.equal(self.cache[number, :first].nan_to_num(), x[row, :first].nan_to_num()), (
                f"row {number} changed before {first}, and {window} does not say so"
            )
            self.cache[number, first : start + width] = x[row, first : start + width]
            self.cache[number, start + width :] = 99
        return super().evaluate(x, window)

    def select(self, rows: Tensor) -> "Caching":
        subset = Caching(self.problem, like=self, rows=self.rows[rows], **self.options)
        subset.cache = self.cache
        return subset


class Uncached(pd.TriangularSystem):
    """The same system, which evaluates everything anew at every pass."""

    def __init__(self, inner: pd.TriangularSystem) -> None:
        self.inner = inner

    @property
    def length(self) -> int:
        return self.inner.length

    def initial(self) -> Tensor:
        return self.inner.initial()

    def evaluate(self, x: Tensor, window: pd.Window) -> Tensor:
        return self.inner.evaluate(x, pd.Window.full(self.length))[:, window.slice]
