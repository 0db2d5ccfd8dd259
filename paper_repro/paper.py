"""What the paper reports: the figures that ours stand beside (Selective Jacobi Decoding, arXiv 2505.24791).

Seconds are for a batch of 256 on two L40S, means of 10 runs; every Jacobi sweep stops at tau = 0.5 and starts from zeros.
"""

from typing import NamedTuple


class Row(NamedTuple):
    """A cell row of Table 1."""

    seconds: float
    speed_up: float
    fid: float
    clip_iqa: float
    brisque: float


TABLE_1 = {
    "cifar10": {
        "sequential": Row(9.56, 1.0, 9.71, 0.35, 56.35),
        "UJD": Row(3.92, 2.4, 10.19, 0.35, 56.79),
        "SeJD": Row(2.63, 3.6, 10.20, 0.35, 56.78),
    },
    "cifar100": {
        "sequential": Row(9.57, 1.0, 8.22, 0.35, 57.75),
        "UJD": Row(3.30, 2.9, 8.26, 0.35, 57.76),
        "SeJD": Row(2.04, 4.7, 8.19, 0.35, 57.78),
    },
    "afhq": {
        "sequential": Row(186.28, 1.0, 15.42, 0.63, 15.55),
        "UJD": Row(219.24, 0.8, 15.44, 0.63, 15.44),
        "SeJD": Row(41.21, 4.5, 15.44, 0.63, 15.56),
    },
}
SWEEPS = {  # of each block under SeJD; the first is sequential
    "cifar10": (255, 53.9, 4.9, 4.0, 3.0, 6.1),
    "cifar100": (255, 7.5, 4.7, 4.0, 4.0, 5.2),
    "afhq": (1023, 6.6, 6.0, 5.2, 5.0, 5.9, 4.5, 4.0),
}
FIRST_BLOCK = {"cifar10": 0.557, "cifar100": 0.766, "afhq": 0.520}  # its share of SeJD's time
SHAPES = {"cifar10": (32, 256, 256), "afhq": (256, 1024, 768)}  # pixels of a side, positions, width
FIRST_UJD = {"cifar10": 213, "afhq": 515}  # sweeps of the first block under UJD: derived, as are
COSTS = {"cifar10": (0.0057, 0.0128), "afhq": (0.0211, 0.388)}  # seconds of a sequential step and of a full sweep
RECONSTRUCTION = {"cifar10": 0.00636, "cifar100": 0.00313, "afhq": 0.00122}  # mean squared error
MEMORY = {"sequential": 7.8, "SeJD": 5.2}  # GB, AFHQ, batch 16
MAF = {
    "Ising, 100,000 samples": (16.84, 1.07),
    "binary MNIST, 100 images": (281.0, 15.24),
}  # seconds: nflows' own; Jacobi
