"""Guesses on a grid: an image's neighbours are alike.

Shapes: none; everything is tokens of one picture, on the host.
"""

from collections.abc import Callable, Sequence
from typing import Any

from parallel_decode.tokens.guesses import NAMES, Guess, Row, as_guess


class Grid(Guess):
    """The token to the left, or above, for positions that no window has reached yet.

    Args:
        width: tokens of a row.
        where: "left" or "above".
    """

    fresh = True

    def __init__(self, width: int, where: str = "above") -> None:
        self.width, self.where = width, where

    def begin(self, prompts: Sequence[Row]) -> None:
        self.columns = [len(prompt) for prompt in prompts]

    def draft(self, row: int, text: Row, ahead: Row, most: int) -> tuple[Row, int]:
        known = text[self.columns[row] :] + ahead
        back = self.width if self.where == "above" else 1
        if len(known) < back:
            back = 1
        if not known:
            return [], 0
        first = len(known)
        for _ in range(most):
            known.append(known[-back])
        return known[first:], 1 if back == 1 else 2


class Preview(Guess):
    """The token of a small picture that was drawn before, at the same place; in the small picture itself the token above.

    Args:
        small, large: rows and columns of the two, in the order they are drawn in.

    Example:
        >>> guess = Preview((1, 2), (2, 4))
        >>> guess.begin([[9]])
        >>> guess.draft(0, [9, 5, 6], [], 8)
        ([5, 5, 6, 6, 5, 5, 6, 6], 3)
    """

    fresh = True

    def __init__(self, small: tuple[int, int], large: tuple[int, int]) -> None:
        (rows, columns), (height, width) = small, large
        self.above = Grid(columns)
        self.places = [
            row * rows // height * columns + column * columns // width
            for row in range(height)
            for column in range(width)
        ]
        self.known = rows * columns

    def begin(self, prompts: Sequence[Row]) -> None:
        self.above.begin(prompts)

    def draft(self, row: int, text: Row, ahead: Row, most: int) -> tuple[Row, int]:
        first = self.above.columns[row]
        done = len(text) + len(ahead) - first - self.known
        if done < 0:
            return self.above.draft(row, text, ahead, min(most, -done))
        small = (text[first : first + self.known] + ahead)[: self.known]
        found = [small[place] for place in self.places[done : done + most]]
        return found, 3 if found else 0


def as_image_guess(guess: str | Guess | Callable[..., Any], grids: Sequence[tuple[int, int]]) -> Guess:
    """A guess from itself, its name, or a function.

    Args:
        guess: what it is.
        grids: rows and columns of what is drawn, one after the other.

    Raises:
        ValueError: no guess has this name, or there is no preview.
        TypeError: it is nothing of that kind.
    """
    if guess == "preview" and len(grids) < 2:
        raise ValueError('guess is "preview", and no small picture is drawn before the large one: expected "grid"')
    if guess == "preview" or (guess == "grid" and len(grids) == 2):
        return Preview(grids[0], grids[1])
    if guess in ("grid", "above", "left"):
        return Grid(grids[-1][1], "left" if guess == "left" else "above")
    if isinstance(guess, str) and guess not in NAMES:
        names = ", ".join(map(repr, ("grid", "above", "left", "preview", *NAMES)))
        raise ValueError(f"guess is {guess!r}, expected one of {names}, or a function")
    return as_guess(guess)
