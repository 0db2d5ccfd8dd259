"""What may be lost by trying: never more than a share of all work, and a few passes."""

FREE = 2.0  # passes that may be lost at first
SHARE = 0.005  # of every pass's worth that was gained: what may be lost besides
MOST = 8.0  # passes that can be saved up, by that share and by what windows gain


class Allowance:
    """Passes that may yet be lost, where a pass is one of sequential decoding: a token bucket.

    After N passes' worth of work the passes that were lost, beyond N, are `FREE` + `SHARE` N at most, and what the last pass cost beyond what was
    foreseen when it was allowed.

    Example:
        >>> allowance = Allowance()
        >>> allowance.covers(1.5)
        True
        >>> allowance.settle(cost=2.5, gained=1.0)  # nothing was gained by it
        >>> allowance.covers(1.5)
        False
    """

    def __init__(self) -> None:
        self.left = FREE

    def covers(self, loss: float) -> bool:
        """Whether so many passes may be lost."""
        return loss <= self.left

    def settle(self, cost: float, gained: float) -> None:
        """Something took as long as `cost` passes, and gained what `gained` passes would have."""
        self.left = min(self.left + SHARE * max(gained, 0.0) + gained - cost, MOST)
