"""A model is checked before it is trusted: whether windows over its cache give the scores of one token at a time.

The check is four forwards over a few tokens of the user's own prompt, once for a model on a machine: other processes recall what it said. It may come in the
middle of a text. What a short prompt cannot show is read off the configuration.
"""

import hashlib
import inspect
import re
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from transformers import DynamicCache

from parallel_decode import _disk_cache
from parallel_decode._fingerprint import fingerprint
from parallel_decode.adapters.causal_lm.cache import Slots
from parallel_decode.adapters.causal_lm.prompt import Prompt
from parallel_decode.adapters.causal_lm.reader import Reader

KIND = "model_checks"  # of what is kept for other processes
TOKENS = 12  # of the check's prompt
BEHIND = 4  # columns by which one row is behind the other
# Of the scores' standard deviation, by the type that is computed in.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.05}
PRECISION = {"highest": 0.0, "high": 0.01, "medium": 0.05}  # by `torch.get_float32_matmul_precision()`
OWN = (
    "torch.nn.modules.",
    "transformers.activations.",
    "transformers.models.",
)  # modules that their versions tell all about
DISTANCE = re.compile("window|chunk|local|span|block_size|floor_scale")  # settings that are a number of columns


class Trust(NamedTuple):
    """What a model cannot do, and why; empty for what it can.

    Attributes:
        no_windows: why it cannot read several tokens at once.
        no_rows: why it cannot read each row of a batch at a column of its own.
        until: the number of columns within which windows have to stay, if there is one; `no_rows` says why.
        error: what a check raised, where no window could be read at all; `no_windows` says so too.
    """

    no_windows: str = ""
    no_rows: str = ""
    until: int | None = None
    error: Exception | None = None

    def or_refuse(self) -> "Trust":
        """The same; raises what the check raised."""
        if self.error is not None:
            raise self.error
        return self


def settings(model: Any, columns: int, shortest: int) -> Trust:
    """What a model's settings say about a text.

    Args:
        model: of transformers.
        columns: of prompt and continuation.
        shortest: tokens of the shortest prompt.
    """
    config = model.config.get_text_config(decoder=True)
    rotary = list(_rotary(getattr(config, "rope_parameters", None)))
    limit = getattr(config, "max_position_embeddings", None) or columns + 2
    for rope in rotary:
        bound = rope.get("original_max_position_embeddings") or limit
        if rope.get("rope_type") == "longrope" and shortest <= bound + 1 and columns > bound:
            return Trust(no_rows=f"the rotary embedding (longrope) changes at {bound} tokens", until=bound)
        if "dynamic" in str(rope.get("rope_type")) and columns > (bound := min(bound, limit)):
            reason = f"the rotary embedding (dynamic NTK) changes with every token beyond {bound}"
            return Trust(no_rows=reason, until=bound - 1)  # a forward that is shorter than the bound puts it back
    if not rotary and columns > limit - 2:
        return Trust(no_rows=f"the model has {limit} positions", until=limit - 2)
    full = set(getattr(config, "layer_types", None) or ["unknown"]) == {"full_attention"}
    for name, value in vars(config).items():
        distance = DISTANCE.search(name) and not re.search("layers|expert|pattern", name) and type(value) is int
        if distance and 0 < value < columns and (name == "floor_scale" or not full):
            return Trust(no_rows=f"the model measures distances in columns of its cache ({name} = {value})")
    return Trust()


def _rotary(parameters: Any) -> Iterator[dict[str, Any]]:
    if isinstance(parameters, dict):
        if "rope_type" in parameters:
            yield parameters
        for value in parameters.values():
            yield from _rotary(value)


def hooked(model: Any) -> bool:
    """Whether there are hooks: they may know the rows of the batch, as those of PEFT's `adapter_names` do."""
    return any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


_KNOWN: "weakref.WeakKeyDictionary[Any, dict[Any, Trust | None]]" = weakref.WeakKeyDictionary()  # None: not checked


class ModelCheck:
    """A check of a model, made or to be made.

    Args:
        model: of transformers.
        prompt: whose tokens are used.
        extra: further arguments of every forward.
        padded: whether there is padding, as in the prompt if None: without it models take other ways (no mask, another attention).

    Attributes:
        configuration: of the model, written out.
        built_in: whether there are no hooks, and no modules and forwards but those of torch and transformers: what they keep of a text is known.
    """

    def __init__(self, model: Any, prompt: Prompt, extra: dict[str, Any], padded: bool | None = None) -> None:
        self.model, self.prompt, self.extra = model, prompt, extra
        self.padded = prompt.padded if padded is None else padded
        self.batch = len(prompt.ids) if hooked(model) else 0
        modules = tuple(
            (type(m), tuple(m._forward_pre_hooks), tuple(m._forward_hooks), id(vars(m).get("forward")))
            for m in model.modules()
        )
        prepare = model.prepare_inputs_for_generation  # PEFT puts its own in place
        prepare = getattr(prepare, "__module__", ""), getattr(prepare, "__qualname__", repr(type(prepare)))
        precision = _computes_in(model), torch.get_float32_matmul_precision()
        self.configuration = _described(model.config)
        how = self.configuration, model.training, *precision, model.device, repr(sorted(extra.items()))
        self._result: Trust | None = None
        self._key, self._how = (modules, prepare, how, self.batch, self.padded), (prepare, how, self.padded)

    @cached_property
    def fingerprint(self) -> str:
        """Of the weights."""
        return fingerprint(self.model)

    @cached_property
    def built_in(self) -> bool:
        return _built_in(self.model)

    @cached_property
    def _name(self) -> str | None:
        """What another process knows this model by; None where it could be another there."""
        model = self.model
        weights = model.state_dict(keep_vars=True).values()
        if not self.built_in or any(type(weight) not in (torch.nn.Parameter, Tensor) for weight in weights):
            return None
        kinds = {type(module) for module in model.modules()}
        forwards = sorted((kind.__qualname__, inspect.unwrap(kind.forward).__code__.co_code) for kind in kinds)
        where = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else ""
        versions = torch.__version__, transformers.__version__, _source()
        return repr((*versions, where, forwards, self.fingerprint, self._how))

    @property
    def recalled(self) -> Trust | None:
        """What a check of the same model said before, in this process or another; None if there was none."""
        known = _KNOWN.setdefault(self.model, {})
        if self._key not in known:
            known[self._key] = None if self._name is None else _recalled(self._name)
        return known[self._key]

    def result(self) -> Trust:
        """What it says, or said before."""
        if self._result is None:
            self._result = self.recalled or self._make()
        return self._result

    def _make(self) -> Trust:
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices, enabled=self.model.training), _unchanged(self.model):
            found = _check(self.model, self.prompt, self.extra, self.batch, self.padded)  # dropout draws
        if self._name is not None and not found.no_windows:  # that may come of broken weights
            _disk_cache.remember(KIND, self._name, found[:3])
        if found.error is None:
            _KNOWN[self.model][self._key] = found
        return found


@contextmanager
def _unchanged(model: Any) -> Iterator[None]:
    """Put back what forwards set: some models keep something of the prompt for the tokens after it."""
    parts = [part for module in model.modules() for part in (vars(module), module._buffers)]
    before = [dict(part) for part in parts]
    try:
        yield
    finally:
        for part, old in zip(parts, before, strict=True):
            part.update(old)
            for name in part.keys() - old.keys():
                del part[name]


def _described(config: Any) -> str:
    """All settings, those of the attention's kernels among them, which are no part of the JSON."""
    parts = [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", {}))]
    return f"{config.to_json_string(use_diff=False)} {[getattr(part, '_attn_implementation', None) for part in parts]}"


def _built_in(model: Any) -> bool:
    for module in model.modules():
        if module._forward_pre_hooks or module._forward_hooks or "forward" in vars(module):
            return False
    for kind in {type(module) for module in model.modules()}:
        if not f"{kind.__module__}.".startswith(OWN) or not hasattr(inspect.unwrap(kind.forward), "__code__"):
            return False
    return True


@cache
def _source() -> str:
    """A hash of what checks models."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _recalled(name: str) -> Trust | None:
    match _disk_cache.recall(KIND, name):
        case [str(no_windows), str(no_rows), None]:
            return Trust(no_windows, no_rows)
    return None


@torch.no_grad()
def _check(model: Any, prompt: Prompt, extra: dict[str, Any], batch: int, padded: bool) -> Trust:
    name, close = type(model).__name__, partial(_close, dtype=_computes_in(model))
    tokens = _tokens(model, prompt)
    columns, device = len(tokens), prompt.ids.device
    ends = tokens[-BEHIND:] if not padded else [prompt.pad(model.config)] * BEHIND
    ids = torch.tensor([tokens, ends + tokens[:-BEHIND]], device=device)
    mask = torch.ones_like(ids)
    mask[1, :BEHIND] = 0 if padded else 1
    if batch:
        ids, mask = ids[:1].repeat(batch, 1), mask[:1].repeat(batch, 1)
    layout = Prompt(ids, BEHIND, mask, None, tuple(prompt.zeros))
    slots = Slots(DynamicCache(config=model.config), len(ids), columns)
    reader = Reader(model, layout, slots, extra)
    wrong = ids[:, :BEHIND].flip(1)  # drafts that nobody believes
    try:
        expected = reader.read(wrong, 0, columns, BEHIND + 1)
        if slots.aligned:
            reader = Reader(model, layout, slots := Slots(DynamicCache(config=model.config), len(ids), columns), extra)
            reader.read(wrong, 0, columns - BEHIND - 1, 1)
            slots.record()
            reader.read(wrong, columns - BEHIND - 1, BEHIND + 1, 1)
        found = reader.read(wrong, columns - 2, 2 + BEHIND, 2 + BEHIND)[:, :2]
        if not close(found, expected[:, -2:]):
            mode = " (it is in training mode: call model.eval())" if model.training else ""
            return Trust(f"{name} gives other scores for a window of tokens than for one token after the other{mode}")
        if not close(reader.read(wrong, columns - 1, 1, 1), expected[:, -1:]):
            return Trust(f"{name} gives other scores for a token alone than for the same one among others")
        if batch:
            return Trust(no_rows="the model has hooks, which may know the rows of the batch")
        if slots.aligned:
            return Trust()
        slots.spread()
        found = reader.read(wrong, torch.tensor([columns - 1, columns - 1 - BEHIND]), BEHIND + 1, BEHIND + 1)
        same = close(found[0, 0], expected[0, -1]) and close(found[1], expected[1])
    except (NotImplementedError, torch.OutOfMemoryError) as error:
        return Trust(str(error) or type(error).__name__, error=error)
    except Exception as error:  # noqa: BLE001 - whatever a model may raise
        why = f"{name} could not read a window of tokens over its cache ({type(error).__name__}: {error}); use generate without custom_generate"
        refused = NotImplementedError(why)
        refused.__cause__ = error
        return Trust(why, error=refused)
    return Trust() if same else Trust(no_rows="the model counts the columns of its cache, or ignores position_ids")


def _tokens(model: Any, prompt: Prompt) -> list[int]:
    """Different tokens, of the prompt first: among equal ones no mistake would be seen."""
    configs = vars(model.config) | vars(model.config.get_text_config(decoder=True))
    special = {value for name, value in configs.items() if "token" in name and type(value) is int}
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    others = (number for start in range(37) for number in range(start, vocabulary, 37) if number not in special)
    own = dict.fromkeys(max(prompt.tokens(), key=len, default=[])[: 2 * TOKENS])
    found = [*own, *islice((number for number in others if number not in own), TOKENS)]
    return (found * TOKENS)[:TOKENS]


def _computes_in(model: Any) -> torch.dtype:
    device = model.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else model.dtype


def _close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Whether scores are the same but for rounding."""
    tolerance = max(TOLERANCE.get(dtype, 0.05), PRECISION[torch.get_float32_matmul_precision()])
    real = expected.abs() < 1e4  # some models mask a part of their vocabulary
    found, expected = found[real], expected[real]
    return len(found) > 1 and bool((found - expected).square().mean().sqrt() <= tolerance * expected.std())
