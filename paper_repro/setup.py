"""What every experiment is given: a trained flow, where to write, and how much to do."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from paper_repro.data import DATA, Images
from paper_repro.train import train
from parallel_decode._command_line import as_device
from parallel_decode.adapters.tarflow import TarFlow, digits
from parallel_decode.adapters.tarflow.bench.suite import Setting

CIFAR = {"patch_size": 2, "channels": 256, "num_blocks": 6, "layers_per_block": 6, "noise_std": 0.05}
SMALL = {"patch_size": 2, "channels": 128, "num_blocks": 4, "layers_per_block": 2, "noise_std": 0.05}
TINY = {"channels": 64, "num_blocks": 2, "layers_per_block": 1, "noise_std": 0.05}
STEPS = {"full": 100_000, "quick": 1000, "smoke": 4}  # of training, where a flow is needed and there is none


@dataclass(frozen=True)
class Setup:
    """A flow, and how it is looked at.

    Attributes:
        flow: trained, in evaluation mode, on its device.
        data: the name of its data set, see `paper_repro.data.DATA`.
        out: the folder of figures.
        scale: "full" is the paper's batch and number of runs, "quick" what two CPU cores do in minutes, "smoke" the least that runs.
        images: the data set, where an experiment needs it; None where there is only a checkpoint.
        seed: of the noise.
        inception: a file of the weights of FID's network.
        fid_stats: a file of its statistics of the data, such as Apple's.
    """

    flow: TarFlow
    data: str
    out: Path
    scale: str = "full"
    images: Images | None = None
    seed: int = 0
    inception: Path | None = None
    fid_stats: Path | None = None

    def __post_init__(self) -> None:
        if self.scale not in ("full", "quick", "smoke"):
            raise ValueError(f"scale is {self.scale!r}, expected full, quick or smoke")
        if self.fid_stats is not None and self.inception is None:
            raise ValueError("--fid-stats are statistics of FID's features, which need --inception")

    def pick(self, full: int, quick: int, smoke: int) -> int:
        """The number for this scale."""
        return {"full": full, "quick": quick, "smoke": smoke}[self.scale]

    @property
    def batch(self) -> int:
        """Rows that are drawn at a time: 256 in the paper."""
        return self.pick(256, 16, 2)

    @property
    def runs(self) -> int:
        """Interleaved rounds of what is timed."""
        return self.pick(10, 5, 1)

    def needed_images(self) -> Images:
        """The data set.

        Raises:
            ValueError: there is only a checkpoint.
        """
        if self.images is None:
            raise ValueError("this experiment needs images, and only a checkpoint was given: pass --root too")
        return self.images

    def setting(self, batch: int | None = None, seed: int | None = None) -> Setting:
        return Setting(batch or self.batch, seed=self.seed if seed is None else seed, runs=self.runs)

    def noise(self, batch: int | None = None) -> tuple[Tensor, Tensor | None]:
        """z, shape (B, L, D), and classes, shape (B,), all in turn."""
        return self.setting(batch).noise(self.flow)


def obtain(
    data: str,
    out: Path,
    root: Path | None = None,
    checkpoint: Path | None = None,
    device: str = "cpu",
    scale: str = "full",
    steps: int | None = None,
) -> Setup:
    """The set-up for a data set: the checkpoint that is given, the digits' own flow, or one that is trained now and kept in `out`.

    Args:
        data: a name of `DATA`.
        out: where figures go, and the flow that is trained.
        root: where the data set lies.
        checkpoint: a file of weights or a folder.
        device: "cpu", "cuda".
        scale: see `Setup`.
        steps: of training; `STEPS` by default.

    Raises:
        FileNotFoundError, ValueError: the data or the checkpoint is not as expected.
    """
    if data not in DATA:
        raise ValueError(f"--data is {data!r}, expected one of {', '.join(DATA)}")
    place = as_device(device)
    images = None if checkpoint is not None and root is None and data not in SHIPPED else DATA[data](root)
    if checkpoint is None and data == "digits" and scale != "smoke":
        flow = digits()
    elif checkpoint is None:
        assert images is not None
        flow = _trained(images, out / "flow", device, scale, steps or STEPS[scale])
    else:
        flow = TarFlow.from_checkpoint(checkpoint)
    return Setup(flow.to(place).eval(), data, out, scale, images)


def small(images: Images, scale: str) -> dict[str, Any]:
    """The configuration of a flow that an experiment trains for itself, of 64 positions where the scale is quick and 16 where it is smoke."""
    side = images.img_size
    sizes = {"full": CIFAR, "quick": {**SMALL, "patch_size": side // 8}, "smoke": {**TINY, "patch_size": side // 4}}[
        scale
    ]
    return {"in_channels": images.in_channels, "img_size": images.img_size, "num_classes": images.num_classes, **sizes}


SHIPPED = ("digits", "photos", "photographs", "leaves")


def _trained(images: Images, folder: Path, device: str, scale: str, steps: int) -> TarFlow:
    """The flow in a folder, or one that is trained for so many steps (resumed, if that was cut off)."""
    config = small(images, scale)
    if scale == "quick":
        config["patch_size"] = SMALL["patch_size"]
    resume = (folder / "state.pt").exists()
    batch, lr = (128, 5e-4) if scale == "full" else (16, 1e-3)
    for _ in train(folder, images, config, steps=steps, batch_size=batch, lr=lr, device=device, resume=resume):
        pass
    return TarFlow.from_checkpoint(folder)
