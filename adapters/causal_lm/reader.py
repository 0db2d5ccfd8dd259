"""A model over a key-value cache: the logits of some columns, given those before.

Shapes: B batch rows, P columns of the prompt, L positions, n columns that are read, V tokens of the vocabulary.
"""

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, GenerationMixin

from parallel_decode.adapters.causal_lm.cache import NAME, Slots
from parallel_decode.adapters.causal_lm.prompt import Prompt


class Reader:
    """Forwards of a model, as `generate` makes them: through the model's own preparation of inputs, wherever all rows are at the same column.

    Args:
        model: of transformers.
        layout: what it reads.
        slots: what its cache holds.
        extra: further arguments of every forward.
        forwards: where they are counted, a list of one number.

    Attributes:
        used: whether there was a forward.
    """

    def __init__(
        self, model: Any, layout: Prompt, slots: Slots, extra: dict[str, Any], forwards: list[int] | None = None
    ) -> None:
        self.model, self.layout, self.slots, self.extra = model, layout, slots, extra
        self.forwards, self.used = forwards or [0], False
        self.numbered = "position_ids" in inspect.signature(model.forward).parameters
        self.keeps = model._supports_logits_to_keep()
        own = getattr(model.prepare_inputs_for_generation, "__func__", None)
        self.plain = own is GenerationMixin.prepare_inputs_for_generation and not slots.static

    def read(self, x: Tensor, first: int | Tensor, count: int, keep: int, going: Tensor | None = None) -> Tensor:
        """The last `keep` logits, shape (B, keep, V), float32.

        Args:
            x: tokens after the prompt, shape (B, L).
            first: the first column to be read; of each row, shape (B,) on the host, where the slots are spread.
            count: n.
            keep: how many logits are wanted.
            going: the rows that count, shape (B,) on the host; None for all.

        Raises:
            NotImplementedError: the model does not read what it is told to, or not into this cache.
        """
        self.slots.rewind(first)
        if isinstance(first, int):
            arguments = self._prepared(x, first, count, keep)
            own = [k for k, v in arguments.items() if isinstance(v, Cache) and v is not self.slots.cache]
            if own:
                raise NotImplementedError(
                    f"{type(self.model).__name__} reads a cache of its own ({', '.join(own)}), as soft prompts do; use generate without custom_generate"
                )
            if not any(value is self.slots.cache for value in arguments.values()):
                # Phi-3 wants all read anew once its rotary embedding changes.
                first, count = 0, first + count
                self.slots.rewind(0)
                arguments[NAME] = self.slots.cache
        else:
            arguments = self._gathered(x, first, count, keep, going)
        output = self.model(**arguments, return_dict=True)
        self.forwards[0] += 1
        logits: Tensor = output.logits[:, -keep:]
        first_time, self.used = not self.used and isinstance(first, int), True
        if logits.shape[1] < keep or (first_time and self.slots.held() != first + count):
            raise NotImplementedError(
                f"{type(self.model).__name__} read {count} columns after {first} and left {logits.shape[1]} logits and a cache of {self.slots.held()} "
                "columns: it has no key-value cache, or reads more than the prompt (soft prompts); use generate without custom_generate"
            )
        self.slots.append(first, count, going)
        return logits.to(dtype=torch.float32, device=x.device)

    def _prepared(self, x: Tensor, first: int, count: int, keep: int) -> dict[str, Any]:
        layout, end = self.layout, first + count
        if self.plain and first >= layout.columns:
            return self._continued(x, first, end, keep)
        arguments: dict[str, Any] = dict(self.extra)
        if self.numbered:
            arguments["position_ids"] = layout.position_ids[..., :end]
        if self.keeps:
            arguments["logits_to_keep"] = keep
        return self.model.prepare_inputs_for_generation(  # type: ignore[no-any-return]
            layout.text(x)[:, :end],
            next_sequence_length=count,
            attention_mask=layout.mask[:, :end] if layout.padded else None,
            is_first_iteration=first == 0,
            use_cache=True,
            **{NAME: self.slots.cache},
            **{name: value[:, :end] for name, value in layout.zeros.items()},
            **arguments,
        )

    def _continued(self, x: Tensor, first: int, end: int, keep: int) -> dict[str, Any]:
        """What the preparation that most models have makes of columns behind the prompt, in a quarter of its time."""
        layout = self.layout
        arguments = self.extra | {name: value[:, first:end] for name, value in layout.zeros.items()}
        if self.numbered:
            arguments["position_ids"] = layout.position_ids[..., first:end]
        if self.keeps:
            arguments["logits_to_keep"] = keep
        if layout.padded:
            arguments["attention_mask"] = layout.mask[:, :end]
        ids = x[:, first - layout.columns : end - layout.columns]
        return arguments | {"input_ids": ids, NAME: self.slots.cache, "use_cache": True}

    def _gathered(self, x: Tensor, first: Tensor, count: int, keep: int, going: Tensor | None) -> dict[str, Any]:
        layout, device = self.layout, x.device
        columns = first[:, None] + torch.arange(count)
        at = columns.to(device).clamp(0, layout.mask.shape[1] - 1)
        assert self.slots.columns is not None
        held = torch.cat([self.slots.columns, columns], 1).to(device)
        mask = (held >= 0).long() * layout.mask.gather(1, held.clamp(0, layout.mask.shape[1] - 1))
        arguments = self.extra | {name: value.gather(1, at) for name, value in layout.zeros.items()}
        if self.numbered:
            places = layout.position_ids
            arguments["position_ids"] = places.gather(-1, at.expand(*places.shape[:-1], count))
        if self.keeps:
            arguments["logits_to_keep"] = keep
        ids = layout.text(x).gather(1, at)
        return arguments | {
            "input_ids": ids,
            "attention_mask": mask,
            NAME: self.slots.cache,
            "use_cache": True,
        }
