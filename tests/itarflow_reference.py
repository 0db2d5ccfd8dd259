"""An iTARFlow by its definition, from the names of its weights: no cache, explicit softmax, one position after the other.

Shapes: B batch, L positions, D values of a patch.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

State = Mapping[str, Tensor]


def patches(x: Tensor, size: int) -> Tensor:
    """(B, C, H, W) to (B, L, D): patches row by row, in each channels, rows, columns."""
    b, c, h, w = x.shape
    return x.reshape(b, c, h // size, size, w // size, size).permute(0, 2, 4, 1, 3, 5).reshape(b, -1, c * size**2)


def image(x: Tensor, size: int) -> Tensor:
    b, length, dim = x.shape
    side, c = math.isqrt(length), dim // size**2
    return x.reshape(b, side, side, c, size, size).permute(0, 3, 1, 4, 2, 5).reshape(b, c, side * size, side * size)


def transformer(state: State, index: int, x: Tensor, y: Tensor | None, t: Tensor, temp: float = 1.0) -> Tensor:
    """What a block computes at each position, for x (B, L, D) in the block's order; t (B, 1) is the noise level."""
    start = f"blocks.{index}."
    w = {name.removeprefix(start): value for name, value in state.items() if name.startswith(start)}

    def linear(name: str, h: Tensor) -> Tensor:
        return h @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(name: str, h: Tensor) -> Tensor:
        centred = h - h.mean(-1, keepdim=True)
        unit = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return unit * w[f"{name}.weight"] + w[f"{name}.bias"]

    def gelu(h: Tensor) -> Tensor:
        return h * (1 + torch.erf(h / math.sqrt(2))) / 2

    h = linear("proj_in", x) + (w["pos_embed"].flip(0) if index % 2 else w["pos_embed"])
    channels = h.shape[-1]
    if "class_embed" in w:
        mean = w["class_embed"].mean(0)
        labels = [-1] * len(x) if y is None else y.tolist()
        h = h + torch.stack([mean if label < 0 else w["class_embed"][label] for label in labels])
    waves = [t.log() * 1e4 ** (-2 * k / channels) for k in range(channels // 2)]
    features = torch.cat([f(wave) for f in (torch.sin, torch.cos) for wave in waves], 1)
    h = h + linear("time_embed.mlp.2", gelu(linear("time_embed.mlp.0", features)))[:, None]
    later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    for name in layers(w):
        qkv = linear(f"{name}.attention.qkv", norm(f"{name}.attention.norm", h))
        mixed = []
        for head in range(channels // 64):
            q, k, v = (part[..., 64 * head : 64 * head + 64] for part in qkv.chunk(3, -1))
            mixed.append((q @ k.mT / 8 / temp).masked_fill(later, -math.inf).softmax(-1) @ v)
        h = h + linear(f"{name}.attention.proj", torch.cat(mixed, -1))
        h = h + linear(f"{name}.mlp.main.2", gelu(linear(f"{name}.mlp.main.0", norm(f"{name}.mlp.norm", h))))
    return linear("proj_out", h)


def layers(w: State) -> list[str]:
    """Of a block, in order: those that all blocks share, then its own."""
    kinds = [[f"{kind}.{j}" for j in range(99)] for kind in ("shared_backbone", "head_blocks")]
    return [name for names in kinds for name in names if f"{name}.mlp.norm.weight" in w]


def affine(state: State, index: int, out: Tensor) -> tuple[Tensor, Tensor]:
    """a and b from what the transformer computed."""
    nvp = out.shape[-1] == 2 * state[f"blocks.{index}.proj_in.weight"].shape[1]
    a, b = out.chunk(2, -1) if nvp else (torch.zeros_like(out), out)
    return a, b


def forward(
    state: State, x: Tensor, y: Tensor | None, t: Tensor, sizes: Sequence[int], scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """z of images, and log |det dz/dx| (B,)."""
    logdet = torch.full_like(x[:, 0, 0, 0], x[0].numel() * math.log(scale))
    x = x * scale
    for index, size in enumerate(sizes):
        h = patches(x, size)
        h = h.flip(1) if index % 2 else h
        a, b = affine(state, index, transformer(state, index, h, y, t)[:, :-1])
        h = torch.cat([h[:, :1], (h[:, 1:] - b) * (-a).exp()], 1)
        logdet = logdet - a.sum((1, 2))
        h = h.flip(1) if index % 2 else h
        x = image(h, size)
    return h, logdet


def guided(rule: str, a: Tensor, b: Tensor, a_u: Tensor, b_u: Tensor, w: float) -> tuple[Tensor, Tensor]:
    """Scale and shift."""
    if rule == "tarflow":
        return (1 + w) * a.exp() - w * a_u.exp(), (1 + w) * b - w * b_u
    variance, wide = (2 * a).exp(), torch.maximum((2 * a).exp(), (2 * a_u).exp())
    precision = (1 + w) / variance - w / wide  # of N(b, variance)^(1 + w) / N(b_u, wide)^w
    return precision**-0.5, ((1 + w) * b / variance - w * b_u / wide) / precision


def reverse(
    state: State,
    z: Tensor,
    y: Tensor | None,
    t: Tensor,
    sizes: Sequence[int],
    scale: float = 1.0,
    *,
    guidance: float = 0.0,
    guide_rule: str = "tarflow",
    annealed_guidance: bool = False,
    guide_flows: int | None = None,
    attn_temp: float = 1.0,
) -> Tensor:
    """Images of z (B, L, D)."""
    x = image(z * state["var"].sqrt(), sizes[-1])
    flows = guide_flows or (1 if guide_rule == "starflow" else len(sizes))
    for step, (index, size) in enumerate(reversed([*enumerate(sizes)])):
        h = patches(x, size)
        h = h.flip(1) if index % 2 else h
        known, length = [h[:, 0]], h.shape[1]
        for position in range(1, length):
            so_far = torch.stack([*known, *h.unbind(1)[position:]], 1)
            a, b = affine(state, index, transformer(state, index, so_far, y, t)[:, position - 1])
            factor = a.exp()
            if guidance and step < flows:
                without = transformer(state, index, so_far, None, t, attn_temp)[:, position - 1]
                w = guidance * position / (length - 1) if annealed_guidance else guidance
                factor, b = guided(guide_rule, a, b, *affine(state, index, without), w)
            known.append(h[:, position] * factor + b)
        h = torch.stack(known, 1)
        h = h.flip(1) if index % 2 else h
        x = image(h, size)
    return x / scale
