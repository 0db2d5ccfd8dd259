"""The network: a stack of causal transformers, with parameters and buffers named as in Apple's public checkpoints.

One forward serves density, training, windows, single positions and probes. It calls the modules, or takes their weights as prepared for
decoding (`weights.py`), and reads what a window needs over a key-value cache, or everything.

Shapes: B batch, L patches (positions), D values of a patch, C channels of the transformer, T positions read, W positions of the window.
"""

import torch
from torch import Tensor, nn

from parallel_decode.adapters.tarflow.changes import as_built, built
from parallel_decode.adapters.tarflow.transformer import AttentionBlock, Layer, is_as_built
from parallel_decode.adapters.tarflow.weights import Called, Linear, Weights
from parallel_decode.cached import KeyValueStorage, Reads
from parallel_decode.window import Window


@built
class MetaBlock(nn.Module):
    """One block of the flow: an affine autoregressive transform whose a and b are a causal transformer's.

    Args:
        patch_dim: D.
        channels: C.
        num_patches: L.
        num_layers: layers of its own.
        flip: whether it reads the patches from last to first.
        nvp: whether it scales.
        num_classes: 0 for none.
        name: of its layers in the state dict.
        time_embed: embeds noise levels, (B, 1) to (B, C); None without.
        shared_backbone: layers before its own, which other blocks have too.
    """

    def __init__(
        self,
        patch_dim: int,
        channels: int,
        num_patches: int,
        num_layers: int,
        flip: bool,
        nvp: bool,
        num_classes: int,
        *,
        name: str = "attn_blocks",
        time_embed: nn.Module | None = None,
        shared_backbone: nn.ModuleList | None = None,
    ) -> None:
        super().__init__()
        self.patch_dim, self.flip, self.nvp, self._name = patch_dim, flip, nvp, name
        self.proj_in = nn.Linear(patch_dim, channels)
        self.pos_embed = embedding(num_patches, channels)
        self.class_embed = embedding(num_classes, 1, channels) if num_classes else None
        self.shared_backbone = shared_backbone
        self.add_module(name, nn.ModuleList(AttentionBlock(channels) for _ in range(num_layers)))
        self.proj_out = nn.Linear(channels, patch_dim * (2 if nvp else 1))
        nn.init.zeros_(self.proj_out.weight)
        self.time_embed = time_embed

    @property
    def layers(self) -> list[nn.Module]:
        """Of the transformer, in order."""
        return [*(self.shared_backbone or ()), *getattr(self, self._name)]

    @property
    def network(self) -> tuple[int, int]:
        """Channels and layers."""
        return self.pos_embed.shape[1], len(self.layers)

    def permuted(self, x: Tensor, dim: int = 1) -> Tensor:
        """x in the block's order, and back: every second block reads the patches from last to first."""
        return x.flip(dim) if self.flip else x

    def condition(self, y: Tensor | None, t: Tensor | None = None) -> Tensor | None:
        """The sum of the embeddings of classes and noise levels, shape (B or 1, 1, C), or None.

        Args:
            y: classes; the mean of all of them where it is None or negative.
            t: logarithms of noise levels, shape (B, 1).
        """
        embeddings = []
        if self.class_embed is not None:
            mean = self.class_embed.mean(0, keepdim=True)
            y = None if y is None else y.to(mean.device)
            one = mean if y is None else torch.where((y < 0)[:, None, None], mean, self.class_embed[y.clamp(min=0)])
            embeddings.append(one)
        if self.time_embed is not None and t is not None:
            embeddings.append(self.time_embed(t)[:, None])
        return sum(embeddings[1:], embeddings[0]) if embeddings else None

    def weights(self, y: Tensor | None, dtype: torch.dtype | None = None, t: Tensor | None = None) -> Weights:
        """The block's functions and embeddings for these classes and levels: its modules, or prepared for decoding in this type."""
        pos_embed, condition = self.permuted(self.pos_embed, 0), self.condition(y, t)
        if dtype is None:
            return Weights(pos_embed.dtype, self.proj_in, self.proj_out, self.layers, pos_embed, condition)
        ends = self.proj_in, self.proj_out
        proj_in, proj_out = (Linear.of(m, dtype) if as_built(m, [nn.Linear]) else Called(m, dtype) for m in ends)
        layers = [Layer.of(layer, dtype) for layer in self.layers]
        return Weights(dtype, proj_in, proj_out, layers, pos_embed, condition)

    def for_check(self, dtype: torch.dtype | None) -> Weights:
        """What decoding is checked with, see `changes`."""
        return self.weights(None, dtype)

    def changed(self) -> bool:
        """Whether modules in it were hooked to, wrapped or replaced."""
        linear = all(as_built(module, [nn.Linear]) for module in (self.proj_in, self.proj_out))
        return not (linear and all(map(is_as_built, self.layers)))

    def affine(
        self, x: Tensor, w: Weights, reads: Reads, storage: KeyValueStorage | None = None
    ) -> tuple[Tensor, Tensor]:
        """a and b.

        Args:
            x: the values that are read, in the block's order, shape (B, T, D).
            w: the weights.
            reads: which positions those are.
            storage: the key-value cache, or None.

        Returns:
            Each at the window's positions but position 0, which depends on nothing: shape (B, W, D), float32 at least.
        """
        batch, size, dim = x.shape
        if not size:
            return x, x
        h = w.proj_in(x.reshape(-1, dim).to(w.dtype)).view(batch, size, -1) + reads.embedding(w.pos_embed)
        h = (h if w.condition is None else h + w.condition).flatten(0, 1)
        for index, layer in enumerate(w.layers):
            h = layer(h, reads, storage, index, w.temperature)
        h = reads.outputs(h.view(batch, size, -1))
        out = w.proj_out(h.reshape(-1, h.shape[2]).to(w.dtype)).view(batch, h.shape[1], -1)
        out = out if out.element_size() > 2 else out.float()
        a, b = out.chunk(2, dim=-1) if self.nvp else (torch.zeros_like(out), out)
        return a, b

    def forward(self, x: Tensor, y: Tensor | None = None, t: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """z, shape (B, L, D), and the log-determinant, shape (B,)."""
        x = self.permuted(x)
        reads = Reads(Window.full(x.shape[1]), x.shape[1])
        a, b = self.affine(reads.take(x), self.weights(y, t=t), reads)
        return self.permuted(reads.complete((reads.targets(x) - b) * (-a).exp(), x)), -a.sum((1, 2))


def embedding(*shape: int) -> nn.Parameter:
    """Small random numbers; none on the meta device, where drawing them would import half of torch's compiler."""
    value = torch.empty(shape)
    return nn.Parameter(value if value.is_meta else torch.randn(shape) * 1e-2)
