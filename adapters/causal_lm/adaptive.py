"""`Adaptive`: windows as wide as the present draft is good for."""

from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from parallel_decode._allowance import Allowance
from parallel_decode._costs import LOCK
from parallel_decode._learnt import name_of
from parallel_decode.adapters.causal_lm.learnt import load
from parallel_decode.adapters.causal_lm.memory import Memory, RowCosts
from parallel_decode.adapters.causal_lm.system import CausalLM
from parallel_decode.adapters.causal_lm.tuner import Tuner
from parallel_decode.schedules import Chooser, Schedule
from parallel_decode.system import TriangularSystem


@dataclass(frozen=True, repr=False)
class Adaptive(Schedule):
    """For each pass the width that promises the most tokens per second, 1 where no draft is worth reading.

    What a pass costs by its width is measured as it runs, and how often drafts of each kind come true is counted (the first token, and each further one
    given those before it; the first also where single tokens are read); both are remembered, and kept for other processes as by `Auto`. Windows that turn out
    to lose are given up. What may be lost is two passes (of short texts one for 64 tokens) and half a percent of all; and, while no more may be lost, three
    tenths of what drafts promise to save, by those that came true so far, until earlier runs have lost an eighth of a text by that, 16 passes at most.
    (Where windows live on the predictions of earlier passes, as of image tokens, 16 passes and 2%.)

    A model that was never checked is checked, behind its first pass, once windows promise to save half as much again as that takes, in this run or in as many
    as there have been; one that fails is read token by token, with a warning. A model with hooks or modules of its own is checked before its first token: nobody knows what they keep of a text.

    Attributes:
        most: the widest window.
        per_row: rows may have windows of their own, at their own fronts, where the cache allows it.
    """

    most: int = 64
    per_row: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.most, int) or self.most < 1:
            raise ValueError(f"most is {self.most!r}, expected a whole number >= 1")

    @property
    def ragged(self) -> bool:
        return self.per_row

    def window(self, front: int, length: int) -> range:
        raise RuntimeError("Adaptive chooses by what it measures in a run: parallel_generate uses it")

    def begin(self, system: TriangularSystem, x: Tensor, tol: float) -> Chooser:
        if not isinstance(system, CausalLM):
            raise TypeError(f"Adaptive is for language models, and this is a {type(system).__name__}: use 'auto'")
        most = 1 if system.processors.unknown else self.most
        if most > 1 and not system.model_check.built_in:
            system.model_check.result()
        key = system.cost_key, torch.get_num_threads()
        with LOCK:
            kept = key, type(system.choice), type(system.guess), system.drafting.fresh
            memory, costs = _MEMORIES.setdefault(kept, Memory(_allowance(system))), _COSTS.setdefault(key, {})
            now_and_then = memory.runs & (memory.runs + 1) == 0  # the first run, the second, the fourth, the eighth
            name = name_of(system, tuple(map(_called, kept[1:]))) if now_and_then else None
            if name is not None and memory.runs == 0:
                load(name, costs, memory)
            memory.runs += 1
            for record in memory.records.values():
                record.fade(16)  # another text may be another matter
            return Tuner(system, costs, memory, most, self.per_row and not system.in_step, name)


def _allowance(system: CausalLM) -> Allowance:
    """Windows that live on the predictions of the passes before gain little for some passes, and may cost that; of drafts each one tells at once."""
    if not system.drafting.fresh:
        return Allowance(free=min(2.0, system.length / 64), most=min(32.0, max(8.0, system.length / 4)))
    return Allowance(free=min(16.0, system.length / 16), share=0.02, most=min(64.0, system.length / 4))


def _called(kind: object) -> str:
    return f"{kind.__module__}.{kind.__qualname__}" if isinstance(kind, type) else str(kind)


_COSTS: dict[Hashable, dict[int, RowCosts]] = {}  # by rows
_MEMORIES: dict[Hashable, Memory] = {}
