"""A causal language model's continuation as a triangular system.

x_l, the token l of the continuation, is a function of the prompt and x_<l: the choice from the model's scores. One pass is one forward of the
model over the window's tokens, on top of a key-value cache that holds what is before it.

Shapes: B batch rows, P tokens of the prompt, L tokens of the continuation, W positions of a window, n columns of a pass, V tokens of the
vocabulary. A column is a place in prompt and continuation together: position l is column P + l.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from parallel_decode._claims import claim_of
from parallel_decode.adapters.causal_lm.cache import Slots
from parallel_decode.system import TriangularSystem
from parallel_decode.tokens.choices import Choice, Greedy
from parallel_decode.tokens.guesses import Guess, Last, Row
from parallel_decode.tokens.processors import Processors
from parallel_decode.window import Window

MOST = 64  # tokens that are drafted


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
        extra: further arguments of every forward.

    Attributes:
        scores, logits: of the last pass, shape (B, W, V).
        counts: "forwards" of the model, "ties", choices that were made again, and "rows" of the last pass.
        texts: of each row, the prompt without padding and what is final.
        draft_kinds: of the drafts that are in place, by row; rows that have ended are not there.
        left: how many tokens each row may still get, likewise.
        plan: says how wide the next window will be, so that no more is drafted.
        listeners: called for each draft with its kind, how many of its tokens were accepted, and how many were read.

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
        extra: dict[str, Any] | None = None,
    ) -> None:
        batch, columns = prompt.shape
        self.model, self.prompt, self._length = model, prompt, length
        mask = torch.ones_like(prompt) if attention_mask is None else attention_mask.long().to(prompt.device)
        self.padded = not bool(mask.all())
        self.mask = torch.cat([mask, mask.new_ones(batch, length)], 1)
        if position_ids is None or position_ids.shape != prompt.shape:
            position_ids = (mask.cumsum(1) - 1).clamp(min=0)
        position_ids = position_ids.to(prompt.device)
        ahead = torch.arange(1, length + 1, device=prompt.device)
        self.position_ids = torch.cat([position_ids, position_ids[:, -1:] + ahead], 1)
        self.processors = processors if isinstance(processors, Processors) else Processors(processors)
        self.choice, self.guess, self.tie_tolerance = choice or Greedy(), guess or Last(), tie_tolerance
        cache = DynamicCache(config=model.config) if cache is None else cache
        self.slots = Slots(cache, batch, columns + length)
        self.given = self.slots.filled  # columns that the cache came with
        self.extra = extra or {}
        self.keeps = model._supports_logits_to_keep()
        self.scores = self.logits = prompt.new_zeros(0)
        self.prompts = [line[kept].tolist() for line, kept in zip(prompt.cpu(), mask.bool().cpu(), strict=True)]
        self.listeners: list[Callable[[int, int, int], None]] = []
        self.plan: Callable[[], int] | None = None
        self._begin()

    def _begin(self) -> None:
        """Nothing is read yet."""
        batch, device = len(self.prompt), self.prompt.device
        self.slots.align(self.given)
        self.rows = torch.arange(batch)  # their numbers at first
        self.ended = torch.zeros(batch, dtype=torch.bool)
        self.guessed = torch.ones(batch, self.length, dtype=torch.bool, device=device)
        self.starts, self.width = torch.zeros(batch, dtype=torch.long), MOST
        self.counts = {"forwards": 0, "ties": 0, "rows": batch}
        self.texts = [list(text) for text in self.prompts]
        self.draft_kinds = dict.fromkeys(range(batch), 0)
        self.left = dict.fromkeys(range(batch), self.length)
        self.drafted = [0] * batch
        self.reached = [0] * batch  # positions from here on no window has held yet

    @property
    def length(self) -> int:
        return self._length

    @property
    def ragged(self) -> bool:  # type: ignore[override]
        return not (self.slots.aligned or self.processors.lockstep or self.tie_tolerance)

    @property
    def cost_key(self) -> Any:  # type: ignore[override]
        config = self.model.config
        return (type(self.model), config.to_json_string(), str(self.prompt.device), self.model.dtype)

    def initial(self) -> Tensor:
        self._begin()
        x = self.prompt[:, -1:].repeat(1, self.length)
        self.guess.begin(self.prompts)
        self._draft(x, dict.fromkeys(range(len(x) if self.length else 0), 0))
        return x

    def after_pass(self, x: Tensor, fronts: Tensor) -> Tensor:
        """Extend the texts by what is final, and draft anew what is not."""
        ends = fronts.tolist()
        rows = [row for row in range(len(ends)) if not self.ended[row]]
        olds = [len(self.texts[row]) - len(self.prompts[row]) for row in rows]
        least = min(olds, default=0)
        new = x[:, least : max((ends[row] for row in rows), default=0)].tolist()
        for row, old in zip(rows, olds, strict=True):
            self.texts[row].extend(new[row][old - least : ends[row] - least])
            self.reached[row] = max(self.reached[row], int(self.starts[row]) + self.width)
            read = int(self.starts[row]) + self.width - 1 - old
            read = min(read, self.drafted[row]) if self.drafted[row] else read
            if old and read > 0:
                for listener in self.listeners:
                    listener(self.draft_kinds[int(self.rows[row])], min(ends[row] - old - 1, read), read)
        fronts = self._end_rows(x, fronts, {row: ends[row] - old for row, old in zip(rows, olds, strict=True)})
        self._draft(x, {row: front for row, front in enumerate(fronts.tolist()) if front < self.length})
        return fronts

    def _end_rows(self, x: Tensor, fronts: Tensor, new: dict[int, int]) -> Tensor:
        """The fronts that hold, where texts end; `new` has the number of new tokens of each row that had not ended."""
        return fronts

    def end(self, row: int) -> None:
        """A row of this batch goes on no longer."""
        self.ended[row] = True
        self.draft_kinds.pop(int(self.rows[row]), None)

    def _draft(self, x: Tensor, fronts: dict[int, int]) -> None:
        """Write drafts beyond the fronts of these rows."""
        fresh = self.choice.couples if self.guess.fresh is None else self.guess.fresh
        least, most = min(fronts.values(), default=0), max((self.reached[row] for row in fronts), default=0)
        held = x[:, least:most].tolist() if fresh or self.guess.recycles else [[]] * len(x)
        drafts: dict[int, tuple[int, Row]] = {}  # where they begin, and their tokens
        for row, front in fronts.items():
            number, text = int(self.rows[row]), self.texts[row]
            predicted = held[row][front - least : max(0, self.reached[row] - least)]
            if predicted and self.guess.recycles:
                self.guess.refused(number, text, predicted)
            ahead = predicted if fresh else []
            room = min(MOST, self.length - front) - len(ahead)
            found, kind = self.guess.draft(number, text, ahead, room) if room > 0 else ([], 0)
            drafts[row], self.left[number] = (front + len(ahead), found), self.length - front
            self.draft_kinds[number], self.drafted[row] = (0, 0) if ahead else (kind, len(found))
        width = (self.width if self.plan is None else self.plan()) - 1
        at: tuple[list[int], list[int], list[int]] = [], [], []  # rows, positions, tokens
        for row, (first, found) in drafts.items():
            found = found[: max(0, fronts[row] + width - first)]
            places = range(first, first + len(found))
            for part, values in zip(at, ([row] * len(found), places, found), strict=True):
                part.extend(values)
        if at[0]:
            rows, positions, tokens = torch.tensor(at, device=x.device)
            x[rows, positions] = tokens
            if self.choice.couples:
                self.guessed[rows, positions] = True

    def select(self, rows: Tensor) -> "CausalLM | None":
        if self.processors.lockstep or self.slots.static:
            return None
        host, subset = rows.cpu(), copy.copy(self)
        self.slots.select(rows)
        self.slots = Slots(
            DynamicCache(config=self.model.config), len(self.prompt), 1
        )  # these rows take the other along
        for name in ("prompt", "position_ids", "mask", "guessed"):
            setattr(subset, name, getattr(self, name)[rows])
        subset.rows, subset.ended = self.rows[host], self.ended[host]
        for name in ("texts", "prompts", "drafted", "reached"):
            setattr(subset, name, [getattr(self, name)[row] for row in host.tolist()])
        return subset

    @property
    def deterministic(self) -> bool:  # type: ignore[override]
        return not self.choice.couples

    def resource(self) -> Any:
        return self.slots.cache

    @torch.no_grad()
    def evaluate(self, x: Tensor, window: Window) -> Tensor:
        claim_of(self.slots.cache)
        before, start, last = self.prompt.shape[1], window.positions.start, window.positions[-1]
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
            self.starts, end = start + shift, before + last + shift
            wanted = (end - torch.minimum(changed + shift, self.slots.known))[~self.ended]
            count = int(wanted.max()) if len(wanted) else 1
            first = end - count  # before column 0 there are holes
        self.width, self.counts["rows"] = len(window.positions), len(x)
        logits = self._forward(x, first, count, last - start + 1)
        self.logits = logits if window.positions.step == 1 else logits[:, :: window.positions.step]
        positions = torch.tensor(window.positions) - start + self.starts[:, None]
        if self.processors.processors:
            self.scores = self.processors(self._text(x), self.logits.clone(), before + positions)
        else:
            self.scores = self.logits
        drafts = window.take(x)
        guessed = window.take(self.guessed) if self.choice.couples else None
        tokens = self.choice(self.scores, drafts, guessed, positions, self.rows)
        if self.tie_tolerance:
            self._verify(x, drafts, tokens, positions)
        if guessed is not None:
            window.put(self.guessed, torch.zeros_like(guessed))
        return tokens

    def _text(self, x: Tensor) -> Tensor:
        return torch.cat([self.prompt, x], 1)

    def _forward(self, x: Tensor, first: int | Tensor, count: int, keep: int) -> Tensor:
        """The last `keep` logits of `count` columns from `first`, of all rows or of each, on; float32."""
        before, device, real = self.prompt.shape[1], x.device, None
        self.slots.rewind(first)
        if isinstance(first, int):
            end = first + count
            ids = x[:, first - before : end - before] if first >= before else self._text(x)[:, first:end]
            positions, mask = self.position_ids[:, first:end], self.mask[:, :end] if self.padded else None
        else:
            columns = first[:, None] + torch.arange(count)
            real = ~self.ended if bool(self.ended.any()) else None
            at = columns.to(device).clamp(0, self.position_ids.shape[1] - 1)
            ids, positions = self._text(x).gather(1, at), self.position_ids.gather(1, at)
            assert self.slots.columns is not None
            held = torch.cat([self.slots.columns, columns], 1).to(device)
            mask = (held >= 0).long() * self.mask.gather(1, held.clamp(0, self.mask.shape[1] - 1))
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
        close = ((best[..., 0] - best[..., 1]) <= self.tie_tolerance * best.abs().amax(-1)).any(0)
        final = torch.cat([torch.ones_like(drafts[:, :1]), (drafts == tokens)[:, :-1]], 1).cumprod(1).bool().any(0)
        again = (close & final).nonzero()[:, 0].tolist() if tokens.shape[1] > 1 else []
        for index in reversed(again):
            column = self.prompt.shape[1] + int(positions[0, index]) - 1
            self.logits[:, index] = self._forward(x, column, 1, 1)[:, 0]
            self.scores[:, index : index + 1] = self.processors(
                self._text(x),
                self.logits[:, index : index + 1].clone(),
                self.prompt.shape[1] + positions[:, index : index + 1],
            )
            tokens[:, index] = self.scores[:, index].argmax(-1)
            self.counts["ties"] += 1
