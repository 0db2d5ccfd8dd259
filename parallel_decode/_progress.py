"""A bar that shows how far the work has come."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(progress: bool, name: str, length: int, unit: str = "position") -> Iterator[Callable[[int], None]]:
    """A tqdm bar; yields the function that moves it."""
    if not progress:
        yield lambda done: None
        return
    try:
        from tqdm import tqdm
    except ImportError:
        raise ImportError("progress=True shows a tqdm bar: pip install tqdm") from None
    with tqdm(total=length, desc=name, unit=unit) as bar:

        def show(done: int) -> None:
            bar.update(done - bar.n)

        yield show
