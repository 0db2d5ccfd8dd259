"""A causal language model's continuation as a triangular system.

x_l, the token l of the continuation, is a function of the prompt and x_<l: the choice from the model's scores. One pass is one forward of the
model over the window's tokens, on top of a key-value cache that holds what is before it.

Shapes: B batch rows, P tokens of the prompt, L tokens of the continuation, W positions of a window, n columns of a pass, V tokens of the
vocabulary. A column is a place in prompt and continuation together: position l is column P + l.
"""

import copy
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from parallel_decode._claims import claim_of
from parallel_decode.adapters.causal_lm.cache import Slots
from parallel_decode.adapters.causal_lm.guidance import Guidance
from parallel_decode.adapters.causal_lm.model_check import ModelCheck, Trust, hooked, settings
from parallel_decode.adapters.causal_lm.prompt import Prompt
from parallel_decode.adapters.causal_lm.reader import Reader
from parallel_decode.system import TriangularSystem
from parallel_decode.tokens.choices import Choice, Greedy
from parallel_decode.tokens.drafting import Drafting
from parallel_decode.tokens.guesses import Guess, Last
from parallel_decode.tokens.processors import Processors
from parallel_decode.window import Window


class CausalLM(TriangularSystem):
    """The continuation of prompts by a model of transformers.

    Args:
        model: with a language modelling head, decoder only.
        prompt: tokens, shape (B, P), padded on the left.
        length: L.
        attention_mask: of the prompt, shape (B, P), 0 for padding; None for no padding. With H columns more where the cache holds H
            tokens that are not in the prompt.
        position_ids: of the same columns; None counts what is not padding.
        processors: of logits, as `generate` makes them.
        choice: of tokens from scores.
        guess: what windows hold before they are read.
        cache: of transformers, empty or with leading columns in it; None makes one. It stays as it is (but for static caches).
        guidance: negative prompts, which are read in a doubled batch.
        zeros: names of arguments of every forward that are 0 for each column (token types of text).
        extra: further arguments of every forward, the same for all rows and columns.

    Attributes:
        scores, logits: of the last pass, shape (B, W, V).
        reader: the model, its cache, and how many forwards there were.
        drafting: the texts, and the drafts beyond them.
        trust: what the model cannot do, and why: a check tells, which is made now if there was none.
        model_check: that one.

    Raises:
        NotImplementedError: the model or its cache cannot be read in windows.
        ValueError: mask, position ids and cache are of different lengths.

    Example:
        >>> import torch, parallel_decode as pd, transformers
        >>> config = transformers.LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
        >>> model = transformers.LlamaForCausalLM(config).eval()
        >>> system = CausalLM(model, torch.tensor([[1, 2, 3]]), 8)
        >>> pd.solve(system, "sliding").value.shape
        torch.Size([1, 8])
    """

    def __init__(
        self,
        model: Any,
        prompt: Tensor,
        length: int,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        processors: Any = None,
        choice: Choice | None = None,
        guess: Guess | None = None,
        cache: Any = None,
        guidance: Guidance | None = None,
        zeros: tuple[str, ...] = (),
        extra: dict[str, Any] | None = None,
    ) -> None:
        self.model, self._length = model, length
        self.processors = processors if isinstance(processors, Processors) else Processors(processors)
        self.choice, self.guess = choice or Greedy(), guess or Last()
        self.guidance, self.copies = guidance, 1 if guidance is None else 2
        cache = DynamicCache(config=model.config) if cache is None else cache
        held, columns = int(cache.get_seq_length()), prompt.shape[1]
        known = columns if attention_mask is None else attention_mask.shape[1]
        if known == columns and held < columns:
            self.prompt = self.layout = Prompt(prompt, length, attention_mask, position_ids, zeros)
        elif attention_mask is not None and known == held + columns:
            self.prompt = Prompt(prompt, length, attention_mask[:, held:], None, zeros)
            self.layout = self.prompt.after(held, attention_mask, position_ids)
        else:
            raise ValueError(
                f"the cache holds {held} columns, and there are {columns} of tokens and {known} of attention_mask: expected the whole text, longer than the "
                f"cache, with as many columns of the mask, or the new tokens alone with {held + columns}"
            )
        if guidance is not None:
            self.layout = guidance.doubled(self.prompt, length)  # what the model reads
        self.extra = extra or {}
        self.cache, self.given = cache, held
        self.reader = self._reader([0])
        real = self.layout.mask[:, : self.layout.columns].sum(1)
        self.limits = settings(model, self.layout.columns + length, int(real.min()) if len(real) else 0)
        self.scores = self.logits = prompt.new_zeros(0)
        self._begin()

    def _begin(self) -> None:
        """Nothing is read yet."""
        ids = self.prompt.ids
        if self.reader.used:
            self.slots.take_back(self.given)
            self.reader = self._reader([0])
        self.rows = torch.arange(len(ids))  # their numbers at first
        self.ended = torch.zeros(len(ids), dtype=torch.bool)
        self.guessed = torch.ones(len(ids), self.length, dtype=torch.bool, device=ids.device)
        self.starts, self.width = torch.zeros(len(ids), dtype=torch.long), 0
        self.sound: Tensor | None = None  # from which position on each row has no scores that count; None if all do
        vocabulary = getattr(self.model.get_input_embeddings(), "num_embeddings", None)
        self.drafting = Drafting(self.guess, self.prompt.tokens(), self.length, self.choice.couples, vocabulary)

    def _reader(self, forwards: list[int]) -> Reader:
        """One that has read nothing."""
        slots = Slots(self.cache, self.copies * len(self.prompt.ids), self.layout.columns)
        return Reader(self.model, self.layout, slots, self.extra, forwards)

    @property
    def slots(self) -> Slots:
        return self.reader.slots

    @cached_property
    def model_check(self) -> ModelCheck:
        return ModelCheck(self.model, self.prompt, self.extra, self.layout.padded)

    @cached_property
    def trust(self) -> Trust:
        found = self.model_check.result()
        return found._replace(no_rows=found.no_rows or self.limits.no_rows, until=self.limits.until)

    @property
    def reach(self) -> int:
        """The position before which windows have to end: the column before it is the last that they may read."""
        until = self.limits.until
        return self.length if until is None else max(0, min(self.length, until - self.layout.columns + 1))

    @property
    def apart(self) -> bool:
        """Whether rows stand at columns of their own, which takes a mask."""
        return self.slots.columns is not None

    @property
    def length(self) -> int:
        return self._length

    @property
    def in_step(self) -> bool:
        """Whether rows have to stand at the same column whatever a check says."""
        return bool(self.slots.aligned or self.processors.lockstep or self.limits.no_rows)

    @property
    def ragged(self) -> bool:  # type: ignore[override]
        return not (self.in_step or self.trust.no_windows or self.trust.no_rows)

    @cached_property
    def cost_key(self) -> Any:  # type: ignore[override]
        device = str(self.prompt.ids.device)
        return type(self.model), self.model_check.configuration, device, self.model.dtype, self.copies

    @property
    def identity(self) -> dict[str, str | int | float]:  # type: ignore[override]
        kind, config, device, dtype, copies = self.cost_key
        place = torch.cuda.get_device_name(self.prompt.ids.device) if self.prompt.ids.is_cuda else device
        model = f"{kind.__module__}.{kind.__qualname__} {self.model_check.fingerprint}"
        return {"model": model, "settings": config, "device": place, "dtype": str(dtype), "copies": copies}

    def initial(self) -> Tensor:
        self._begin()
        x = self.prompt.ids[:, -1:].repeat(1, self.length)
        self.drafting.write(x)
        return x

    def after_pass(self, x: Tensor, fronts: Tensor) -> Tensor:
        """Extend the texts by what is final, and draft anew what is not."""
        fronts = self._sound(fronts)
        new = self.drafting.accept(x, fronts.tolist(), self.starts.tolist(), self.width)
        fronts = self._end_rows(x, fronts, new)
        written = self.drafting.write(x)
        for row, positions in written if self.choice.couples else ():
            self.guessed[row, positions.start : positions.stop] = True
        return fronts

    def _sound(self, fronts: Tensor) -> Tensor:
        """The fronts, but no row's beyond the positions that have scores."""
        if self.sound is None or not bool((held := (self.sound < fronts) & ~self.ended).any()):
            return fronts
        final = torch.tensor([self.drafting.final(row) for row in range(len(fronts))])
        return torch.where(held, torch.maximum(self.sound, final), fronts)

    def _end_rows(self, x: Tensor, fronts: Tensor, new: dict[int, int]) -> Tensor:
        """The fronts that hold, where texts end; `new` has the number of new tokens of each row that had not ended."""
        return fronts

    def end(self, row: int) -> None:
        """A row of this batch goes on no longer."""
        self.ended[row] = True
        self.drafting.end(row)

    def select(self, rows: Tensor) -> "CausalLM | None":
        if self.processors.lockstep or self.slots.static or self.limits.until is not None or hooked(self.model):
            return None
        if self.trust.no_windows:  # what a row gives may depend on the others, as it depends on the other tokens
            return None
        host, subset = rows.cpu(), copy.copy(self)
        both = torch.cat([rows, rows + len(self.rows)]) if self.guidance else rows
        self.slots.select(both)
        self.reader = self._reader(self.reader.forwards)  # those rows take the other along
        subset.prompt, subset.layout = self.prompt.select(rows), self.layout.select(both)
        subset.reader.layout = subset.layout
        subset.guessed = self.guessed[rows]
        subset.rows, subset.ended = self.rows[host], self.ended[host]
        subset.drafting = self.drafting.select(host.tolist())
        return subset

    @property
    def deterministic(self) -> bool:  # type: ignore[override]
        return not self.choice.couples

    def resource(self) -> Any:
        return self.cache

    @torch.no_grad()
    def evaluate(self, x: Tensor, window: Window) -> Tensor:
        before, start, last = self.layout.columns, window.positions.start, window.positions[-1]
        if last > start and (self.trust.no_windows or last >= self.reach):
            raise NotImplementedError(f"{self.trust.no_windows or self.trust.no_rows}: use schedule='sequential'")
        claim_of(self.cache)
        changed = before + min(window.changed_from, start - 1)  # the first column to be read, if it is there at all
        if self.slots.aligned and not self.slots.records and len(window.positions) > 1:
            if not self.slots.filled and before > 1:  # while nothing is recorded a long prompt takes less memory
                self._read(x, 0, before - 1, 1)
            self.slots.record()
        first: int | Tensor
        if window.shift is None and self.slots.columns is not None:
            self.slots.align(before + start, ~self.ended.repeat(self.copies))
        if window.shift is None:
            first = self.slots.reach(changed)
            count = before + last - first
            self.starts = torch.full((len(x),), start)
        else:
            self.slots.spread()
            shift = window.shift.cpu()
            self.starts, each = start + shift, shift.repeat(self.copies)
            end = before + last + each
            wanted = (end - torch.minimum(changed + each, self.slots.known))[~self.ended.repeat(self.copies)]
            count = int(wanted.max()) if len(wanted) else 1
            first = end - count  # before column 0 there are holes
        self.width = len(window.positions)
        logits = self._read(x, first, count, last - start + 1)
        logits = logits if window.positions.step == 1 else logits[:, :: window.positions.step]
        positions = torch.arange(0, last - start + 1, window.positions.step) + self.starts[:, None]
        self.logits, self.scores = logits[: len(x)], self._scored(x, logits, positions)
        guessed = window.take(self.guessed) if self.choice.couples else None
        tokens = self.choice(self.scores, window.take(x), guessed, positions, self.rows)
        self._note_undrawable(positions)
        if guessed is not None:
            window.put(self.guessed, torch.zeros_like(guessed))
        return tokens

    def _read(self, x: Tensor, first: int | Tensor, count: int, keep: int) -> Tensor:
        """The last `keep` logits of `count` columns from `first`, of all copies of the batch."""
        going = ~self.ended.repeat(self.copies) if not isinstance(first, int) and bool(self.ended.any()) else None
        return self.reader.read(x if self.copies == 1 else x.repeat(self.copies, 1), first, count, keep, going)

    def _scored(self, x: Tensor, logits: Tensor, positions: Tensor) -> Tensor:
        """Scores, shape (B, W, V), of all copies' logits at these positions (B, W); notes from which position on there are none."""
        scores = logits if self.guidance is None else self.guidance.combine(logits)
        count = scores.shape[1]
        if self.processors.processors:
            own = scores.clone() if self.guidance is None else scores
            scores, count = self.processors(self.prompt.text(x), own, self.prompt.columns + positions)
        if scores.shape[1] == 1 == count:  # a pass that moves no row beyond it
            self.sound = None
        else:
            self.sound = positions[:, -1] + 1 if count == scores.shape[1] else positions[:, count]
        return scores

    def _note_undrawable(self, positions: Tensor) -> None:
        """Positions (B, W) from the first one on that nothing could be drawn for do not count.

        Raises:
            RuntimeError: it is a row's next.
        """
        wrong = self.choice.undrawable
        if wrong is None or not bool(wrong.any()):
            return
        wrong = wrong.cpu() & ~self.ended[:, None]
        if bool(wrong[:, 0].any()):
            raise RuntimeError("probability tensor contains either `inf`, `nan` or element < 0")
        if self.sound is not None:
            self.sound = torch.where(wrong, positions, self.sound[:, None]).amin(1)
