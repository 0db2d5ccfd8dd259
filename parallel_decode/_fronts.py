"""Fronts: how many leading positions of each row are final. Nothing else holds them.

Shapes: B batch rows, W positions of a window, *E the event.
"""

import torch
from torch import Tensor

from parallel_decode._tolerance import like
from parallel_decode.window import Window


class Fronts:
    """The front of each row, on the host and on the device of the iterate.

    Attributes:
        length: L; a row whose front is there is done.
        min, max: over the rows.
        uniform: whether all rows have the same.
    """

    def __init__(self, batch: int, length: int, device: torch.device) -> None:
        self.length, self._batch, self._device = length, batch, device
        self.move(0)

    def move(self, host: Tensor | int, device: Tensor | None = None) -> None:
        """New fronts: one for all rows, or shape (B,) on the host (and the same on the device, if they are there already)."""
        self._on_host: Tensor | None = None
        self._on_device: Tensor | None = None
        if isinstance(host, int):
            self.min = self.max = host
            self.uniform = True
        else:
            self.min, self.max = map(int, host.aminmax())
            self.uniform = self.min == self.max
            self._on_host, self._on_device = host, device

    @property
    def host(self) -> Tensor:
        """Shape (B,), on the host."""
        if self._on_host is None:
            self._on_host = torch.full((self._batch,), self.min)
        return self._on_host

    @property
    def device(self) -> Tensor:
        """Shape (B,), on the device."""
        if self._on_device is None:
            self._on_device = self.host.to(self._device, non_blocking=True)
        return self._on_device

    def hold(self, new: Tensor, old: Tensor, window: Window) -> Tensor:
        """The new values (B, W, *E), but the old ones where they are final: rows ahead of the others keep theirs."""
        if self.uniform and window.positions.start >= self.min:
            return new
        return torch.where(like(window.indices(self._device) < self.device[:, None], new), old, new)

    def select(self, keep: Tensor) -> None:
        """Only these rows from now on; indices on the host."""
        self._batch = len(keep)
        self.move(self.host[keep])
