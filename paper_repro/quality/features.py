"""From images to features: the Inception network of FID, and the statistics that others made with it.

Shapes: N images, C channels (1 or 3), H x W pixels, F features.
"""

import hashlib
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from paper_repro.quality.distances import Statistics
from paper_repro.quality.inception import Network

# SHA-256 of weights files. torch-fidelity 0.2.0 published this one; several public repositories record the digest, and
# its first digits are in the name of the file (pytorch-fid's pt_inception-2015-12-05-6726825d.pth has the same ones).
KNOWN = {"6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2": "inception-2015-12-05"}


class Features(Protocol):
    """A function from images to features.

    Attributes:
        name: of the network, for tables.
        is_inception: whether these are the published features of FID; a distance in any others is not an FID.
        size: F, how many features an image has.
        label: what to call a Frechet distance in these features.
    """

    @property
    def name(self) -> str: ...
    @property
    def is_inception(self) -> bool: ...
    @property
    def size(self) -> int: ...
    @property
    def label(self) -> str: ...

    def __call__(self, images: Tensor) -> Tensor:
        """Features (N, F) in float64 on the CPU, of images (N, C, H, W) that are clamped to [-1, 1]."""


class Inception:
    """The 2048 features of FID (arXiv 1706.08500), from a file of weights.

    Images are made ready as torchmetrics and ml-tarflow do: 8 bits, then 299 x 299 by bilinear interpolation with
    antialiasing. torch-fidelity places pixels as TensorFlow 1 did, and its figures differ a little. Grey images become
    three equal channels.

    Args:
        path: the weights of pytorch-fid or torch-fidelity (inception-2015-12-05); nothing is downloaded.
        device: where the network runs.

    Attributes:
        sha256: of the file.
        is_inception: whether the file is the published one. A distance by any other is not labelled FID.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be read as weights, or a weight is missing or of another shape.
    """

    size = 2048

    def __init__(self, path: Path | str, device: str = "cpu") -> None:
        content = _content(Path(path))
        self.sha256 = hashlib.sha256(content).hexdigest()
        self.is_inception = self.sha256 in KNOWN
        self.name = KNOWN.get(self.sha256, f"inception file {self.sha256[:8]}")
        self.label = "FID" if self.is_inception else f"Frechet distance ({self.name})"
        self.device = device
        self._network = _network(_loaded(content, Path(path)), Path(path)).to(device)

    def __call__(self, images: Tensor) -> Tensor:
        return batched(self._features, coloured(unit(images)))

    def _features(self, images: Tensor) -> Tensor:
        images = (images.to(self.device) * 255).byte().float()
        images = F.interpolate(images, (299, 299), mode="bilinear", align_corners=False, antialias=True)
        return self._network((images - 128) / 128)  # type: ignore[no-any-return]


def reference_statistics(path: Path | str) -> Statistics:
    """The statistics of real images, from the state of torchmetrics' FrechetInceptionDistance.

    Such a file is ml-tarflow's `afhq_256_fid_stats.pth`, which prepare_fid_stats.py writes: the sum of the features,
    the sum of their outer products and their number. Compare it with Inception features only.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be read, or does not hold such a state of two or more images.
    """
    path = Path(path)
    state = _loaded(_content(path), path)
    keys = [f"real_features_{part}" for part in ("sum", "cov_sum", "num_samples")]
    if missing := [key for key in keys if not isinstance(state.get(key), Tensor)]:
        raise ValueError(f"{path} has no {', '.join(missing)}, expected the state of FrechetInceptionDistance")
    total, outer, count = (state[key].double() for key in keys)
    if total.ndim != 1 or outer.shape != 2 * total.shape or count.numel() != 1 or count < 2:
        raise ValueError(
            f"{path} holds sums of {tuple(total.shape)} and {tuple(outer.shape)} of {count.tolist():g} images, "
            "expected (F,) and (F, F) of 2 or more"
        )
    mean = total / count
    return Statistics(mean, (outer - count * mean.outer(mean)) / (count - 1), int(count))


def unit(images: Tensor) -> Tensor:
    """Images (N, C, H, W) from [-1, 1] to [0, 1], clamped, as samples of a flow go a little beyond.

    Raises:
        ValueError: images are not finite floating-point numbers (N, C, H, W) of 1 or 3 channels.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3) or not len(images) or not images.is_floating_point():
        raise ValueError(
            f"images are {images.dtype} {tuple(images.shape)}, expected floating point (N, C, H, W) in [-1, 1] "
            "with N >= 1 and 1 or 3 channels"
        )
    if unusable := int((~images.isfinite()).flatten(1).any(1).sum()):
        raise ValueError(f"{unusable} of {len(images)} images are not finite: leave them out, and say how many")
    return 0.5 * (images.detach().clamp(-1, 1) + 1)


def coloured(images: Tensor) -> Tensor:
    """Images of three channels; grey ones are repeated."""
    return images.expand(-1, 3, -1, -1)


@torch.no_grad()
def batched(function: Callable[[Tensor], Tensor], images: Tensor, batch_size: int = 64) -> Tensor:
    """What a function gives for all images, a batch at a time, in float64 on the CPU."""
    return torch.cat([function(batch).double().cpu() for batch in torch.split(images, batch_size)])


def _content(path: Path) -> bytes:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file: nothing is downloaded here, bring the file and pass its path")
    return path.read_bytes()


def _loaded(content: bytes, path: Path) -> dict[str, Any]:
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} cannot be read, it may be damaged or of another kind: {reason}") from None
    if not isinstance(state, dict) or not state:
        raise ValueError(f"{path} holds no dictionary of tensors, expected a state dict")
    return state


def _network(state: dict[str, Any], path: Path) -> Network:
    with torch.device("meta"):  # neither time nor random numbers for weights that are replaced
        network = Network().eval().requires_grad_(False)
    weights = {}
    for key, expected in network.state_dict().items():
        if key.endswith("num_batches_tracked"):  # training's, and not in every file
            weights[key] = torch.zeros((), dtype=torch.long)
        elif not isinstance(found := state.get(key), Tensor):
            raise ValueError(f"{path} has no weight {key}, expected those of inception-2015-12-05")
        elif found.shape != expected.shape:
            raise ValueError(f"{path} has {key} of shape {tuple(found.shape)}, expected {tuple(expected.shape)}")
        else:
            weights[key] = found.float()
    network.load_state_dict(weights, assign=True)
    return network
