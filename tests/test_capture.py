"""What CUDA graphs capture reads nothing of its tensors on the host: run with tensors that have no values, where that raises.

(On a build without CUDA fake tensors of the device "cuda" cannot be indexed by tensors, so these are of the CPU.)
"""

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import parallel_decode as pd
from parallel_decode.adapters.itarflow import ITarFlow
from parallel_decode.adapters.starflow import StarFlow, decoding
from parallel_decode.adapters.tarflow import TarFlow
from parallel_decode.adapters.tarflow.decoding import BlockSystem
from parallel_decode.adapters.tarflow.guidance import Guidance, guide_gaussians
from parallel_decode.adapters.tarflow.weights import Weights
from parallel_decode.cached import KeyValueStorage
from parallel_decode.cached.graphs import Graphs

STARFLOW: dict[str, Any] = dict(
    in_channels=4, img_size=4, patch_size=1, channels=32, num_blocks=2, layers_per_block=1, head_dim=16, rope=True, sos=True, txt_size=3,
    txt_dim=5, cond_top_only=True, use_softplus=True, soft_clip=4.0, num_heads=2, num_kv_heads=1,
)  # fmt: skip
WINDOWS = {
    "one position": pd.Window(range(3, 4), 2),
    "some positions": pd.Window(range(3, 9), 2),
    "everything": pd.Window.full(16),
    "the first": pd.Window(range(4), 0),
}


@pytest.mark.parametrize(
    "guidance",
    [Guidance(), Guidance(1.0), Guidance(1.0, "a", annealed=True, attn_temp=0.5), Guidance(1.0, rule=guide_gaussians)],
)
@pytest.mark.parametrize("kind", [TarFlow, ITarFlow])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.filterwarnings("ignore:Accessing the data pointer")  # outside of what is captured
def test_a_captured_window_reads_no_value_on_the_host(
    dtype: torch.dtype, kind: type[Any], guidance: Guidance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("parallel_decode.adapters.tarflow.changes._unchanged", lambda module: True)  # but for the mode
    with FakeTensorMode(), torch.no_grad():
        torch.set_default_dtype(dtype)  # fake weights cannot be converted
        try:
            flow = kind(1, 8, 2, 64, num_blocks=2, layers_per_block=2, num_classes=3).eval()
        finally:
            torch.set_default_dtype(torch.float32)
        z, y, graphs = torch.empty(3, 16, 4), torch.empty(3, dtype=torch.long), Graphs(capture=False)
        t = torch.empty(3, 1) if kind is ITarFlow else None
        for block in flow.blocks:
            system = BlockSystem(block, z, y, guidance, KeyValueStorage(), graphs, t)
            x = system.initial()
            for window in WINDOWS.values():
                assert system.evaluate(x, window).shape == (3, len(window.positions), 4)
            assert isinstance(system._given, Weights) and isinstance(system._given.layers[0], tuple), "not prepared"
        assert graphs.runs, "nothing was captured"


def test_reading_a_value_would_raise() -> None:
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        float(torch.empty(3).sum())


@pytest.mark.parametrize("guidance", [0.0, 1.0])
def test_nor_does_one_of_a_starflow(guidance: float) -> None:
    with FakeTensorMode(), torch.no_grad():
        flow = StarFlow(**STARFLOW).eval()
        z, text = torch.empty(3, 16, 4), torch.empty(6 if guidance else 3, 3, 5)
        graphs, angles, guide = Graphs(capture=False), flow.angles(flow.deep, 3, 1, (4, 4)), Guidance(guidance)
        system = decoding.BlockSystem(flow.deep, z, z[:, :0], text, angles, guide, graphs=graphs)
        x = system.initial()
        for window in WINDOWS.values():
            assert system.evaluate(x, window).shape == (3, len(window.positions), 4)
        assert graphs.runs, "nothing was captured"


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("guidance", [0.0, 1.0])
def test_windows_of_a_starflow_are_read_on_the_device_of_the_flow(guidance: float, captured: bool) -> None:
    """Here it is the CPU, where another device is the default."""
    made = StarFlow(**STARFLOW).eval()
    text = torch.zeros(6 if guidance else 3, 3, 5)
    z, angles, graphs = torch.ones(3, 16, 4), made.angles(made.deep, 3, 1, (4, 4)), Graphs(capture=False)
    system = decoding.BlockSystem(
        made.deep, z, z[:, :0], text, angles, Guidance(guidance), graphs=graphs if captured else None
    )
    x = system.initial()
    with torch.no_grad(), torch.device("meta"):
        for window in WINDOWS.values():
            assert system.evaluate(x, window).device.type == "cpu"


@pytest.mark.parametrize("guidance", [Guidance(), Guidance(1.0)], ids=["plain", "guided"])
def test_torch_compile_takes_a_captured_window_whole(guidance: Guidance, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a break, and with the same bits, where it compiles nothing (docs/performance.md says why windows are captured by hand)."""
    torch.manual_seed(0)
    flow = TarFlow(1, 8, 2, 64, num_blocks=1, layers_per_block=1, num_classes=3).eval()
    torch.nn.init.normal_(flow.blocks[0].proj_out.weight, std=0.1)  # type: ignore[union-attr,arg-type]
    z, y = torch.randn(3, 16, 4), torch.arange(3)

    def windows(compiled: bool) -> list[torch.Tensor]:
        graphs = Graphs(capture=False)
        if compiled:
            monkeypatch.setattr(
                graphs,
                "_captured",
                lambda function, x, start: torch.compile(function, backend="eager", fullgraph=True, dynamic=False),
            )
        system = BlockSystem(flow.blocks[0], z, y, guidance, graphs=graphs)  # type: ignore[arg-type]
        x = system.initial()
        return [system.evaluate(x, window) for window in WINDOWS.values()]

    with torch.no_grad():
        for one, other in zip(windows(True), windows(False), strict=True):
            assert torch.equal(one, other)
