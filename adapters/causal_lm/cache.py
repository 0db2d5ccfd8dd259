"""A key-value cache whose rows may stand at different columns.

A forward pass appends the same number of slots to every row. A row that then takes back more of them than another leaves holes, which
the attention mask hides; when there are many, the slots are moved together. Keys know their positions (rotary or learnt), so
slots need no order but that of their columns.

Shapes: B batch rows, T slots.
"""

import copy
import inspect
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin
from transformers.cache_utils import DynamicLayer

NAME = "cache"  # of the argument of `generate` and of models; before transformers 5.24:
if NAME not in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters:
    NAME = "past_key_values"
HOLES = 64  # slots, and half of what is needed: from there on they are moved together
ROOM = 256  # columns, and half of what was generated: so much is reserved ahead
SMALL = 3 * 2**17  # bytes of a layer's keys, below which concatenating takes less time (on a CPU)


class FixedLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """A `DynamicLayer` that writes into storage with room ahead (larger storage when it is full) where that one concatenates, which copies all.

    Its keys and values are views of what is filled. As long as it is small it concatenates too.

    Args:
        prompt: columns of it.
    """

    def __init__(self, prompt: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.prompt = prompt
        self.storage: tuple[Tensor, ...] = ()

    @classmethod
    def of(cls, layer: DynamicLayer, prompt: int) -> "FixedLayer":
        """With the content of another layer, which stays as it is."""
        fixed = cls(prompt)
        if layer.keys is not None and layer.values is not None and layer.is_initialized:
            fixed.update(layer.keys, layer.values)
        return fixed

    def plain(self) -> DynamicLayer:
        """With this one's content."""
        layer = DynamicLayer()  # type: ignore[no-untyped-call]
        if self.is_initialized and self.keys is not None and self.values is not None:
            layer.lazy_initialization(self.keys, self.values)
            layer.keys, layer.values = self.keys, self.values
        return layer

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if not self.storage and self.keys.nbytes + key_states.nbytes < SMALL:  # type: ignore[union-attr]
            return super().update(key_states, value_states)
        start = self.keys.shape[-2] if self.keys.numel() else 0  # type: ignore[union-attr]
        end = start + key_states.shape[-2]
        if not self._fits(start, end, key_states):
            self._move(start, end, key_states, value_states)
        keys, values = self.storage
        keys[:, :, start:end] = key_states
        values[:, :, start:end] = value_states
        self.keys, self.values = keys[:, :, :end], values[:, :, :end]
        return self.keys, self.values

    def _fits(self, start: int, end: int, new: Tensor) -> bool:
        """Whether the storage has the room, and holds what it should: others may have put other keys in place."""
        if not self.storage or self.storage[0].shape[2] < end or self.storage[0].shape[0] != new.shape[0]:
            return False
        return start == 0 or self.keys.data_ptr() == self.storage[0].data_ptr()  # type: ignore[union-attr]

    def _move(self, start: int, end: int, *new: Tensor) -> None:
        capacity = end + max(ROOM, (end - self.prompt) // 2)
        self.storage = tuple(n.new_empty(*n.shape[:2], capacity, n.shape[3]) for n in new)
        for s, held in zip(self.storage, (self.keys, self.values), strict=True):
            if start:
                s[:, :, :start] = held  # type: ignore[assignment]


class Slots:
    """Which column of its row's sequence each slot of a cache holds.

    Args:
        cache: of transformers; the first columns of all rows may be in it. It stays as it is until `give_back` (a static cache does not: `take_back`).
        batch: B.
        columns: of the prompt.

    Attributes:
        given: that cache.
        cache: what is written to: a copy of its layers, with room ahead in those that grow; a static cache itself.
        aligned: whether all rows have to stand at the same column, since not all layers can have holes.
        filled: while all rows are alike, slot t of any holds column t, for t < filled.
        columns: shape (B, T), on the host, once rows may differ; -1 for a hole. None before.
        known: of each row then how many leading columns are there, shape (B,).

    Raises:
        NotImplementedError: the cache cannot be rewound.
        ValueError: it has another number of rows.
    """

    def __init__(self, cache: Any, batch: int, columns: int) -> None:
        layers = getattr(cache, "layers", None)
        kinds = {type(layer).__name__ for layer in layers or ()} or {"DynamicLayer"}
        self.static = kinds == {"StaticLayer"}
        lossy = any(kind.startswith("Linear") or "Quantized" in kind for kind in kinds)
        if layers is None or lossy or not (self.static or cache.is_croppable):
            raise NotImplementedError(
                f"the cache is a {type(cache).__name__} of {', '.join(sorted(kinds))}, which cannot be rewound: a window of guesses needs "
                "that; use generate without custom_generate"
            )
        rows = {
            len(layer.keys)
            for layer in layers
            if isinstance(getattr(layer, "keys", None), Tensor) and layer.keys.numel()
        }
        if rows - {batch}:
            raise ValueError(
                f"the cache holds {max(rows)} rows, and the prompts are {batch}: repeat or select its rows"
            )
        self.given = self.cache = cache
        self.aligned = not kinds <= {"DynamicLayer"} or cache.offloading
        if not self.static:
            self.cache = copy.copy(cache)
            grows = not cache.offloading
            self.cache.layers = [
                FixedLayer.of(layer, columns) if type(layer) is DynamicLayer and grows else copy.copy(layer)
                for layer in layers
            ]
            if cache.layer_class_to_replicate is DynamicLayer and grows:
                self.cache.layer_class_to_replicate = partial(FixedLayer, columns)
        self.records = False
        self.filled = self.held()
        # Where the last pass began: of what was before, layers of a sliding window keep a part.
        self.floor: int | Tensor = 0
        self.columns: Tensor | None = None
        self.known = torch.zeros(batch, dtype=torch.long)

    def held(self) -> int:
        """How many slots the cache says to hold."""
        return int(self.cache.get_seq_length())

    def give_back(self) -> Any:
        """The cache that was given, with what this one holds."""
        if self.records:
            self._crop(0)  # what was kept for a rewind
        if not self.static:
            self.given.layers = [
                layer.plain() if isinstance(layer, FixedLayer) else layer for layer in self.cache.layers
            ]
            for layer in self.given.layers:
                if hasattr(layer, "record_past"):
                    layer.record_past = False
        return self.given

    def take_back(self, to: int) -> None:
        """Leave the cache that was given with so many columns, as it was."""
        if self.static:
            self.align(to)

    def record(self) -> None:
        """From now on layers of a sliding window keep what a `rewind` may want back."""
        self.records = True
        if not self.static:
            self.cache.activate_past_recording()
            self._crop(0)

    def spread(self) -> None:
        """From now on rows may differ."""
        if self.columns is None:
            self.columns = torch.arange(self.filled).expand(len(self.known), -1).clone()
            self.known.fill_(self.filled)

    def reach(self, to: int) -> int:
        """The column from which to read on where those from `to` on are wanted, while all rows are alike."""
        to = min(to, self.filled)
        return 0 if self.records and to < self.floor else to

    def rewind(self, to: int | Tensor) -> None:
        """Forget the columns from `to` on; shape (B,) where rows may differ."""
        if self.columns is None:
            assert isinstance(to, int)
            self._crop(self.filled - to)
            self.filled = to
            return
        self.columns[self.columns >= torch.as_tensor(to).view(-1, 1)] = -1
        used = (self.columns >= 0).any(0).nonzero()
        length = int(used[-1]) + 1 if len(used) else 0
        self._crop(self.columns.shape[1] - length)
        self.columns = self.columns[:, :length]
        most = int((self.columns >= 0).sum(1).max())
        if length - most > max(HOLES, most // 2):
            self._compact(most)
        self.known = torch.minimum(self.known, torch.as_tensor(to))

    def append(self, first: int | Tensor, count: int, real: Tensor | None = None) -> None:
        """A pass has read `count` columns from `first` on; of the rows that are `real` (all)."""
        self.floor = first
        if self.columns is None:
            assert isinstance(first, int)
            self.filled = first + count
            return
        new = torch.as_tensor(first).view(-1, 1) + torch.arange(count)
        last = new[:, -1] + 1
        self.columns = torch.cat([self.columns, new if real is None else torch.where(real[:, None], new, -1)], 1)
        self.known = last if real is None else torch.where(real, last, self.known)

    def select(self, rows: Tensor) -> None:
        """Keep these rows alone."""
        self.cache.batch_select_indices(rows)
        host = rows.cpu()
        self.known = self.known[host]
        self.columns = None if self.columns is None else self.columns[host]

    def align(self, most: int, going: Tensor | None = None) -> int:
        """Move the slots of all rows together, up to the column that the slowest row has (of those that are `going`, all by default), and to `most`; returns that."""
        if self.columns is not None:
            most = min(most, int((self.known if going is None or not bool(going.any()) else self.known[going]).min()))
            self.rewind(torch.full_like(self.known, most))
            self._compact(most)
            self.columns, self.filled = None, most
        else:
            self.rewind(min(most, self.filled))
        return self.filled

    def _crop(self, count: int) -> None:
        if not any(layer.is_initialized for layer in self.cache.layers):  # nothing was read
            return
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
        moved = (order != torch.arange(order.shape[1])).any(0).nonzero()
        first = int(moved[0]) if len(moved) else order.shape[1]  # those before are where they belong
        for layer in self.cache.layers:
            if layer.is_initialized:
                index = order[:, first:].to(layer.keys.device)[:, None, :, None]
                for name in ("keys", "values"):
                    kept = getattr(layer, name)
                    new = kept.gather(2, index.expand(-1, kept.shape[1], -1, kept.shape[3]))
                    kept[:, :, first : order.shape[1]] = new
                    setattr(layer, name, kept[:, :, : order.shape[1]])
