"""The experiments by name."""

from pathlib import Path
from typing import Any, Protocol

from paper_repro.experiments import (
    convergence,
    devices,
    layers,
    maf,
    memory,
    reconstruction,
    redundancy,
    regularise,
    samples,
    scaling,
    start,
    table1,
    tau,
    training,
)
from paper_repro.setup import Setup


class Experiment(Protocol):
    """What a module of this package offers."""

    TITLE: str

    def run(self, setup: Setup) -> dict[str, Any]:
        """The figures, as JSON can hold them; pictures of samples go to `setup.out`."""

    def tell(self, figures: dict[str, Any], data: str) -> str:
        """Markdown: a table, and what it says, from the figures alone."""

    def draw(self, figures: dict[str, Any], path: Path) -> None:
        """A plot of the figures, as a PNG."""


EXPERIMENTS: dict[str, Experiment] = {  # in the order of the report
    "table1": table1,
    "layers": layers,
    "redundancy": redundancy,
    "convergence": convergence,
    "tau": tau,
    "start": start,
    "reconstruction": reconstruction,
    "memory": memory,
    "samples": samples,
    "maf": maf,
    "training": training,
    "regularise": regularise,
    "scaling": scaling,
    "devices": devices,
}

APART = {"maf"}  # needs no flow over images: once is enough
