"""`Auto`: sliding windows whose width is found as it runs.

It minimises the time for a position, (passes for a position) x (seconds for a pass). Seconds are measured for
each width and kept, for all systems that cost the same. Passes for a position follow, on every trained flow that we have measured and
within some 10%, the law c + k / W for windows of W > 1 positions: a position needs about k passes from when the window reaches it, and
the front moves by no more than 1 / c positions a pass, however wide the window. So a few passes at one width say how good the others would
be, and the best of them is then tried and measured itself. A window of 1 needs exactly one pass for a position: ordinary decoding.
"""

import math
from dataclasses import dataclass, field
from numbers import Integral

import torch
from torch import Tensor

from parallel_decode._costs import COSTS, LOCK, Arm, Costs, recall
from parallel_decode._gains import gains_of
from parallel_decode._learnt import load, name_of
from parallel_decode._options import check_kind
from parallel_decode._tuner import Tuner
from parallel_decode.schedules import Chooser, Schedule
from parallel_decode.system import TriangularSystem

LARGEST_EVENT = 256  # numbers of a position, up to which the secant correction is tried


@dataclass(frozen=True, repr=False)
class Auto(Schedule):
    """Sliding windows of the width that gains the most positions per second, for this layer, batch, device and dtype.

    It measures as it runs, and remembers what it measured for systems of the same `cost_key` and `gain_key`: a first call still tries widths,
    within an allowance of 2% and 20 sequential passes, later ones know. Of systems that say what they are (`identity`) other processes know it
    too, from small files in the user's cache folder (`PARALLEL_DECODE_CACHE` names another, or is "off"). `parallel_decode.Plan` fixes what was found.

    Attributes:
        widths: the widths to choose from; powers of two from 8, and all positions, by default. 1, which is sequential
            decoding, always belongs to them.
        secant: also try the secant correction, on floats and where no other correction is given.
        per_row: as for `Sliding`.

    Example:
        >>> import torch, parallel_decode as pd
        >>> system = pd.from_function(lambda x: 1 + torch.nn.functional.pad(x, (1, -1)) / 2, torch.zeros(1, 300))
        >>> bool((pd.solve(system, "auto").value[0, -1] - 2).abs() < 1e-4)
        True
    """

    widths: tuple[int, ...] | None = None
    secant: bool = field(default=True, kw_only=True)
    per_row: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_kind("secant", self.secant, bool, "True or False")
        check_kind("per_row", self.per_row, bool, "True or False")
        if self.widths is None:
            return
        if not isinstance(self.widths, (tuple, list)) or not all(
            isinstance(w, Integral) and not isinstance(w, bool) and w >= 1 for w in self.widths
        ):
            raise ValueError(f"widths is {self.widths!r}, expected whole numbers >= 1, in a tuple")
        object.__setattr__(self, "widths", tuple(sorted({1, *self.widths})))

    @property
    def ragged(self) -> bool:
        return self.per_row

    def window(self, front: int, length: int) -> range:
        raise RuntimeError("Auto chooses by what it measures in a run: solve(system, 'auto')")

    def begin(self, system: TriangularSystem, x: Tensor, tol: float) -> Chooser:
        length, batch = system.length, len(x)
        widths = self.widths or (1, *(2**i for i in range(3, 20) if 2**i < length), length)
        arms = [Arm(width) for width in widths if width <= length]
        if (
            self.secant
            and self.correction is None
            and x.is_floating_point()
            and math.prod(x.shape[2:]) <= LARGEST_EVENT
        ):
            arms += [Arm(width, True) for width in widths if 1 < width <= length]
        options = (self.per_row, self.correction, self.start, tol)
        with LOCK:
            costs = recall(COSTS, system.cost_key, (*options, length, torch.get_num_threads()), lambda: Costs(length))
            gains = gains_of(system.gain_key, options, batch)
            now_and_then = gains.runs & (gains.runs + 1) == 0  # the first run, the second, the fourth, the eighth
            name = name_of(system, (repr(self), tol, length, batch)) if now_and_then else None
            recalled = name is not None and gains.runs == 0 and load(name, costs, gains)
            gains.begin_run()
            costs.begin_run()
        return Tuner(self.correction, costs, gains, arms, x.is_cuda, name, recalled)
