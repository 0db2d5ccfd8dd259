"""A causal language model's continuation as a triangular system.

x_l, the token l of the continuation, is a function of the prompt and x_<l: the choice from the model's scores. One pass is one forward of the
model over the window's tokens, on top of a key-value cache that holds what is before it.

Shapes: B batch rows, P tokens of the prompt, L tokens of the continuation, W positions of a window, n columns of a pass, V tokens of the
vocabulary. A column is a place in prompt and continuation together: position l is column P + l.
"""

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from parallel_decode._claims import claim_of
from parallel_decode.adapters.causal_lm.cache import Slots
from parallel_decode.adapters.causal_lm.guidance import Guidance
from parallel_decode.adapters.causal_lm.prompt import Prompt
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
        attention_mask: of the prompt, shape (B, P), 0 for padding; None for no padding.
        position_ids: of the prompt, shape (B, P); None counts what is not padding.
        processors: of logits, as `generate` makes them.
        choice: of tokens from scores.
        guess: what windows hold before they are read.
        cache: of transformers, empty or with leading columns in it; None makes one.
        tie_tolerance: choose again, by a forward of a single token, where the two best scores are no further apart than this (relative to the larger one); with
            0, never. See `parallel_generate`'s `strict`.
        guidance: negative prompts, which are read in a doubled batch.
        extra: further arguments of every forward.

    Attributes:
        scores, logits: of the last pass, shape (B, W, V).
        counts: "forwards" of the model, and "ties", choices that were made again.
        drafting: the texts, and the drafts beyond them.

    Raises:
        NotImplementedError: the model's cache cannot be rewound.

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
        tie_tolerance: float = 0.0,
        guidance: Guidance | None = None,
        extra: dict[str, Any] | None = None,
    ) -> None:
        self.model, self.prompt, self._length = model, Prompt(prompt, length, attention_mask, position_ids), length
        self.processors = processors if isinstance(processors, Processors) else Processors(processors)
        self.choice, self.guess, self.tie_tolerance = choice or Greedy(), guess or Last(), tie_tolerance
        self.guidance, self.copies = guidance, 1 if guidance is None else 2
        self.layout = self.prompt if guidance is None else guidance.doubled(self.prompt, length)  # what the model reads
        cache = DynamicCache(config=model.config) if cache is None else cache
        self.slots = Slots(cache, self.copies * len(prompt), self.layout.columns + length)
        self.given = self.slots.filled  # columns that the cache came with
        self.extra = extra or {}
        self.keeps = model._supports_logits_to_keep()
        self.scores = self.logits = prompt.new_zeros(0)
        self._begin()

    def _begin(self) -> None:
        """Nothing is read yet."""
        ids = self.prompt.ids
        self.slots.align(self.given)
        self.rows = torch.arange(len(ids))  # their numbers at first
        self.ended = torch.zeros(len(ids), dtype=torch.bool)
        self.guessed = torch.ones(len(ids), self.length, dtype=torch.bool, device=ids.device)
        self.starts, self.width = torch.zeros(len(ids), dtype=torch.long), 0
        self.counts = {"forwards": 0, "ties": 0}
        self.drafting = Drafting(self.guess, self.prompt.tokens(), self.length, self.choice.couples)

    @property
    def length(self) -> int:
        return self._length

    @property
    def ragged(self) -> bool:  # type: ignore[override]
        return not (self.slots.aligned or self.processors.lockstep or self.tie_tolerance)

    @property
    def cost_key(self) -> Any:  # type: ignore[override]
        config = self.model.config
        return (type(self.model), config.to_json_string(), str(self.prompt.ids.device), self.model.dtype, self.copies)

    def initial(self) -> Tensor:
        self._begin()
        x = self.prompt.ids[:, -1:].repeat(1, self.length)
        self.drafting.write(x)
        return x

    def after_pass(self, x: Tensor, fronts: Tensor) -> Tensor:
        """Extend the texts by what is final, and draft anew what is not."""
        new = self.drafting.accept(x, fronts.tolist(), self.starts.tolist(), self.width)
        fronts = self._end_rows(x, fronts, new)
        written = self.drafting.write(x)
        if written is not None and self.choice.couples:
            self.guessed[written] = True
        return fronts

    def _end_rows(self, x: Tensor, fronts: Tensor, new: dict[int, int]) -> Tensor:
        """The fronts that hold, where texts end; `new` has the number of new tokens of each row that had not ended."""
        return fronts

    def end(self, row: int) -> None:
        """A row of this batch goes on no longer."""
        self.ended[row] = True
        self.drafting.end(row)

    def select(self, rows: Tensor) -> "CausalLM | None":
        if self.processors.lockstep or self.slots.static:
            return None
        host, subset = rows.cpu(), copy.copy(self)
        both = torch.cat([rows, rows + len(self.rows)]) if self.guidance else rows
        self.slots.select(both)
        empty = DynamicCache(config=self.model.config)
        self.slots = Slots(empty, self.copies * len(self.rows), 1)  # these rows take the other along
        subset.prompt, subset.layout = self.prompt.select(rows), self.layout.select(both)
        subset.guessed = self.guessed[rows]
        subset.rows, subset.ended = self.rows[host], self.ended[host]
        subset.drafting = self.drafting.select(host.tolist())
        return subset

    @property
    def deterministic(self) -> bool:  # type: ignore[override]
        return not self.choice.couples

    def resource(self) -> Any:
        return self.slots.cache

    @torch.no_grad()
    def evaluate(self, x: Tensor, window: Window) -> Tensor:
        claim_of(self.slots.cache)
        before, start, last = self.layout.columns, window.positions.start, window.positions[-1]
        changed = before + min(window.changed_from, start - 1)  # the first column to be read, if it is there at all
        if self.slots.aligned and not self.slots.records:
            if not self.slots.filled and before > 1:  # while nothing is recorded a long prompt takes less memory
                self._forward(x, 0, before - 1, 1)
            self.slots.record()
        first: int | Tensor
        if window.shift is None and self.slots.columns is None:
            first = self.slots.reach(changed)
            count = before + last - first
            self.starts = torch.full((len(x),), start)
        else:
            self.slots.spread()
            shift = torch.zeros(len(x), dtype=torch.long) if window.shift is None else window.shift.cpu()
            self.starts, each = start + shift, shift.repeat(self.copies)
            end = before + last + each
            wanted = (end - torch.minimum(changed + each, self.slots.known))[~self.ended.repeat(self.copies)]
            count = int(wanted.max()) if len(wanted) else 1
            first = end - count  # before column 0 there are holes
        self.width = len(window.positions)
        logits = self._forward(x, first, count, last - start + 1)
        logits = logits if window.positions.step == 1 else logits[:, :: window.positions.step]
        positions = torch.tensor(window.positions) - start + self.starts[:, None]
        self.logits, self.scores = logits[: len(x)], self._scored(x, logits, positions)
        drafts = window.take(x)
        guessed = window.take(self.guessed) if self.choice.couples else None
        tokens = self.choice(self.scores, drafts, guessed, positions, self.rows)
        if self.tie_tolerance:
            self._verify(x, drafts, tokens, positions)
        if guessed is not None:
            window.put(self.guessed, torch.zeros_like(guessed))
        return tokens

    def _scored(self, x: Tensor, logits: Tensor, positions: Tensor) -> Tensor:
        """Scores, shape (B, W, V), of all copies' logits at these positions (B, W)."""
        guided = logits if self.guidance is None else self.guidance.combine(logits)
        if not self.processors.processors:
            return guided
        own = guided.clone() if self.guidance is None else guided
        return self.processors(self.prompt.text(x), own, self.prompt.columns + positions)

    def _forward(self, x: Tensor, first: int | Tensor, count: int, keep: int) -> Tensor:
        """The last `keep` logits of `count` columns from `first`, of all rows or of each, on; float32, of all copies of the batch."""
        x = x if self.guidance is None else x.repeat(2, 1)
        before, device, real = self.layout.columns, x.device, None
        self.slots.rewind(first)
        if isinstance(first, int):
            end = first + count
            ids = x[:, first - before : end - before] if first >= before else self.layout.text(x)[:, first:end]
            positions = self.layout.position_ids[:, first:end]
            mask = self.layout.mask[:, :end] if self.layout.padded else None
        else:
            columns = first[:, None] + torch.arange(count)
            real = ~self.ended.repeat(self.copies) if bool(self.ended.any()) else None
            at = columns.to(device).clamp(0, self.layout.position_ids.shape[1] - 1)
            ids, positions = self.layout.text(x).gather(1, at), self.layout.position_ids.gather(1, at)
            assert self.slots.columns is not None
            held = torch.cat([self.slots.columns, columns], 1).to(device)
            mask = (held >= 0).long() * self.layout.mask.gather(1, held.clamp(0, self.layout.mask.shape[1] - 1))
        arguments = {"logits_to_keep": keep} if self.keeps else {}
        output = self.model(
            input_ids=ids.contiguous(),
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self.slots.cache,
            use_cache=True,
            return_dict=True,
            **arguments,
            **self.extra,
        )
        self.counts["forwards"] += 1
        self.slots.append(first, count, real)
        logits: Tensor = output.logits[:, -keep:]
        return logits.to(dtype=torch.float32, device=device)

    def _verify(self, x: Tensor, drafts: Tensor, tokens: Tensor, positions: Tensor) -> None:
        """Choose again where the two best scores nearly tie, by a forward of one token, the last of such positions first."""
        best = self.scores.topk(2, -1).values
        # Scores round as the logits do that they are made of.
        size = torch.maximum(best.abs().amax(-1), self.logits.abs().amax(-1))
        size = size if self.guidance is None else size * (abs(self.guidance.scale) + abs(1 - self.guidance.scale))
        close = ((best[..., 0] - best[..., 1]) <= self.tie_tolerance * size).any(0)
        final = torch.cat([torch.ones_like(drafts[:, :1]), (drafts == tokens)[:, :-1]], 1).cumprod(1).bool().any(0)
        again = (close & final).nonzero()[:, 0].tolist() if tokens.shape[1] > 1 else []
        for index in reversed(again):
            column = self.layout.columns + int(positions[0, index]) - 1
            if (first := self.slots.reach(column)) < column:  # layers of a sliding window have forgotten what is before
                self._forward(x, first, column - first, 1)
            logits = self._forward(x, column, 1, 1)
            self.logits[:, index] = logits[: len(x), 0]
            self.scores[:, index] = self._scored(x, logits, positions[:, index : index + 1])[:, 0]
            tokens[:, index] = self.scores[:, index].argmax(-1)
            self.counts["ties"] += 1
