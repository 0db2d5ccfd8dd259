"""Causal language models of transformers: `model.generate(**inputs, custom_generate=parallel_generate)`."""

from parallel_decode.adapters.causal_lm.adaptive import Adaptive
from parallel_decode.adapters.causal_lm.generate import parallel_generate
from parallel_decode.adapters.causal_lm.system import CausalLM
from parallel_decode.tokens import Guess, NGram

__all__ = ["Adaptive", "CausalLM", "Guess", "NGram", "parallel_generate"]
