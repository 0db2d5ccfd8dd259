"""A cached system in under ninety lines: a two-layer causal transformer continues prompts, window by window, over fixed key-value storage."""

import copy

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as attention

import parallel_decode as pd
from parallel_decode.cached import KeyValueStorage, Reads


class Layer(nn.Module):
    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(channels), nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        wide = nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels)
        self.mlp = nn.Sequential(nn.LayerNorm(channels), *wide)
        self.heads = heads

    def forward(self, h: Tensor, index: int, reads: Reads, storage: KeyValueStorage) -> Tensor:
        qkv = self.qkv(self.norm(h)).unflatten(2, (3, self.heads, -1))  # (B, T, 3, H, D)
        keys, values = storage.update(index, qkv[:, :, 1:], reads)
        y = attention(qkv[:, :, 0].transpose(1, 2), keys, values, attn_mask=reads.mask, is_causal=reads.causal)
        h = h + self.proj(y.transpose(1, 2).flatten(2))
        return h + self.mlp(h)  # type: ignore[no-any-return]


class Transformer(nn.Module):
    def __init__(self, vocabulary: int = 64, channels: int = 64, heads: int = 4, places: int = 256) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, channels), nn.Embedding(places, channels)
        self.layers = nn.ModuleList(Layer(channels, heads) for _ in range(2))
        self.head = nn.Linear(channels, vocabulary)

    def forward(self, tokens: Tensor, reads: Reads, storage: KeyValueStorage) -> Tensor:
        h = self.tokens(tokens) + reads.embedding(self.places.weight)
        for index, layer in enumerate(self.layers):
            h = layer(h, index, reads, storage)
        return self.head(reads.outputs(h))  # type: ignore[no-any-return]


class Continuation(pd.TriangularSystem):
    """x_l is the best token after a prompt (B, P) and x_<l: the output of the transformer at input P + l - 1."""

    ragged = True  # rows may have windows of their own

    def __init__(self, model: Transformer, prompt: Tensor, length: int) -> None:
        self.model, self.prompt, self._length = model, prompt, length
        self.storage = KeyValueStorage()

    @property
    def length(self) -> int:
        return self._length

    def initial(self) -> Tensor:
        return self.prompt[:, -1:].repeat(1, self.length)

    def evaluate(self, x: Tensor, window: pd.Window) -> Tensor:
        prefix = self.prompt.shape[1]
        known = self.storage.claim(self, inputs=prefix + self.length)
        reads = Reads.of(window, self.length, prefix, known, x.device)
        scores = self.model(reads.take(torch.cat([self.prompt, x], 1)), reads, self.storage)
        return scores.argmax(-1)  # type: ignore[no-any-return]

    def select(self, rows: Tensor) -> "Continuation":
        subset = copy.copy(self)
        subset.prompt = self.prompt[rows]
        self.storage.select(rows, self, subset)
        return subset

    def resource(self) -> KeyValueStorage:
        return self.storage


if __name__ == "__main__":
    torch.manual_seed(0)
    model = Transformer().double()
    system = Continuation(model, torch.randint(64, (4, 10)), 100)
    truth = pd.solve(system, "sequential")
    for schedule in ("jacobi", pd.Sliding(16), pd.Sliding(16, per_row=True), pd.JacobiGaussSeidel(4)):
        solution = pd.solve(system, schedule)
        assert torch.equal(solution.value, truth.value)
        print(f"{schedule!r:30} {solution.passes:4} passes in place of {truth.passes}, the same tokens")
