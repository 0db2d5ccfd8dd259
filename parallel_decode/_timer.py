"""How long the passes of a run take."""

import time


class Timer:
    """Of the passes of a run.

    Attributes:
        size: positions of the passes that are being timed.
        together: how many there are.
        left: how many of them are still to come.
    """

    def __init__(self) -> None:
        self.size = self.together = self.left = 0
        self._begins: list[float] = []

    def begin(self, size: int, together: int) -> None:
        """So many passes are timed together from now on."""
        self.size, self.together, self.left = size, together, together - 1
        self._begins = [time.perf_counter()]

    def lap(self) -> None:
        """The next of them begins."""
        self.left -= 1
        self._begins.append(time.perf_counter())

    def each(self, queued: bool) -> float:
        """Seconds of each: of one that little disturbed, as `Timings` counts; the mean where passes were only queued."""
        ends = [*self._begins[1:], time.perf_counter()]
        if queued:
            return (ends[-1] - self._begins[0]) / self.together
        return sorted(end - begin for begin, end in zip(self._begins, ends, strict=True))[self.together // 8]
