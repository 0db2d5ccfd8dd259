"""Seconds of decoding on a device, from what its passes do: operations, FLOPs and bytes, each at a price.

A pass of one block over some positions of all rows takes

    calls * call + steps * step + products * product + attention * attention + bytes * byte

seconds: the amounts are counted from shapes (`Network.work`), and the prices (`Device`) are measured (`fit`) or follow from data sheets (`gpus.gpu`).

A roofline (Williams et al. 2009) takes the larger of arithmetic and memory, and this model their sum: a pass is a chain of operations that wait for one
another, some bound by the one and some by the other. It also measures better: on one core of a Xeon the error of single passes (root mean square, flows of
digits and photographs) was 5 to 8%, and 9 to 10% with the larger of the two in products and in attention.

Shapes: B rows of a batch, L positions, C channels of the transformer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import nnls  # type: ignore[import-untyped]

from parallel_decode.adapters.tarflow import TarFlow

LAYER_CALLS, BLOCK_CALLS = 11, 7  # operations of a layer, and of a block around its layers
SWEEP_STEPS, WINDOW_STEPS = 5, 20  # of the solver: a stopping rule for the batch; masks, and a front for each row
LAYER_PRODUCTS = 12  # weights of a layer over C^2: 3 of QKV, 1 of the projection, 8 of the MLP
LAYER_ACTIVATIONS = 38  # numbers that a layer reads and writes at each position, over C


class Pass(NamedTuple):
    """One pass of one block.

    Attributes:
        rows: B, of those at work.
        read: positions that are read, of each row.
        keys: positions that are attended to, those that are read among them.
        steps: operations of the solver, 0 where a single position is computed from final values.
    """

    rows: float
    read: float
    keys: float
    steps: int = 0


Passes = Mapping[Pass, float]  # and how often each is made


class Work(NamedTuple):
    """What a pass does.

    Attributes:
        calls, steps: operations of the network, and of the solver.
        products, attention: FLOPs of matrix products with weights, and of attention.
        bytes: read and written.
    """

    calls: float
    steps: float
    products: float
    attention: float
    bytes: float


@dataclass(frozen=True)
class Network:
    """The transformer of one block.

    Attributes:
        channels: C.
        layers: of the transformer.
        inputs, outputs: numbers of a position that go in and come out.
        itemsize: bytes of a number.
        concatenates: whether keys and values are copied to grow by a position, as Apple's sampler does; fixed storage is only read.

    Example: the products of a sweep are two FLOPs for each weight and position.
        >>> from paper_repro.devices import Network, Pass
        >>> Network(channels=64, layers=1, inputs=4, outputs=8).work(Pass(rows=2, read=15, keys=15)).products
        2995200
    """

    channels: int
    layers: int
    inputs: int
    outputs: int
    itemsize: int = 4
    concatenates: bool = False

    @classmethod
    def of(cls, flow: TarFlow) -> "Network":
        """That of a flow's blocks, which are all alike."""
        block: Any = flow.blocks[0]
        weight = block.proj_in.weight
        outputs = block.proj_out.out_features
        return cls(weight.shape[0], len(block.attn_blocks), weight.shape[1], outputs, weight.element_size())

    def work(self, one: Pass) -> Work:
        """What a pass does: attention counts all pairs, masked or not, and the last projection all positions that are read."""
        weights = LAYER_PRODUCTS * self.channels**2 * self.layers + self.channels * (self.inputs + self.outputs)
        positions, width = one.rows * one.read, self.layers * self.channels
        cache = 2 * one.rows * one.keys * width * (3 if self.concatenates else 1)
        return Work(
            calls=LAYER_CALLS * self.layers + BLOCK_CALLS,
            steps=one.steps,
            products=2 * positions * weights,
            attention=4 * positions * one.keys * width,
            bytes=self.itemsize * (weights + cache + LAYER_ACTIVATIONS * positions * width),
        )


@dataclass(frozen=True)
class Device:
    """Prices in seconds: of an operation of the network and one of the solver, of a FLOP of products and one of attention, of a byte.

    Example:
        >>> Device(call=1e-5, step=1e-5, product=1e-12, attention=1e-12, byte=1e-12).seconds(Work(100, 20, 1e9, 0, 1e9))
        0.0032
    """

    call: float
    step: float
    product: float
    attention: float
    byte: float

    def seconds(self, work: Work) -> float:
        """Of a pass."""
        return float(sum(price * amount for price, amount in zip(astuple(self), work, strict=True)))

    def predict(self, network: Network, passes: Passes) -> float:
        """Seconds of many passes."""
        return sum(times * self.seconds(network.work(one)) for one, times in passes.items())

    def calibrated(self, network: Network, passes: Passes, seconds: float) -> "Device":
        """The same with that price of a call at which these passes take so many seconds (and at least 0)."""
        calls = sum(times * network.work(one).calls for one, times in passes.items())
        rest = replace(self, call=0.0).predict(network, passes)
        return replace(self, call=max(0.0, seconds - rest) / calls)


def fit(works: Sequence[Work], seconds: Sequence[float]) -> Device:
    """The prices, none negative, with the least squares of relative errors.

    Args:
        works: of single passes.
        seconds: that they took, each more than 0.

    Raises:
        ValueError: there are fewer passes than prices, or not as many times.
    """
    if len(works) != len(seconds) or len(works) < len(Work._fields):
        raise ValueError(
            f"{len(works)} passes and {len(seconds)} times, expected as many, at least {len(Work._fields)}"
        )
    relative = np.array(works, float) / np.array(seconds)[:, None]
    scale = np.maximum(relative.max(0), np.finfo(float).tiny)
    return Device(*(nnls(relative / scale, np.ones(len(works)))[0] / scale).tolist())


def sequential(rows: int, length: int, blocks: float = 1) -> dict[Pass, float]:
    """Position by position; nothing is read for the first."""
    return {Pass(rows, 1, keys): blocks for keys in range(1, length)}


def sweeps(rows: int, length: int, times: float) -> dict[Pass, float]:
    """Of all positions."""
    return {Pass(rows, length - 1, length - 1, SWEEP_STEPS): times}


def windows(rows: int, length: int, times: float, evaluated: float) -> dict[Pass, float]:
    """So many passes that evaluated so many positions of each row in all; their fronts are taken to lie evenly."""
    width = evaluated / times
    return {Pass(rows, width, min(length - 1, (length + width) / 2), WINDOW_STEPS): times}
