"""The conformance check: does a system keep the promises that `solve` builds on?"""

import torch
from torch import Tensor

from parallel_decode.schedules import GaussSeidelJacobi, Jacobi, JacobiGaussSeidel, Schedule, Sequential, Sliding
from parallel_decode.solver import solve
from parallel_decode.system import LayeredSystem, TriangularSystem
from parallel_decode.window import Window


@torch.no_grad()
def check_system(
    system: TriangularSystem | LayeredSystem, *, points: Tensor | None = None, atol: float | None = None
) -> None:
    """Try a system, ours or a user's, against the contract of `TriangularSystem`; every layer of a `LayeredSystem`.

    It tries: shapes and dtypes, that the iterate is not written to, that the same inputs give the same outputs, that a
    change at l moves nothing at or before l, that rows do not leak into one another (NaN neither), that windows agree with
    the full evaluation, that NaN at and after a window's last position has no effect, that rows with windows of their own and rows that go on
    alone get the same (for systems that offer it), and that every schedule ends at the sequential answer.

    Args:
        system: the system; a batch of at least two rows also tries the rows.
        points: values to try, shape (B, L, *E), for a system without layers whose values mean something special (token ids,
            say); by default the initial guess, the solution, and for floats normal noise.
        atol: the largest difference, absolute plus relative, that counts as equal; by default 0 for integers and the
            square root of the machine epsilon for floats, since the same sum over another window may round differently.

    Raises:
        AssertionError: a promise is broken; it says which, and at which position.

    Example:
        >>> import torch, parallel_decode as pd
        >>> from parallel_decode.testing import check_system
        >>> check_system(pd.from_function(lambda x: x.cumsum(1), torch.zeros(2, 4)))
        Traceback (most recent call last):
        AssertionError: not triangular: a change at position 0 moves f at position 0, f may depend on earlier positions alone
    """
    if isinstance(system, LayeredSystem):
        if points is not None:
            raise ValueError("points are for a system without layers: check each layer by itself")
        value = None
        for index in range(system.depth):
            layer = system.layer(index, value)
            _check(layer, None, atol, f"layer {index}: ")
            value = solve(layer, "sequential").value
        return
    _check(system, points, atol, "")


def _check(system: TriangularSystem, points: Tensor | None, atol: float | None, where: str) -> None:
    guess = system.initial().clone()
    length = system.length
    if guess.dim() < 2 or guess.shape[1] != length:
        raise AssertionError(f"{where}initial() has shape {tuple(guess.shape)}, expected (batch, {length}, *event)")
    if _where(system.initial(), guess, 0.0) is not None:
        raise AssertionError(f"{where}initial() differs between two calls")
    atol = _default_atol(guess) if atol is None else atol
    solution = solve(system, "sequential").value
    first, other = _two_points(guess, solution, points)
    full = Window.full(length)

    kept = first.clone()
    y = system.evaluate(first, full)
    if y.shape != guess.shape or y.dtype != guess.dtype:
        raise AssertionError(
            f"{where}evaluate returned {y.dtype} of shape {tuple(y.shape)}, expected {guess.dtype} of {tuple(guess.shape)}"
        )
    if _where(first, kept, 0.0) is not None:
        raise AssertionError(f"{where}evaluate wrote to the iterate, at position {_where(first, kept, 0.0)}")
    y = y.clone()
    if _where(system.evaluate(first, full), y, 0.0) is not None:
        raise AssertionError(f"{where}two evaluations of the same iterate differ")

    for position in _some_positions(length):
        moved = first.clone()
        moved[:, position] = other[:, position]
        if (at := _where(system.evaluate(moved, full)[:, : position + 1], y[:, : position + 1], atol)) is not None:
            raise AssertionError(
                f"{where}not triangular: a change at position {position} moves f at position {at}, "
                "f may depend on earlier positions alone"
            )

    strange = [other, torch.full_like(other, torch.nan)] if other.is_floating_point() else [other]
    for values in strange if len(first) > 1 else []:
        for row in (0, len(first) - 1):
            mixed = values.clone()
            mixed[row] = first[row]
            if (at := _where(system.evaluate(mixed, full)[row, None], y[row, None], atol)) is not None:
                raise AssertionError(
                    f"{where}rows leak: {values[row - 1].flatten()[0]} and so on in row {(row - 1) % len(first)} "
                    f"moves row {row} at position {at}"
                )

    for schedule in [Sequential(), *_schedules(length)]:
        for beyond in [None, torch.nan] if first.is_floating_point() else [None]:
            for exact in (True, False):
                _check_windows(system, schedule, first, other, beyond, exact, atol, where)
    if system.ragged:
        _check_ragged(system, first, other, atol, where)
    _check_select(system, first, atol, where)
    for schedule in _schedules(length):
        result = solve(system, schedule, tol=0).value
        if (at := _where(result, solution, atol)) is not None:
            raise AssertionError(f"{where}{schedule!r} ends elsewhere than sequential decoding, first at position {at}")


def _check_windows(
    system: TriangularSystem,
    schedule: Schedule,
    first: Tensor,
    other: Tensor,
    beyond: float | None,
    exact: bool,
    atol: float,
    where: str,
) -> None:
    """Go over the windows of a schedule as `solve` does, the iterate changing in between; compare with full evaluations.

    What was evaluated changes from the new front on if `exact` (tol = 0), else all of it.
    """
    length = system.length
    x, front, changed = first.clone(), 0, 0
    seen = []
    while front < length:
        window = Window(schedule.window(front, length), changed)
        read = x.clone()
        if beyond is not None:
            read[:, window.positions[-1] :] = beyond
        got = system.evaluate(read, window).clone()
        seen.append((x.clone(), window, got))
        start, step = window.positions.start, min(1 + front % 3, len(window.positions))
        front = min(length, start + step)
        changed = front - 1 if exact and window.positions.step == 1 else start
        moved = [p for p in window.positions if p >= changed]
        x[:, moved] = (other if len(seen) % 2 else first)[:, moved]
    for x, window, got in seen:
        expected = system.evaluate(x, Window.full(length))[:, window.slice]
        if got.shape != expected.shape:
            raise AssertionError(
                f"{where}evaluate returned shape {tuple(got.shape)} for {window}, expected {tuple(expected.shape)}"
            )
        if (at := _where(got, expected, atol)) is not None:
            reason = "" if beyond is None else f", with {beyond} at and after the last of them"
            raise AssertionError(
                f"{where}windows disagree: over {window}{reason}, evaluate gives something else than over everything "
                f"at position {window.positions[at]}"
            )


def _check_ragged(system: TriangularSystem, first: Tensor, other: Tensor, atol: float, where: str) -> None:
    """Windows that part from row to row."""
    rows, length, device = len(first), system.length, first.device
    width = max(1, length // 4)
    x, start, seen = first.clone(), torch.zeros(rows, dtype=torch.long), []
    at = torch.arange(length)
    for number in range(1 + (length - width) // width):
        ahead = start if number == 0 else start + (number + torch.arange(rows)) % (width + 1)
        ahead = ahead.clamp(max=length - width)
        before, start = int((ahead - start).max()), ahead
        least = int(start.min())
        window = Window(range(least, least + width), least - before, (start - least).to(device))
        seen.append((x.clone(), window, system.evaluate(x, window).clone()))
        moved = (at >= start[:, None]).to(device)
        x = torch.where(moved.view(*moved.shape, *[1] * (x.dim() - 2)), other if number % 2 else first, x)
    for x, window, got in seen:
        if (bad := _where(got, window.take(system.evaluate(x, Window.full(length))), atol)) is not None:
            raise AssertionError(
                f"{where}windows disagree: over {window}, evaluate gives something else than over everything at number {bad} of it"
            )


def _check_select(system: TriangularSystem, first: Tensor, atol: float, where: str) -> None:
    """Some rows go on alone, with what was kept for them."""
    half, length = max(1, system.length // 2), system.length
    expected = system.evaluate(first, Window.full(length)).clone()
    system.evaluate(first, Window(range(half), 0))
    rows = torch.arange(1, len(first), 2, device=first.device)
    fewer = system.select(rows)
    if fewer is None or half == length or not len(rows):
        return
    got = fewer.evaluate(first[rows], Window(range(half, length), half))
    if (bad := _where(got, expected[rows, half:], atol)) is not None:
        raise AssertionError(f"{where}select: rows {rows.tolist()} alone give something else at position {half + bad}")


def _two_points(guess: Tensor, solution: Tensor, points: Tensor | None) -> tuple[Tensor, Tensor]:
    """Two iterates that differ in most places."""
    if points is not None:
        return points.clone(), points.roll(1, dims=1)
    if guess.is_floating_point():
        noise = torch.randn(guess.shape, generator=_generator(0), dtype=torch.float64).to(guess)
        return solution.nan_to_num(0, 0, 0) + noise, guess.nan_to_num(0, 0, 0) - noise
    return solution, solution.roll(1, dims=1)


def _schedules(length: int) -> list[Schedule]:
    small = max(2, length // 5)
    return [Jacobi(), GaussSeidelJacobi(small), JacobiGaussSeidel(small), Sliding(small)]


def _some_positions(length: int) -> list[int]:
    return sorted({*range(min(4, length)), *range(0, length, max(1, length // 8)), length - 1})


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _default_atol(x: Tensor) -> float:
    return float(torch.finfo(x.dtype).eps ** 0.5) if x.is_floating_point() else 0.0


def _where(got: Tensor, expected: Tensor, atol: float) -> int | None:
    """The first position (dimension 1) where the two differ by more than atol * (1 + |expected|), NaN equalling NaN."""
    if got.is_floating_point():
        same = torch.isclose(got, expected, rtol=atol, atol=atol, equal_nan=True)
    else:
        same = got == expected
    bad = ~same.flatten(2).all(2).all(0) if same.dim() > 2 else ~same.all(0)
    return int(bad.nonzero()[0, 0]) if bool(bad.any()) else None
