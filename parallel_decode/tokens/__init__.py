"""What systems of tokens share, language models and others: choosing from scores, guessing ahead, and processors of logits on windows."""

from parallel_decode.tokens.choices import Choice, Greedy, Gumbel, Maximal, Speculative
from parallel_decode.tokens.drafting import Drafting, Outcome
from parallel_decode.tokens.guesses import Draft, Guess, Last, NGram, Repeat, as_guess
from parallel_decode.tokens.processors import Processors

__all__ = [
    "Choice",
    "Draft",
    "Drafting",
    "Greedy",
    "Guess",
    "Gumbel",
    "Last",
    "Maximal",
    "NGram",
    "Outcome",
    "Processors",
    "Repeat",
    "Speculative",
    "as_guess",
]
