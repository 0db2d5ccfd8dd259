"""Scores of single images without a reference, as piq computes them; piq is imported when a score is asked for."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from paper_repro.quality.features import batched, coloured, unit


def brisque(images: Tensor) -> Tensor:
    """BRISQUE of each image, lower is better (Mittal et al., IEEE TIP 2012).

    piq downloads a support vector machine (brisque_svm_weights.pt) at the first call.

    Args:
        images: shape (N, C, H, W) in [-1, 1], clamped.

    Returns:
        Scores (N,) in float64.

    Raises:
        ImportError: piq cannot be imported.
        OSError: what it downloads is not there.
    """
    images, piq = unit(images).float(), _piq()
    return _scores("brisque_svm_weights.pt", lambda: lambda batch: piq.brisque(batch, reduction="none"), images)


def clip_iqa(images: Tensor) -> Tensor:
    """CLIP-IQA of each image in [0, 1], higher is better (Wang et al., arXiv 2207.12396).

    piq downloads CLIP (RN50.pt, about 250 MB) and the tokens of its prompts (clipiqa_tokens.pt) at the first call.

    Args:
        images: shape (N, C, H, W) in [-1, 1], clamped.

    Returns:
        Scores (N,) in float64.

    Raises:
        ImportError: piq cannot be imported.
        OSError: what it downloads is not there.
    """
    images, piq = coloured(unit(images).float()), _piq()
    return _scores("RN50.pt and clipiqa_tokens.pt", piq.CLIPIQA, images)


def _piq() -> Any:
    try:
        import piq
    except Exception as error:  # a torchvision that does not fit torch fails in many ways, not all of them ImportError
        raise ImportError(
            f"piq, which CLIP-IQA and BRISQUE need, cannot be imported ({type(error).__name__}: {error}). It needs a "
            'torchvision that fits the installed torch, then `pip install -e ".[quality]"`. '
            "The Frechet distance, KID and the bootstrap intervals work without it"
        ) from error
    return piq


def _scores(files: str, score: Callable[[], Callable[[Tensor], Tensor]], images: Tensor) -> Tensor:
    try:
        with _weights_only():
            return batched(score(), images).flatten()
    except OSError as error:
        raise OSError(
            f"piq could not download {files} ({error}): run it once on a machine with a network, and bring "
            "~/.cache/torch/hub/checkpoints and ~/.cache/clip along"
        ) from error


@contextmanager
def _weights_only() -> Iterator[None]:
    """Have piq's torch.load refuse pickled code, which it does not ask for itself."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
