"""What a STARFlow is built from: the arguments of the published constructor."""

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from numbers import Real
from typing import Any, NamedTuple

from torch import Tensor

from parallel_decode._options import check_at_least_one, check_kind
from parallel_decode.adapters.tarflow.config import FlowConfig

_GEMMA: dict[str, Any] = dict(
    head_dim=256, use_swiglu=True, use_post_norm=True, use_final_norm=True, use_bias=False, norm_type="rms_norm",
    hf_style_rope=True, rope_1d=True, project_text=False,
)  # fmt: skip
_SMALL, _MIDDLE = dict(num_heads=4, num_kv_heads=1), dict(num_heads=8, num_kv_heads=4)
LANGUAGE_MODELS: dict[str, tuple[int, dict[str, Any]]] = {  # layers, and the shape of the deep block
    "gemma3_4b": (34, _GEMMA | _MIDDLE | dict(use_qk_norm=True, channels=2560)),
    "gemma3_1b": (26, _GEMMA | _SMALL | dict(use_qk_norm=True, channels=1152, expansion=6)),
    "gemma2_2b": (26, _GEMMA | _MIDDLE | dict(use_qk_norm=False, channels=2304)),
}
_CHOICES: dict[str, tuple[str | None, ...]] = {
    "norm_type": ("layer_norm", "rms_norm", "none"),
    "seq_order": ("L2R", "R2L"),
    "use_pretrained_lm": (None, *LANGUAGE_MODELS),
}
_MAY_BE_0 = ("txt_size", "txt_dim", "temporal_causal")


class Shape(NamedTuple):
    """Of the transformer of one block."""

    channels: int
    head_dim: int
    num_heads: int
    num_kv_heads: int
    use_swiglu: bool
    use_qk_norm: bool
    use_post_norm: bool
    use_final_norm: bool
    use_bias: bool
    norm_type: str
    hf_style_rope: bool
    expansion: int = 4
    rope_1d: bool = False
    project_text: bool = True


@dataclass(frozen=True)
class Config(FlowConfig):
    """The arguments of `StarFlow`, with the names of the published constructor.

    Attributes:
        in_channels, img_size, patch_size: of the latents; `img_size` is their height and width, where none is given.
        channels, num_blocks, layers_per_block: width and depth; one number of layers serves all blocks, and 0 leaves one out.
        head_dim, num_heads, num_kv_heads: of attention; fewer key-value heads than heads are shared by groups of heads.
        rope, hf_style_rope, pt_seq_len: rotary positions (with halves of a head as pairs), and the side that places are scaled to; without
            `rope` places have embeddings, and the latents are of `img_size`.
        sos: a start embedding is read before the first patch; without it the first patch is that of the noise.
        txt_size, txt_dim, cond_top_only: length and width of the text, and whether only the deep block, the last, sees it.
        use_softplus: scales are softplus(a + c), with 1 at a = 0, in place of exp(a).
        use_swiglu, use_bias, use_qk_norm, use_post_norm, use_final_norm, norm_type: of the transformers; "layer_norm" or "rms_norm".
        use_pretrained_lm, top_block_channels: the shape of the deep block: of "gemma3_4b", "gemma3_1b" or "gemma2_2b", with 1-D rotary
            positions; or of this width.
        soft_clip: bound of a and b, by tanh; 0 for none.
        seq_order: "R2L" or "L2R", the order of the patches in the first block; every second block has the other.
        temporal_causal, shallow_block_local: of video: turn the order within frames, not over time, and let the shallow blocks see single frames.
        local_attn_window: frames that a video is decoded over at a time, see `StarFlow.system`.
        learnable_self_denoiser, conditional_denoiser, denoiser_window: a learned denoiser, whether it sees the text, and the frames it sees.
        noise_std: standard deviation of the noise of training, for `denoise=True`; not in the published constructor.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: one is out of its range, or some contradict one another.
    """

    kind = "StarFlow"
    needed = ()

    in_channels: int
    img_size: int
    patch_size: int
    channels: int
    num_blocks: int
    layers_per_block: tuple[int, ...]
    head_dim: int = 64
    num_heads: int | None = None
    num_kv_heads: int | None = None
    rope: bool = False
    pt_seq_len: int | None = None
    sos: bool = False
    txt_size: int = 0
    txt_dim: int = 0
    cond_top_only: bool = False
    use_softplus: bool = False
    use_swiglu: bool = False
    use_bias: bool = True
    use_qk_norm: bool = False
    use_post_norm: bool = False
    use_final_norm: bool = False
    hf_style_rope: bool = False
    norm_type: str = "layer_norm"
    use_pretrained_lm: str | None = None
    soft_clip: float = 0.0
    seq_order: str = "R2L"
    learnable_self_denoiser: bool = False
    conditional_denoiser: bool = False
    temporal_causal: int = 0
    top_block_channels: int | None = None
    shallow_block_local: bool = False
    denoiser_window: int | None = None
    local_attn_window: int | None = None
    noise_std: float | None = None

    def __post_init__(self) -> None:
        check_at_least_one("num_blocks", self.num_blocks)
        layers = self.layers_per_block
        layers = tuple(layers) if isinstance(layers, (list, tuple)) else (layers,)
        object.__setattr__(self, "layers_per_block", layers * self.num_blocks if len(layers) == 1 else layers)
        for field in fields(self):
            self._check(field.name, field.type, getattr(self, field.name))
        if len(self.layers_per_block) != self.num_blocks or not self.layers_per_block[-1]:
            raise ValueError(
                f"layers_per_block is {layers}, expected one number or {self.num_blocks}, the last of them not 0"
            )
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected one of {', '.join(map(repr, known))}")
        for wrong, message in self._contradictions():
            if wrong:
                raise ValueError(f"{message}: change one of them")

    @classmethod
    def read_off(cls, state: Mapping[str, Tensor], given: Mapping[str, Any]) -> dict[str, Any]:
        """Nothing: heads, orders and bounds leave no trace."""
        left_out = [f.name for f in fields(cls) if f.default is MISSING and f.name not in given]
        if left_out:
            raise ValueError(
                f"its weights do not tell {', '.join(left_out)} and others: pass the arguments that it was built with, once: a folder that "
                "save_pretrained wrote has them"
            )
        layers = given["layers_per_block"]
        counts = given["num_blocks"], *(layers if isinstance(layers, (list, tuple)) else [layers])
        if any(isinstance(count, int) and count > len(state) for count in counts):  # before any of them is made
            raise ValueError(f"it holds {len(state)} tensors, fewer than there are layers in this configuration")
        return {}

    def _check(self, name: str, kind: Any, value: Any) -> None:
        if name == "layers_per_block":
            for number in value:
                if number != 0:  # a block that is left out
                    check_at_least_one(name, number)
        elif kind is bool:
            if value not in (0, 1):
                raise TypeError(f"{name} is {value!r}, expected True or False")
            object.__setattr__(self, name, bool(value))
        elif kind in (int, int | None) and value is not None and not (value == 0 and name in _MAY_BE_0):
            check_at_least_one(name, value)
        elif kind in (float, float | None) and value is not None:
            check_kind(name, value, Real, "a number")
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} is {value}, expected a finite number >= 0")

    def _contradictions(self) -> list[tuple[bool, str]]:
        least = 16 if self.txt_size else 4
        groups = any(s.num_heads % s.num_kv_heads for s in (self.shape(False), self.shape(True)))
        windowed = self.local_attn_window is not None
        return [
            (self.img_size % self.patch_size > 0, "img_size is no multiple of patch_size"),
            (groups, "num_heads is no multiple of num_kv_heads"),
            (self.rope and self.head_dim % 4 + (self.head_dim < least) > 0, f"rope needs head_dim of 4 n >= {least}"),
            (self.txt_dim > 0 and not self.txt_size, "txt_dim needs txt_size"),
            (self.cond_top_only and not self.txt_size, "cond_top_only needs txt_size"),
            (self.shallow_block_local and not self.cond_top_only, "shallow_block_local needs cond_top_only"),
            (windowed and not self.shallow_block_local, "local_attn_window needs shallow_block_local"),
            (self.temporal_causal > 0 and self.seq_order != "L2R", "temporal_causal needs seq_order='L2R'"),
        ]

    def shape(self, deep: bool) -> Shape:
        """Of the transformer of the deep block, or of the others."""
        channels = (self.top_block_channels if deep else None) or self.channels
        heads = self.num_heads or channels // self.head_dim
        shape = Shape(
            channels,
            self.head_dim,
            heads,
            self.num_kv_heads or heads,
            **{name: getattr(self, name) for name in Shape._fields[4:11]},
        )
        return (
            shape._replace(**LANGUAGE_MODELS[self.use_pretrained_lm][1]) if deep and self.use_pretrained_lm else shape
        )

    def layers(self, block: int) -> int:
        """Transformer layers of a block."""
        deep = block == self.num_blocks - 1
        return (
            LANGUAGE_MODELS[self.use_pretrained_lm][0]
            if deep and self.use_pretrained_lm
            else self.layers_per_block[block]
        )
