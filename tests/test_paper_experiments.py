"""Every experiment of the paper runs on a tiny flow, and says what it measured."""

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import parallel_decode as pd
from paper_repro import report
from paper_repro.__main__ import app
from paper_repro.catalogue import EXPERIMENTS
from paper_repro.data import Digits
from paper_repro.experiments import convergence, maf, methods, reconstruction, regularise, tau
from paper_repro.experiments.table import table
from paper_repro.measure import CORES, measure, side_by_side
from paper_repro.setup import Setup, obtain
from parallel_decode.adapters.tarflow import TarFlow
from parallel_decode.adapters.tarflow.decoding import BlockSystem

jacobian_of: Any = torch.autograd.functional.jacobian


def tiny(nvp: bool = True) -> TarFlow:
    """A flow of two blocks and 16 positions whose positions depend on one another."""
    torch.manual_seed(0)
    flow = TarFlow(1, 16, 4, 64, 2, 1, nvp=nvp, num_classes=10, noise_std=0.1)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return flow.eval()


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    return Setup(tiny(), "digits", tmp_path / "digits", "smoke", Digits())


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_measures_says_and_draws(name: str, setup: Setup) -> None:
    path = measure(setup, name)
    figures = json.loads(path.read_text())
    assert {"machine", "versions", "seed", "seconds", "scale"} <= figures.keys()
    text = EXPERIMENTS[name].tell(figures, "digits")
    columns = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert columns and "nan" not in text and len(text.split("\n\n")[1]) > 50
    for block in re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE):
        assert len({line.count("|") for line in block.strip().splitlines()}) == 1, (
            f"a table with a ragged row:\n{block}"
        )
    EXPERIMENTS[name].draw(figures, picture := setup.out / "drawn.png")
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_everything_goes_on_where_it_was_stopped_and_ends_in_a_report(tmp_path: Path) -> None:
    words = ["all", "--data", "digits", "--smoke", "--steps", "2", "--out", str(tmp_path)]
    setup = obtain("digits", tmp_path / "digits", scale="smoke", steps=2)
    measure(setup, "start")
    before = (tmp_path / "digits" / "start.json").read_bytes()
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert done.exit_code == 0 and "digits, start: there already" in done.output
    assert (tmp_path / "digits" / "start.json").read_bytes() == before
    page = (tmp_path / "report.html").read_text()
    assert page.count("<table>") >= len(EXPERIMENTS) and 'src="data:image/png;base64,' in page
    assert 'src="digits/' not in page, "the page is to stand alone"
    for experiment in EXPERIMENTS.values():
        assert f"<h3>{experiment.TITLE}</h3>" in page
    again = CliRunner().invoke(app, words, catch_exceptions=False)
    assert again.output.count("there already") == len(EXPERIMENTS)


@pytest.mark.slow
@pytest.mark.skipif(CORES < 2, reason="one core")
def test_experiments_are_done_side_by_side_and_end_in_one_report(tmp_path: Path) -> None:
    skip = ",".join({*EXPERIMENTS} - {"start", "maf"})
    words = ["all", "--data", "digits,photos", "--smoke", "--steps", "2", "--skip", skip, "--out", str(tmp_path)]
    command = [sys.executable, "-m", "paper_repro", *words]
    subprocess.run(command, check=True)
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.glob("*/*.json")}
    assert found == {"digits/start.json", "photos/start.json", "digits/maf.json"}
    assert (tmp_path / "report.html").read_text().count("<h2>") == 2
    (tmp_path / "photos" / "start.json").write_text("{")
    again = subprocess.run(command, check=False, capture_output=True, text=True)
    assert again.returncode == 2 and "photos/start.json is damaged" in again.stderr and "Traceback" not in again.stderr
    assert CliRunner().invoke(app, [*words[:3], "--skip", "sleep"]).exit_code == 2


class Killed:
    """Ends the process that is given it."""

    def __reduce__(self) -> Any:
        return os._exit, (9,)


def test_a_process_that_is_killed_is_one_line() -> None:
    with pytest.raises(ValueError, match="a process was killed"):
        side_by_side({(Killed(),): []})


def test_figures_of_another_flow_or_scale_are_not_taken_for_these(setup: Setup) -> None:
    measure(setup, "start")
    with torch.no_grad():
        setup.flow.blocks[0].proj_in.weight.mul_(1.1)  # type: ignore[union-attr,operator]
    with pytest.raises(ValueError, match="pass --again"):
        measure(setup, "start")
    with pytest.raises(ValueError, match="scale smoke in place of quick"):
        measure(replace(setup, scale="quick"), "start")
    measure(setup, "start", again=True)


def test_bad_options_say_what_was_expected(tmp_path: Path) -> None:
    for words, message in (
        (["layers", "--data", "cats"], "expected one of"),
        (["table1", "--smoke", "--steps", "1", "--inception", str(tmp_path / "none.pth")], "none.pth"),
        (["layers", "--checkpoint", str(tmp_path / "none.pth")], "does not exist"),
        (["layers", "--data", "cifar10"], "cifar"),
        (["table1", "--smoke", "--steps", "1", "--fid-stats", "a.pth"], "need --inception"),
    ):
        done = CliRunner().invoke(app, [*words, "--out", str(tmp_path)], env={"COLUMNS": "300"})
        assert done.exit_code == 2 and message in done.output, done.output
    with pytest.raises(FileNotFoundError, match="run the experiments first"):
        report.write(tmp_path / "empty", ["digits"])


def test_the_paper_s_methods_are_those_of_the_paper() -> None:
    flow = tiny()
    z = torch.randn(3, *flow.var.shape, generator=torch.Generator().manual_seed(0))
    found = {name: pd.solve(flow.system(z), schedule) for name, schedule in methods.paper().items()}
    assert found["SeJD"].layers[0].passes == len(flow.var)
    layer = flow.system(z).layer(0, None)
    x = torch.cat([layer.z[:, :1], torch.zeros_like(layer.z[:, 1:])], 1)  # type: ignore[attr-defined]
    sweeps, change = 0, x.new_tensor(math.inf)
    while not change <= methods.TAU:  # from zeros, until no value of the batch changes by more
        new = layer.evaluate(x, pd.Window.full(layer.length))
        sweeps, change, x = sweeps + 1, (new - x).abs().max(), new
    assert found["UJD"].layers[0].passes == sweeps


# Pieces ---------------------------------------------------------------------------------------------------------------------------------------


def test_tables() -> None:
    assert table(["a", "b"], [[1, 0.12345], [None, "x"]]).splitlines()[2:] == ["| 1 | 0.123 |", "| - | x |"]


def test_passes_to_a_level_count_the_last_time_that_it_is_passed() -> None:
    distances = [1.0, 0.05, 0.2, 0.05, 0.01]
    assert convergence.passes_to(distances, 0.1) == 3 and convergence.passes_to(distances, 1.0) == 0
    assert convergence.passes_to(distances, 1e-3) is None


def test_constants_are_the_norms_of_the_jacobian() -> None:
    flow = tiny().double()
    z = torch.randn(2, *flow.var.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    layer = flow.system(z).layer(0, None)
    x = pd.solve(layer, "sequential").value
    jacobian = jacobian_of(lambda v: layer.evaluate(v, pd.Window.full(layer.length))[0], x)[:, :, 0]
    expected = torch.linalg.matrix_norm(jacobian.transpose(1, 2), ord=2)
    found = convergence._constants(layer, x)
    assert (found - expected.tril(-1)).abs().max() < 1e-12 < found.max()
    assert expected.triu().abs().max() < 1e-12  # triangular


def test_the_bound_of_theorem_3_holds_to_first_order(setup: Setup) -> None:
    for block in convergence.run(setup)["blocks"]:
        for measured, bound in zip(block["first_row"][1:], block["bound"][1:], strict=True):
            assert measured <= 1.5 * bound + 1e-12


@pytest.mark.parametrize("nvp", [True, False])
def test_the_penalty_is_the_squared_norm_of_the_jacobian(nvp: bool) -> None:
    flow = tiny(nvp).double()
    x, y = torch.randn(1, 1, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), torch.tensor([3])
    torch.manual_seed(0)
    mean = torch.stack([regularise.penalty(flow, x, y).detach() for _ in range(300)]).mean()
    z, _ = flow(x, y)
    layer = flow.system(z / flow.var.sqrt(), y=y).layer(0, None)
    assert isinstance(layer, BlockSystem)
    solution = pd.solve(layer, "sequential").value
    jacobian = jacobian_of(lambda v: layer.evaluate(v, pd.Window.full(layer.length)), solution)
    assert mean == pytest.approx(float(jacobian.square().sum() / solution.numel()), rel=0.15)


def test_the_penalty_can_be_trained_on() -> None:
    flow = tiny()
    x = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    regularise.penalty(flow, x, None).backward()  # type: ignore[no-untyped-call]
    grads = [p.grad for p in flow.blocks[-1].parameters() if p.grad is not None]
    assert any(float(grad.abs().max()) > 0 for grad in grads)


def test_psnr() -> None:
    assert reconstruction.psnr(4e-3) == pytest.approx(30) and reconstruction.psnr(0) == math.inf


def test_ising_configurations_have_onsager_s_energy() -> None:
    """-0.817 couplings a site at T = 3.0 (Onsager 1944; by his integral), beyond the correlation length of a 16 x 16 lattice."""
    k = 2 / maf.TEMPERATURE
    kappa = 2 * math.sinh(k) / math.cosh(k) ** 2
    angles = (torch.arange(20_000, dtype=torch.float64) + 0.5) * math.pi / 2 / 20_000
    elliptic = float((1 - kappa**2 * angles.sin() ** 2).rsqrt().mean() * math.pi / 2)
    exact = -(1 / math.tanh(k)) * (1 + 2 / math.pi * (2 * math.tanh(k) ** 2 - 1) * elliptic)
    assert exact == pytest.approx(-0.817, abs=1e-3)
    spins = maf.ising(200, 16, torch.Generator().manual_seed(0))
    assert maf.energy(spins) == pytest.approx(exact, abs=0.015)
    assert float(spins.mean((1, 2)).abs().mean()) < 0.2


def test_starts_differ(setup: Setup) -> None:
    default = EXPERIMENTS["start"].run(setup)["passes"]["default"]
    assert len({tuple(passes) for passes in default.values()}) > 1
    z, y = setup.noise()
    for name, schedule in (("z", pd.Jacobi()), ("zeros", pd.Jacobi(start="zeros"))):
        layers = pd.solve(setup.flow.system(z, y=y), schedule).layers
        assert default[name] == [layer.passes for layer in layers]


def test_a_smaller_tau_is_closer(setup: Setup) -> None:
    found: dict[str, Any] = tau.run(setup)["methods"]
    for way in found.values():
        assert way["0.01"]["largest_deviation"] <= way["2.0"]["largest_deviation"]


def test_flows_that_are_needed_are_trained_once_and_then_loaded(tmp_path: Path) -> None:
    first = obtain("leaves", tmp_path, scale="smoke", steps=2).flow
    second = obtain("leaves", tmp_path, scale="smoke", steps=2).flow
    assert len(first.var) == 16
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))
