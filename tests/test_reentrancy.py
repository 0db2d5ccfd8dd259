"""Two solves at once, a callback that uses the system, and weights that change between two solves: right, or an error that says so."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import parallel_decode as pd
from parallel_decode.adapters.causal_lm import CausalLM, parallel_generate
from parallel_decode.cached.graphs import Graphs
from tests.flows import flow, labels, noise
from tests.systems import Rows, chain, halves, problem, shift


def small_model() -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "initializer_range": 0.4}
    config = transformers.LlamaConfig(**sizes, num_hidden_layers=2, num_attention_heads=2, eos_token_id=None)
    return transformers.LlamaForCausalLM(config).eval()  # type: ignore[no-untyped-call]


def language() -> CausalLM:
    return CausalLM(small_model(), torch.tensor([[1, 2, 3], [4, 5, 6]]), 12)


def of_flow() -> pd.LayeredSystem:
    return flow(num_classes=3).system(noise(), y=labels(3))


def of_block() -> pd.TriangularSystem:
    return of_flow().layer(0, None)


def of_rows() -> Rows:
    made = problem("tanh", 2, 12, 0)
    return Rows(made.f, made.guess)


STATEFUL: list[Callable[[], Any]] = [of_rows, of_block, of_flow, language]
STATELESS: list[Callable[[], Any]] = [halves, chain]


@pytest.mark.parametrize("make", STATEFUL)
def test_a_callback_that_solves_its_own_system(make: Callable[[], Any]) -> None:
    system = make()
    with pytest.raises(RuntimeError, match="in use by a solve that is still going on"):
        pd.solve(system, "jacobi", callback=lambda p: print(pd.solve(system, "sequential")))
    expected = pd.solve(make(), "sequential").value
    assert (pd.solve(system, "sequential").value - expected).abs().max() == 0, "after the error it can be solved"


@pytest.mark.parametrize("make", [of_block, language])
def test_a_callback_that_evaluates_a_system_with_a_cache(make: Callable[[], Any]) -> None:
    system = make()
    with pytest.raises(RuntimeError, match="make a system for each solve"):
        pd.solve(system, "jacobi", callback=lambda p: system.evaluate(p.x, pd.Window.full(system.length)))
    system.evaluate(system.initial(), pd.Window.full(system.length))  # outside of a solve it may be


@pytest.mark.parametrize("make", STATELESS)
def test_systems_without_state_can_be_solved_within_their_own_callbacks(make: Callable[[], Any]) -> None:
    system = make()
    inner: list[Tensor] = []
    outer = pd.solve(system, "jacobi", tol=0, callback=lambda p: inner.append(pd.solve(system, "sequential").value))
    assert all(torch.equal(value, outer.value) for value in inner) and inner


class Slow(Rows):
    """Its first evaluation waits until another thread has tried."""

    def __init__(self) -> None:
        made = problem("tanh", 2, 12, 0)
        super().__init__(made.f, made.guess)
        self.inside, self.go_on = threading.Event(), threading.Event()

    def evaluate(self, x: Tensor, window: pd.Window) -> Tensor:
        self.inside.set()
        assert self.go_on.wait(30)
        return super().evaluate(x, window)


def test_two_threads_that_solve_one_system() -> None:
    system = Slow()
    results: list[pd.Solution] = []
    thread = threading.Thread(target=lambda: results.append(pd.solve(system, "jacobi", tol=0)))
    thread.start()
    assert system.inside.wait(30)
    try:
        with pytest.raises(RuntimeError, match="in another thread"):
            pd.solve(system, "jacobi")
    finally:
        system.go_on.set()
        thread.join()
    assert torch.equal(results[0].value, problem("tanh", 2, 12, 0).truth())


def in_threads(works: list[Callable[[], None]]) -> None:
    """Run at once; an error of any is raised here."""
    with ThreadPoolExecutor(len(works)) as pool:
        for done in [pool.submit(work) for work in works]:
            done.result()


def test_threads_in_auto_share_its_tables() -> None:
    def f(x: Tensor) -> Tensor:
        return 1 + torch.sin(shift(x))

    class Remembered(Rows):
        cost_key = gain_key = "threads in auto"

    truth = pd.solve(Remembered(f, torch.zeros(1, 40, dtype=torch.float64)), "sequential").value

    def work() -> None:
        for _ in range(60):
            system = Remembered(f, torch.zeros(1, 40, dtype=torch.float64))
            assert (pd.solve(system, "auto", tol=1e-9).value - truth).abs().max() < 1e-7

    in_threads([work] * 4)


def test_threads_that_generate_with_one_model_share_its_records() -> None:
    model = small_model()
    inputs: dict[str, Any] = {"input_ids": torch.tensor([[1, 5, 6, 7, 5, 6]]), "do_sample": False, "max_new_tokens": 24}
    expected = model.generate(**inputs, pad_token_id=0)

    def work() -> None:
        for _ in range(8):
            assert torch.equal(model.generate(**inputs, pad_token_id=0, custom_generate=parallel_generate), expected)

    in_threads([work] * 3)


def test_threads_that_sample_from_one_flow() -> None:
    made = flow(num_classes=3)
    expected = made.sample(z=noise(), y=labels(3), schedule="sequential")
    assert isinstance(expected, Tensor)

    def work() -> None:
        for _ in range(6):
            images = made.sample(z=noise(), y=labels(3), schedule=pd.Sliding(5), tol=1e-12)
            assert isinstance(images, Tensor) and (images - expected).abs().max() < 1e-9

    in_threads([work] * 3)


# weights that change between two solves


@pytest.mark.parametrize("change", ["in place", "through .data"])
def test_new_weights_of_a_flow_are_seen_by_the_next_solve(change: str) -> None:
    made = flow(num_classes=3)
    system = made.system(noise(), y=labels(3))
    layer = system.layer(0, None)
    before = pd.solve(layer, "sequential").value
    with torch.no_grad():
        for p in made.parameters():
            (p.data if change == "through .data" else p).mul_(1.1)
    new = pd.solve(made.system(noise(), y=labels(3)).layer(0, None), "sequential").value
    assert (new - before).abs().max() > 1e-3
    assert torch.equal(pd.solve(layer, "sequential").value, new)
    assert (pd.solve(layer, "jacobi", tol=1e-12).value - new).abs().max() < 1e-9


def test_new_weights_of_a_flow_are_seen_by_captured_windows() -> None:
    """The graphs keep their own copies, at addresses that stay; here they are not captured."""
    made = flow(num_classes=3)
    graphs = Graphs(capture=False)

    def draw() -> Tensor:
        system: Any = made.system(noise(), y=labels(3))
        system.graphs = graphs
        return pd.solve(system, pd.Sliding(4), tol=1e-12).value

    before = draw()
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        for p in made.parameters():
            p.data = p.data * 1.1
    assert (draw() - before).abs().max() > 1e-3
    assert (draw() - pd.solve(made.system(noise(), y=labels(3)), "sequential").value).abs().max() < 1e-9


def test_new_weights_of_a_language_model_are_seen_by_the_next_solve() -> None:
    system = language()
    before = pd.solve(system, pd.Sliding(4)).value
    with torch.no_grad():
        for p in system.model.parameters():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.4)
    new = pd.solve(CausalLM(system.model, system.prompt.ids, 12), "sequential").value
    assert not torch.equal(new, before)
    for schedule in ("sequential", "jacobi", pd.Sliding(4, per_row=True), pd.Jacobi(freeze=False)):
        assert torch.equal(pd.solve(system, schedule).value, new)
