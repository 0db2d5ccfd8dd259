"""LlamaGen's state dict (github.com/FoundationVision/LlamaGen, autoregressive/models/gpt.py) as one of transformers' Llama.

Shapes: D channels, H query heads and K key heads of h channels, V codes.
"""

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig

from parallel_decode._options import check_at_least_one
from parallel_decode._weight_files import check_state

NAMES = {
    "tok_embeddings": "model.embed_tokens",
    "cls_embedding.embedding_table": "classes",
    "norm": "model.norm",
    "output": "lm_head",
    "attention.wo": "self_attn.o_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}
LAYER = ("attention.wqkv", *(name for name in NAMES if name.startswith(("attention", "ffn", "feed"))))
REST = tuple(name for name in NAMES if name not in LAYER)


def renamed(state: Mapping[str, Tensor], head_dim: int, rows: int) -> tuple[LlamaConfig, dict[str, Tensor]]:
    """The configuration, and the weights by transformers' names.

    Args:
        state: LlamaGen's.
        head_dim: h.
        rows: of the square grid.

    Raises:
        TypeError: `head_dim` is no whole number.
        ValueError: names, types or shapes are not those of a class-conditional LlamaGen.
    """
    check_at_least_one("head_dim", head_dim)
    if not isinstance(state, Mapping):
        raise ValueError(f"state is a {type(state).__name__}, expected names and tensors: pass the file's 'model'")  # noqa: TRY004
    layers = next(n for n in itertools.count() if f"layers.{n}.attention.wqkv.weight" not in state)
    expected = {f"{name}.weight" for name in REST}
    expected |= {f"layers.{layer}.{name}.weight" for layer in range(layers) for name in LAYER}
    if state.keys() != expected:
        missing = sorted(expected - state.keys())[:3]
        unknown = sorted(repr(name)[:60] for name in state.keys() - expected)[:3]
        raise ValueError(
            f"state is not of a class-conditional LlamaGen: missing {missing}, unknown {unknown}; pass the file's 'model'"
        )
    check_state(state, "state")
    wrong = [name for name, weight in state.items() if weight.dim() != (1 if "norm" in name else 2)]
    if wrong:
        raise ValueError(
            f"state holds {wrong[0]} of shape {tuple(state[wrong[0]].shape)}, expected norms (D,), else (out, in)"
        )
    codes, channels = state["tok_embeddings.weight"].shape
    if layers == 0 or channels % head_dim or head_dim % 4:
        raise ValueError(
            f"the model has {layers} layers of {channels} channels, expected a multiple of head_dim = {head_dim}"
        )
    heights = {len(state[f"layers.{layer}.attention.wqkv.weight"]) for layer in range(layers)}
    key_channels = max((max(heights) - channels) // 2, head_dim)
    if heights != {channels + 2 * key_channels} or key_channels % head_dim or channels % key_channels:
        raise ValueError(
            f"attention.wqkv has {sorted(heights)} outputs, expected {channels} of queries, and keys and values of whole heads"
        )
    sizes: dict[str, Any] = {
        "vocab_size": codes,
        "hidden_size": channels,
        "intermediate_size": len(state["layers.0.feed_forward.w1.weight"]),
        "num_hidden_layers": layers,
        "num_attention_heads": channels // head_dim,
        "num_key_value_heads": key_channels // head_dim,
        "num_classes": len(state["cls_embedding.embedding_table.weight"]) - 1,
        "rows": rows,
        "columns": rows,
    }
    weights = {f"{new}.weight": state[f"{old}.weight"] for old, new in NAMES.items() if old in REST}
    for layer in range(layers):
        before, after = f"layers.{layer}", f"model.layers.{layer}"
        for old in LAYER[1:]:
            weights[f"{after}.{NAMES[old]}.weight"] = state[f"{before}.{old}.weight"]
        q, k, v = torch.split(state[f"{before}.attention.wqkv.weight"], [channels, key_channels, key_channels])
        weights[f"{after}.self_attn.q_proj.weight"] = _halves(q, head_dim)
        weights[f"{after}.self_attn.k_proj.weight"] = _halves(k, head_dim)
        weights[f"{after}.self_attn.v_proj.weight"] = v
    return LlamaConfig(**sizes, rms_norm_eps=1e-5, bos_token_id=None, eos_token_id=None), weights


def _halves(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of each head (heads h, D) in another order: LlamaGen turns neighbouring channels against each other, transformers the two halves."""
    pairs = weight.reshape(-1, head_dim // 2, 2, weight.shape[1])
    return pairs.transpose(1, 2).reshape(weight.shape)
