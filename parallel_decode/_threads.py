"""How many threads to take."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


@contextmanager
def best_threads(run: Callable[[], object]) -> Iterator[int]:
    """All of torch's threads or one, whichever does `run` sooner; afterwards as before.

    Threads that wait for one another spin: where something else wants a core, two of them may take many times as long as one over small tensors.
    """
    most, taken = torch.get_num_threads(), {}
    try:
        run()  # which also prepares
        for threads in {most, 1}:
            torch.set_num_threads(threads)
            began = time.perf_counter()
            run()
            taken[threads] = time.perf_counter() - began
        best = min(taken, key=taken.__getitem__)
        torch.set_num_threads(best)
        yield best
    finally:
        torch.set_num_threads(most)
