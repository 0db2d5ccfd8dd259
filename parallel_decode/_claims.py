"""One solve at a time for whatever evaluation writes to: two at once would read each other's caches."""

import threading

_LOCK = threading.Lock()
_CLAIMS: dict[int, "Claim"] = {}


class Claim:
    """A resource that is in use inside of `with Claim(resource)`.

    Args:
        resource: what a system writes to, which the claim keeps alive; None for nothing.

    Raises:
        RuntimeError: on entering: another solve, of this thread or of another, uses it.

    Attributes:
        thread: that solves.
        evaluating: whether the solver is evaluating the system right now.
    """

    def __init__(self, resource: object | None) -> None:
        self.resource, self.thread, self.evaluating = resource, threading.get_ident(), False

    def __enter__(self) -> "Claim":  # noqa: PYI034
        if self.resource is not None:
            with _LOCK:
                if id(self.resource) in _CLAIMS:
                    raise RuntimeError(_message(self.resource))
                _CLAIMS[id(self.resource)] = self
        return self

    def __exit__(self, *error: object) -> None:
        if self.resource is not None:
            with _LOCK:
                del _CLAIMS[id(self.resource)]


def claim_of(resource: object) -> Claim | None:
    """The claim on a resource, for systems at the beginning of `evaluate`; None outside of all solves.

    Raises:
        RuntimeError: a callback, or another thread, evaluates a system that is being solved.
    """
    claim = _CLAIMS.get(id(resource))
    if claim is not None and not (claim.evaluating and claim.thread == threading.get_ident()):
        raise RuntimeError(_message(resource))
    return claim


def _message(resource: object) -> str:
    return (
        f"this system's {type(resource).__name__} is in use by a solve that is still going on (in another thread, or around this callback), "
        "and both would write to its cache: make a system for each solve"
    )
