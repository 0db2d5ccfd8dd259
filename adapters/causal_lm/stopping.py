"""Where texts end: end-of-text tokens, criteria, padding, and what is kept of the scores on the way.

Shapes: B batch rows, L tokens of the continuation.
"""

import math
from typing import Any

import torch
from torch import Tensor
from transformers import EosTokenCriteria, MaxLengthCriteria

from parallel_decode.adapters.causal_lm.system import CausalLM
from parallel_decode.window import Window


class Generation(CausalLM):
    """With ends of text, scores to be kept, and a streamer."""

    def __init__(
        self,
        *args: Any,
        ends: Any,
        pad: int | None,
        keep: tuple[bool, bool],
        keep_ended: bool,
        stream: Any,
        returned: bool = False,
        **more: Any,
    ) -> None:
        super().__init__(*args, **more)
        self.eos, self.criteria = _ends(ends)
        # Without a criterion that knows a token at the end generate lets all rows go on until all are done.
        self.pad = pad if any(hasattr(criterion, "eos_token_id") for criterion in ends or ()) else None
        self.stream, self.keep_ended, self.keep, self.returned = stream, keep_ended, keep, returned

    def _begin(self) -> None:
        super()._begin()
        self.kept: list[list[Tensor]] = [[], []]  # scores, logits
        self.latest: list[dict[int, Tensor]] = [{}, {}]  # of positions that are not final
        self.lengths = torch.full((len(self.prompt.ids),), self.length)  # where each row ends
        self.checked = 0  # positions that the criteria, and the streamer, have seen

    @property
    def in_step(self) -> bool:
        return super().in_step or any(self.keep)

    def select(self, rows: Tensor) -> "CausalLM | None":
        return None if self.keep_ended or self.criteria or self.stream is not None else super().select(rows)

    def after_pass(self, x: Tensor, fronts: Tensor) -> Tensor:
        fronts = self._in_step(self._sound(fronts))
        if any(self.keep):
            self._take_scores(int(fronts.min()))
        return super().after_pass(x, fronts)

    def _in_step(self, fronts: Tensor) -> Tensor:
        """All rows at the front of the slowest, if there are criteria: they see all rows at one position, and may end a row there."""
        if not self.criteria or bool(self.ended.all()):
            return fronts
        return torch.where(self.ended, fronts, fronts[~self.ended].min())

    def _end_rows(self, x: Tensor, fronts: Tensor, new: dict[int, int]) -> Tensor:
        if not (self.eos or self.criteria or self.stream is not None):
            return fronts
        fronts = fronts.clone()
        for row, count in new.items():
            text = self.drafting.texts[row]
            at = next((i for i in range(len(text) - count, len(text)) if text[i] in self.eos), None)
            if at is not None and int(self.lengths[self.rows[row]]) == self.length:
                self._stop(x, fronts, row, self.drafting.final(row) + at + 1 - len(text))
        self._check(x, fronts)
        held = self._in_step(fronts)
        for row in () if held is fronts else (held < fronts).nonzero()[:, 0].tolist():
            self.drafting.cut(row, int(held[row]))
        fronts = held
        if bool((self.lengths < self.length).all()) and int(fronts.min()) >= int(self.lengths.max()):
            fronts[:] = self.length
        return fronts

    def _stop(self, x: Tensor, fronts: Tensor, row: int, length: int) -> None:
        """A row ends; with padding from there on, if that is what ends rows."""
        self.lengths[self.rows[row]] = length
        if self.pad is None:
            return
        x[row, length:] = self.pad
        if not self.keep_ended:
            self.end(row)
            fronts[row] = self.length
        elif length < int(fronts[row]):  # what was read beyond was no padding: hold the row back
            fronts[row] = length
            self.drafting.cut(row, length)
            for kept in self.kept:
                del kept[length:]

    def _check(self, x: Tensor, fronts: Tensor) -> None:
        """Ask the criteria, and tell the streamer, of positions that are final in all rows, one by one."""
        if not self.criteria and self.stream is None:
            return
        columns = self.prompt.columns
        while self.checked < min(int(fronts.min()), int(self.lengths.max())):
            position = self.checked
            text = self.prompt.text(x[:, : position + 1])
            scores = tuple(self.kept[0][: position + 1]) if self.keep[0] else None
            for criterion in self.criteria:
                done = torch.as_tensor(criterion(text, scores), device="cpu").expand(len(x))
                for row in (done & (self.lengths > position + 1)).nonzero()[:, 0].tolist():
                    self._stop(x, fronts, row, position + 1)
            if self.stream is not None:
                self.stream.put(text[:, columns + position].cpu())
            self.checked += 1

    def _take_scores(self, least: int) -> None:
        for kept, latest in zip(self.kept, self.latest, strict=True):
            while latest and len(kept) < least:
                kept.append(latest.pop(len(kept)))

    def evaluate(self, x: Tensor, window: Window) -> Tensor:
        tokens = super().evaluate(x, window)
        if self.keep_ended and self.pad is not None:  # as generate does: rows that have ended go on with padding
            ends = torch.isin(x, torch.tensor(sorted(self.eos), device=x.device)).long()
            over = window.indices(x.device) >= self.lengths[self.rows][:, None].to(x.device)
            tokens = torch.where(over | (window.take(ends.cumsum(1) - ends) > 0), self.pad, tokens)
        for latest, wanted, given in zip(self.latest, self.keep, (self.scores, self.logits), strict=True):
            if wanted:
                latest.update(zip(window.positions, given.clone().unbind(1), strict=True))
        return tokens


def _ends(criteria: Any) -> tuple[set[int], list[Any]]:
    """Tokens that end a row, and the other criteria but those of length (`longest`)."""
    eos: set[int] = set()
    others = []
    for criterion in criteria or ():
        if type(criterion) is EosTokenCriteria:
            eos |= set(torch.as_tensor(criterion.eos_token_id).flatten().tolist())
        elif type(criterion) is not MaxLengthCriteria:
            others.append(criterion)
    return eos, others


def longest(criteria: Any) -> float:
    """How many columns the criteria of length allow."""
    return min((c.max_length for c in criteria or () if type(c) is MaxLengthCriteria), default=math.inf)
