"""The trained flow that comes with the package: the main job, on real input."""

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.svm import SVC
from torch import Tensor

import parallel_decode as pd
from parallel_decode.adapters.tarflow import TarFlow, digits

LABELS = torch.arange(2)


@pytest.fixture(scope="module")
def flow() -> TarFlow:
    return digits().double()


@pytest.fixture(scope="module")
def z() -> Tensor:
    return torch.randn(2, 256, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture(scope="module")
def sequential(flow: TarFlow, z: Tensor) -> Tensor:
    return pd.solve(flow.system(z, y=LABELS), "sequential").value


def test_sequential_samples_invert_the_flow(flow: TarFlow, z: Tensor, sequential: Tensor) -> None:
    with torch.no_grad():
        assert (flow(sequential, LABELS)[0] - z).abs().max() < 1e-12
    single = digits()
    x = pd.solve(single.system(z.float(), y=LABELS), "sequential").value
    assert (x - sequential).abs().max() < 1e-5


@pytest.mark.parametrize(
    "schedule", [pd.Jacobi(), pd.GaussSeidelJacobi(64), pd.JacobiGaussSeidel(2), pd.Sliding(64)], ids=repr
)
def test_exact_schedules_give_the_sequential_samples_in_fewer_passes(
    flow: TarFlow, z: Tensor, sequential: Tensor, schedule: pd.Schedule
) -> None:
    solution = pd.solve(flow.system(z, y=LABELS), schedule, tol=0)
    assert (solution.value - sequential).abs().max() < 1e-10
    assert set(solution.status) == {pd.Status.EXACT}
    assert all(layer.passes < 256 for layer in solution.layers)


@pytest.mark.parametrize("schedule", ["jacobi", "selective", "gs-jacobi", "sliding"])
def test_the_default_tolerance_stays_within_one_level_of_8_bits(schedule: str) -> None:
    flow, labels = digits(), torch.arange(8)
    z = torch.randn(8, 256, 1, generator=torch.Generator().manual_seed(1))
    expected = pd.solve(flow.system(z, y=labels), "sequential").value
    solution = pd.solve(flow.system(z, y=labels), schedule)
    assert (solution.value - expected).abs().max() < 2 / 255
    assert solution.passes < 4 * 256 // 2


def test_samples_are_read_as_digits() -> None:
    """A classifier that was trained on the real digits names the class that each sample was asked to be."""
    real = load_digits()
    reader = SVC().fit(real.images.reshape(-1, 64) / 8 - 1, real.target)
    labels = torch.arange(10).repeat(4)
    images = digits().sample(
        y=labels, schedule="sliding", denoise=True, generator=torch.Generator().manual_seed(0), tol=1e-2
    )
    assert isinstance(images, Tensor)
    small = F.avg_pool2d(images, 2).clamp(-1, 1).reshape(-1, 64)
    read = torch.from_numpy(reader.predict(small.numpy()))
    assert (read == labels).double().mean() >= 0.8
