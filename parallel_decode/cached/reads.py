"""Which inputs a pass reads, and which of the network's outputs are the window's.

Shapes: B batch rows, L positions, P inputs before them, T inputs that are read, W positions of the window, C channels, *E the event.
"""

import copy

import torch
from torch import Tensor

from parallel_decode.window import Window


class Reads:
    """What a causal network reads in one pass, where all rows have the same window.

    Its inputs are P given ones (a prompt, a class token) and after them the values of positions 0..L-2; it computes position l at
    input P + l - 1. Keys and values of the inputs before those that are read come from a cache. With P = 0 nothing is read
    for position 0: its value is given.

    Args:
        window: of the pass.
        length: L.
        prefix: P.
        known: how many leading inputs the cache holds.
        device: where masks and indices are to be.

    Attributes:
        size: T; 0 if the window is position 0 alone, and nothing is read for that.
        first: no input before this one is read.
        stop: keys of inputs before this one are attended to.
        mask: which, shape (T, stop), True where a query sees a key. None where nothing is to be masked, or `causal`; see `visible`.
        causal: whether query t sees the keys 0..t, as `is_causal` of `scaled_dot_product_attention` has it.

    Example: a window over positions 3 and 4 behind a prompt of 10, of which the cache holds all but the last.
        >>> import torch
        >>> from parallel_decode import Window
        >>> from parallel_decode.cached import Reads
        >>> reads = Reads(Window(range(3, 5), changed_from=2), length=8, prefix=10, known=12)
        >>> reads.take(torch.arange(18)[None]), reads.mask.shape
        (tensor([[12, 13]]), torch.Size([2, 14]))
        >>> reads.outputs(torch.zeros(1, 2, 64)).shape
        torch.Size([1, 2, 64])
    """

    def __init__(
        self, window: Window, length: int, prefix: int = 0, known: int = 0, device: torch.device | None = None
    ) -> None:
        self._all, self._device = prefix + length - 1, device
        self._skips = prefix == 0 and window.positions.start == 0
        wanted = self._wanted = window.positions[1:] if self._skips else window.positions
        self.stop = prefix + window.positions[-1]
        first = min(prefix + min(window.changed_from, wanted.start - 1), known, self.stop)
        self.first, self.size = first, self.stop - first
        self._inputs = slice(first, self.stop)
        self._outputs = slice(prefix + wanted.start - 1 - first, None, wanted.step)
        self.causal = first == 0 and self.size > 1
        self.mask: Tensor | None = None
        if first > 0 and self.size > 1:
            at = torch.arange(self.stop, device=device)
            self.mask = at <= at[first:, None]

    @staticmethod
    def of(window: Window, length: int, prefix: int = 0, known: int = 0, device: torch.device | None = None) -> "Reads":
        """The reads of any window: `RowReads` where every row has its own."""
        if window.shift is None:
            return Reads(window, length, prefix, known, device)
        first, shift = window.positions.start, window.shift
        before = first - window.changed_from
        if known < prefix + window.changed_from:  # a cache that is new in the middle of a solve
            before = prefix + first + int(shift.max()) - known
        last = window.positions[-1] + int(shift.max()) if shift.device.type == "cpu" else length
        return RowReads(first + shift[:, None], len(window.positions), before, prefix + last, length, prefix)

    def take(self, x: Tensor) -> Tensor:
        """What is read, of all inputs: (B or 1, P + L, *E) to (B, T, *E), or (1, T, *E) where all rows read the same."""
        self._check(x.shape[1])
        return x[:, self._inputs]

    def _check(self, inputs: int) -> None:
        if inputs < self._all:  # slices would silently be shorter
            raise ValueError(
                f"there are {inputs} inputs, or places of inputs, expected at least {self._all}: P + L - 1"
            )

    def visible(self) -> Tensor:
        """Which keys each query sees, always as a tensor: shape (1, 1, T, stop), or (B, 1, T, stop) where rows differ. For masks of your own, as of padding."""
        if self.mask is not None:
            return self.mask.view(-1, 1, self.size, self.stop)
        at = torch.arange(self.stop, device=self._device)
        return (at <= at[self._inputs, None])[None, None]

    def inputs(self) -> Tensor:
        """Which they are, shape (1, T), or (B, T) where rows differ."""
        return torch.arange(self.first, self.stop, device=self._device)[None]

    def embedding(self, table: Tensor) -> Tensor:
        """What belongs to the places of these inputs: (P + L, C) to (T, C)."""
        self._check(len(table))
        return table[self._inputs]

    def outputs(self, h: Tensor) -> Tensor:
        """The network's outputs for the window: (B, T, C) to (B, W, C), without position 0 if nothing is read for it."""
        return h if self.size == len(self._wanted) else h[:, self._outputs]

    def targets(self, z: Tensor) -> Tensor:
        """What belongs to the positions of the outputs: (B, L, *E) to (B, W, *E), without position 0 likewise."""
        p = self._wanted
        return z[:, p.start : p.stop : p.step]

    def complete(self, values: Tensor, given: Tensor) -> Tensor:
        """The values of all positions of the window from those of the outputs; position 0 is that of `given` (B, L, *E) if nothing is read for it."""
        return torch.cat([given[:, :1], values], 1) if self._skips else values

    def write(self, storage: Tensor, values: Tensor) -> None:
        """Write values (B, T, *E) to the places of these inputs in (B, P + L, *E)."""
        storage[:, self._inputs] = values

    def repeat(self, times: int) -> "Reads":
        """The same for so many copies of the batch."""
        return self


class RowReads(Reads):
    """The same where every row has a window of its own; shapes do not depend on where the windows lie.

    Args:
        start: the first position of each row's window, shape (B, 1).
        width: W. What would lie beyond the last position is that position again.
        before: how many positions before its window a row's first change lies, at most.
        stop: keys of inputs from here on are not needed.
        length: L.
        prefix: P.

    Attributes:
        mask: shape (B, 1, T, stop).
    """

    causal = False
    first = 0  # which it is lies in tensors

    def __init__(self, start: Tensor, width: int, before: int, stop: int, length: int, prefix: int = 0) -> None:
        self._all = inputs = prefix + length - 1
        device, before = start.device, max(before, 1)
        self.stop, self.size = stop, min(before + width - 1, inputs)
        first = (prefix + start - before).clamp(0, inputs - self.size)
        at = torch.arange(max(width, self.size, stop), device=device)
        self._row_positions = (start + at[:width]).clamp(max=length - 1)  # (B, W)
        self._row_outputs = (prefix + self._row_positions - 1 - first).clamp(min=0)  # (B, W), into T
        self._skips = prefix == 0
        self._index = first + at[: self.size]  # (B, T)
        self.mask = (at[:stop] <= self._index[..., None])[:, None]

    @property
    def _rows(self) -> Tensor:
        return torch.arange(len(self._index), device=self._index.device)[:, None]

    def take(self, x: Tensor) -> Tensor:
        self._check(x.shape[1])
        return x.expand(len(self._index), *x.shape[1:])[self._rows, self._index]

    def inputs(self) -> Tensor:
        return self._index

    def embedding(self, table: Tensor) -> Tensor:
        """(P + L, C) to (B, T, C)."""
        self._check(len(table))
        return table[self._index]

    def outputs(self, h: Tensor) -> Tensor:
        return h[self._rows, self._row_outputs]

    def targets(self, z: Tensor) -> Tensor:
        return z[self._rows, self._row_positions]

    def complete(self, values: Tensor, given: Tensor) -> Tensor:
        if not self._skips:
            return values
        nothing = (self._row_positions == 0).view(self._row_positions.shape + (1,) * (values.dim() - 2))
        return torch.where(nothing, given[:, :1], values)

    def write(self, storage: Tensor, values: Tensor) -> None:
        # What lies after a row's window stays there, masked, and 0 * NaN is NaN.
        storage[self._rows, self._index] = values.nan_to_num()

    def repeat(self, times: int) -> "RowReads":
        copies = copy.copy(self)
        copies._row_positions, copies._row_outputs, copies._index = (
            part.repeat(times, 1) for part in (self._row_positions, self._row_outputs, self._index)
        )
        copies.mask = None if self.mask is None else self.mask.repeat(times, 1, 1, 1)
        return copies
