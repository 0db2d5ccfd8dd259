"""The experiment `scaling`: its laws, its sizes, and what it says, on made-up figures and on tiny flows."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import parallel_decode as pd
from paper_repro import paper
from paper_repro.data import Digits
from paper_repro.experiments import methods, scaling, scaling_paper, scaling_text
from paper_repro.experiments.scaling_law import fit
from paper_repro.experiments.scaling_sizes import FACTORS, SIZES, Resized
from paper_repro.setup import Setup
from parallel_decode.adapters.tarflow import TarFlow


def made_up(passes: Callable[..., float], cost: Callable[..., float]) -> dict[str, Any]:
    """Figures of the quick sizes whose passes and costs follow these functions of side, L and width."""
    sizes = SIZES["quick"]
    rows = []
    for size, varied in [*sizes.fitted().items(), (sizes.held_out, "held out")]:
        at = size.side, size.length, size.channels
        taken = {"0.5": [1.5 * passes(*at), 0.5 * passes(*at)], "0.001": [3 * passes(*at)] * 2}
        about = {"side": size.side, "patch": size.patch, "length": size.length, "width": size.channels}
        speed_up = scaling_text.speed_up(size.length, passes(*at), cost(*at))
        price = {"single": 1e-3, "sweep": 1e-3 * cost(*at), "speed_up": speed_up}
        rows.append({"varied": varied, **about, "held_out": 0.0, "passes": taken, **price})
    return {"batch": 16, "steps": 250, "rows": rows}


# Laws -------------------------------------------------------------------------------------------------------------------------------------------


def test_a_power_law_is_found_again() -> None:
    points = [(24, 36, 64), (12, 36, 64), (48, 36, 64), (24, 144, 64), (24, 36, 192)]
    law = fit(points, [3 * side**-0.5 * length**0.8 * width**0.25 for side, length, width in points])
    assert law.constant == pytest.approx(3) and law.exponents == pytest.approx((-0.5, 0.8, 0.25))
    assert law(48, 256, 128) == pytest.approx(3 * 48**-0.5 * 256**0.8 * 128**0.25)
    assert law.misfit == pytest.approx(1) and law.errors == pytest.approx((0, 0, 0), abs=1e-9)


def test_errors_and_misfit_are_those_of_the_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.linspace(1, 100, 2000, dtype=torch.float64)
    noise = 0.2 * torch.randn(len(x), dtype=torch.float64, generator=generator)
    law = fit([(one,) for one in x.tolist()], (2 * x**0.7 * noise.exp()).tolist())
    assert law.errors is not None and law.misfit is not None
    assert math.log(law.misfit) == pytest.approx(0.2, rel=0.05)
    spread = 0.2 / math.sqrt(len(x) * float(x.log().var(correction=0)))  # of the slope of a line
    assert law.errors[0] == pytest.approx(spread, rel=0.05)
    assert abs(law.exponents[0] - 0.7) < 4 * spread


def test_a_law_without_points_to_spare_states_no_errors() -> None:
    law = fit([(1,), (4,)], [1, 2])
    assert law.exponents == pytest.approx((0.5,)) and law.errors is None and law.misfit is None


@pytest.mark.parametrize(
    ("points", "values", "message"),
    [
        ([(1, 1), (2, 2), (4, 4)], [1, 2, 3], "vary each factor apart"),
        ([(1,), (0,)], [1, 2], "points are .* expected numbers above 0"),
        ([(1,), (2,)], [1, -2], "values are .* expected numbers above 0"),
    ],
)
def test_a_law_that_cannot_be_fitted_says_why(points: Any, values: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(points, values)


# Sizes ------------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", SIZES)
def test_one_factor_is_varied_at_a_time_and_the_held_out_size_is_not_fitted(scale: str) -> None:
    sizes = SIZES[scale]
    of = {size: (size.side, size.length, size.channels) for size in [*sizes.fitted(), sizes.held_out]}
    for size, varied in sizes.fitted().items():
        assert size.side % size.patch == 0
        apart = [f for f, a, b in zip(FACTORS, of[size], of[sizes.base], strict=True) if a != b]
        assert apart == ([] if varied == "base" else [varied])
    assert sizes.held_out not in sizes.fitted()
    assert all(a > b for a, b in zip(of[sizes.held_out], of[sizes.base], strict=True))
    fit([of[size] for size in sizes.fitted()], [1.0] * len(sizes.fitted()))  # determined


@pytest.mark.parametrize("side", [8, 24])
def test_resized_images_keep_range_labels_and_content(side: int) -> None:
    digits, resized = Digits(), Resized(Digits(), side)
    x, y = digits.batch(4, torch.Generator().manual_seed(0))
    small, labels = resized.batch(4, torch.Generator().manual_seed(0))
    assert small.shape == (4, 1, side, side) and labels is not None and torch.equal(labels, y)
    assert small.abs().max() <= 1 and (small.mean((1, 2, 3)) - x.mean((1, 2, 3))).abs().max() < 0.05
    assert resized.held_out()[0].shape[2:] == next(resized.reference(2)).shape[2:] == (side, side)


# What it says -----------------------------------------------------------------------------------------------------------------------------------


def test_the_text_names_the_cost_where_that_grows_and_the_passes_where_those_do() -> None:
    costly = scaling_paper.paper(made_up(lambda side, length, width: 4.0, lambda side, length, width: length * width))
    assert "on this machine: UJD becomes 0.33 times as fast, by the cost of a sweep alone" in costly
    hard = scaling_paper.paper(made_up(lambda side, length, width: side**2 * length, lambda side, length, width: 8.0))
    assert "on this machine: UJD becomes 0.016 times as fast, by the passes for a position alone" in hard
    assert "passes for a position change most by the resolution" in hard
    both = scaling_paper.paper(made_up(lambda side, length, width: side * length, lambda side, length, width: width))
    assert (
        "mostly by the passes for a position (the passes for a position 8 times, the cost of a sweep 3 times)" in both
    )
    neither = scaling_paper.paper(made_up(lambda side, length, width: 4.0, lambda side, length, width: 8.0))
    assert "on this machine: UJD does not become slower, but 4 times as fast" in neither


def test_directions_are_compared_with_the_paper_s() -> None:
    """Its passes for a position fall, and its cost of a sweep rises."""
    for passes, cost, said in (
        (0.5, 1.0, "The direction of both is as"),
        (1.5, 1.0, "The direction of the cost of a sweep alone is as"),
        (0.5, -1.0, "The direction of the passes for a position alone is as"),
        (1.5, -1.0, "The direction of neither is as"),
    ):
        figures = made_up(
            lambda side, length, width, a=passes: length**a, lambda side, length, width, a=cost: 1000 * length**a
        )
        assert said in scaling_paper.paper(figures)


def test_a_held_out_flow_that_follows_the_laws_is_predicted_and_another_is_not() -> None:
    figures = made_up(lambda side, length, width: 1.1 * length**0.5, lambda side, length, width: length)
    for index, row in enumerate(figures["rows"][:-1]):  # what no law explains
        row["sweep"] *= 1.05 if index % 2 else 0.95
        row["passes"] = {
            tau: [taken * (0.95 if index % 2 else 1.05) for taken in of] for tau, of in row["passes"].items()
        }
    told = scaling_text.held_out(figures)
    assert "No law is off" in told and "resolution 1, length 1.8, width 0.67 times" in told
    figures["rows"][-1]["sweep"] *= 2
    figures["rows"][-1]["speed_up"] /= 2
    assert "misfit of its law: sweep / single pass." in scaling_text.held_out(figures)


def test_the_paper_s_passes_and_costs_give_its_speed_ups() -> None:
    for name in (scaling_paper.SMALL, scaling_paper.LARGE):
        length, stated = paper.SHAPES[name][1], paper.TABLE_1[name]["UJD"].speed_up
        found = scaling_text.speed_up(length, scaling_paper.passes_of(name), scaling_paper.cost_of(name))
        assert found == pytest.approx(stated, rel=0.03)


def test_the_paper_s_first_block_under_ujd_is_what_its_times_leave_for_it() -> None:
    """UJD differs from SeJD in the first block alone: sweeps in place of sequential steps."""
    for name, sweeps in paper.FIRST_UJD.items():
        step, sweep = paper.COSTS[name]
        rows = paper.TABLE_1[name]
        apart = rows["UJD"].seconds - rows["SeJD"].seconds
        assert (apart + paper.SWEEPS[name][0] * step) / sweep == pytest.approx(sweeps, rel=0.01)


# Measuring --------------------------------------------------------------------------------------------------------------------------------------


def test_passes_of_the_flow_are_those_of_ujd_and_a_smaller_tau_takes_more(tmp_path: Path) -> None:
    torch.manual_seed(0)
    flow = TarFlow(1, 16, 2, 64, 2, 1, noise_std=0.1)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    setup = Setup(flow.eval(), "digits", tmp_path, "smoke")
    found = scaling.measure(flow, setup)
    z, _ = setup.noise()
    layers = pd.solve(flow.system(z), methods.paper()["UJD"]).layers
    assert found["passes"]["0.5"] == [layer.passes for layer in layers]
    assert sum(found["passes"]["0.001"]) > sum(found["passes"]["0.5"])
    assert 0 < found["single"] < found["sweep"] and found["speed_up"] > 0


def test_a_run_goes_on_with_the_flows_that_are_trained(tmp_path: Path) -> None:
    setup = Setup(TarFlow(1, 16, 4, 64, 2, 1), "digits", tmp_path, "smoke", Digits())
    first = scaling.run(setup)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("state.pt")}
    assert len(files) == len(first["rows"])
    second = json.loads(json.dumps(scaling.run(setup)))
    assert files == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("state.pt")}
    for one, other in zip(first["rows"], second["rows"], strict=True):
        assert (one["held_out"], one["passes"]) == (other["held_out"], other["passes"])
    assert [row["varied"] for row in second["rows"]] == ["base", *FACTORS, "held out"]
    assert "held out: side 16, L = 64, width 128" in scaling.tell(second, "digits")
