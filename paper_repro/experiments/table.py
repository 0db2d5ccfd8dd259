"""Markdown tables."""

from collections.abc import Iterable, Sequence


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in Markdown; floats in three digits.

    Example:
        >>> print(table(["block", "passes"], [[1, 41.04]]))
        | block | passes |
        |---|---|
        | 1 | 41 |
    """
    lines = [header, ["---"] * len(header), *[[cell(value) for value in row] for row in rows]]
    return "\n".join(
        "|" + "|".join(line) + "|" if line[0] == "---" else "| " + " | ".join(line) + " |" for line in lines
    )


def cell(value: object) -> str:
    """A value as a table shows it."""
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
