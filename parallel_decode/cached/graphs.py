"""CUDA graphs of windows: at small batches a GPU waits for the launches of a pass, and a graph launches them as one.

A graph has fixed shapes and addresses. So a window is captured for each block, width (rounded up to a power of two) and number of positions
to read again (three to choose from); where it lies is an input, and it attends over all L positions, masked. Weights,
noise and caches stay where they are from call to call.

`tests/test_cuda.py` captures them; the tests on a CPU run the same functions as they are.
"""

import gc
from collections.abc import Callable, Hashable
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from parallel_decode.window import Window

Made = TypeVar("Made")


class Graphs:
    """The captured windows of a model, for one batch size, type and set of options.

    Args:
        capture: whether to capture; if not, the functions run as they are.
    """

    def __init__(self, capture: bool = True) -> None:
        self.capture = capture
        self.pool = torch.cuda.graph_pool_handle() if capture else None
        self.kept: dict[Hashable, Tensor] = {}
        self.made: dict[Hashable, Any] = {}
        self.runs: dict[Hashable, Callable[[Tensor, Tensor], Tensor]] = {}

    def keep(self, name: Hashable, value: Tensor) -> Tensor:
        """The value, at an address of its own that stays the same for this name and shape."""
        key = name, value.shape
        if key not in self.kept:
            self.kept[key] = torch.empty_like(value, memory_format=torch.contiguous_format)
        return self.kept[key].copy_(value)

    def first(self, name: Hashable, value: Made) -> Made:
        """The first value that came under this name."""
        made: Made = self.made.setdefault(name, value)
        return made

    def run(
        self,
        key: Hashable,
        x: Tensor,
        window: Window,
        changed: int,
        evaluate: Callable[[Tensor, Tensor, int, int], Tensor],
    ) -> Tensor:
        """f at the window's positions, shape (B, W, *E).

        Args:
            key: what `evaluate` depends on besides its arguments.
            x: the iterate, shape (B, L, *E).
            window: a contiguous window.
            changed: from where the positions have to be read again.
            evaluate: takes x, the first positions of the rows' windows (B, 1), their width, and how many positions before them
                to read again; returns (B, width, *E).
        """
        length, size = x.shape[1], len(window.positions)
        width = min(length, 1 << (size - 1).bit_length())
        needed = window.positions.start - changed
        before = next(n for n in (1, max(1, width // 4), width, length) if n >= min(needed, length))
        start = torch.full((len(x), 1), window.positions.start, device=x.device)
        if window.shift is not None:
            start += window.shift[:, None]
        run = self.runs.get((key, width, before))
        x, start = self.keep("x", x), self.keep("start", start)
        if run is None:
            run = self._captured(lambda x, start: evaluate(x, start, width, before), x, start)
            self.runs[key, width, before] = run
        return run(x, start)[:, :size].clone()

    def _captured(
        self, function: Callable[[Tensor, Tensor], Tensor], x: Tensor, start: Tensor
    ) -> Callable[[Tensor, Tensor], Tensor]:
        if not self.capture:
            return function
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # what a first call sets up may not be captured
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                function(x, start)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        collects = gc.isenabled()
        gc.disable()  # a graph of old that is collected while one is captured spoils the capture
        try:
            with torch.cuda.graph(graph, pool=self.pool):
                output = function(x, start)
        finally:
            if collects:
                gc.enable()

        def replay(x: Tensor, start: Tensor) -> Tensor:
            graph.replay()
            return output

        return replay


_GRAPHS: WeakKeyDictionary[nn.Module, tuple[Hashable, Graphs]] = WeakKeyDictionary()


def graphs_of(model: nn.Module, key: Hashable) -> Graphs:
    """The graphs of a model, which are made anew when the key, a parameter or a module has changed, or a hook."""
    parts = tuple((type(m), m.extra_repr(), *m._forward_hooks, *m._forward_pre_hooks) for m in model.modules())
    key = (key, parts, tuple((p.data_ptr(), p._version) for p in model.parameters()))
    if model not in _GRAPHS or _GRAPHS[model][0] != key:
        _GRAPHS[model] = key, Graphs()
    return _GRAPHS[model][1]
