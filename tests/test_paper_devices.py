"""The device model counts what passes do, finds prices again, and predicts from both."""

import json
import re
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import parallel_decode as pd
from paper_repro import gpus
from paper_repro.data import Digits
from paper_repro.devices import (
    BLOCK_CALLS,
    LAYER_CALLS,
    SWEEP_STEPS,
    WINDOW_STEPS,
    Device,
    Network,
    Pass,
    Work,
    fit,
    sequential,
    sweeps,
    windows,
)
from paper_repro.experiments import devices, devices_text, methods
from paper_repro.setup import Setup
from parallel_decode.adapters.tarflow import TarFlow
from parallel_decode.adapters.tarflow.decoding import BlockSystem, FlowSystem

PRICES = Device(call=5e-6, step=8e-6, product=1 / 160e9, attention=1 / 80e9, byte=1 / 20e9)
NETWORK = Network(channels=128, layers=2, inputs=1, outputs=2)


def tiny(layers: int = 2) -> TarFlow:
    """A flow of 16 positions whose positions depend on one another."""
    torch.manual_seed(0)
    flow = TarFlow(1, 16, 4, 64, 2, layers, num_classes=10, noise_std=0.1)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return flow.eval()


def block(flow: TarFlow, rows: int = 3) -> BlockSystem:
    z = torch.randn(rows, *flow.var.shape, generator=torch.Generator().manual_seed(0))
    layer = flow.system(z, y=torch.arange(rows)).layer(0, None)
    assert isinstance(layer, BlockSystem)
    return layer


def setup(path: Path) -> Setup:
    return Setup(tiny(), "digits", path / "digits", "smoke", Digits())


# Counts ---------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "close"),
    [(pd.Jacobi(freeze=False), 0), (pd.Sequential(), 0), (pd.Sliding(5), 0.01)],  # what is read again needs no output
    ids=["sweep", "sequential", "window"],
)
def test_flops_are_those_that_torch_counts(
    schedule: pd.Schedule, close: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    flow, counts = tiny(), []
    layer = block(flow)
    storage = layer.storage = devices.Noting()
    evaluate = layer.evaluate

    def counted(x: torch.Tensor, window: pd.Window) -> torch.Tensor:
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # others are not counted on a CPU
            value = evaluate(x, window)
        flops = {str(name): count for name, count in counter.get_flop_counts().get("Global", {}).items()}
        counts.append((flops.get("aten.addmm", 0), flops.get("aten.bmm", 0)))
        return value

    monkeypatch.setattr(layer, "evaluate", counted)
    pd.solve(layer, schedule, max_passes=6)
    works = [Network.of(flow).work(one) for one in storage.passes(WINDOW_STEPS)]
    reading = [count for count in counts if count != (0, 0)]  # nothing is read for the first position alone
    assert len(works) == len(reading) >= 5
    for work, (products, attention) in zip(works, reading, strict=True):
        assert work.attention == attention and work.products == pytest.approx(products, rel=close, abs=0)


class Calls(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations that compute or copy: no views."""

    FREE = (
        "view",
        "t",
        "transpose",
        "slice",
        "select",
        "permute",
        "split",
        "chunk",
        "expand",
        "unsqueeze",
        "_unsafe_view",
        "_local_scalar_dense",
    )

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = str(func).split(".")[1]
        same = isinstance(result, torch.Tensor) and result.data_ptr() == getattr(args[0], "data_ptr", int)()
        moves = name not in ("reshape", "flatten", "to") or not same
        self.count += name not in self.FREE and moves
        return result


@pytest.mark.parametrize(
    ("schedule", "steps"),
    [
        (pd.Sequential(), 0),
        (pd.Sliding(4), WINDOW_STEPS),
        (pd.Jacobi(freeze=False, absolute=True, start="zeros"), SWEEP_STEPS),
    ],
    ids=["sequential", "window", "sweep"],
)
@pytest.mark.parametrize("layers", [1, 3])
def test_operations_of_a_pass_are_counted_within_a_tenth(schedule: pd.Schedule, steps: int, layers: int) -> None:
    counts = []
    for passes in (3, 7):
        layer = block(tiny(layers))
        with Calls() as calls:
            pd.solve(layer, schedule, tol=0, max_passes=passes)
        counts.append(calls.count)
    expected = LAYER_CALLS * layers + BLOCK_CALLS + steps
    assert (counts[1] - counts[0]) / 4 == pytest.approx(expected, rel=0.1)


def test_bytes_are_weights_once_keys_and_values_of_every_row_and_activations() -> None:
    flow = tiny()
    network = Network.of(flow)
    one = Pass(rows=3, read=0, keys=10)
    first: Any = flow.blocks[0]
    matrices = [p for name, p in first.named_parameters() if p.dim() == 2 and "embed" not in name]
    weights = sum(p.numel() for p in matrices)
    cache = 2 * 3 * 10 * 64 * 2  # keys and values, rows, keys, channels, layers
    assert network.work(one).bytes == 4 * (weights + cache)
    assert replace(network, concatenates=True).work(one).bytes == 4 * (weights + 3 * cache)
    assert replace(network, itemsize=2).work(one).bytes == 2 * (weights + cache)
    more = network.work(one._replace(read=1)).bytes - network.work(one).bytes
    assert more == 4 * 38 * 3 * 64 * 2


def test_noted_passes_are_those_of_the_fronts() -> None:
    flow, rows = tiny(), 3
    system = flow.system(torch.zeros(rows, *flow.var.shape))
    assert isinstance(system, FlowSystem)
    storage = system.storage = devices.Noting()
    pd.solve(system, pd.Sequential())
    length = len(flow.var)
    assert storage.passes(WINDOW_STEPS) == [Pass(rows, 1, keys) for keys in range(1, length)] * len(flow.blocks)
    assert sequential(rows, length, blocks=2) == {one: 2 for one in storage.passes(WINDOW_STEPS)}
    storage.noted.clear()
    solution = pd.solve(system, methods.paper()["UJD"])
    assert storage.passes(SWEEP_STEPS) == [Pass(rows, length - 1, length - 1, SWEEP_STEPS)] * solution.passes
    assert sweeps(rows, length, 2) == {storage.passes(SWEEP_STEPS)[0]: 2}
    ((one, times),) = windows(rows, length, 4, evaluated=32).items()
    assert (one.read, times) == (8, 4) and 8 < one.keys < length


# Prices ---------------------------------------------------------------------------------------------------------------------------------------


def singles() -> list[Work]:
    shapes = [Pass(b, 1, k) for b in (1, 4, 16) for k in (25, 128, 230)]
    shapes += [Pass(b, w, w + 5, WINDOW_STEPS) for b in (1, 4, 16) for w in (4, 16, 64, 240)]
    return [NETWORK.work(one) for one in shapes]


def test_a_fit_finds_the_prices_again() -> None:
    works = singles()
    found = fit(works, [PRICES.seconds(work) for work in works])
    assert astuple(found) == pytest.approx(astuple(PRICES), rel=1e-6)


def test_a_fit_to_noisy_times_predicts_what_was_not_fitted() -> None:
    works, generator = singles(), torch.Generator().manual_seed(0)
    noise = (1 + 0.05 * torch.randn(len(works), generator=generator)).tolist()
    found = fit(works, [PRICES.seconds(work) * factor for work, factor in zip(works, noise, strict=True)])
    assert min(astuple(found)) >= 0
    for passes in (sequential(8, 256), sweeps(8, 256, 20), windows(2, 256, 40, 64 * 40)):
        assert found.predict(NETWORK, passes) == pytest.approx(PRICES.predict(NETWORK, passes), rel=0.1)


def test_a_price_that_would_be_negative_is_0() -> None:
    works = singles()
    found = fit(works, [PRICES.seconds(work._replace(steps=0)) - 1e-6 * work.steps for work in works])
    assert found.step == 0 < found.product


def test_too_few_passes_are_refused() -> None:
    with pytest.raises(ValueError, match="4 passes and 4 times, expected as many, at least 5"):
        fit(singles()[:4], [1.0] * 4)


def test_seconds_grow_with_rows_positions_keys_and_steps() -> None:
    base = Pass(4, 16, 64, 5)
    least = PRICES.seconds(NETWORK.work(base))
    for more in (base._replace(rows=5), base._replace(read=17), base._replace(keys=65), base._replace(steps=6)):
        assert PRICES.seconds(NETWORK.work(more)) > least
    assert PRICES.seconds(replace(NETWORK, layers=3).work(base)) > least


def test_calibrated_prices_agree_with_what_they_were_calibrated_on() -> None:
    passes = sequential(16, 256, 4)
    seconds = 1.5 * PRICES.predict(NETWORK, passes)
    found = PRICES.calibrated(NETWORK, passes, seconds)
    assert found.predict(NETWORK, passes) == pytest.approx(seconds) and found.call > PRICES.call
    assert PRICES.calibrated(NETWORK, passes, 0.0).call == 0


# GPUs -----------------------------------------------------------------------------------------------------------------------------------------


def test_a_gpu_is_priced_by_its_data_sheet() -> None:
    found = gpus.gpu("H200")
    assert 1 / found.product == pytest.approx(989e12 * gpus.EFFICIENCY["FLOPs"]) and found.product == found.attention
    assert 1 / found.byte == pytest.approx(4.8e12 * gpus.EFFICIENCY["bandwidth"])
    assert gpus.gpu("H200", "tf32").product == pytest.approx(found.product * 989 / 495)
    with pytest.raises(ValueError, match="'V100' in 'bfloat16', expected one of H200, A100, L40S"):
        gpus.gpu("V100")
    with pytest.raises(ValueError, match="in bfloat16 or tf32"):
        gpus.gpu("A100", "float64")


def test_only_the_sequential_rows_of_the_h200_are_calibrated_on_and_most_others_follow() -> None:
    rows, latencies = gpus.check()
    measured = json.loads(gpus.MEASURED.read_text())["whole"]["bfloat16"]["16"]
    assert {row["method"] for row in rows} == measured.keys() - {"Apple's sampler"}
    errors = {row["method"]: devices_text.error(row, "calibrated") for row in rows}
    for name in ("sequential", "sequential, compiled"):
        assert errors.pop(name) == pytest.approx(0, abs=0.01)
    assert sum(abs(error) < 0.26 for error in errors.values()) == len(errors)
    assert 5e-6 < latencies.eager < 25e-6 and 1e-6 < latencies.captured < 6e-6


def test_the_paper_s_sequential_decoding_is_bound_by_memory_where_its_flow_is_large() -> None:
    _, latencies = gpus.check()
    rows = {(row["data"], row["gpu"], row["ours"]): row for row in gpus.paper(latencies)}
    paper, ours = rows["afhq", "H200", False], rows["afhq", "H200", True]
    assert paper["sequential"] > 2 * ours["sequential"] and paper["sweep"] > ours["sweep"]
    assert rows["afhq", "L40S", False]["step"] > 3 * paper["step"]  # as the bandwidths are
    for row in rows.values():
        assert row["SeJD"] < row["UJD"], "the first block is the hard one"


# The experiment -------------------------------------------------------------------------------------------------------------------------------


def test_the_experiment_says_what_it_measured(tmp_path: Path) -> None:
    figures = json.loads(json.dumps(devices.run(setup(tmp_path))))
    assert {row["method"] for row in figures["schedules"]} == {*methods.paper(), "window of 16", "window of 64", "auto"}
    assert all(row["measured"] > 0 and row["predicted"] > 0 for row in figures["schedules"])
    for row in figures["schedules"]:  # an error that the text has to name
        row["predicted"] = row["measured"] * (1.5 if (row["method"], row["batch"]) == ("SeJD", 2) else 1.1)
    text = devices.tell(figures, "digits")
    count = len(figures["schedules"])
    assert f"{count - 1} of {count} predictions are within 25%; not: SeJD at batch 2 (+50%)." in text
    assert len(re.findall(r"\*as predictions\*", text)) == 2 and "nan" not in text
    figures["prices"]["attention"] = 0.0
    assert "attention at more than can be seen" in devices.tell(figures, "digits")
