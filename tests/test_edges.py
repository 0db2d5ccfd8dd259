"""Empty batches, no positions, events of size 0, one position, odd dtypes: an answer from everything that solves."""

from typing import Any

import pytest
import torch
import transformers

import parallel_decode as pd
from parallel_decode.adapters.causal_lm import parallel_generate
from tests.flows import flow
from tests.systems import SCHEDULES, Chain, Rows, shift

EMPTY = [(0, 4), (2, 0), (0, 0), (2, 4, 0), (0, 4, 3), (2, 0, 3), (2, 3, 0, 2)]
EVERY: list[Any] = [*SCHEDULES, "selective", pd.Selective.sejd()]


@pytest.mark.parametrize("schedule", EVERY, ids=repr)
@pytest.mark.parametrize("shape", EMPTY, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.long, torch.bool])
def test_there_is_nothing_to_solve(shape: tuple[int, ...], schedule: Any, dtype: torch.dtype) -> None:
    if dtype != torch.float32 and isinstance(schedule, pd.Selective):
        schedule = pd.Selective()
    seen: list[pd.Pass] = []
    system = Rows(lambda x: x, torch.zeros(shape, dtype=dtype))
    solution = pd.solve(system, schedule, verify=True, callback=seen.append)
    assert solution.value.shape == shape and solution.value.dtype == dtype
    assert solution.status == (pd.Status.EXACT,) * shape[0] and solution.passes == 0 == len(seen)
    assert solution.layers[0].fronts.shape == solution.layers[0].residuals.shape == (0, shape[0])
    solution.raise_for_status()


@pytest.mark.parametrize("schedule", ["sequential", "jacobi", "auto", "sliding"])
def test_chains_and_flows_of_nothing(schedule: str) -> None:
    assert pd.solve(Chain(torch.zeros(0, 5)), schedule).value.shape == (0, 5)
    made = flow(num_classes=3)
    images = made.sample(z=torch.zeros(0, 16, 4, dtype=torch.float64), schedule=schedule)
    assert isinstance(images, torch.Tensor) and images.shape == (0, 1, 8, 8)


@pytest.mark.parametrize("schedule", EVERY, ids=repr)
def test_one_position(schedule: Any) -> None:
    system = pd.from_function(lambda x: x * 0 + 3, torch.zeros(2, 1))
    solution = pd.solve(system, schedule, verify=True)
    assert solution.value.tolist() == [[3.0], [3.0]] and solution.passes == 1
    assert set(solution.status) == {pd.Status.EXACT}


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.uint8, torch.int8, torch.int16, torch.int32, torch.bool]
)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_every_type(dtype: torch.dtype, schedule: pd.Schedule) -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        return ~shift(x) if dtype == torch.bool else 1 + shift(x)

    solution = pd.solve(pd.from_function(f, torch.zeros(2, 9, dtype=dtype)), schedule)
    expected = [i % 2 == 0 for i in range(9)] if dtype == torch.bool else list(range(1, 10))
    assert solution.value.dtype == dtype and solution.value.tolist() == [expected] * 2


def test_a_system_without_layers_to_walk() -> None:
    class Empty(Chain):
        depth = 0

    with pytest.raises(ValueError, match="the system has 0 layers, expected at least one"):
        pd.solve(Empty(torch.zeros(1, 3)))


class Couples(pd.TriangularSystem):
    """Draws anew at each evaluation."""

    deterministic = False
    length = 6

    def initial(self) -> torch.Tensor:
        return torch.zeros(2, 6)

    def evaluate(self, x: torch.Tensor, window: pd.Window) -> torch.Tensor:
        return torch.rand(2, len(window.positions))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_what_draws_anew_is_a_sample_and_is_called_one(schedule: pd.Schedule) -> None:
    for tol in (0.0, 0.5):
        solution = pd.solve(Couples(), schedule, tol=tol)
        assert set(solution.status) == {pd.Status.SAMPLE}
        assert (
            solution.status[0].succeeded
            and "not the one that sequential decoding would draw" in solution.status[0].value
        )


@pytest.mark.parametrize("sampling", ["gumbel", "maximal", "speculative"])
def test_couplings_of_language_models_are_called_samples(sampling: str) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "eos_token_id": None}
    model: Any = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=2)
    )
    report: dict[str, Any] = {}
    inputs: Any = {"input_ids": torch.tensor([[1, 5, 6]]), "do_sample": True, "max_new_tokens": 8, "pad_token_id": 0}
    model.generate(**inputs, custom_generate=parallel_generate, sampling=sampling, report=report)
    expected = pd.Status.EXACT if sampling == "gumbel" else pd.Status.SAMPLE
    assert set(report["solution"].status) == {expected}
