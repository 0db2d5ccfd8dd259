"""The promises of a system, one by one; `parallel_decode.testing.check_system` goes through them.

Shapes: B batch rows, L positions, W positions of the window, *E the event.
"""

from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from parallel_decode._subject import Subject
from parallel_decode._tolerance import like
from parallel_decode.schedules import Jacobi, Schedule, Sequential, Sliding
from parallel_decode.secant import SecantCorrection
from parallel_decode.solution import Solution
from parallel_decode.solver import Pass, solve
from parallel_decode.window import Window


def check(subject: Subject) -> None:
    """All promises."""
    subject.system.initial()
    check_evaluation(subject)
    if subject.system.deterministic:
        check_triangular(subject)
        check_rows(subject)
        for schedule in [Sequential(), *subject.schedules()]:
            for beyond in [None, torch.nan] if subject.first.is_floating_point() else [None]:
                for exact in (True, False):
                    check_windows(subject, schedule, beyond, exact)
        if subject.system.ragged:
            check_ragged(subject)
        check_select(subject)
    check_solutions(subject)


def check_evaluation(subject: Subject) -> None:
    """Shape and dtype, and nothing written to."""
    kept, guess = subject.first.clone(), subject.solution
    y = subject.full(subject.first)
    subject.require(
        y.shape == guess.shape and y.dtype == guess.dtype,
        f"evaluate returned {y.dtype} of shape {tuple(y.shape)}, expected {guess.dtype} of {tuple(guess.shape)}",
    )
    atol, subject.atol = subject.atol, 0.0
    subject.compare(subject.first, kept, "evaluate wrote to the iterate, at position {at}")
    subject.atol = atol
    if subject.system.deterministic:  # but for rounding: some kernels' depends on where in memory their operands are
        subject.compare(subject.full(subject.first), y, "two evaluations of the same iterate differ")


def check_triangular(subject: Subject) -> None:
    """A change at l moves nothing at or before l."""
    y, length = subject.full(subject.first), subject.system.length
    for position in sorted({*range(min(4, length)), *range(0, length, max(1, length // 8)), length - 1}):
        moved = subject.first.clone()
        moved[:, position] = subject.other[:, position]
        subject.compare(
            subject.full(moved)[:, : position + 1],
            y[:, : position + 1],
            f"not triangular: a change at position {position} moves f at position {{at}}, f may depend on earlier positions alone",
        )


def check_rows(subject: Subject) -> None:
    """Rows do not leak into one another."""
    first, other, rows = subject.first, subject.other, len(subject.first)
    y = subject.full(first)
    strange = [other, torch.full_like(other, torch.nan)] if other.is_floating_point() else [other]
    for values in strange if rows > 1 else []:
        for row in (0, rows - 1):
            mixed = values.clone()
            mixed[row] = first[row]
            leak = f"rows leak: {values[row - 1].flatten()[0]} and so on in row {(row - 1) % rows} moves row {row} at position {{at}}"
            subject.compare(subject.full(mixed)[row, None], y[row, None], leak)


def check_windows(subject: Subject, schedule: Schedule, beyond: float | None, exact: bool) -> None:
    """Go over the windows of a schedule as `solve` does, the iterate changing in between; compare with full evaluations.

    What was evaluated changes from the new front on if `exact` (tol = 0), else all of it.
    """
    system, length = subject.system, subject.system.length
    x, front, changed_from = subject.first.clone(), 0, 0
    seen = []
    while front < length:
        window = Window(schedule.window(front, length), changed_from)
        read = x.clone()
        if beyond is not None:
            read[:, window.positions[-1] :] = beyond
        seen.append((x.clone(), window, system.evaluate(read, window).clone()))
        start, step = window.positions.start, min(1 + front % 3, len(window.positions))
        front = min(length, start + step)
        changed_from = front - 1 if exact and window.positions.step == 1 else start
        moved = [p for p in window.positions if p >= changed_from]
        x[:, moved] = (subject.other if len(seen) % 2 else subject.first)[:, moved]
    for x, window, got in seen:
        expected = window.take(subject.full(x))
        subject.require(
            got.shape == expected.shape,
            f"evaluate returned shape {tuple(got.shape)} for {window}, expected {tuple(expected.shape)}",
        )
        reason = "" if beyond is None else f", with {beyond} at and after the last of them"
        disagree = f"windows disagree: over {window}{reason}, evaluate gives something else than over everything at position {{at}}"
        subject.compare(got, expected, disagree, window.positions)


def check_ragged(subject: Subject) -> None:
    """Windows that part from row to row."""
    system, first, other = subject.system, subject.first, subject.other
    rows, length, device = len(first), system.length, first.device
    width = max(1, length // 4)
    x, start, seen = first.clone(), torch.zeros(rows, dtype=torch.long), []
    for number in range(1 + (length - width) // width):
        ahead = start if number == 0 else start + (number + torch.arange(rows)) % (width + 1)
        ahead = ahead.clamp(max=length - width)
        before, start = int((ahead - start).max()), ahead
        least = int(start.min())
        window = Window(range(least, least + width), least - before, (start - least).to(device))
        seen.append((x.clone(), window, system.evaluate(x, window).clone()))
        moved = (torch.arange(length) >= start[:, None]).to(device)
        x = torch.where(like(moved, x), other if number % 2 else first, x)
    for x, window, got in seen:
        disagree = f"windows disagree: over {window}, evaluate gives something else than over everything at number {{at}} of it"
        subject.compare(got, window.take(subject.full(x)), disagree)


def check_select(subject: Subject) -> None:
    """Some rows go on alone, with what was kept for them; and of those some again."""
    length, x = subject.system.length, subject.first
    rows, thirds = torch.arange(1, len(x), 2, device=x.device), [length * i // 3 for i in range(1, 4)]
    if thirds[0] < 1 or thirds[1] == thirds[0] or not len(rows):
        return
    expected = subject.full(x)
    subject.system.initial()
    subject.system.evaluate(x, Window(range(thirds[0]), 0))
    subset, numbers = subject.system.select(rows), rows
    for start, stop in pairwise(thirds):
        if subset is None:
            break
        got = subset.evaluate(x[numbers], Window(range(start, stop), start))
        message = (
            f"select: rows {numbers.tolist()} alone give something else at number {{at}} of positions {start} to {stop}"
        )
        subject.compare(got, expected[numbers, start:stop], message)
        last = torch.tensor([len(numbers) - 1], device=x.device)
        subset, numbers = subset.select(last), numbers[last]
    subject.system.initial()


def check_solutions(subject: Subject) -> None:
    """Every schedule ends at the sequential answer, with corrections too, and no turn of the system's spoils that."""
    schedules = [*subject.schedules(), Jacobi(freeze=False)]
    if subject.system.ragged:
        schedules.append(Sliding(max(2, subject.system.length // 5), per_row=True))
    if subject.first.is_floating_point():
        schedules += [replace(schedule, correction=SecantCorrection()) for schedule in schedules]
    for schedule in [Sequential(), *schedules]:
        result = solve_watched(subject, schedule).value
        if subject.system.deterministic:
            message = f"{schedule!r} ends elsewhere than sequential decoding, first at position {{at}}"
            subject.compare(result, subject.solution, message)


def solve_watched(subject: Subject, schedule: Schedule) -> Solution:
    """Solve, and see to it that fronts never go back and that nothing final changes."""
    last: list[tuple[Tensor, Tensor]] = []

    def watch(p: Pass) -> None:
        for fronts, x in last:
            subject.require(
                bool((p.front >= fronts).all()), f"{schedule!r}: a front went back, from {fronts} to {p.front}"
            )
            final = torch.arange(x.shape[1]) < fronts[:, None]
            change = torch.where(like(final.to(x.device), x), p.x, x)
            subject.compare(change, x, f"{schedule!r}: a final value changed, at position {{at}}")
        last[:] = [(p.front.clone(), p.x.clone())]

    try:
        return solve(subject.system, schedule, tol=0, callback=watch)
    except ValueError as error:
        raise AssertionError(f"{subject.where}{schedule!r}: {error}") from error
