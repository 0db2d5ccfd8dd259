"""Logits processors on a window of positions.

`generate` calls each processor once for a position, in order. On a window that is the same for processors that are functions of a
row's tokens and logits. Those that look at the logits alone take the whole window at once; others are called position by position; and whatever
is not known to be a function, having a state perhaps, asks for windows of one.

Shapes: B batch rows, S tokens of text, W positions of a window, V tokens of the vocabulary.
"""

from typing import Any

import torch
from torch import Tensor

ALONE = {  # functions of the logits
    "TemperatureLogitsWarper",
    "TopPLogitsWarper",
    "TopKLogitsWarper",
    "TopHLogitsWarper",
    "MinPLogitsWarper",
    "TypicalLogitsWarper",
    "EpsilonLogitsWarper",
    "EtaLogitsWarper",
    "InfNanRemoveLogitsProcessor",
    "LogitNormalization",
    "SuppressTokensLogitsProcessor",
}
OF_TEXT = {  # and of the row's tokens before
    "MinLengthLogitsProcessor",
    "MinNewTokensLengthLogitsProcessor",
    "RepetitionPenaltyLogitsProcessor",
    "NoRepeatNGramLogitsProcessor",
    "SequenceBiasLogitsProcessor",
    "NoBadWordsLogitsProcessor",
    "ForcedBOSTokenLogitsProcessor",
    "ForcedEOSTokenLogitsProcessor",
    "ExponentialDecayLengthPenalty",
    "SuppressTokensAtBeginLogitsProcessor",
}
OF_ROW = {  # and of the row's number in the batch
    "PrefixConstrainedLogitsProcessor",
    "EncoderRepetitionPenaltyLogitsProcessor",
    "EncoderNoRepeatNGramLogitsProcessor",
}


def _kind(processor: Any) -> str:
    module = type(processor).__module__
    if hasattr(processor, "of_window"):
        return "of window"
    name = type(processor).__name__ if module.startswith("transformers.") else ""
    if isinstance(getattr(processor, "prompt_ignore_length", None), Tensor):  # one for each row
        return "of row"
    return "of text" if name not in ALONE | OF_ROW and getattr(processor, "is_pure", False) else name


class Processors:
    """A list of processors for windows.

    Attributes:
        unknown: names of those that are not known to be functions: windows of one position for all rows are what they get. One's own
            says that it is a function of a row's tokens and logits by an attribute `is_pure = True`; one with a method `of_window`, of logits and the lengths
            before them, gets whole windows.
        lockstep: whether they want all rows at the same position.
    """

    def __init__(self, processors: Any) -> None:
        self.processors = list(processors or ())
        self.kinds = [_kind(processor) for processor in self.processors]
        known = ALONE | OF_TEXT | OF_ROW | {"of window", "of text", "of row"}
        self.unknown = [
            type(p).__name__ for p, kind in zip(self.processors, self.kinds, strict=True) if kind not in known
        ]
        self.lockstep = bool(self.unknown) or any(kind in OF_ROW | {"of row"} for kind in self.kinds)

    def __call__(self, text: Tensor, logits: Tensor, lengths: Tensor) -> tuple[Tensor, int]:
        """Scores, shape (B, W, V), and how many positions of the window have them.

        A processor may fail on a text that cannot be, and drafts make such texts: where one fails after drafts, the window ends there.
        What it raises after no draft, at the first position, goes to the caller.

        Args:
            text: tokens, shape (B, S).
            logits: float32, shape (B, W, V).
            lengths: how many tokens are before each position, shape (B, W), on the host.
        """
        whole = logits
        for processor, kind in zip(self.processors, self.kinds, strict=True):
            if kind in ALONE:
                flat = logits.flatten(0, 1)
                logits = processor(text[:, :1].repeat_interleave(logits.shape[1], 0), flat).view_as(logits)
                continue
            if kind == "of window":
                logits = processor.of_window(logits, lengths[:, : logits.shape[1]])
                continue
            columns: list[Tensor] = []
            for position in range(logits.shape[1]):
                try:
                    columns.append(_at(processor, text, logits[:, position], lengths[:, position]))
                except Exception:
                    if not position:
                        raise
                    break
            logits = torch.stack(columns, 1)
        count = logits.shape[1]
        return (logits if count == whole.shape[1] else torch.cat([logits, whole[:, count:]], 1)), count


def _at(processor: Any, text: Tensor, logits: Tensor, before: Tensor) -> Tensor:
    """What a processor makes of logits (B, V) after so many tokens of each row."""
    if bool((before == before[0]).all()):
        return processor(text[:, : int(before[0])], logits)  # type: ignore[no-any-return]
    each = zip(text, before.tolist(), logits, strict=True)
    return torch.cat([processor(line[None, :count], scores[None]) for line, count, scores in each])
