"""What `Adaptive` remembers: what passes cost, which drafts came true, how windows that live on predictions move, and what may be lost. No torch here."""

from collections.abc import Sequence

from parallel_decode._allowance import Allowance
from parallel_decode._costs import Timings

WIDTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
SLOWER = 0.03  # for each further token of a pass, as long as nothing was measured
APART = 1.1  # likewise, of rows at fronts of their own, which need a mask
KEPT = 15  # samples of what a pass costs
ENOUGH = 2  # of them are believed
SHARE = 0.49  # of them are below the one that counts: passes of windows vary, as caches grow and rows come together
FORGET = 4096  # passes, and fewer at first, after which a width that none of them had is measured anew: the machine may have been busy when it was


class RowCosts:
    """Seconds of a pass by width, for so many rows; where nothing was measured each further token adds `SLOWER` of a pass of one for each row.

    Attributes:
        tables: the seconds of all `WIDTHS`, of rows in step and (True) of rows at fronts of their own.
    """

    def __init__(self, rows: int) -> None:
        slower = SLOWER * rows

        def beyond(size: float, near: int, seconds: float) -> float:
            return seconds * (1 + slower * (size - 1)) / (1 + slower * (near - 1))

        self.timings = {apart: Timings(beyond, int, ENOUGH, KEPT, SHARE) for apart in (False, True)}
        self.added, self._due = 0, 256
        self._foreign = False  # of another process, when the machine may have been faster or slower
        self._singles = 0  # that were measured here
        self._tabulate()

    def restore(self, together: Sequence[tuple[int, float]], apart: Sequence[tuple[int, float]]) -> None:
        """Begin with what another process measured: how widths compare. How fast all of it is tells the first pass."""
        self.timings[False].restore(together)
        self.timings[True].restore(apart)
        self._foreign = True
        self._tabulate()

    def add(self, size: int, apart: bool, seconds: float) -> None:
        self.added += 1
        self._singles += size == 1
        if self._foreign and size == 1 and self.timings[apart].knows(1):
            self._foreign, scale = False, seconds / self.timings[apart].seconds(size)
            for timings in self.timings.values():
                timings.restore(timings.measured(), scale)
            self._tabulate()
        if self.added == self._due:
            self._due += min(self._due, FORGET)
            for timings in self.timings.values():
                timings.forget()
        if self.timings[apart].add(size, seconds) or self.added % 32 == 0:
            self._tabulate()

    @property
    def ready(self) -> bool:
        """Whether single tokens have been measured here."""
        return self._singles >= ENOUGH

    def of(self, size: int, apart: bool, seconds: float | None = None) -> float:
        """Seconds of such a pass, as expected; if `seconds` is what this one took: that, but at most twice what is expected of a window, and once of a
        single token, where that is known, since the machine may have been busy."""
        expected = self.tables[apart].get(size)
        if seconds is None:
            return self.tables[apart][1] if expected is None else expected
        if expected is None or not self.timings[apart].knows(size):
            return seconds
        return min(expected if size == 1 else 2 * expected, seconds)

    def seconds(self, columns: int, apart: bool) -> float:
        """Of a pass over so many columns."""
        own, other = self.timings[apart].measured(), self.timings[not apart].measured()
        if own or not other:
            return self.timings[apart].seconds(columns, own or [(1, APART if apart else 1.0)])
        return (APART if apart else 1 / APART) * self.timings[not apart].seconds(columns, other)

    def _tabulate(self) -> None:
        self.tables = {apart: {width: self.seconds(width, apart) for width in WIDTHS} for apart in (False, True)}


class Record:
    """How often drafts of a kind came true."""

    def __init__(self, kind: int) -> None:
        first, further = (0.05, 0.3) if kind == 0 else (min(0.15 * kind, 0.7), 0.7)
        self.first, self.further = [4 * first, 4.0], [4 * further, 4.0]  # how many came true, of how many

    def add(self, accepted: int, drafted: int) -> None:
        """Of so many drafts so many came true, without a gap."""
        for counts, came, tried in (
            (self.first, min(accepted, 1), 1),
            (self.further, max(accepted - 1, 0), min(accepted, drafted - 1)),
        ):
            counts[0], counts[1] = counts[0] + came, counts[1] + tried
        self.fade(64)  # the text may change

    def fade(self, most: float) -> None:
        """Let what was long ago count for less: for so many drafts in all."""
        for counts in (self.first, self.further):
            scale = min(1.0, most / counts[1])
            counts[0], counts[1] = scale * counts[0], scale * counts[1]

    @property
    def chances(self) -> tuple[float, float]:
        """That the first draft comes true, and each further one if those before it do."""
        return self.first[0] / self.first[1], self.further[0] / self.further[1]


class Pace:
    """Passes for a position where windows live on the predictions of the passes before: c + k / W for windows of W, as of `Auto`.

    Attributes:
        k: passes that a position takes from when a window reaches it.
        known: whether that was measured.
    """

    c = 0.12  # 0.11 to 0.16 on the image tokens of the benchmarks, and k 1.7 to 2

    def __init__(self) -> None:
        self.k, self.known = 2.0, False
        self.width = self.passes = 0
        self.gained = 0.0

    def __call__(self, width: int) -> float:
        return min(1.0, self.c + self.k / width) if width > 1 else 1.0

    def add(self, width: int, gained: float) -> None:
        """A pass; as many of one width as it has positions, the first quarter of them left out, tell k anew."""
        if width != self.width:
            self.width, self.passes, self.gained = width, 0, 0.0
        self.passes += 1
        self.gained += gained if 4 * self.passes > width else 0.0
        if width > 1 and self.passes >= max(width, 8):
            seen = (self.passes - width // 4) / max(self.gained, 0.1)
            self.k += (max(1.0, (seen - self.c) * width) - self.k) / 4
            self.width, self.known = 0, True


class Memory:
    """What is kept from run to run, besides costs."""

    def __init__(self, allowance: Allowance | None = None) -> None:
        self.records: dict[int, Record] = {}
        self.pace = Pace()
        self.runs = 0
        self.allowance = allowance or Allowance()

    def record(self, kind: int) -> Record:
        if kind not in self.records:
            self.records[kind] = Record(kind)
        return self.records[kind]
