"""What tells one trained model from another, without reading all of it."""

import hashlib

import torch
from torch import nn


@torch.no_grad()
def fingerprint(model: nn.Module) -> str:
    """A hash of the names and shapes of the weights, and of up to 16 values of each, evenly spaced."""
    state = model.state_dict()
    some = [t.flatten()[:: max(1, t.numel() // 16)][:16].float() for t in state.values()]
    text = repr([(name, tuple(t.shape)) for name, t in state.items()])
    return hashlib.sha256(text.encode() + torch.cat(some).cpu().numpy().tobytes()).hexdigest()[:16]
