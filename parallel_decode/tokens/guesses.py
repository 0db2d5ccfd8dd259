"""What a window holds before the model has read it. Guesses change how many passes are needed, never the text.

Shapes: none; everything is tokens of one row, on the host.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

Row = list[int]


class Guess(ABC):
    """Drafts for the rows of a batch.

    A guess keeps what it needs for each row between `begin` and the end of a generation; one object serves one call at a time.

    Attributes:
        fresh: True drafts only positions that no window has reached yet, behind the last predictions, which stay; False drafts all from the front on. None
            leaves it to the choice: couplings (`Maximal`, `Speculative`) keep their own samples as long as they can, so they ask for fresh ones.
        recycles: whether it wants to see predictions that did not become final.
    """

    fresh: bool | None = None
    recycles: bool = False

    def begin(self, prompts: Sequence[Row]) -> None:  # noqa: B027
        """A generation begins; the prompts without padding."""

    @abstractmethod
    def draft(self, row: int, text: Row, ahead: Row, most: int) -> tuple[Row, int]:
        """What may follow.

        Args:
            row: its number in the batch.
            text: prompt and final tokens; not to be changed.
            ahead: predictions after the text that stay where they are, with the draft behind them; empty unless drafts are `fresh`.
            most: how many tokens are of use.

        Returns:
            Up to `most` tokens, after which the last predictions stay, and a number above 0 for the kind of guess: how often guesses of a kind
            come true is what `Adaptive` learns. No tokens: 0.
        """

    def refused(self, row: int, text: Row, predictions: Row) -> None:  # noqa: B027
        """What the last pass predicted beyond the front, after the text; called if it `recycles`."""


class Last(Guess):
    """The last predictions stay where they are: Jacobi decoding."""

    def draft(self, row: int, text: Row, ahead: Row, most: int) -> tuple[Row, int]:
        return [], 0


class Repeat(Guess):
    """The last token, again and again."""

    def draft(self, row: int, text: Row, ahead: Row, most: int) -> tuple[Row, int]:
        return [(ahead or text)[-1]] * most, 1


class NGram(Guess):
    """What followed the last tokens when they stood in the text before; the last predictions where they never did.

    The longest match counts, and the latest of those; a match that reaches the end of the text goes on into its own draft, as in LZ77.
    (Prompt lookup, Saxena 2023, drafts from the prompt alone and verifies the draft once; here the whole window is drafted anew at every pass.)

    Attributes:
        longest, shortest: lengths of what is looked for.
        fresh: see `Guess`.
        recycles: look also in what passes predicted beyond the front and did not keep, where the text has nothing (rejection recycling, Jacobi Forcing,
            arXiv 2512.14681).

    Example:
        >>> guess = NGram(longest=2)
        >>> guess.begin([[5, 6, 7, 5, 6]])
        >>> guess.draft(0, [5, 6, 7, 5, 6], [], 5)
        ([7, 5, 6, 7, 5], 2)
    """

    def __init__(self, longest: int = 5, shortest: int = 1, fresh: bool | None = None, recycles: bool = False) -> None:
        if not 1 <= shortest <= longest:
            raise ValueError(f"shortest is {shortest} and longest {longest}, expected 1 <= shortest <= longest")
        self.longest, self.shortest, self.fresh, self.recycles = longest, shortest, fresh, recycles

    def begin(self, prompts: Sequence[Row]) -> None:
        self.seen: list[dict[tuple[int, ...], int]] = [{} for _ in prompts]  # n-gram to where it ended last
        self.upto = [0] * len(prompts)
        self.pool: list[dict[tuple[int, ...], Row]] = [{} for _ in prompts]  # n-gram to what was predicted after it

    def refused(self, row: int, text: Row, predictions: Row) -> None:
        tail = text[-self.longest :] + predictions
        first = len(tail) - len(predictions)
        for end in range(first + 1, len(tail)):
            for n in range(self.shortest, min(self.longest, end) + 1):
                self.pool[row][tuple(tail[end - n : end])] = tail[end:]

    def draft(self, row: int, text: Row, ahead: Row, most: int) -> tuple[Row, int]:
        seen = self.seen[row]
        for end in range(max(self.upto[row], 1), len(text)):  # what ends at the end of the text has no continuation yet
            for n in range(self.shortest, min(self.longest, end) + 1):
                seen[tuple(text[end - n : end])] = end
        self.upto[row] = max(self.upto[row], len(text))
        last = (text[-self.longest :] + ahead)[-self.longest :]
        for n in range(min(self.longest, len(text) + len(ahead) - 1), self.shortest - 1, -1):
            tail = tuple(last[-n:])
            if tail in seen:
                found = text[seen[tail] : seen[tail] + most]
                while len(found) < most:  # the match overlaps its own continuation
                    found += found[: most - len(found)]
                return found, n
            if tail in self.pool[row]:
                return self.pool[row][tail][:most], self.longest + n
        return [], 0


class Draft(Guess):
    """A function of one's own, from prompt and final tokens to what may follow: tokens, as many or as few as it likes.

    Args:
        function: takes the tokens of a row, a list, and how many are of use.
    """

    def __init__(self, function: Callable[[Row, int], Sequence[int]]) -> None:
        self.function = function

    def draft(self, row: int, text: Row, ahead: Row, most: int) -> tuple[Row, int]:
        found = [int(token) for token in self.function(text + ahead, most)][:most]
        return found, int(bool(found))


NAMES: dict[str, type[Guess]] = {"last": Last, "repeat": Repeat, "n-gram": NGram}


def as_guess(guess: "Guess | str | Callable[[Row, int], Sequence[int]]") -> Guess:
    """A guess from itself, its name, or a function.

    Raises:
        ValueError: no guess has this name.
        TypeError: it is nothing of that kind.
    """
    if isinstance(guess, Guess):
        return guess
    if isinstance(guess, str):
        if guess not in NAMES:
            raise ValueError(f"guess is {guess!r}, expected one of {', '.join(map(repr, NAMES))}, or a function")
        return NAMES[guess]()
    if callable(guess) and not isinstance(guess, type):
        return Draft(guess)
    raise TypeError(f"guess is {guess!r}, expected a name, a Guess, or a function of tokens and a number")
