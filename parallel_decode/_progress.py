"""A bar that shows how far the work has come."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

Show = Callable[[int], None]  # told how much is done


def progress_bar(progress: bool, name: str, length: int, unit: str = "position") -> AbstractContextManager[Show]:
    """A tqdm bar, or nothing; gives the function that moves it."""
    return _bar(name, length, unit) if progress else nullcontext(lambda done: None)


@contextmanager
def _bar(name: str, length: int, unit: str) -> Iterator[Show]:
    try:
        from tqdm import tqdm
    except ImportError:
        raise ImportError("progress=True shows a tqdm bar: pip install tqdm") from None
    with tqdm(total=length, desc=name, unit=unit) as bar:

        def show(done: int) -> None:
            bar.update(done - bar.n)

        yield show
