"""What is measured: the methods by name, on whole flows and on single blocks.

Shapes: B batch, L positions, D values of a position.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import parallel_decode as pd
from parallel_decode.adapters.tarflow.base import Flow
from parallel_decode.adapters.tarflow.bench import rules
from parallel_decode.adapters.tarflow.bench.measure import (
    Case,
    Method,
    Outcome,
    Timing,
    deviations,
    interleave,
    peak_memory,
    precision,
    row,
    short,
)

BASELINE, APPLE, COMPILED = "sequential", "Apple's sampler", ", compiled"
WIDTHS = (8, 16, 32, 64, 128)


@dataclass(frozen=True)
class Setting:
    """How to measure.

    Attributes:
        batch: B.
        dtype: see `precision`.
        seed: of z.
        tol: see `pd.solve`; None is its default, and under bfloat16 or float16 half the machine epsilon of that type.
        runs, budget, deadline: see `interleave`.
        memory: run everything once more for its peak memory.
        notify: called with a line of text now and then.
    """

    batch: int
    dtype: str = "float32"
    seed: int = 0
    tol: float | None = None
    runs: int = 7
    budget: float | None = None
    deadline: float | None = None
    memory: bool = False
    notify: Callable[[str], None] = lambda message: None

    def noise(self, flow: Flow) -> tuple[Tensor, Tensor | None]:
        """z, and what is drawn: classes, shape (B,), all in turn, or noise for texts; None where a flow is conditioned on nothing."""
        generator, like = torch.Generator().manual_seed(self.seed), flow.noise_like
        z = torch.randn(self.batch, *like.shape, generator=generator)
        return z.to(like), flow.conditions(self.batch, generator).get(flow.condition)

    def time(self, flow: Flow, cases: Mapping[str, Case], baseline: str) -> dict[str, Timing]:
        """The cases interleaved, each entering the precision anew, as a user's call would."""

        def cast(case: Case) -> Outcome:
            with precision(self.dtype, flow.noise_like.device):
                return case()

        return interleave(
            {name: partial(cast, case) for name, case in cases.items()},
            baseline=baseline,
            runs=self.runs,
            budget=self.budget,
            deadline=self.deadline,
            notify=self.notify,
        )

    @property
    def tolerance(self) -> float | None:
        """What `pd.solve` is given."""
        half = self.dtype in ("bfloat16", "float16")
        return torch.finfo(getattr(torch, self.dtype)).eps / 2 if half and self.tol is None else self.tol


def schedules(length: int) -> dict[str, pd.Schedule | pd.Selective]:
    """The library's schedules for L positions, by the name that the tables use.

    Example:
        >>> [name for name in schedules(16)]
        ['sequential', 'UJD (tau = 0.5)', 'UJD', 'SeJD (tau = 0.5)', 'SeJD', 'sliding 8', 'auto']
    """
    named: dict[str, pd.Schedule | pd.Selective] = {
        BASELINE: pd.Sequential(),
        "UJD (tau = 0.5)": pd.Jacobi(freeze=False, absolute=True, tol=0.5, start="zeros"),
        "UJD": pd.Jacobi(),
        "SeJD (tau = 0.5)": pd.Selective.sejd(),
        "SeJD": pd.Selective(),
    }
    return named | _widths(length)


def block_schedules(length: int) -> dict[str, pd.Schedule | pd.Selective]:
    """The same for one block alone: sequential, each fixed width up to all L positions, and "auto"."""
    return {BASELINE: pd.Sequential(), **_widths(length), f"sliding {length}": pd.Sliding(length)}


def _widths(length: int) -> dict[str, pd.Schedule | pd.Selective]:
    named: dict[str, pd.Schedule | pd.Selective] = {f"sliding {w}": pd.Sliding(w) for w in WIDTHS if w < length}
    return named | {"auto": pd.Auto()}


def methods(
    flow: Flow,
    tol: float | None = None,
    *,
    compiled: bool = False,
    segments: Sequence[int] = (8, 1),
    caps: Sequence[int] = (32, 10),
    window: int = 64,
) -> dict[str, Method]:
    """Ways to draw images from z by this library, and by the approximate rules of others over its systems.

    Args:
        flow: what to draw from.
        tol: see `pd.solve`; schedules that carry a tolerance keep it.
        compiled: add every schedule once more with `flow.system(..., compile=True)`.
        segments, caps: of GS-Jacobi, for each block in the order of generation; the last serves all that remain. The published
            lists are tuned for each model. The default is what they have in common: the hard block, here taken to be the
            first, in 8 segments of at most 32 sweeps, every other block in one of at most 10.
        window: positions of STARFlow's windows.

    Raises:
        ValueError: an option out of range.
    """
    length = max(flow.lengths)
    named: dict[str, Method] = {
        name: partial(_solved, flow, schedule, tol, {}) for name, schedule in schedules(length).items()
    }
    if compiled:
        options = {"compile": True}
        named |= {
            name + COMPILED: partial(_solved, flow, schedule, tol, options)
            for name, schedule in schedules(length).items()
        }
    pairs = list(zip(*spread(segments, caps), strict=True))
    approximate = {
        f"GS-Jacobi ({', '.join(f'{count} x {cap}' for count, cap in pairs)})": tuple(
            rules.GSJacobi(cap=cap, count=count) for count, cap in pairs
        ),
        f"STARFlow (window {window})": (rules.Starflow(width=window),),
    }
    for name, layers in approximate.items():
        for rule in layers:
            for one in flow.lengths:
                rule.segments(one)  # before the work: segments that do not divide
        named[name] = partial(_swept, flow, layers)
    return named


def choose(names: Sequence[str], wanted: str | None) -> list[str]:
    """The names that hold one of the parts in `wanted`, and the baseline; all of them where it is None.

    Raises:
        ValueError: a part that no name holds.

    Example:
        >>> choose(["sequential", "sliding 8", "auto", "auto, compiled"], "AUTO")
        ['sequential', 'auto', 'auto, compiled']
    """
    if wanted is None:
        return list(names)
    parts = [part.strip().lower() for part in wanted.split(",")]
    for part in parts:
        if not part or not any(part in name.lower() for name in names):
            raise ValueError(f"--methods has {part!r}, expected parts of these names: {'; '.join(names)}")
    return [name for name in names if name == BASELINE or any(part in name.lower() for part in parts)]


def block_names(flow: Flow, compiled: bool = False) -> list[str]:
    """What `blocks` can measure, by name."""
    names = list(block_schedules(max(flow.lengths)))
    return names + [name + COMPILED for name in names] * compiled


def spread(*lists: Sequence[int], depth: int | None = None) -> list[list[int]]:
    """Lists of options made equally long, or `depth` long, by repeating the last entry of each.

    Example:
        >>> spread((8, 1), (32,), depth=4)
        [[8, 1, 1, 1], [32, 32, 32, 32]]
    """
    depth = depth or max(map(len, lists))
    if any(not 1 <= len(options) <= depth for options in lists):
        raise ValueError(f"{' and '.join(map(str, lists))} were given, expected 1 to {depth} numbers each")
    return [[*options, *options[-1:] * (depth - len(options))] for options in map(list, lists)]


def _solved(
    flow: Flow,
    schedule: pd.Schedule | pd.Selective,
    tol: float | None,
    options: dict[str, Any],
    z: Tensor,
    y: Tensor | None,
) -> Outcome:
    return _outcome(pd.solve(flow.system(z, **{flow.condition: y}, **options), schedule, tol=tol))


def _swept(flow: Flow, layers: tuple[rules.Rule, ...], z: Tensor, y: Tensor | None) -> Outcome:
    return Outcome(*rules.solve(flow.system(z, **{flow.condition: y}), layers))


def _outcome(solution: pd.Solution) -> Outcome:
    layers = solution.layers
    return Outcome(solution.value, tuple(layer.passes for layer in layers), sum(layer.positions for layer in layers))


def whole(flow: Flow, methods: Mapping[str, Method], setting: Setting) -> dict[str, dict[str, Any]]:
    """Draw images by every method in turn.

    Args:
        flow: what to draw from.
        methods: by name; among them `BASELINE`, which the others are compared with. `APPLE` may be there too.
        setting: how to measure.

    Returns:
        for each method the figures of `row` (`speed_up` over the baseline, and `against_apple` over Apple's sampler) and of
        `deviations` from the baseline's images; `passes` of each block and `evaluations_per_position` (1 in
        sequential decoding); in lower precision also `from_float32`, the deviations from sequential decoding in
        float32, the baseline's own among them; with `memory` also `peak_memory_mib`.
    """
    z, y = setting.noise(flow)
    cases = {name: partial(method, z, y) for name, method in methods.items()}
    timings = setting.time(flow, cases, BASELINE)
    if BASELINE not in timings:  # no time was left
        return {}
    against = {
        ratio: timings[name] for ratio, name in (("speed_up", BASELINE), ("against_apple", APPLE)) if name in timings
    }
    exact = None
    if setting.dtype != "float32":
        with precision("float32", flow.noise_like.device):
            exact = methods[BASELINE](z, y).value
    rows = {}
    for name, timing in timings.items():
        value, passes, positions = timing.outcome
        figures = row(timing, against) | {"passes": passes, "evaluations_per_position": None}
        if positions is not None:
            figures["evaluations_per_position"] = short(positions / sum(flow.lengths))
        rows[name] = figures | deviations(value, timings[BASELINE].outcome.value)
        if exact is not None:
            rows[name]["from_float32"] = deviations(value, exact)
    if setting.memory:
        for name, figures in rows.items():
            setting.notify(f"{name}: memory")
            with precision(setting.dtype, flow.noise_like.device):
                figures["peak_memory_mib"] = round(peak_memory(cases[name], flow.noise_like.device) / 2**20, 2)
    return rows


def blocks(flow: Flow, names: Sequence[str], setting: Setting) -> list[dict[str, dict[str, Any]]]:
    """Solve every block alone, given the sequential solution of the one before.

    Args:
        flow: whose blocks.
        names: of `block_names`; the baseline among them.
        setting: how to measure; its budget is shared by the blocks.

    Returns:
        for each block, in the order of generation, and each schedule: the figures of `row`, `passes`,
        `evaluations_per_position` and `largest_deviation` from the block's sequential solution (on its own scale).
    """
    z, y = setting.noise(flow)
    schedules = block_schedules(max(flow.lengths))
    systems = {
        name: flow.system(z, **{flow.condition: y}, **({"compile": True} if name.endswith(COMPILED) else {}))
        for name in names
    }
    share = None if setting.budget is None else setting.budget / len(flow.lengths)

    def alone(name: str, index: int, before: Tensor | None) -> Outcome:
        schedule = schedules[name.removesuffix(COMPILED)]
        return _outcome(pd.solve(systems[name].layer(index, before), schedule, tol=setting.tolerance))

    value: Tensor | None = None
    results = []
    for index in range(len(flow.lengths)):
        cases = {name: partial(alone, name, index, value) for name in names}
        timings = replace(setting, budget=share).time(flow, cases, BASELINE)
        if BASELINE not in timings:  # no time was left
            break
        value = timings[BASELINE].outcome.value
        results.append({name: _block_row(timing, timings[BASELINE]) for name, timing in timings.items()})
    return results


def _block_row(timing: Timing, baseline: Timing) -> dict[str, Any]:
    value, passes, positions = timing.outcome
    return row(timing, {"speed_up": baseline}) | {
        "passes": passes,
        "evaluations_per_position": short((positions or 0) / value.shape[1]),
        "largest_deviation": short((value - baseline.outcome.value).abs().max().item()),
    }
