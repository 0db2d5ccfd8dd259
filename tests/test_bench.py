"""`parallel-decode bench`: its figures, the rules of others, checkouts of peers, and the command."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import parallel_decode as pd
from benchmarks import peers
from parallel_decode.adapters.tarflow import TarFlow
from parallel_decode.adapters.tarflow.bench import rules, suite
from parallel_decode.adapters.tarflow.bench.measure import Outcome, deviations, interleave, peak_memory, precision
from parallel_decode.cli import app
from tests.flows import flow, labels, noise

ROOT = Path(__file__).parents[1]
PEER = """
from beside import solve
from parallel_decode.adapters.tarflow import TarFlow

class Model(TarFlow):
    def reverse(self, x, y=None, **lists):
        assert all(len(options) == len(self.blocks) for options in lists.values())
        return solve(self, x, y)
"""
BESIDE = """
import parallel_decode as pd

def solve(flow, x, y):
    return pd.solve(flow.system(x, y=y), "sequential").value
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder of the form of both peers' checkouts."""
    for name, text in (("transformer_flow", PEER), ("GS_Jacobi_sampling", PEER), ("beside", BESIDE)):
        (tmp_path / f"{name}.py").write_text(text)
    return tmp_path


@pytest.fixture
def small(tmp_path: Path) -> Path:
    flow(num_classes=3).float().save_pretrained(tmp_path / "flow")
    return tmp_path / "flow"


def test_runs_are_interleaved_and_slow_cases_run_less(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def case(name: str, seconds: float) -> Any:
        def run() -> Outcome:
            order.append(name)
            now[0] += seconds
            return Outcome(torch.zeros(1))

        return run

    cases = {"b": case("b", 1.0), "a": case("a", 1.0), "slow": case("slow", 50.0)}
    timings = interleave(cases, baseline="a", runs=4)
    assert order[:6] == ["a", "a", "b", "b", "slow", "slow"]
    assert "".join(order[6:]).replace("slow", "s") == "abs" * 3 + "ab"
    assert {name: timing.seconds for name, timing in timings.items()} == {
        "a": [1.0] * 4,
        "b": [1.0] * 4,
        "slow": [50.0] * 3,
    }


def test_a_deadline_that_is_over_leaves_everything_out() -> None:
    outcome = Outcome(torch.ones(1))
    assert interleave({"one": lambda: outcome}, baseline="one", runs=5, budget=1.0, deadline=0.0) == {}


def test_deviations_of_what_is_not_finite() -> None:
    figures = deviations(torch.tensor([0.0, torch.nan]), torch.zeros(2))
    assert figures["largest_deviation"] == 2 and figures["within_one_level"] == 0.5
    assert deviations(torch.zeros(2), torch.zeros(2))["psnr_db"] == torch.inf


def test_peak_memory_on_a_cpu() -> None:
    def case() -> Outcome:
        first = torch.zeros(1000, dtype=torch.float64)
        del first
        return Outcome(torch.zeros(3000, dtype=torch.float64))

    assert 24_000 <= peak_memory(case, torch.device("cpu")) < 32_000


def test_precisions() -> None:
    cpu = torch.device("cpu")
    with precision("bfloat16", cpu):
        assert torch.is_autocast_enabled("cpu")
    for name, message in (("tf32", "which cpu does not have"), ("int8", "dtype is 'int8', expected float32")):
        with pytest.raises(ValueError, match=message), precision(name, cpu):
            pass


@pytest.mark.parametrize("start", ["system", "zeros"])
def test_the_rules_of_others_end_at_the_sequential_answer_if_let(start: Any) -> None:
    made, y = flow(num_classes=3), labels(3)
    expected = pd.solve(made.system(noise(), y=y), "sequential").value
    exact: tuple[rules.Rule, ...] = (
        rules.GSJacobi(cap=20, threshold=0, clamp=None, count=4, start=start),
        rules.Starflow(cap=20, threshold=0, clamp=None, width=5, start=start),
    )
    for rule in exact:
        value, sweeps, positions = rules.solve(made.system(noise(), y=y), (rule,))
        assert (value - expected).abs().max() < 1e-10
        assert len(sweeps) == 3 and positions >= sum(sweeps)
    capped, sweeps, _ = rules.solve(made.system(noise(), y=y), (rules.GSJacobi(cap=1, count=2), rules.Starflow(cap=2)))
    assert sweeps == (2, 2, 2) and (capped - expected).abs().max() > 1e-3
    with pytest.raises(ValueError, match="3 segments do not divide 16 positions"):
        rules.GSJacobi(count=3).segments(16)


def test_peers_draw_from_the_same_weights(checkout: Path) -> None:
    made, path = flow(num_classes=3), list(sys.path)
    expected = pd.solve(made.system(noise(), y=labels(3)), "sequential").value
    for method in (peers.tarflow(checkout, made), peers.gs_jacobi(checkout, made, [8, 1, 1], [9] * 3, [0] * 3)):
        assert torch.equal(method(noise(), labels(3)).value, expected)
    assert sys.path == path


def test_folders_that_are_no_checkouts(checkout: Path, tmp_path: Path) -> None:
    made = flow(num_classes=3)
    with pytest.raises(ValueError, match=r"has no transformer_flow.py, expected a checkout of Apple's ml-tarflow"):
        peers.tarflow(tmp_path / "nothing", made)
    file = checkout / "transformer_flow.py"
    for text, message in (
        ("x = 1", "has no class Model"),
        ("1 / 0", "cannot be imported: ZeroDivisionError"),
        (PEER.replace("**lists", "").replace("class Model(TarFlow):", "class Model:"), "does not take this flow"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            peers.tarflow(checkout, made)
    with pytest.raises(ValueError, match="only flows that scale"):
        peers.gs_jacobi(checkout, flow(nvp=False), [1], [1], [0])


def bench(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["bench", *map(str, words)])
    return result.exit_code, result.output


def flows(*words: object) -> tuple[int, str]:
    """The script, which takes the same options and peers."""
    command = [sys.executable, str(ROOT / "benchmarks" / "flows.py"), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_the_script_with_peers(small: Path, checkout: Path, tmp_path: Path) -> None:
    peer = ("--peer-tarflow", checkout, "--peer-gs-jacobi", checkout, "--gs-segments", "4,1", "--gs-guesses", "0,1")
    code, text = flows("--checkpoint", small, "--batches", "1,2", "--runs", 2, "--memory", "--out", tmp_path, *peer)
    assert code == 0, text
    figures = json.loads((tmp_path / "bench.json").read_text())
    assert {"machine", "versions", "runs"} < figures.keys() and figures["batches"].keys() == {"1", "2"}
    rows = figures["batches"]["2"]
    assert {"sequential", "UJD", "SeJD (tau = 0.5)", "sliding 8", "auto", suite.APPLE, "GS-Jacobi's own code"} < set(
        rows
    )
    assert rows["sequential"]["speed_up"] == 1 and rows["sequential"]["largest_deviation"] == 0
    assert rows["sequential"]["evaluations_per_position"] == 1 and rows["sequential"]["peak_memory_mib"] > 0
    assert rows["auto"]["within_one_level"] == 1 and len(rows["auto"]["passes"]) == 3
    assert all(row["seconds"] > 0 and row["against_apple"] > 0 for row in rows.values())
    assert (tmp_path / "bench.png").stat().st_size > 10_000
    for name in rows:
        assert name.split()[0] in text


def test_blocks_alone(small: Path, tmp_path: Path) -> None:
    code, text = bench("--checkpoint", small, "--batches", 2, "--runs", 1, "--blocks", "--out", tmp_path)
    assert code == 0, text
    blocks = json.loads((tmp_path / "bench.json").read_text())["blocks_alone"]["2"]
    assert len(blocks) == 3
    for block in blocks:
        assert block["sequential"]["passes"] == [16] and block["sliding 16"]["largest_deviation"] < 1e-3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--batches", "one"), "--batches is 'one', expected whole numbers"),
        (("--batches", "0"), "expected numbers from 1 on"),
        (("--methods", "magic"), "--methods has 'magic', expected parts of these names"),
        (("--dtype", "tf32"), "dtype is 'tf32', which cpu does not have"),
        (("--device", "magic"), "magic"),
        (("--checkpoint", "/nothing"), "does not exist"),
        (("--gs-segments", "3"), "3 segments do not divide"),
    ],
)
def test_bad_options(words: tuple[str, ...], message: str) -> None:
    code, text = bench(*words)
    assert code == 2 and message in " ".join(text.split())


def test_bad_peers() -> None:
    for words, message in (
        (("--peer-tarflow", "/nothing"), "has no transformer_flow.py"),
        (("--peer-gs-jacobi", "/nothing", "--gs-guesses", "z"), "--gs-guesses is 'z', expected whole numbers"),
    ):
        code, text = flows(*words)
        assert code == 2 and message in " ".join(text.split())


@pytest.mark.slow
def test_the_script_for_a_gpu_runs_on_a_cpu(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--tiny", "--out", "out", "--checkpoint", "flow"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert {"flow", "checks", "whole", "blocks", "machine", "versions"} < figures.keys()
    assert figures["flow"]["steps"] > 0 and TarFlow.from_checkpoint(tmp_path / "flow" / "tiny").img_size == 32
    assert all(check["largest_deviation"] < 1e-2 for check in figures["checks"].values())
    assert "auto, compiled" in figures["whole"]["bfloat16"]["1"]
