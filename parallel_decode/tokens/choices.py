"""From scores to tokens: greedily, or by sampling that is a triangular system too.

| choice | what it guarantees |
|---|---|
| `Greedy` | the tokens of `generate(do_sample=False)` |
| `Gumbel` | for a seed the very sample of `generate(do_sample=True)`, in every schedule: all noise is drawn before, in the order in which `torch.multinomial` would |
| `Maximal` | the distribution of `generate(do_sample=True)`, not the same sample. A draft is kept as often as any rule can (maximal coupling with what it was drawn from), at every position of the window |
| `Speculative` | likewise; Speculative Jacobi Decoding's rule (arXiv 2410.01699): as above up to the first draft that is not kept, and fresh draws beyond |

Shapes: B batch rows, W positions of a window, V tokens of the vocabulary, N tokens at most.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from parallel_decode.tokens._draws import default_generator, draw, undrawable


class Choice(ABC):
    """A token for each position of a window.

    Attributes:
        couples: whether it asks what was `guessed`.
        undrawable: where nothing could be drawn from the scores of the last call, since they were NaN, infinite, or -inf all: shape (B, W); None if that
            does not matter. The tokens there mean nothing.
    """

    couples = False
    undrawable: Tensor | None = None

    @abstractmethod
    def __call__(
        self, scores: Tensor, drafts: Tensor, guessed: Tensor | None, positions: Tensor, rows: Tensor
    ) -> Tensor:
        """Tokens, shape (B, W).

        Args:
            scores: after all processors, shape (B, W, V).
            drafts: the tokens that the window held, shape (B, W); perhaps beyond V, as an image's prompt has tokens that it cannot hold itself.
            guessed: which of them came from a guess, not from this choice, shape (B, W); None unless it `couples`.
            positions: of the window, shape (B, W), on the host.
            rows: the rows' numbers in the batch as it was at first, shape (B,), on the host.
        """

    def finish(self, length: int) -> None:  # noqa: B027
        """For who decodes, at the end: the texts ended after so many positions, the longest row's (L, unless all rows ended before)."""


class Greedy(Choice):
    """The best token."""

    def __call__(
        self, scores: Tensor, drafts: Tensor, guessed: Tensor | None, positions: Tensor, rows: Tensor
    ) -> Tensor:
        return scores.argmax(-1)


class Gumbel(Choice):
    """argmax p / q for exponential q, drawn once for each position: what `torch.multinomial` does (log p minus log q is log p plus Gumbel noise).

    The noise of a position is drawn for the whole batch when a window first reaches it. One object is one noise: solved again, it gives the same tokens.
    (Old noise is forgotten, and drawn again from the generator's state of then where it is needed.)

    Args:
        batch: B, as it was at first.
        device: of the scores.
        generator: the device's default one if None. Threads that draw from it at the same time get noise that is independent, but not that of `generate`.
        whole: the size of a whole vocabulary and the ids of it that scores are of, shape (V,): noise is drawn for all of it, as `generate` does. None where scores
            are of all.
    """

    def __init__(
        self,
        batch: int,
        device: torch.device | str,
        generator: torch.Generator | None = None,
        whole: tuple[int, Tensor] | None = None,
    ) -> None:
        self.batch, self.device = batch, torch.device(device)
        self.generator = default_generator(self.device) if generator is None else generator
        self.noise: dict[int, Tensor] = {}
        self.states: dict[int, Tensor] = {}  # of the generator, before a position's noise was drawn
        self.drawn = 0
        self.vocabulary = 0 if whole is None else whole[0]
        self.kept = None if whole is None else whole[1]

    def __call__(
        self, scores: Tensor, drafts: Tensor, guessed: Tensor | None, positions: Tensor, rows: Tensor
    ) -> Tensor:
        numbers, places = rows.tolist(), positions.tolist()
        if max(numbers, default=0) >= self.batch:
            raise ValueError(
                f"row {max(numbers)} of a batch of {self.batch}: make Gumbel for the batch as it is at first"
            )
        first, last = min(map(min, places)), max(map(max, places))
        self.vocabulary = scores.shape[-1] if self.kept is None else self.vocabulary
        for position in [p for p in self.noise if p < first]:
            del self.noise[position]
        while self.drawn <= last:
            self.states[self.drawn] = self.generator.get_state()
            self.noise[self.drawn] = self._draw(self.generator)
            self.drawn += 1
        for position in range(first, last + 1):  # of an earlier run
            if position not in self.noise:
                self.noise[position] = self._draw(self._at(position))
        probabilities = scores.softmax(-1)
        self.undrawable = undrawable(probabilities)
        if all(line == places[0] for line in places):
            q = torch.stack([self.noise[p] for p in places[0]], 1)
            q = q if len(rows) == self.batch else q[rows.to(q.device)]
        else:
            each = zip(numbers, places, strict=True)
            q = torch.stack([torch.stack([self.noise[p][row] for p in line]) for row, line in each])
        return (probabilities / q).argmax(-1)

    def finish(self, length: int) -> None:
        """Leave the generator as one draw for each position would have; as it is, if others have drawn from it since, who would be given the same noise again."""
        if length >= self.drawn:
            return
        replay = self._at(length)
        for _ in range(length, self.drawn):
            self._draw(replay)
        if torch.equal(replay.get_state(), self.generator.get_state()):
            self.generator.set_state(self.states[length])

    def _draw(self, generator: torch.Generator) -> Tensor:
        noise = torch.empty(self.batch, self.vocabulary, device=self.device).exponential_(1, generator=generator)
        return noise if self.kept is None else noise[:, self.kept]

    def _at(self, position: int) -> torch.Generator:
        """A generator of its own, as the one was before this position's noise."""
        generator = torch.Generator(self.device)
        generator.set_state(self.states[position])
        return generator


class Maximal(Choice):
    """A draft x from q becomes a sample of p that differs from it as seldom as possible.

    It stays with probability min(1, p(x) / q(x)); otherwise a token is drawn from max(0, p - q), scaled to sum to 1. A guess that is
    no sample has q(x) = 1. The q of the last window are kept, of nothing else: (B, W, V) numbers.
    """

    couples = True

    def __init__(self, generator: torch.Generator | None = None) -> None:
        self.generator = generator
        self._last: tuple[Tensor, Tensor, Tensor] | None = None  # its rows, positions, and p

    def __call__(
        self, scores: Tensor, drafts: Tensor, guessed: Tensor | None, positions: Tensor, rows: Tensor
    ) -> Tensor:
        assert guessed is not None
        p = scores.softmax(-1)
        self.undrawable = undrawable(p)
        if p.shape[1] == 1:  # final, whatever it is: nothing is gained by keeping a draft
            self._last = rows, positions, p
            return draw(p[:, 0], self.generator)[:, None]
        drafts = drafts.clamp(max=p.shape[-1] - 1)
        row, column, q, sampled = self._drawn_from(p, positions, rows)
        sampled = sampled & ~guessed & ~undrawable(q)[row, column]
        q_draft = torch.where(sampled, q[row, column, drafts], 1.0)
        p_draft = p.gather(-1, drafts[..., None])[..., 0]
        keep = torch.rand(p_draft.shape, generator=self.generator, device=p_draft.device) * q_draft < p_draft
        self._last = rows, positions, p
        beyond = self._beyond(~keep)
        b, w = (~keep | beyond).nonzero(as_tuple=True)
        new, draft, known = p[b, w], drafts[b, w, None], sampled[b, w, None]
        rest = (new - torch.where(known, q[row[b, 0], column[b, w]], 0.0)).clamp_(min=0)
        rest.scatter_(1, draft, torch.where(known, rest.gather(1, draft), 0.0))
        alone = beyond[b, w, None] | (rest.sum(1, keepdim=True) <= 0)
        return drafts.index_put((b, w), draw(torch.where(alone, new, rest), self.generator))

    def _drawn_from(self, p: Tensor, positions: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Where in the distributions of the last window those of the present drafts are: row (B, 1), column (B, W), the distributions, whether there."""
        old_rows, old_positions, q = self._last or (rows, positions, p)
        row = torch.searchsorted(old_rows, rows).clamp_(max=len(old_rows) - 1)  # rows leave, and keep their order
        same = positions[:, :, None] == old_positions[row][:, None, :]
        there = same.any(2) & (old_rows[row] == rows)[:, None]
        return row[:, None].to(p.device), same.int().argmax(2).to(p.device), q, there.to(p.device)

    def _beyond(self, refused: Tensor) -> Tensor:
        """Positions that are drawn anew whatever they hold, (B, W)."""
        return torch.zeros_like(refused)


class Speculative(Maximal):
    """The same up to the first draft that is not kept, and fresh draws beyond."""

    def _beyond(self, refused: Tensor) -> Tensor:
        return refused.cumsum(1) - refused.long() > 0
