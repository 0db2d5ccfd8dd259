"""STARFlow by its definition, written from the papers and the names of the parameters: no cache, a softmax written out, the whole transformer anew for every position.

Shapes: B batch, F frames, N patches of a frame, L positions, M inputs, D values of a patch, C channels.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

DEFAULTS: dict[str, Any] = dict(
    head_dim=64, num_heads=None, num_kv_heads=None, rope=False, pt_seq_len=None, sos=False, txt_size=0, txt_dim=0, cond_top_only=False,
    use_softplus=False, hf_style_rope=False, norm_type="layer_norm", soft_clip=0, seq_order="R2L", temporal_causal=0, shallow_block_local=False,
    local_attn_window=None, denoiser_window=None, conditional_denoiser=False, one_d=False, noise_std=None,
)  # fmt: skip


class Reference:
    """The flow of a state dict.

    Args:
        weights: by name.
        config: arguments of the published constructor; `one_d` says that the deep block counts places as a language model does, and `deep` has
            what else its shape differs in.
    """

    def __init__(self, weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
        self.weights: dict[str, Tensor] = dict(weights)
        self.c: dict[str, Any] = DEFAULTS | dict(config)
        self.deep: dict[str, Any] = self.c | self.c.get("deep", {})
        self.blocks = range(self.c["num_blocks"])

    def _part(self, prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): w for name, w in self.weights.items() if name.startswith(prefix)}

    def angles(self, c: dict[str, Any], one_d: bool, text: int, frames: int, height: int, width: int) -> Tensor:
        pairs = c["head_dim"] // 2
        if one_d:
            places = range(text + frames * height * width)
            return torch.tensor(
                [[i * 10000 ** (-p / pairs) for p in range(pairs)] for i in places], dtype=torch.float64
            )
        side = self.c["pt_seq_len"] or self.c["img_size"] // self.c["patch_size"]
        timed = self.c["txt_size"] > 0
        space, time = (pairs - 8 if timed else pairs) // 2, 8 if timed else 0
        mean = math.sqrt(height * width)
        places_3d = [(0.0, 0.0, i / text * side) for i in range(text)]
        for f in range(frames):
            for i in range(height):
                for j in range(width):
                    places_3d.append((i / mean * side, j / mean * side, float(f)))
        rows = []
        for down, right, when in places_3d:
            row = [at * 10000 ** (-p / space) for at in (down, right) for p in range(space)]
            rows.append(row + [when * 10000 ** (-p / time) for p in range(time)])
        return torch.tensor(rows, dtype=torch.float64)

    def network(
        self, w: dict[str, Tensor], c: dict[str, Any], h: Tensor, angles: Tensor | None, mask: Tensor
    ) -> Tensor:
        """The transformer's layers and its last norm, over the residual stream (B, M, C); mask (M, M) is True where a query sees a key."""

        def linear(name: str, x: Tensor) -> Tensor:
            return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", torch.zeros(()))

        def rms(name: str, x: Tensor) -> Tensor:
            if f"{name}.weight" not in w:
                return x
            return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + w[f"{name}.weight"])

        def norm(name: str, x: Tensor) -> Tensor:
            if c["norm_type"] == "rms_norm":
                return rms(name, x)
            x = x - x.mean(-1, keepdim=True)
            return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]

        def turned(x: Tensor) -> Tensor:
            if angles is None:
                return x
            y, half = torch.empty_like(x), x.shape[-1] // 2
            for p in range(half):
                i, j = (p, p + half) if c["hf_style_rope"] else (2 * p, 2 * p + 1)
                cos, sin = angles[: x.shape[1], p].cos(), angles[: x.shape[1], p].sin()
                y[..., i], y[..., j] = x[..., i] * cos - x[..., j] * sin, x[..., i] * sin + x[..., j] * cos
            return y

        size = c["head_dim"]
        heads = c["num_heads"] or h.shape[-1] // size
        groups = heads // (c["num_kv_heads"] or heads)
        layer = 0
        while f"attn_blocks.{layer}.attention.qkv.weight" in w:
            name = f"attn_blocks.{layer}.attention"
            qkv, outs = linear(f"{name}.qkv", norm(f"{name}.norm", h)), []
            for head in range(heads):
                at = [head, heads + head // groups, heads + heads // groups + head // groups]
                q, k, v = (qkv[..., i * size : (i + 1) * size] for i in at)
                q, k = turned(rms(f"{name}.query_norm", q)), turned(rms(f"{name}.key_norm", k))
                scores = (q @ k.mT / math.sqrt(size)).masked_fill(~mask, -math.inf)
                outs.append(scores.softmax(-1) @ v)
            h = h + rms(f"{name}.post_norm", linear(f"{name}.proj", torch.cat(outs, -1)))
            name = f"attn_blocks.{layer}.mlp"
            x = norm(f"{name}.norm", h)
            if f"{name}.gate_proj.weight" in w:
                g = linear(f"{name}.gate_proj", x)
                g = g * (1 + torch.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3))) / 2
                x = linear(f"{name}.down_proj", g * linear(f"{name}.up_proj", x))
            else:
                x = linear(f"{name}.main.0", x)
                x = linear(f"{name}.main.2", x * (1 + torch.erf(x / math.sqrt(2))) / 2)
            h = h + rms(f"{name}.post_norm", x)
            layer += 1
        return rms("final_norm", h)

    def _is_deep(self, block: int) -> bool:
        return block == self.blocks[-1]

    def sees_text(self, block: int) -> bool:
        return self.c["txt_dim"] > 0 and (self._is_deep(block) or not self.c["cond_top_only"])

    def affine(self, block: int, x: Tensor, text: Tensor | None, grid: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
        """Scale and shift at all positions of x (B, L, D), in the block's order, from those before."""
        w, c = self._part(f"blocks.{block}."), self.deep if self._is_deep(block) else self.c
        inputs = torch.cat([w["sos_embed"].expand(len(x), 1, -1), x[:, :-1]], 1) if self.c["sos"] else x
        h = inputs @ w["proj_in.weight"].T + w["proj_in.bias"]
        if not self.c["rope"]:
            h = h + (w["pos_embed"].flip(0) if self.flips(block) else w["pos_embed"])
        words = 0
        if self.sees_text(block):
            assert text is not None
            words = text.shape[1]
            text = text @ w["proj_txt.weight"].T + w["proj_txt.bias"] if "proj_txt.weight" in w else text
            h = torch.cat([text.expand(len(x), -1, -1), h], 1)
        angles = self.angles(c, self._is_deep(block) and self.c["one_d"], words, *grid) if self.c["rope"] else None
        causal = torch.ones(h.shape[1], h.shape[1], dtype=torch.bool).tril()
        h = self.network(w, c, h, angles, causal)[:, words:]
        out = h @ w["proj_out.weight"].T + w["proj_out.bias"]
        if self.c["soft_clip"]:
            out = self.c["soft_clip"] * torch.tanh(out / self.c["soft_clip"])
        if not self.c["sos"]:
            out = torch.cat([torch.zeros_like(out[:, :1]), out[:, :-1]], 1)
        a, b = out.chunk(2, -1)
        return torch.log(1 + (math.e - 1) * a.exp()) if self.c["use_softplus"] else a.exp(), b

    def flips(self, block: int) -> bool:
        return (block % 2 == 1) if self.c["seq_order"] == "R2L" else (block % 2 == 0)

    def order(self, block: int, x: Tensor, frames: int) -> Tensor:
        """(B, L, D) of so many frames in the block's order, and back."""
        if not self.flips(block):
            return x
        if self.c["temporal_causal"]:
            return torch.cat([frame.flip(1) for frame in x.chunk(frames, 1)], 1)
        return x.flip(1)

    def patches(self, x: Tensor) -> Tensor:
        """(B, F, C, H, W) to (B, F, N, D), a patch by rows, its columns, and channels last."""
        p, (height, width) = self.c["patch_size"], x.shape[-2:]
        found = [
            x[..., i : i + p, j : j + p].permute(0, 1, 3, 4, 2).flatten(2)
            for i in range(0, height, p)
            for j in range(0, width, p)
        ]
        return torch.stack(found, 2)

    def latents(self, x: Tensor, height: int, width: int) -> Tensor:
        """The way back."""
        p = self.c["patch_size"]
        y = x.new_zeros(*x.shape[:2], x.shape[3] // p**2, height * p, width * p)
        for n in range(height * width):
            i, j = n // width * p, n % width * p
            y[..., i : i + p, j : j + p] = x[:, :, n].reshape(*x.shape[:2], p, p, -1).permute(0, 1, 4, 2, 3)
        return y

    def _rows(self, block: int, x: Tensor) -> tuple[Tensor, int]:
        apart = self.c["shallow_block_local"] and not self._is_deep(block)
        return (x.flatten(0, 1), 1) if apart else (x.flatten(1, 2), x.shape[1])

    def forward(self, x: Tensor, text: Tensor | None, blocks: int | None = None) -> tuple[Tensor, Tensor]:
        """z, shaped as x (B, C, H, W) or (B, F, C, H, W), and log |det dz/dx|."""
        p, video = self.c["patch_size"], x.dim() == 5
        height, width = x.shape[-2] // p, x.shape[-1] // p
        u, total = self.patches(x if video else x[:, None]), x.new_zeros(len(x))
        for block in list(self.blocks)[:blocks]:
            if f"blocks.{block}.proj_in.weight" not in self.weights:
                continue
            rows, frames = self._rows(block, u)
            v = self.order(block, rows, frames)
            scale, shift = self.affine(block, v, text, (frames, height, width))
            total = total - scale.log().reshape(len(x), -1).sum(1)
            u = self.order(block, (v - shift) / scale, frames).reshape(u.shape)
        z = self.latents(u, height, width)
        return (z if video else z[:, 0]), total

    def guided(
        self, block: int, x: Tensor, text: Any, null: Any, w: float, grid: tuple[int, int, int]
    ) -> tuple[Tensor, Tensor]:
        scale, shift = self.affine(block, x, text, grid)
        if not w or not self.sees_text(block):
            return scale, shift
        other, centre = self.affine(block, x, null, grid)
        variance = torch.minimum(scale / other, torch.ones(())) ** 2
        precision = 1 + w - w * variance
        return scale / precision.sqrt(), ((1 + w) * shift - w * variance * centre) / precision

    def sample(
        self,
        z: Tensor,
        text: Tensor | None,
        null: Tensor | None = None,
        w: float = 0.0,
        frames: Tensor | None = None,
        context: int | None = None,
    ) -> Tensor:
        """x from z: every position by a run of the whole transformer on what is there so far."""
        p, video = self.c["patch_size"], z.dim() == 5
        height, width = z.shape[-2] // p, z.shape[-1] // p
        each, u = height * width, self.patches(z if video else z[:, None])
        for block in reversed(self.blocks):
            if f"blocks.{block}.proj_in.weight" not in self.weights:
                continue
            rows, count = self._rows(block, u)
            noise = self.order(block, rows, count)
            x, done, window = noise.clone(), 0, count
            if self._is_deep(block):
                window = min(count, self.c["local_attn_window"] or count)
                if frames is not None:
                    known = self.patches(self.forward(frames, None, len(self.blocks) - 1)[0])
                    done = known.shape[1]
                    x[:, : done * each] = self.order(block, known.flatten(1, 2), done)
            first = 0
            while done < count:
                stop = min(first + window, count)
                for l in range(done * each, stop * each):
                    at, grid = l - first * each, (stop - first, height, width)
                    scale, shift = self.guided(block, x[:, first * each : stop * each], text, null, w, grid)
                    x[:, l] = noise[:, l] * scale[:, at] + shift[:, at]
                done = stop
                first = done - (context or window - 1)
            u = self.order(block, x, count).reshape(u.shape)
        x = self.latents(u, height, width)
        return x if video else x[:, 0]

    def denoised(self, x: Tensor, text: Tensor | None) -> Tensor:
        """By the learned denoiser."""
        p, video, w = self.c["patch_size"], x.dim() == 5, self._part("learnable_self_denoiser.")
        height, width = x.shape[-2] // p, x.shape[-1] // p
        u = self.patches(x if video else x[:, None])
        count, each, words = u.shape[1], u.shape[2], 0
        h = u.flatten(1, 2) @ w["proj_in.weight"].T + w["proj_in.bias"]
        if "proj_txt.weight" in w:
            assert text is not None
            words = text.shape[1]
            h = torch.cat([text @ w["proj_txt.weight"].T + w["proj_txt.bias"], h], 1)
        total, ahead, window = h.shape[1], self.c["temporal_causal"], self.c["denoiser_window"]
        mask = torch.ones(total, total, dtype=torch.bool)
        for q in range(total if video and ahead else 0):
            for k in range(words, total):
                frame, own = (k - words) // each, (q - words) // each
                late = frame > max(q - words, 0) // each + ahead - 1
                mask[q, k] = not late and (window is None or frame >= own + ahead - 1 - window)
        angles = self.angles(self.c, False, words, count, height, width) if self.c["rope"] else None
        out = self.network(w, self.c, h, angles, mask)[:, words:] @ w["proj_out.weight"].T + w["proj_out.bias"]
        y = self.latents(out.reshape(u.shape), height, width)
        return x - 0.3 * (y if video else y[:, 0])
