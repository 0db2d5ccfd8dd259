"""Drafts of the rows of a batch: what is final of each text, what may follow, and how much of that came true.

Shapes: B batch rows, L positions.
"""

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from parallel_decode.tokens.guesses import Guess, Row

MOST = 64  # tokens that are drafted


class Outcome(NamedTuple):
    """Of a draft: its kind, how many of its tokens came true, of how many that the pass read; of the first, where it read a single position."""

    kind: int
    accepted: int
    read: int


class Drafting:
    """The texts of a batch and the drafts beyond them, on the host.

    Args:
        guess: what makes drafts.
        prompts: the tokens of each row, without padding.
        length: L.
        couples: whether tokens are chosen by a coupling; drafts are for fresh positions alone then, unless the guess says otherwise.
        vocabulary: how many tokens there are; None if that is not known.

    Attributes:
        texts: of each row, the prompt and what is final.
        kinds: of the drafts that are in place (0: none); None for rows that have ended.
        outcomes: of the drafts of the last pass.
        fresh: whether drafts are for positions that no window has reached, behind the last predictions.

    Raises:
        ValueError: drafts that would bias the samples of a coupling.
    """

    def __init__(
        self, guess: Guess, prompts: Sequence[Row], length: int, couples: bool = False, vocabulary: int | None = None
    ) -> None:
        self.guess, self.length, self.vocabulary = guess, length, vocabulary
        self.texts = [list(text) for text in prompts]
        self.kinds: list[int | None] = [0] * len(prompts)
        self.outcomes: list[Outcome] = []
        if couples and guess.recycles and guess.fresh is False:
            raise ValueError(
                "fresh=False with recycles=True would replace samples of a coupling by what they were, and bias them: leave out one of them"
            )
        self.fresh = couples if guess.fresh is None else guess.fresh
        self._numbers = list(range(len(prompts)))  # of the rows, as they were at first
        self._prompts = [len(text) for text in prompts]
        self._drafted = [0] * len(prompts)  # tokens of the drafts in place
        self._first = [-1] * len(prompts)  # the first of them
        self._reached = [0] * len(prompts)  # positions from here on no window has held yet
        guess.begin(prompts)

    def final(self, row: int) -> int:
        """How many positions of a row are final."""
        return len(self.texts[row]) - self._prompts[row]

    def going(self) -> list[int]:
        """The rows that have not ended."""
        return [row for row, kind in enumerate(self.kinds) if kind is not None]

    def accept(self, x: Tensor, fronts: list[int], starts: list[int], width: int) -> dict[int, int]:
        """The texts grow to the fronts of a pass, which are noted.

        Args:
            x: the iterate, shape (B, L).
            fronts: of each row.
            starts, width: of each row's window.

        Returns:
            How many tokens each row got that has not ended.
        """
        rows, self.outcomes = self.going(), []
        olds = {row: self.final(row) for row in rows}
        least, most = min(olds.values(), default=0), max((fronts[row] for row in rows), default=0)
        new = x[:, least:most].tolist()
        for row, old in olds.items():
            self.texts[row].extend(new[row][old - least : fronts[row] - least])
            self._reached[row] = max(self._reached[row], starts[row] + width)
            read = starts[row] + width - 1 - old
            read = min(read, self._drafted[row]) if self._drafted[row] else read
            if old and read > 0:
                self.outcomes.append(Outcome(self.kinds[row] or 0, min(fronts[row] - old - 1, read), read))
            elif read == 0 and self._drafted[row] and fronts[row] > old:
                self.outcomes.append(Outcome(self.kinds[row] or 0, int(self.texts[row][-1] == self._first[row]), 1))
        return {row: fronts[row] - old for row, old in olds.items()}

    def cut(self, row: int, length: int) -> None:
        """No more than so many positions of a row are final."""
        del self.texts[row][self._prompts[row] + length :]

    def end(self, row: int) -> None:
        """A row goes on no longer."""
        self.kinds[row] = None

    def write(self, x: Tensor) -> list[tuple[int, range]]:
        """Write drafts beyond what is final, into the iterate (B, L); returns the rows that got one, and where.

        Raises:
            ValueError: a draft has a token that there is not.
        """
        fronts = {row: self.final(row) for row in self.going() if self.final(row) < self.length}
        reads = self.fresh or self.guess.recycles
        host = x.cpu().numpy() if reads else None  # the same memory, if it is there already
        written = []
        for row, front in fronts.items():
            predicted = [] if host is None else host[row, front : self._reached[row]].tolist()
            if predicted and self.guess.recycles:
                self.guess.refused(self._numbers[row], self.texts[row], predicted)
            ahead = predicted if self.fresh else []
            first, room = front + len(ahead), min(MOST, self.length - front) - len(ahead)
            found, kind = self.guess.draft(self._numbers[row], self.texts[row], ahead, room) if room > 0 else ([], 0)
            self.kinds[row], self._drafted[row] = (0, 0) if ahead else (kind, len(found))
            if not found:
                continue
            self._first[row] = found[0]
            if min(found) < 0 or (self.vocabulary is not None and max(found) >= self.vocabulary):
                raise ValueError(
                    f"the guess drafted tokens from {min(found)} to {max(found)}, expected 0 to {self.vocabulary or '...'} - 1"
                )
            host = x.cpu().numpy() if host is None else host
            host[row, first : first + len(found)] = found
            written.append((row, range(first, first + len(found))))
        if host is not None and written and x.device.type != "cpu":
            x.copy_(torch.from_numpy(host))
        return written

    def select(self, rows: list[int]) -> "Drafting":
        """The same for some rows."""
        subset = copy.copy(self)
        for name in ("texts", "kinds", "_numbers", "_prompts", "_drafted", "_first", "_reached"):
            setattr(subset, name, [getattr(self, name)[row] for row in rows])
        return subset
