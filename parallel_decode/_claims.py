"""One solve at a time for whatever evaluation writes to: two at once would read each other's caches."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

_LOCK = threading.Lock()
_CLAIMS: dict[int, "Claim"] = {}


class Claim:
    """A resource in use.

    Attributes:
        resource: of a system, which the claim keeps alive.
        thread: that solves.
        evaluating: whether the solver is evaluating the system right now.
    """

    def __init__(self, resource: object) -> None:
        self.resource, self.thread, self.evaluating = resource, threading.get_ident(), False


@contextmanager
def claimed(resource: object | None) -> Iterator[Claim]:
    """Claim what a system writes to for the time of a solve.

    Raises:
        RuntimeError: another solve, of this thread or of another, uses it.
    """
    claim = Claim(resource)
    if resource is None:
        yield claim
        return
    with _LOCK:
        if id(resource) in _CLAIMS:
            raise RuntimeError(_message(resource))
        _CLAIMS[id(resource)] = claim
    try:
        yield claim
    finally:
        with _LOCK:
            del _CLAIMS[id(resource)]


def check_unclaimed(resource: object) -> None:
    """For systems that keep a cache, at the beginning of `evaluate`: raise if a solve is going on that did not ask for this.

    Raises:
        RuntimeError: a callback, or another thread, evaluates a system that is being solved.
    """
    claim = _CLAIMS.get(id(resource))
    if claim is not None and not (claim.evaluating and claim.thread == threading.get_ident()):
        raise RuntimeError(_message(resource))


def _message(resource: object) -> str:
    return (
        f"this system's {type(resource).__name__} is in use by a solve that is still going on (in another thread, or around this callback), "
        "and both would write to its cache: make a system for each solve"
    )
