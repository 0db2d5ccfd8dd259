"""Probes of a flow, against plain recomputation on tiny ones."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import parallel_decode as pd
from parallel_decode.adapters.tarflow import TarFlow
from parallel_decode.adapters.tarflow.decoding import FlowSystem
from parallel_decode.adapters.tarflow.probe import Masked, mean_jacobian, probe
from parallel_decode.cli import app
from parallel_decode.testing import check_system
from tests.flows import flow, labels, noise


def first_layer(made: TarFlow) -> tuple[pd.TriangularSystem, torch.Tensor, torch.Tensor]:
    system = made.system(noise(), y=labels(3))
    layer = system.layer(0, None)
    return layer, pd.solve(layer, "sequential").value, layer.initial()


def test_the_mean_jacobian_is_that_of_automatic_differentiation() -> None:
    layer, x, _ = first_layer(flow(num_classes=3))
    full = torch.autograd.functional.jacobian(lambda x: layer.evaluate(x, pd.Window.full(16)), x)  # type: ignore[no-untyped-call]
    for lag in (1, 3):
        blocks = [full[row, l, :, row, l - lag] for row in range(3) for l in range(lag, 16)]
        assert torch.allclose(mean_jacobian(layer, x, lag, positions=16), torch.stack(blocks).mean(0), atol=1e-12)


@pytest.mark.parametrize("nvp", [True, False])
def test_what_is_hidden_is_not_attended_to(nvp: bool) -> None:
    system = flow(nvp, 3).system(noise(), y=labels(3))
    assert isinstance(system, FlowSystem)
    layer = system.layer(0, None)
    x, full = pd.solve(layer, "sequential").value, pd.Window.full(16)
    assert torch.allclose(Masked(layer, 0).evaluate(x, full), layer.evaluate(x, full), atol=1e-12)
    masked = Masked(layer, 3)
    check_system(masked)
    moved = x.clone()
    moved[:, 7:9] += 1.0  # of the three predecessors of position 10 that are hidden all but the nearest, which is read
    change = (masked.evaluate(moved, full) - masked.evaluate(x, full)).abs().amax((0, 2))
    assert change[10] == 0 and change[8] > 0 and change[12] > 0


def test_metrics_by_their_definitions() -> None:
    made = flow(num_classes=3)
    found = probe(made, 3, hidden=(1, 15), lags=(1, 2))
    system: Any = made.example(3)
    layer = system.layer(0, None)
    x, z = pd.solve(layer, "sequential").value, layer.initial()
    block = made.blocks[2]
    more = made.system(system.z + 1 / made.var.sqrt(), y=torch.arange(3)).layer(0, None)
    with torch.no_grad():
        h = pd.Window.full(16)
        guess = torch.zeros_like(x)
        guess[:, 0] = x[:, 0]
        for name, x0 in (("system", z), ("zeros", guess)):
            expected = torch.linalg.svdvals((layer.evaluate(x0, h) - x).mean(0))[0].item()
            assert found.blocks[0].igm[name] == pytest.approx(expected, rel=1e-3)
        # x = z exp(a) + b, so one more z adds exp(a)
        scale = more.evaluate(x, h) - layer.evaluate(x, h)
        w_a, w_b = (torch.linalg.svdvals(w)[0] for w in block.proj_out.weight.chunk(2))  # type: ignore[union-attr,operator]
        crm = torch.linalg.svdvals((x / scale).mean(0))[0] * w_a + w_b
        assert found.blocks[0].crm == pytest.approx(crm.item(), rel=1e-3)
    assert found.blocks[0].passes["jacobi"] == pd.solve(layer, "jacobi").passes
    assert found.batch == 3 and len(found.blocks) == 3
    assert set(found.blocks[1].redundancy) == {1, 15} and set(found.blocks[1].jacobian) == {1, 2}


def test_a_flow_that_is_the_identity() -> None:
    made = TarFlow(1, 8, 2, 64, 2, 1)
    for block in made.blocks:
        torch.nn.init.zeros_(block.proj_out.bias)  # type: ignore[arg-type,union-attr]
    for block_probe in probe(made, 2).blocks:
        assert set(block_probe.redundancy.values()) == {(1.0, 0.0)}
        assert set(block_probe.jacobian.values()) == {0.0} and set(block_probe.igm.values()) == {0.0}
        assert block_probe.crm == 0 and block_probe.passes["jacobi"] == 1


def test_bad_probes() -> None:
    with pytest.raises(ValueError, match="n is 0"):
        probe(flow(), 0)
    with pytest.raises(ValueError, match=r"hidden is \[16\] .* expected numbers from 1 to 15"):
        probe(flow(), 1, hidden=[16])


def test_the_command(tmp_path: Path) -> None:
    flow(num_classes=3).float().save_pretrained(tmp_path / "flow")
    words = ["probe", "--checkpoint", str(tmp_path / "flow"), "--n", "2", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    blocks = json.loads((tmp_path / "out" / "probe.json").read_text())["blocks"]
    assert len(blocks) == 3 and blocks[0]["redundancy"].keys() == {"1", "2", "5"}
    assert (tmp_path / "out" / "probe.png").stat().st_size > 10_000
    for word in ("jacobi", "CRM", "IGM", "lag 1", "hidden 5"):
        assert word in result.output
    result = CliRunner().invoke(app, ["probe", "--checkpoint", "/nothing", "--out", str(tmp_path)])
    assert result.exit_code == 2 and "does not exist" in result.output
