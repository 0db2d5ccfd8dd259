"""A key-value cache whose rows may stand at different columns.

A forward pass appends the same number of slots to every row. A row that then takes back more of them than another leaves holes, which
the attention mask hides; when there are many, the slots are moved together. Keys know their positions (rotary or learnt), so
slots need no order but that of their columns.

Shapes: B batch rows, T slots.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

HOLES = 64  # slots, and half of what is needed: from there on they are moved together


class FixedLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """A `DynamicLayer` that writes into storage of a fixed size (doubled when it is full) where that one concatenates, which copies all.

    Its keys and values are views of what is filled.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.capacity = capacity
        self.storage: tuple[Tensor, ...] = ()

    @classmethod
    def of(cls, layer: DynamicLayer, capacity: int) -> "FixedLayer":
        """With the content of another layer."""
        fixed = cls(capacity)
        if layer.keys is not None and layer.values is not None and layer.is_initialized:
            fixed.update(layer.keys, layer.values)
        return fixed

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        held: Any = (self.keys, self.values)
        new = (key_states, value_states)
        while end > self.capacity:
            self.capacity *= 2
        fits = self.storage and all(
            s.shape[2] >= end and s.shape[0] == n.shape[0] and (start == 0 or h.data_ptr() == s.data_ptr())
            for s, h, n in zip(self.storage, held, new, strict=True)
        )
        if not fits:
            self.storage = tuple(n.new_empty(*n.shape[:2], self.capacity, n.shape[3]) for n in new)
            if start:
                for s, h in zip(self.storage, held, strict=True):
                    s[:, :, :start] = h
        for s, n in zip(self.storage, new, strict=True):
            s[:, :, start:end] = n
        self.keys, self.values = (s[:, :, :end] for s in self.storage)
        return self.keys, self.values


class Slots:
    """Which column of its row's sequence each slot of a cache holds.

    Args:
        cache: of transformers; the first columns of all rows may be in it.
        batch: B.
        capacity: columns that there may be; growing layers are replaced by such as do not.

    Attributes:
        aligned: whether all rows have to stand at the same column, since not all layers can have holes.
        columns: shape (B, T), on the host; -1 for a hole. None as long as slot t holds column t in all rows.
    """

    def __init__(self, cache: Any, batch: int, capacity: int) -> None:
        self.cache = cache
        if not getattr(cache, "offloading", False):
            cache.layers = [FixedLayer.of(x, capacity) if type(x) is DynamicLayer else x for x in cache.layers]
            if getattr(cache, "layer_class_to_replicate", None) is DynamicLayer:
                cache.layer_class_to_replicate = partial(FixedLayer, capacity)
        layers = getattr(cache, "layers", [])
        kinds = {type(layer).__name__ for layer in layers} or {"DynamicLayer"}
        self.aligned = not kinds <= {"DynamicLayer", "FixedLayer"} or getattr(cache, "offloading", False)
        self.static = kinds == {"StaticLayer"}
        what = f"the cache is a {type(cache).__name__} of {', '.join(sorted(kinds))}, which cannot be rewound"
        if any(kind.startswith("Linear") for kind in kinds) or not (
            self.static or getattr(cache, "is_croppable", True)
        ):
            raise NotImplementedError(f"{what}: a window of guesses needs that; use generate without custom_generate")
        if self.static and not hasattr(layers[0], "cumulative_length"):
            raise NotImplementedError(f"{what} before transformers 5.17: upgrade it, or leave out cache_implementation")
        if self.aligned and not self.static and not hasattr(cache, "activate_past_recording"):
            raise NotImplementedError(f"{what} before transformers 5.17: upgrade it")
        self.records = False
        self.floor = torch.zeros(batch, dtype=torch.long)
        self.columns: Tensor | None = None
        self.known = torch.full((batch,), int(cache.get_seq_length()))  # leading columns of each row that are there

    def __len__(self) -> int:
        if self.columns is not None:
            return self.columns.shape[1]
        return int(self.known[0]) if len(self.known) else 0

    def record(self) -> None:
        """From now on layers of a sliding window keep what a `rewind` may want back."""
        self.records = True
        if not self.static:
            self.cache.activate_past_recording()
            self.cache.crop(0)

    def reach(self, to: Tensor) -> Tensor:
        """The columns, shape (B,), from which to read on where those from `to` on are wanted."""
        to = torch.minimum(to, self.known)
        return torch.zeros_like(to) if self.records and bool((to < self.floor).any()) else to

    def rewind(self, to: Tensor) -> None:
        """Forget the columns from `to`, shape (B,), on."""
        if self.columns is None and bool((to == to[0]).all()):
            self._crop(int(self.known[0] - to[0]))
        else:
            if self.columns is None:
                self.columns = torch.arange(int(self.known[0])).expand(len(to), -1).clone()
            self.columns[self.columns >= to[:, None]] = -1
            used = (self.columns >= 0).any(0).nonzero()
            length = int(used[-1]) + 1 if len(used) else 0
            self._crop(self.columns.shape[1] - length)
            self.columns = self.columns[:, :length]
            most = int((self.columns >= 0).sum(1).max())
            if length - most > max(HOLES, most // 2):
                self._compact(most)
        self.known = torch.minimum(self.known, to)

    def append(self, columns: Tensor, real: Tensor | None = None) -> None:
        """A pass has read these columns, shape (B, n); of the rows that are `real` (all)."""
        if self.columns is None and (real is not None or bool((columns != columns[:1]).any())):
            self.columns = torch.arange(int(self.known[0])).expand(len(columns), -1).clone()
        if self.columns is not None:
            new = columns if real is None else torch.where(real[:, None], columns, -1)
            self.columns = torch.cat([self.columns, new], 1)
        self.floor = columns[
            :, 0
        ]  # a layer of a sliding window keeps what the last pass read, and not all that was before
        last = columns[:, -1] + 1
        self.known = last.clone() if real is None else torch.where(real, last, self.known)

    def select(self, rows: Tensor) -> None:
        """Keep these rows alone."""
        self.cache.batch_select_indices(rows)
        host = rows.cpu()
        self.known, self.floor = self.known[host], self.floor[host]
        self.columns = None if self.columns is None else self.columns[host]

    def align(self) -> None:
        """Move the slots of all rows together, up to the column that the slowest row has."""
        self.rewind(self.known.min().expand(len(self.known)).clone())
        if self.columns is not None:
            self._compact(int(self.known[0]))
            self.columns = None

    def _crop(self, count: int) -> None:
        if self.static:
            for layer in self.cache.layers:
                layer.cumulative_length.sub_(count)
        elif count > 0 or self.records:
            self.cache.crop(-count)

    def _compact(self, most: int) -> None:
        """To `most` slots, the columns of each row in order and holes before them."""
        assert self.columns is not None
        there = self.columns >= 0
        order = there.int().argsort(dim=1, stable=True)[:, -most:] if most else self.columns[:, :0]
        self.columns = self.columns.gather(1, order)
        for layer in self.cache.layers:
            if layer.is_initialized:
                index = order.to(layer.keys.device)[:, None, :, None]
                for name in ("keys", "values"):
                    kept = getattr(layer, name)
                    setattr(layer, name, kept.gather(2, index.expand(-1, kept.shape[1], -1, kept.shape[3])))
