"""What tells one trained model from another, without reading all of it."""

import hashlib
from collections import defaultdict

import torch
from torch import Tensor, nn


@torch.no_grad()
def fingerprint(model: nn.Module) -> str:
    """A hash of the names and shapes of the weights, and of up to 16 values of each, evenly spaced.

    Weights may be on several devices. Of what is no plain tensor (packed weights of a quantised layer, weights that are kept elsewhere) the kind counts alone.
    """
    state = model.state_dict()
    some: dict[torch.device, list[Tensor]] = defaultdict(list)
    kinds: list[tuple[str, object]] = []
    for name, value in state.items():
        if isinstance(value, Tensor) and not value.is_meta and value.layout == torch.strided:
            some[value.device].append(value.flatten()[:: max(1, value.numel() // 16)][:16].float())
            kinds.append((name, tuple(value.shape)))
        else:
            kinds.append((name, (type(value).__name__, tuple(getattr(value, "shape", ())))))
    values = b"".join(torch.cat(each).cpu().numpy().tobytes() for each in some.values())
    return hashlib.sha256(repr(kinds).encode() + values).hexdigest()[:16]
