"""Decoding, for all flows: the inverse of a block as a triangular system over a key-value cache with fixed storage, and the chain of them.

Shapes: B batch (twice that with guidance), L positions, P inputs before the first, D values of a patch, W positions of the window.
"""

import weakref
from abc import abstractmethod
from collections.abc import Hashable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Self

from parallel_decode.adapters.tarflow.guidance import Guidance
from parallel_decode.cached import KeyValueStorage, Reads, RowReads
from parallel_decode.cached.graphs import Graphs, graphs_of
from parallel_decode.system import LayeredSystem, TriangularSystem
from parallel_decode.window import Window

if TYPE_CHECKING:
    from parallel_decode.adapters.tarflow.base import Flow


class Given(Protocol):
    """What the positions of a block depend on besides one another, prepared for a solve."""

    def select(self, rows: Tensor) -> "Given":
        """The same for some rows of the batch."""
        ...

    def kept(self, graphs: Graphs, name: Hashable) -> "Given":
        """The same at the addresses that CUDA graphs have captured under this name."""
        ...


class BlockInverse(TriangularSystem):
    """The inverse of one block: x_l = z_l exp(a_l(x_<l)) + b_l(x_<l), in the block's order.

    The block has `network`, which tells networks of different sizes apart, and `affine(values, given, reads, storage)`: a and b for the
    window from the values that are read.

    Args:
        block: the block.
        z: shape (B, L, D), in the block's order.
        guidance: how conditional and unconditional predictions combine.
        storage: of keys and values.
        graphs: to capture windows in.
        prefix: P.

    Attributes:
        of_flow: what it is the layer of, and which one.
    """

    ragged = True

    def __init__(
        self,
        block: Any,
        z: Tensor,
        guidance: Guidance,
        storage: KeyValueStorage | None,
        graphs: Graphs | None,
        prefix: int = 0,
    ) -> None:
        self.block, self.z, self.guidance, self.graphs, self.prefix = block, z, guidance, graphs, prefix
        self.storage = KeyValueStorage() if storage is None else storage
        self.of_flow: tuple[LayeredSystem, int] | None = None
        self._given: Given | None = None
        self._of: torch.dtype | None = None  # what that was prepared for
        self._own_dtype = next(block.parameters()).dtype
        dtype, network = self.dtype, (type(self), tuple(z.shape), prefix, block.network, bool(guidance))
        self.cost_key = (*network, dtype, z.device, graphs is not None)
        self.gain_key = (weakref.ref(block), guidance.scale, guidance.what, guidance.rule, dtype)

    @abstractmethod
    def given(self, guidance: Guidance, dtype: torch.dtype) -> Any:
        """What the positions depend on besides one another, for computing in this type; with guidance the conditional rows come first."""

    @abstractmethod
    def _subset(self, rows: Tensor, both: Tensor) -> Self:
        """The system of some rows; `both` are those of the doubled batch."""

    @property
    def length(self) -> int:
        return self.z.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in."""
        device = self.z.device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self._own_dtype

    @property
    def identity(self) -> Mapping[str, str | int | float]:  # type: ignore[override]
        if self.of_flow is None:
            return {}
        flow, index = self.of_flow
        return {**flow.identity, "layer": index, "captured": self.graphs is not None}

    def initial(self) -> Tensor:
        self._given = None  # a solve begins: the weights may have changed since the last one
        return self.z

    def resource(self) -> KeyValueStorage:
        return self.storage

    def evaluate(self, x: Tensor, window: Window) -> Tensor:
        return self._evaluate(x, window, self.dtype)

    def read(self, x: Tensor, reads: Reads) -> Tensor:
        """The values that are read, shape (B, T, D), with zeros for the inputs before the first position."""
        return reads.take(F.pad(x, (0, 0, self.prefix, 0)) if self.prefix else x)

    def select(self, rows: Tensor) -> Self | None:
        if self.graphs is not None:  # they are for one batch size
            return None
        both = torch.cat([rows, rows + len(self.z)]) if self.guidance else rows
        subset = self._subset(rows, both)
        with torch.inference_mode():
            subset._given, subset._of = None if self._given is None else self._given.select(both), self._of
            self.storage.select(both, self, subset)
        return subset

    def _evaluate(self, x: Tensor, window: Window, dtype: torch.dtype) -> Tensor:
        if torch.is_grad_enabled():  # a function of all it depends on: everything at once, and nothing kept
            reads = Reads(Window.full(self.length), self.length, self.prefix, device=x.device)
            return window.take(self._transform(x, self.z, reads, self.given(self.guidance, dtype), None))
        with torch.inference_mode():
            return self._decode(x, window, dtype)

    def _decode(self, x: Tensor, window: Window, dtype: torch.dtype) -> Tensor:
        if self._given is None or self._of != dtype:
            self.storage.release()
            given = self.given(self.guidance, dtype)
            self._given, self._of = given if self.graphs is None else given.kept(self.graphs, self.block), dtype
        size, prefix = self.length, self.prefix
        known = self.storage.claim(self, inputs=prefix + size)
        if self.graphs is not None and window.positions.step == 1 and size > 1:
            return self._replay(x, window, self._given, self.graphs, known)
        reads = Reads.of(window, size, prefix, known, x.device)
        return self._transform(x, self.z, reads, self._given, self.storage)

    def _replay(self, x: Tensor, window: Window, given: Given, graphs: Graphs, known: int) -> Tensor:
        size, prefix, storage = self.length, self.prefix, self.storage
        if known < prefix:  # what comes before the first position is read once, apart
            self._transform(x, self.z, Reads(Window(range(1), 0), 1, prefix, device=x.device), given, storage)
        z = graphs.keep("z", self.z)

        def evaluate(x: Tensor, start: Tensor, width: int, before: int) -> Tensor:
            reads = RowReads(start, width, before, prefix + size, size, prefix)
            return self._transform(x, z, reads, given, storage)

        value = graphs.run(self.block, x, window, min(window.changed_from, max(known - prefix, 0)), evaluate)
        storage.note(prefix + size)
        return value

    def _transform(self, x: Tensor, z: Tensor, reads: Reads, given: Given, storage: KeyValueStorage | None) -> Tensor:
        """f at the window's positions, shape (B, W, D)."""
        values = self.read(x, reads)
        if self.guidance:
            a, b = self.block.affine(values.repeat(2, 1, 1), given, reads.repeat(2), storage)
            scale, b = self.guidance.combine(a, b, reads, self.length)
        else:
            a, b = self.block.affine(values, given, reads, storage)
            scale = a.exp()
        return reads.complete(torch.addcmul(b, reads.targets(z), scale), z).to(x.dtype)


class FlowInverse(LayeredSystem):
    """Sampling: the inverses of the blocks, the last block first.

    Args:
        flow: the flow.
        z: the noise.
        guidance: of the blocks that are guided.
        graphs: to capture windows in.
    """

    def __init__(self, flow: "Flow", z: Tensor, guidance: Guidance, graphs: Graphs | None) -> None:
        self.flow: Any = flow
        self.z, self.guidance, self.graphs, self.storage = z, guidance, graphs, KeyValueStorage()

    @cached_property
    def _model(self) -> str:
        return self.flow.fingerprint()  # type: ignore[no-any-return]

    @property
    def identity(self) -> dict[str, str | int | float]:
        device, own = self.z.device, self.flow.noise_like.dtype
        low = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else own
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        of_call: dict[str, str | int | float] = {"device": name, "dtype": str(low), "batch": len(self.z)}
        return {"model": self._model, **of_call, **self.guidance.identity}

    def _placed(self, system: BlockInverse, index: int) -> BlockInverse:
        """The layer with this index, over one storage for all; where windows are captured addresses stay, so there is one for each shape."""
        system.of_flow, system.storage = (self, index), self.storage
        if system.graphs is not None:
            shape = tuple(system.z.shape), system.prefix, system.block.network, bool(system.guidance)
            system.storage = system.graphs.first(("storage", shape), KeyValueStorage())
        return system


def graphs_for(flow: "Flow", z: Tensor, *key: Any) -> Graphs | None:
    """To capture windows in, on a CUDA device; `key` is what they depend on besides z."""
    if not z.is_cuda:
        return None
    autocast = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
    return graphs_of(flow, (z.shape, z.dtype, z.device, autocast, key))
