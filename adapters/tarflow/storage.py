"""The key-value cache: fixed storage, written in place.

Shapes: B batch (twice that with guidance), L positions, C channels, H heads.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from parallel_decode.adapters.tarflow.model import HEAD_DIM


class Cache(NamedTuple):
    """Keys and values of one layer for all positions, in place."""

    kv: Tensor  # (B, L, 2 C)
    keys: Tensor  # the same storage, (B, H, L, 64)
    values: Tensor


class Storage:
    """The caches of all layers. The blocks of a flow, which are solved one after the other, share it.

    Attributes:
        owner: whose content it is.
    """

    def __init__(self) -> None:
        self.kv = torch.empty(0)
        self.caches: list[Cache] = []
        self.owner: object = None

    def claim(self, owner: object, shape: tuple[int, int, int, int], like: Tensor) -> None:
        """From now on the content, shape (layers, B, L, 2 C), is the owner's, and all zeros."""
        if self.kv.shape != shape or self.kv.dtype != like.dtype or self.kv.device != like.device:
            self._set(like.new_zeros(shape))
        else:
            self.kv.zero_()
        self.owner = owner

    def select(self, rows: Tensor) -> None:
        """Only these rows of the batch from now on."""
        self._set(self.kv[:, rows])

    def _set(self, kv: Tensor) -> None:
        self.kv, self.caches = kv, []
        for layer in kv:
            keys, values = layer.unflatten(2, (2, -1, HEAD_DIM)).permute(2, 0, 3, 1, 4)
            self.caches.append(Cache(layer, keys, values))
