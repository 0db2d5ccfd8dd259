"""Keys and values in fixed storage, written in place.

Shapes: B batch rows, N inputs that there are in all, T inputs that are read, H heads, D values of a head.
"""

from torch import Tensor

from parallel_decode._claims import Claim, claim_of
from parallel_decode.cached.reads import Reads


class KeyValueStorage:
    """The cache of one system at a time; systems that are solved one after the other may share it.

    A system returns it as its `resource()`: two solves at once are an error then, and at each new solve nothing of an earlier one is known,
    whatever became of the weights since.

    Example:
        >>> import torch
        >>> from parallel_decode import Window
        >>> from parallel_decode.cached import KeyValueStorage, Reads
        >>> storage = KeyValueStorage()
        >>> reads = Reads(Window(range(0, 4), 0), length=8, known=storage.claim("me", inputs=8))
        >>> keys, values = storage.update(0, torch.ones(1, reads.size, 2, 2, 4), reads)
        >>> keys.shape, storage.claim("me", inputs=8)
        (torch.Size([1, 2, 3, 4]), 3)
    """

    def __init__(self) -> None:
        self._layers: list[tuple[Tensor, Tensor, Tensor]] = []  # all of it, and views: keys and values (B, H, N, D)
        self._owner: object = None
        self._claim: Claim | None = None
        self._inputs = self._known = self._written = self._used = 0

    @property
    def kv(self) -> list[Tensor]:
        """Keys and values of each layer, shape (B, N, 2, H, D)."""
        return [kv for kv, _, _ in self._layers]

    def claim(self, owner: object, inputs: int) -> int:
        """For a system, at the beginning of `evaluate`.

        Args:
            owner: the system. If that was another one, or another solve, the content is all zeros now.
            inputs: N.

        Returns:
            How many leading inputs are known.

        Raises:
            RuntimeError: a solve is going on that did not ask for this evaluation.
        """
        claim = claim_of(self)
        if self._owner is not owner or self._claim is not claim or self._inputs != inputs:
            for layer in self.kv:
                layer.zero_()
            self._owner, self._claim, self._inputs, self._written, self._used = owner, claim, inputs, 0, 0
        self._known = self._written
        return self._known

    def update(self, layer: int, kv: Tensor, reads: Reads) -> tuple[Tensor, Tensor]:
        """Write the keys and values of what is read.

        Args:
            layer: its index; layers come in order.
            kv: shape (B, T, 2, H, D).
            reads: the inputs.

        Returns:
            Keys and values of all inputs that are attended to, shape (B, H, reads.stop, D) each.

        Raises:
            RuntimeError: another batch or dtype than what the owner wrote before, or something to be differentiated.
            ValueError: an input beyond those that were claimed.
        """
        if kv.requires_grad:
            raise RuntimeError(
                "keys and values that need a gradient cannot be kept: read everything at once (Window.full) without storage, or use torch.no_grad"
            )
        if reads.stop > self._inputs:
            raise ValueError(
                f"input {reads.stop - 1} was read, and the storage was claimed for {self._inputs} inputs: claim P + L"
            )
        if not self._known:
            self._fit(layer, kv)
        self._used = max(self._used, layer + 1)
        held, keys, values = self._layers[layer]
        if kv.shape[0] != held.shape[0] or kv.dtype != held.dtype:
            raise RuntimeError(
                f"the storage holds {held.dtype} of {held.shape[0]} rows, and gets {kv.dtype} of {kv.shape[0]}: release() it first, or select() rows"
            )
        reads.write(held, kv)
        stop = self._written = reads.stop
        return keys[:, :, :stop], values[:, :, :stop]

    def _fit(self, layer: int, kv: Tensor) -> None:
        """Room for such keys and values; what is there stays if it fits."""
        shape, held = (kv.shape[0], self._inputs, *kv.shape[2:]), self.kv[layer : layer + 1]
        if not held or (held[0].shape, held[0].dtype, held[0].device) != (shape, kv.dtype, kv.device):
            self._set(layer, kv.new_zeros(shape))

    def note(self, stop: int) -> None:
        """The inputs before `stop` are there: for passes that were captured, and are replayed without `update`."""
        self._written = stop

    def select(self, rows: Tensor, owner: object, subset: object) -> None:
        """Only these rows of the batch from now on, for another system, if the content is the owner's."""
        if self._owner is owner:
            for layer, kv in enumerate(self.kv[: self._used]):  # an owner before may have had more
                self._set(layer, kv[rows])
            self._owner = subset

    def release(self) -> None:
        """Nothing is known any more."""
        self._owner = None

    def _set(self, layer: int, kv: Tensor) -> None:
        self._layers[layer : layer + 1] = [(kv, kv[:, :, 0].transpose(1, 2), kv[:, :, 1].transpose(1, 2))]
