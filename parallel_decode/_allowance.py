"""What may be lost by trying: never more than a share of all work, and a few passes."""


class Allowance:
    """Passes that may yet be lost, where a pass is one of sequential decoding: a token bucket.

    After N passes' worth of work the passes that were lost, beyond N, are `free` + `share` N at most, and what the last pass cost beyond what was
    foreseen when it was allowed; and what was lent besides, which stops where earlier runs lost half of `most`.

    Args:
        free: passes that may be lost at first.
        share: of every pass's worth that was gained: what may be lost besides.
        most: passes that can be saved up, by that share and by what windows gain; and those that may be owed.

    Attributes:
        left: what may be lost now.
        lost: what earlier runs lost, and none has gained since.
        closed: whether nothing may be, since more than `most` was owed, and not all of that has been earned again.

    Example:
        >>> allowance = Allowance()
        >>> allowance.covers(1.5)
        True
        >>> allowance.settle(cost=2.5, gained=1.0)  # nothing was gained by it
        >>> allowance.covers(1.5)
        False
    """

    def __init__(self, free: float = 2.0, share: float = 0.005, most: float = 8.0) -> None:
        self.left, self.free, self.share, self.most = free, free, share, most
        self.closed, self.lost, self._gained = False, 0.0, 0.0

    def covers(self, loss: float) -> bool:
        """Whether so many passes may be lost."""
        return loss <= self.left

    def lend(self, passes: float) -> None:
        """So many more passes may be lost, as windows promise more than that; less, the more earlier runs have lost, and nothing from half of `most` on."""
        self.left = min(self.left + passes * max(0.0, 1 - 2 * self.lost / self.most), self.most)

    def settle(self, cost: float, gained: float) -> None:
        """Something took as long as `cost` passes, and gained what `gained` passes would have."""
        gain = self.share * max(gained, 0.0) + gained - cost
        self.left, self._gained = min(self.left + gain, self.most), self._gained + gain
        self.closed = self.left < (0 if self.closed else -self.most)

    def end_run(self) -> None:
        """A run is over: what it gained or lost counts from here on."""
        self.lost, self._gained = max(0.0, self.lost - self._gained), 0.0

    def restore(self, left: float, lost: float = 0.0) -> None:
        """Begin with what another process left."""
        self.left, self.lost = max(min(left, self.most), -self.most), min(max(lost, 0.0), self.most)
