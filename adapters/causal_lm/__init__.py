"""Causal language models of transformers: `model.generate(**inputs, custom_generate=parallel_generate)`."""

from parallel_decode.adapters.causal_lm.adaptive import Adaptive
from parallel_decode.adapters.causal_lm.generate import parallel_generate
from parallel_decode.adapters.causal_lm.system import CausalLM
from parallel_decode.tokens.choices import Choice, Greedy, Gumbel, Maximal, Speculative
from parallel_decode.tokens.guesses import Draft, Guess, Last, NGram, Repeat

__all__ = [
    "Adaptive",
    "CausalLM",
    "Choice",
    "Draft",
    "Greedy",
    "Guess",
    "Gumbel",
    "Last",
    "Maximal",
    "NGram",
    "Repeat",
    "Speculative",
    "parallel_generate",
]
