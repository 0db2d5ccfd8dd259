"""Features of a small network that is trained here, for a Frechet distance without any file from elsewhere."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from paper_repro.quality.features import batched, unit

if TYPE_CHECKING:  # the data needs scikit-image and scikit-learn, and the classifier does not
    from paper_repro.data import Images

WIDTH = 64


class Classifier:
    """A convolutional network; its features are the channels before its last layer, averaged over the image.

    Of a data set without labels it learns which of four rotations an image has (Gidaris et al., arXiv 1803.07728).
    Distances in its features compare methods on one data set, and are no FID.

    Args:
        name: of the network, for tables.
        channels: C of the images.
        classes: how many it tells apart.

    Example:
        >>> features = Classifier("untrained", channels=1, classes=10)
        >>> features(torch.zeros(5, 1, 16, 16)).shape, features.label
        (torch.Size([5, 64]), 'Frechet distance in the features of untrained')
    """

    is_inception, size = False, WIDTH

    def __init__(self, name: str, channels: int, classes: int) -> None:
        self.name = name
        self.label = f"Frechet distance in the features of {name}"
        self.channels = channels
        self._trunk = nn.Sequential(
            *(nn.Conv2d(channels, 32, 3, padding=1), nn.GroupNorm(4, 32), nn.ReLU()),
            *(nn.Conv2d(32, WIDTH, 3, stride=2, padding=1), nn.GroupNorm(4, WIDTH), nn.ReLU()),
            *(nn.Conv2d(WIDTH, WIDTH, 3, stride=2, padding=1), nn.GroupNorm(4, WIDTH), nn.ReLU()),
            *(nn.Conv2d(WIDTH, WIDTH, 3, stride=2, padding=1), nn.GroupNorm(4, WIDTH), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        )
        self._network = nn.Sequential(self._trunk, nn.Linear(WIDTH, classes))

    @classmethod
    def train(cls, name: str, data: "Images", *, steps: int = 300, seed: int = 0) -> "Classifier":
        """Train on batches of 64 images, or of 8 in all rotations: under a minute on one core up to 32 x 32 pixels.

        A seed gives the same network again, on the same machine and number of threads.

        Args:
            name: of the network, for tables.
            data: a data set of `paper_repro.data`; without labels the network learns rotations.
            steps: of Adam, with a rate that falls to 0.
            seed: of the weights and the batches.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            classifier = cls(name, data.in_channels, data.num_classes or 4)
        generator = torch.Generator().manual_seed(seed)
        optimizer = torch.optim.Adam(classifier._network.parameters(), lr=3e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            images, labels = _labelled(*data.batch(64 if data.num_classes else 8, generator))
            loss = F.cross_entropy(classifier._network(images), labels)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
        return classifier

    def __call__(self, images: Tensor) -> Tensor:
        images = unit(images)
        if images.shape[1] != self.channels:
            raise ValueError(f"images have {images.shape[1]} channels, {self.name} was trained on {self.channels}")
        return batched(self._trunk, 2 * images.float() - 1)

    def accuracy(self, data: "Images") -> float:
        """The share of held-out images whose label, or rotation, it finds: how much its features are worth.

        Images that look alike in every rotation (dead leaves) leave it at 1/4.
        """
        images, labels = _labelled(*data.held_out())
        return float((batched(self._network, images).argmax(1) == labels).double().mean())

    def save(self, path: Path | str) -> None:
        """Save to a safetensors file."""
        save_file(self._network.state_dict(), path, metadata={"name": self.name})

    @classmethod
    def load(cls, path: Path | str) -> "Classifier":
        """Load what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged, or holds something else.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path} is not a file: train a classifier and save it there first")
        try:
            with safe_open(path, "pt") as file:
                state, name = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()["name"]  # noqa: SIM118
            classifier = cls(name, state["0.0.weight"].shape[1], len(state["1.weight"]))
            classifier._network.load_state_dict(state)
        except (SafetensorError, RuntimeError, KeyError, TypeError, IndexError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"{path} is damaged, or not what Classifier.save writes: {reason}") from None
        return classifier


def _labelled(images: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
    """The images and their labels, or all four rotations of each and which one it is."""
    if labels is not None:
        return images, labels
    rotated = torch.cat([images.rot90(turns, (2, 3)) for turns in range(4)])
    return rotated, torch.arange(4).repeat_interleave(len(images))
