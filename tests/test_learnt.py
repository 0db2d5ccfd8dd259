"""What `Auto` learnt is kept for other processes, and what is kept can only help."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import parallel_decode as pd
from parallel_decode import _costs, _gains
from parallel_decode.adapters.tarflow import TarFlow
from tests.test_auto import COSTS, Clock, Timed, clock

__all__ = ["clock"]


class Named(Timed):
    """A system that says what it is."""

    def __init__(self, clock: Clock, cost: Any, rate: float = 0.1) -> None:
        super().__init__(clock, cost, rate, 256)
        self.identity = {"model": "a test", "layer": 0}
        self.widths: list[int] = []

    def evaluate(self, x: Tensor, window: pd.Window) -> Tensor:
        self.widths.append(len(window.positions))
        return super().evaluate(x, window)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PARALLEL_DECODE_CACHE", str(tmp_path / "kept"))
    return tmp_path / "kept" / "auto"


def run(clock: Clock, system: Named) -> float:
    began = clock.now
    pd.solve(system, pd.Auto(secant=False), tol=1e-6)
    return clock.now - began


def forget() -> None:
    """As another process begins."""
    _costs.COSTS.clear()
    _gains.GAINS.clear()


def test_another_process_begins_where_this_one_ended(clock: Clock, folder: Path) -> None:
    cost = COSTS["an idle machine"]
    times = [run(clock, Named(clock, cost)) for _ in range(8)]
    forget()
    assert run(clock, Named(clock, cost)) <= 1.02 * min(times) < 0.2 * times[0]
    assert len(list(folder.iterdir())) == 1


def test_a_machine_that_is_slower_now_is_compared_with_itself(clock: Clock, folder: Path) -> None:
    cost = COSTS["an idle machine"]
    for _ in range(8):
        run(clock, Named(clock, cost))
    forget()
    slow = Named(clock, lambda n: 5 * cost(n))
    for _ in range(3):
        slow.widths.clear()
        run(clock, slow)
        assert slow.widths[0] > 1, "sequential passes took a fifth in the other process, and so did all others"


def test_the_first_pass_tells_how_fast_all_of_it_is_now() -> None:
    costs = _costs.Costs(256)
    costs.restore([(1, 1.0)], [[(8, 2.0), (64, 4.0)], [(64, 5.0)]], left=1.0)
    costs.add(_costs.Arm(64), 64, 20.0)
    assert costs.sequential() == 5.0 and (costs.of(8), costs.of(64), costs.of(64, True)) == (2.0, 4.0, 5.0)
    costs.add(_costs.Arm(1), 1, 6.0)
    assert costs.sequential() == 5.0, "from then on it is measured as ever"


def test_nothing_is_kept_of_systems_that_do_not_say_what_they_are_and_where_it_is_off(
    clock: Clock, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pd.solve(Timed(clock, COSTS["an idle machine"], 0.1, 256), "auto", tol=1e-6)
    monkeypatch.setenv("PARALLEL_DECODE_CACHE", "off")
    run(clock, Named(clock, COSTS["an idle machine"]))
    assert not folder.exists()


def test_what_was_spent_on_trials_is_not_given_again_to_another_process(clock: Clock, folder: Path) -> None:
    """Windows gain nothing and every process draws once: all of them together may lose what one may."""
    lost = []
    for _ in range(8):
        forget()
        lost.append(run(clock, Named(clock, COSTS["a full machine"], 0.5)) / 256 - 1)
    assert lost[0] > 0.03 > max(lost[1:])


def test_what_another_process_knew_is_written_again_where_it_turned_out_wrong(clock: Clock, folder: Path) -> None:
    def cost(width: float) -> float:
        return 1 + width / 50

    for _ in range(16):
        run(clock, Named(clock, cost))

    def written(system: Named) -> bool:
        forget()
        before = [file.read_bytes() for file in folder.iterdir()]
        run(clock, system)
        return before != [file.read_bytes() for file in folder.iterdir()]

    assert not written(Named(clock, cost)), "nothing new"
    assert written(Named(clock, cost, rate=2.0)), "windows gain nothing now"


def test_what_belongs_to_other_systems_is_not_taken(clock: Clock, folder: Path) -> None:
    for _ in range(8):
        run(clock, Named(clock, COSTS["an idle machine"]))
    forget()
    other = Named(clock, COSTS["an idle machine"])
    other.identity = {"model": "another", "layer": 0}
    run(clock, other)
    assert other.widths[0] == 1 and len(list(folder.iterdir())) == 2


@pytest.mark.parametrize(
    "known",
    [
        None,
        [],
        "x",
        {},
        {"single": [[1, 1.0]], "windows": [[[8, 1.0]]], "counts": [], "left": 32.0},
        {"single": [[1, float("nan")]], "windows": [[], []], "counts": [], "left": 32.0},
        {"single": [[1, -1.0]], "windows": [[], []], "counts": [], "left": 32.0},
        {"single": [[1, 1.0]], "windows": [[[8, float("inf")]], []], "counts": [], "left": 32.0},
        {"single": [[1, 1.0]], "windows": [[], []], "counts": [[64, False, 0.0, 3.0, 1.0]], "left": 32.0},
        {"single": [[1, 1.0]], "windows": [[], []], "counts": [[64, False, 1.0]], "left": 32.0},
        {"single": [[1, 1.0]], "windows": [[], []], "counts": [["x", False, 1.0, 1.0, 1.0]], "left": 32.0},
        {
            "single": [[1, 1.0]],
            "windows": [[], []],
            "counts": [[1, False, 99.0, 1.0, 1.0], [0, True, 1.0, 1.0, 1.0]],
            "left": 32.0,
        },
        {"single": [[1, 1.0]], "windows": [[[8, 1.0]], []], "counts": [], "left": float("nan")},
        {"single": [[1, 1.0]], "windows": [[[8, 1.0]], []], "counts": []},
        {"single": [], "windows": [[], []], "counts": [[10**400, False, 1.0, 1.0, 1.0]], "left": 32.0},
    ],
    ids=repr,
)
def test_a_damaged_file_is_as_if_it_was_not_there(clock: Clock, folder: Path, known: Any) -> None:
    cost = COSTS["a small machine"]
    expected = run(clock, Named(clock, cost))
    (path,) = folder.iterdir()
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "value": known}))
    forget()
    assert run(clock, Named(clock, cost)) <= expected * 1.05
    assert json.loads(path.read_text())["value"]["single"], "and it is written anew"


def test_what_is_kept_is_what_is_known(clock: Clock, folder: Path) -> None:
    for _ in range(8):
        run(clock, Named(clock, COSTS["a small machine"]))
    (costs,), (by_batch,) = _costs.COSTS.values(), _gains.GAINS.values()
    (path,) = folder.iterdir()
    known = json.loads(path.read_text())["value"]
    assert known["single"] == [[1, 1.0]]
    assert known["windows"][0] == [list(each) for each in costs.windows[False].measured()]
    assert {(width, corrected) for width, corrected, *_ in known["counts"]} == set(by_batch[2].counts)
    assert known["turn"] == by_batch[2].turn != _gains.TURN


KILLED = """
import os, random, signal, sys, time
from parallel_decode import _disk_cache

random.seed(0)
_disk_cache.remember("auto", "key", [0] * 10_000)
for _ in range(20):
    child = os.fork()
    if child == 0:
        for number in range(10**9):
            _disk_cache.remember("auto", "key", [number] * 10_000)
    time.sleep(random.uniform(0, 0.02))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    value = _disk_cache.recall("auto", "key")
    assert value is not None and len(value) == 10_000 and len(set(value)) == 1, value
    print(value[0])
"""


def test_a_process_that_is_killed_while_it_writes_leaves_all_of_the_file(folder: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert max(map(int, done.stdout.split())) > 0, "they wrote"


def test_two_threads_may_sample_at_once(folder: Path) -> None:
    """Each from a flow of its own, of one size and so of one table of costs; samples are those of sequential decoding."""
    torch.manual_seed(0)
    flows = [TarFlow(1, 8, 1, 64, 2, 1).double() for _ in range(2)]
    for flow in flows:
        torch.nn.init.normal_(flow.blocks[0].proj_out.weight, std=0.02)  # type: ignore[union-attr,arg-type]
    z = torch.randn(2, 64, 1, dtype=torch.double)
    truth = [flow.sample(z=z, schedule="sequential") for flow in flows]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda flow: [flow.sample(z=z) for _ in range(8)], flows))
    for drawn, expected in zip(found, truth, strict=True):
        for x in drawn:
            torch.testing.assert_close(x, expected, rtol=0, atol=1e-6)
    assert list(folder.glob("*.json"))
