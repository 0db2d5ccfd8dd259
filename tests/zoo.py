"""Tiny random models of every decoder architecture of the installed transformers, those that also read images among them (with text alone).

A configuration is made small by the names of its fields: widths, numbers of layers and heads, experts. What does not build that way is listed with the
reason in `NOT_BUILT`; nothing is left out silently.
"""

import sys
import warnings
from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

import torch
import transformers
from packaging import version
from torch import Tensor
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

import parallel_decode as pd
from parallel_decode.adapters.causal_lm import cache, parallel_generate, tuner

MADE_FOR = version.parse("5.24.0")
V, NEW = 64, 40
cache.SMALL = 1024  # the caches of these models too go from concatenating to storage as a text grows
VALUES: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 32,
    "n_embd": 32,
    "d_model": 32,
    "dim": 32,
    "embedding_size": 32,
    "emb_dim": 32,
    "intermediate_size": 48,
    "ffn_dim": 48,
    "ffn_hidden_size": 48,
    "decoder_ffn_dim": 48,
    "encoder_ffn_dim": 48,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "num_hidden_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "num_layers": 2,
    "decoder_layers": 2,
    "encoder_layers": 2,
    "num_decoder_layers": 2,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
    "n_positions": 128,
    "max_seq_len": 128,
    "max_target_positions": 128,
    "initializer_range": 0.3,
    "init_std": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "sliding_window": 9,
    "is_decoder": True,
    "use_cache": True,
}


MLA = "axk2 deepseek_v2 deepseek_v3 deepseek_v32 glm4_moe_lite glm_moe_dsa longcat_flash minicpm3 youtu"
LINEAR = "qwen3_5_moe_text qwen3_5_text qwen3_next"
GEMMA = {
    "layer_types": ["sliding_attention", "full_attention"],
    "hidden_size_per_layer_input": 0,
    "num_kv_shared_layers": 0,
}
MROPE = "qwen2_vl_text qwen2_5_vl_text glm4v_text paddleocr_vl_text glm_ocr_text"
MORE: dict[str, dict[str, Any]] = {
    **{
        name: {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
        for name in MROPE.split()
    },
    **{name: {"num_key_value_heads": 4} for name in MLA.split()},
    **{name: {"layer_types": ["linear_attention", "full_attention"]} for name in LINEAR.split()},
    "axk1": {"num_key_value_heads": 4, "n_group": 1, "topk_group": 1},
    "bailing_hybrid": {"num_key_value_heads": 4, "layer_types": ["linear_attention", "full_attention"]},
    "kimi_linear": {"num_key_value_heads": 4, "layer_types": ["linear_attention", "full_attention"]},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1},
    "bamba": {"mamba_n_heads": 4, "mamba_d_head": 16, "attn_layer_indices": [1]},
    "codegen": {"rotary_dim": 4},
    "dots1": {"n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "falcon": {"head_dim": ...},
    "gemma3n_text": {
        **GEMMA,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 8,
        "altup_num_inputs": 2,
        "activation_sparsity_pattern": [0.0, 0.0],
    },
    "gemma4_text": {**GEMMA, "head_dim": ...},
    "gemma4_unified_text": {**GEMMA, "head_dim": ...},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 9},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {"mamba_n_heads": 4, "mamba_d_head": 16, "layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2, "mamba_dt_rank": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "prophetnet": {"num_hidden_layers": ..., "num_decoder_layers": 2, "num_encoder_layers": 2},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "attention_window_size": 9},
    "reformer": {
        "axial_pos_embds": False,
        "attn_layers": ["local", "lsh"],
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
    },
    "roc_bert": {"pronunciation_vocab_size": 16, "shape_vocab_size": 16},
    "xlnet": {"max_position_embeddings": ...},
    "zaya": {"num_experts_per_tok": 1},
}


NOT_BUILT = {
    "blt": "reads bytes in patches by a model of its own",
    **dict.fromkeys(
        ["dory", "inkling2_loop_text", "inkling2_text"], "`generate` itself fails on the small configuration"
    ),
    "cohere_compass_text": "its configuration does not build with its own defaults",
    "dbrx": "its configuration does not build with its own defaults",
    "gemma3n": "needs timm",
    "gemma4_assistant": "drafts for another model, from its hidden states",
    "gemma4_unified_assistant": "drafts for another model, from its hidden states",
    "musicgen": "several codebooks of audio",
    "musicgen_melody": "several codebooks of audio",
    "qwen4_exp": "no small configuration was found",
    "qwen4_exp_text": "no small configuration was found",
    "xlstm": "no small configuration was found; it has a state that cannot be rewound",
    "zamba": "no small configuration was found; it has a state that cannot be rewound",
    "zamba2": "no small configuration was found; it has a state that cannot be rewound",
}


IMAGES_NOT_BUILT = """apertus1p5 blip blip-2 chameleon cohere_compass cosmos3_edge deepseek_ocr2 diffusion_gemma ernie4_5_vl_moe fast_vlm florence2 glm4v_moe glm5_next
glmga granite4_vision granite_docling hunyuan_vl hy_v4_vl idefics inkling2 inkling2_loop instructblip instructblipvideo kosmos-2 mistral4 mistral_large4 molmo2 muse_spark
nemotron_h_omni perception_lm pi0 pix2struct pp_formulanet qwen2_5_omni_thinker qwen3_omni_moe_thinker udop unlimited_ocr vision-encoder-decoder"""
NOT_BUILT |= dict.fromkeys(IMAGES_NOT_BUILT.split(), "needs images, or a configuration of its own")


def classes() -> dict[str, str]:
    """Names of model classes, by type."""
    images = {
        name: made if isinstance(made, str) else made[0]
        for name, made in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.items()
    }
    return images | dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def names() -> list[str]:
    """The model types that are built."""
    return sorted(name for name in classes() if name not in NOT_BUILT)


def small(config_class: Any) -> Any:
    """A configuration of a class with small values wherever it has the fields."""
    default = config_class()
    more = MORE.get(config_class.model_type, {})
    values = {name: value for name, value in VALUES.items() if name not in more and _has(default, name)}
    for name, part in getattr(config_class, "sub_configs", {}).items():
        if getattr(default, name, None) is not None and part is not None:
            values[name] = small(type(getattr(default, name))).to_dict()
    return config_class(**values | {name: value for name, value in more.items() if value is not ...})


def _has(config: Any, name: str) -> bool:
    try:
        return hasattr(config, name)
    except Exception:  # noqa: BLE001 - values that differ from layer to layer
        return False


def build(name: str) -> Any:
    """A model of a type, in evaluation mode."""
    torch.manual_seed(0)
    model_class = getattr(transformers, classes()[name])
    return model_class(small(model_class.config_class)).eval()


def prompts(batch: int, least: int = 3, vocabulary: int = V) -> dict[str, Tensor]:
    """Prompts of 12 tokens and fewer, with something to look up, padded on the left."""
    ids = torch.randint(least, vocabulary, (batch, 12), generator=torch.Generator().manual_seed(1))
    ids[:, 6:] = ids[:, :6]
    mask = torch.ones_like(ids)
    for row in range(batch):
        mask[row, : 3 * row] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def wrong(text: Sequence[int], most: int) -> Sequence[int]:
    """Drafts that are as good as never right."""
    return [3 + (7 * len(text) + i) % (V - 3) for i in range(most)]


OWN: dict[str, dict[str, Any]] = {
    "auto": {"schedule": "auto"},
    "jacobi": {"schedule": "jacobi", "guess": "last"},
    "sliding": {"schedule": pd.Sliding(6, per_row=True)},
    "wrong drafts": {"schedule": pd.Sliding(5, per_row=True), "guess": wrong},
}
HOW: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 0.8, "top_k": 0},
}


def differences(model: Any) -> list[str]:
    """Where a model's text is another than that of `generate`, over batches, choices and schedules.

    Raises:
        NotImplementedError: it is refused.
    """
    found = []
    for batch in (1, 3):
        for how, settings in HOW.items():
            options = {**prompts(batch), **settings, "max_new_tokens": NEW, "pad_token_id": 0}
            torch.manual_seed(5)
            expected = model.generate(**options)
            for name, own in OWN.items():
                torch.manual_seed(5)
                with patch.object(tuner, "CHECK", 0.0):  # "auto" checks a model in the middle of its first text
                    text = model.generate(**options, custom_generate=parallel_generate, **own)
                if text.shape != expected.shape or not bool((text == expected).all()):
                    found.append(f"batch {batch}, {how}, {name}")
    return found


def outcome(name: str) -> tuple[str, str]:
    """What becomes of a type: "equal", "in step" (rows of a batch wait for the slowest), "one by one", "refused" or "OTHER TEXT", and why."""
    model = build(name)
    try:
        model.generate(**prompts(3), max_new_tokens=2, pad_token_id=0, do_sample=False)
    except Exception as error:  # noqa: BLE001 - that is the answer
        return "generate itself fails", f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found = differences(model)
        except NotImplementedError as error:
            return "refused", str(error)
    if found:
        return "OTHER TEXT", "; ".join(found)
    reasons = [str(w.message) for w in caught if "one by one" in str(w.message)]
    if reasons:
        return "one by one", reasons[0]
    system = pd.adapters.causal_lm.CausalLM(model, prompts(3)["input_ids"], 4)  # type: ignore[attr-defined]
    return ("equal", "") if system.ragged else ("in step", system.trust.no_rows or "layers of a sliding window")


def table(outcomes: dict[str, tuple[str, str]]) -> str:
    """Markdown: what becomes of which types, and why."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, (what, why) in [*outcomes.items(), *((name, ("not tried", why)) for name, why in NOT_BUILT.items())]:
        groups.setdefault((what, _short(why)), []).append(name)
    lines = ["| | why | model types |", "|---|---|---|"]
    lines += [f"| {what} | {why} | {', '.join(members)} |" for (what, why), members in sorted(groups.items())]
    return "\n".join(lines)


def _short(why: str) -> str:
    """A reason without names and numbers."""
    for part in (
        "keeps a state that cannot be rewound",
        "cannot be rewound",
        "has no key-value cache",
        "could not read a window",
        "gives other scores for a window",
        "counts the columns of its cache, or ignores position_ids",
        "measures distances in columns",
        "sliding window",
        "has an encoder",
    ):
        if part in why:
            return part
    return why


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    found = {}
    for name in names():
        found[name] = outcome(name)
        print(name, *found[name], sep=" | ", file=sys.stderr, flush=True)
    print(table(found))
