"""Plans: measured, kept, and used."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import parallel_decode as pd
from parallel_decode.adapters.tarflow import TarFlow
from parallel_decode.plan import Measurement
from tests.flows import flow
from tests.systems import chain


@pytest.fixture(scope="module")
def made() -> TarFlow:
    return flow(num_classes=3)


@pytest.fixture(scope="module")
def plan(made: TarFlow) -> pd.Plan:
    return pd.calibrate(made, batch_size=3, runs=1, progress=False)


def test_a_plan_has_the_fastest_of_each_layer(made: TarFlow, plan: pd.Plan) -> None:
    assert len(plan.layers) == len(plan.measurements) == 3
    for schedule, layer in zip(plan.layers, plan.measurements, strict=True):
        assert layer[0].schedule == pd.Sequential() and layer[0].deviation == 0 and layer[0].passes == 16
        fastest = min(layer, key=lambda m: m.seconds)
        assert schedule in (fastest.schedule, pd.Sequential())
        assert any(m.schedule.start == "zeros" for m in layer) and any(m.schedule.correction for m in layer)
        assert all(0 <= m.deviation < 1e-8 and m.seconds > 0 for m in layer)
    assert plan.made_for == {
        "model": made.fingerprint(), "device": "cpu", "dtype": "torch.float64", "batch": 3, "guidance": 0.0,
    }  # fmt: skip


def test_a_plan_round_trips_and_draws_the_same(made: TarFlow, plan: pd.Plan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.json")
    loaded = pd.Plan.load(tmp_path / "plan.json")
    assert loaded == plan
    z = torch.randn(3, 16, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([0, 1, 2])
    images, solution = made.sample(z=z, y=y, schedule=loaded, return_solution=True)  # with no warning
    expected = made.sample(z=z, y=y, schedule="sequential")
    assert (
        isinstance(images, torch.Tensor)
        and isinstance(expected, torch.Tensor)
        and (images - expected).abs().max() < 1e-8
    )
    assert [layer.schedule for layer in solution.layers] == list(plan.layers)


def test_every_option_round_trips(tmp_path: Path) -> None:
    layers = (
        pd.Sequential(),
        pd.Sliding(48, per_row=True, tol=1e-3, start="zeros"),
        pd.Jacobi(correction=pd.SecantCorrection(lags=(1, 4), memory=2, ridge=0.5), freeze=False),
        pd.GaussSeidelJacobi(5),
        pd.JacobiGaussSeidel(3),
        pd.Auto((4, 8), secant=False),
    )
    pd.Plan(layers).save(tmp_path / "plan.json")
    assert pd.Plan.load(tmp_path / "plan.json").layers == layers


def test_a_plan_says_when_it_is_used_for_something_else(made: TarFlow, plan: pd.Plan) -> None:
    with pytest.warns(UserWarning, match=r"made for batch 3, and is used for batch 2: .* parallel_decode.calibrate"):
        made.sample(2, y=0, schedule=plan)
    other = flow(num_classes=3)
    with torch.no_grad():
        next(other.parameters()).add_(1)
    with pytest.warns(UserWarning, match=f"made for model {made.fingerprint()}, and is used for"):
        other.sample(3, y=0, schedule=plan)
    with pytest.warns(UserWarning, match="dtype torch.float64, and is used for .*dtype torch.float32"):
        flow(num_classes=3).float().sample(3, y=0, schedule=plan)


def test_the_candidates_that_are_given(made: TarFlow) -> None:
    plan = pd.calibrate(made, 2, schedules=[pd.Sliding(4), "jacobi"], runs=1, progress=False, guidance=0.5)
    tried = [[m.schedule for m in layer] for layer in plan.measurements]
    assert tried == [[pd.Sequential(), pd.Sliding(4), pd.Jacobi()]] * 3
    assert plan.made_for["guidance"] == 0.5


def test_any_layered_system_can_be_calibrated(capsys: pytest.CaptureFixture[str]) -> None:
    plan = pd.calibrate(chain(), runs=1)
    assert len(plan.layers) == 3 and "3/3" in capsys.readouterr().err
    assert (pd.solve(chain(), plan).value - pd.solve(chain(), "sequential").value).abs().max() < 1e-8


def test_the_papers_rule_from_measurements() -> None:
    jacobi, sequential, wide = pd.Jacobi(), pd.Sequential(), pd.Sliding(8)

    def layer(*seconds: float) -> tuple[Measurement, ...]:
        return tuple(Measurement(s, t, 1, 0.0) for s, t in zip((sequential, jacobi, wide), seconds, strict=True))

    plan = pd.Plan((sequential,) * 3, {}, (layer(2, 1, 3), layer(1, 2, 3), layer(3, 2, 1)))
    assert pd.Selective.from_measurements(plan).layers == (jacobi, sequential, jacobi)
    assert pd.Selective.from_measurements(plan, ("sequential", wide)).layers == (sequential, sequential, wide)
    with pytest.raises(ValueError, match=r"no measurements of .*width=4"):
        pd.Selective.from_measurements(plan, ("sequential", pd.Sliding(4)))


def test_bad_plans(plan: pd.Plan, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    with pytest.raises(FileNotFoundError):
        pd.Plan.load(path)
    plan.save(path)
    good = path.read_text()
    renamed = json.loads(good)
    renamed["layers"][0]["name"] = "magic"
    for bad in (good[: len(good) // 2], "", "[]", "{}", json.dumps(renamed)):
        path.write_text(bad)
        with pytest.raises(ValueError, match=r"plan.json cannot be read as a plan"):
            pd.Plan.load(path)

    class Mine(pd.Sequential):
        pass

    with pytest.raises(ValueError, match="a plan cannot keep it"):
        pd.Plan((Mine(),)).save(path)
    assert json.loads(path.read_text()) == renamed, "a plan that could not be written spoilt the file"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"runs": 0}, ValueError, "runs is 0"),
        ({"batch_size": 0}, ValueError, "batch_size is 0"),
        ({"schedules": ["selective"]}, TypeError, "is for several layers"),
        ({"schedules": ["fast"]}, ValueError, "schedule is 'fast'"),
        ({"model": torch.nn.Linear(1, 1)}, TypeError, "model is a Linear, expected a LayeredSystem, or a model with"),
    ],
)
def test_bad_calibrations(made: TarFlow, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pd.calibrate(**dict[str, Any]({"model": made, "progress": False} | options))
