"""The first iterate, from what the user gave or from the system's own guess.

Shapes: B batch rows, L positions, *E the event.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from parallel_decode._options import check_kind
from parallel_decode._tolerance import all_finite
from parallel_decode.schedules import Schedule
from parallel_decode.system import LayeredSystem, TriangularSystem


def guesses_of_layers(
    initial: Tensor | Sequence[Tensor | None] | None, chain: LayeredSystem, layered: bool
) -> Sequence[Tensor | None]:
    """What `solve` was given as `initial`, one for each layer."""
    if initial is None:
        return [None] * chain.depth
    if not layered:
        check_kind("initial", initial, Tensor, "a tensor of shape (batch, length, *event)")
        return [initial]  # type: ignore[list-item]
    what = f"initial has to hold a tensor or None for each of the {chain.depth} layers of this system"
    if isinstance(initial, Tensor) or not isinstance(initial, Sequence) or len(initial) != chain.depth:
        raise ValueError(what)
    if not all(guess is None or isinstance(guess, Tensor) for guess in initial):
        raise TypeError(f"initial holds {[type(guess).__name__ for guess in initial]}: it has to hold tensors, or None")
    return initial


def first_iterate(system: TriangularSystem, schedule: Schedule, guess: Tensor | None) -> Tensor:
    """The first iterate: contiguous (strides decide how sums round), finite, and the solver's own."""
    own = system.initial()
    expected = (*own.shape[:1], system.length, *own.shape[2:])
    if own.shape != expected:
        raise ValueError(
            f"the system's initial guess has shape {tuple(own.shape)}, expected (batch, {system.length}, *event)"
        )
    if own.is_complex():
        raise TypeError(
            f"the system is {own.dtype}, expected floating or integer values: solve for real and imaginary parts"
        )
    if guess is None:
        guess = torch.zeros_like(own) if schedule.start == "zeros" else own
    elif guess.shape != own.shape or guess.dtype != own.dtype:
        raise ValueError(
            f"initial is {guess.dtype} of shape {tuple(guess.shape)}, expected {own.dtype} of shape {tuple(own.shape)}"
        )
    first = torch.empty(own.shape, dtype=own.dtype, device=own.device).copy_(guess.detach())
    return first if all_finite(first) else first.masked_fill_(~first.isfinite(), 0)
