"""Distances between sets of images, their intervals, the networks behind them, and scores of single images."""

import doctest
import importlib
import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from paper_repro.data import Digits
from paper_repro.quality import (
    Classifier,
    Features,
    Inception,
    Statistics,
    bootstrap,
    brisque,
    classifier,
    clip_iqa,
    difference,
    distances,
    features,
    frechet,
    intervals,
    kid,
    reference_statistics,
    squared_mmd,
)
from paper_repro.quality.inception import Network


def drawn(n: int, f: int, seed: int = 0) -> Tensor:
    return torch.randn(n, f, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def imported(name: str) -> Any:
    """A module, or a skip: a torchvision that does not fit torch fails its importers in other ways than ImportError."""
    try:
        return importlib.import_module(name)
    except Exception as error:  # noqa: BLE001, of whatever type
        pytest.skip(f"{name}: {error}")


class Bars:
    """Photographs without labels, as a data set: bright at the top, so that a rotation shows."""

    img_size, in_channels, num_classes = 8, 3, 0

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, None]:
        return torch.linspace(1, -1, 8)[:, None] + 0.3 * torch.randn(size, 3, 8, 8, generator=generator), None

    def held_out(self) -> tuple[Tensor, None]:
        return self.batch(64, torch.Generator().manual_seed(1))

    def reference(self, batch_size: int) -> Any:
        raise NotImplementedError


@pytest.mark.parametrize("module", [classifier, distances, features, intervals])
def test_the_examples_of_docstrings_run(module: Any) -> None:
    assert doctest.testmod(module, optionflags=doctest.ELLIPSIS).failed == 0


# Distances


def test_frechet_is_the_closed_form_of_gaussians() -> None:
    # commuting covariances: |m|^2 + sum (sqrt a_i - sqrt b_i)^2, in a basis that is not the axes'
    basis = torch.linalg.qr(drawn(5, 5)).Q
    a, b = torch.tensor([1.0, 2, 3, 4, 9]).double(), torch.tensor([4.0, 2, 1, 0.25, 16]).double()
    mean = drawn(1, 5, 1)[0]
    left = Statistics(torch.zeros(5).double(), basis @ a.diag() @ basis.T, 10)
    right = Statistics(mean, basis @ b.diag() @ basis.T, 10)
    exact = float(mean.square().sum() + (a.sqrt() - b.sqrt()).square().sum())
    assert frechet(left, right) == pytest.approx(exact, rel=1e-12)
    # covariances of two features that do not commute: tr (AB)^(1/2) = sqrt(tr AB + 2 sqrt(det AB))
    p, q = torch.tensor([[2.0, 0.5], [0.5, 1]]).double(), torch.tensor([[1.0, -0.8], [-0.8, 3]]).double()
    trace = math.sqrt(float((p @ q).trace()) + 2 * math.sqrt(float((p @ q).det())))
    zero = torch.zeros(2).double()
    expected = float(p.trace() + q.trace()) - 2 * trace
    assert frechet(Statistics(zero, p, 9), Statistics(zero, q, 9)) == pytest.approx(expected, rel=1e-12)
    samples = (
        basis @ a.sqrt().diag() @ drawn(40_000, 5, 2).T,
        mean[:, None] + basis @ b.sqrt().diag() @ drawn(40_000, 5, 3).T,
    )
    assert frechet(samples[0].T, samples[1].T) == pytest.approx(exact, rel=0.03)


def test_statistics_are_unbiased_and_of_any_number_of_features() -> None:
    x = drawn(6, 3).float()
    ours = Statistics.of(x)
    centred = x.double() - x.double().mean(0)
    torch.testing.assert_close(ours.covariance, centred.T @ centred / 5)
    assert ours.mean.dtype == torch.float64 and ours.count == 6
    assert Statistics.of(x[:, :1]).covariance.shape == (1, 1)


def test_frechet_is_symmetric_and_zero_for_equal_sets() -> None:
    a, b = drawn(50, 6), drawn(60, 6, 1) * 2 + 1
    assert frechet(a, b) == pytest.approx(frechet(b, a), rel=1e-10) and frechet(a, b) > 1
    assert 0 <= frechet(a, a.flip(0)) < 1e-12


def test_frechet_holds_for_singular_covariances() -> None:
    few, others = drawn(10, 40), drawn(12, 40, 1)  # fewer images than features
    assert frechet(few, few) < 1e-5

    # adding features that are always 0 changes nothing
    def padded(x: Tensor) -> Tensor:
        return torch.cat([x, torch.zeros(len(x), 7).double()], 1)

    assert frechet(padded(few), padded(others)) == pytest.approx(frechet(few, others), rel=1e-5)
    point = Statistics(torch.zeros(40).double(), torch.zeros(40, 40).double(), 10)
    own = Statistics.of(few)
    assert frechet(few, point) == pytest.approx(float(own.mean.square().sum() + own.covariance.trace()), rel=1e-12)


def test_squared_mmd_is_the_double_loop() -> None:
    a, b = drawn(7, 3), drawn(5, 3, 1) + 0.5

    def kernel(x: Tensor, y: Tensor) -> float:
        return (float(x @ y) / 3 + 1) ** 3

    within_a = sum(kernel(a[i], a[j]) for i in range(7) for j in range(7) if i != j) / 42
    within_b = sum(kernel(b[i], b[j]) for i in range(5) for j in range(5) if i != j) / 20
    across = sum(kernel(x, y) for x in a for y in b) / 35
    assert squared_mmd(a, b) == pytest.approx(within_a + within_b - 2 * across, rel=1e-12)


def test_kid_is_unbiased() -> None:
    values = torch.tensor([squared_mmd(drawn(20, 4, 2 * s), drawn(20, 4, 2 * s + 1)) for s in range(600)])
    assert abs(values.mean()) < 3 * values.std() / math.sqrt(600) and values.min() < 0
    mean, deviation = kid(drawn(400, 4), drawn(400, 4, 1) + 1, 20, 50, torch.Generator().manual_seed(0))
    # E k(x, y) of N(m, 1) and N(n, 1) in 4 features, by moments of z = x.y: 1 + 3 E z/4 + 3 E z^2/16 + E z^3/64
    # m = n = 0: E z^2 = 4; m = 0, n = 1: E z^2 = 8; m = n = 1: E z = 4, E z^2 = 28, E z^3 = 232
    exact = (1 + 12 / 16) + (1 + 3 + 3 * 28 / 16 + 232 / 64) - 2 * (1 + 24 / 16)
    assert mean == pytest.approx(exact, abs=0.25 * exact) and 0 < deviation < exact


def test_kid_is_the_mean_and_deviation_of_its_subsets() -> None:
    a, b = drawn(40, 4), drawn(40, 4, 1) + 1
    one, two = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    first, second = (kid(a, b, 1, 20, one)[0] for _ in range(2))
    assert first != second
    assert kid(a, b, 2, 20, two) == pytest.approx(((first + second) / 2, abs(first - second) / 2), rel=1e-9)


@pytest.mark.parametrize("bad", [torch.zeros(1, 3), torch.zeros(4), torch.full((4, 3), math.nan)])
def test_features_that_have_no_statistics_are_refused(bad: Tensor) -> None:
    for distance in (frechet, squared_mmd):
        with pytest.raises(ValueError, match=r"expected finite numbers \(N, F\) with N >= 2"):
            distance(bad, drawn(5, 3))


def test_arguments_that_do_not_fit_are_refused() -> None:
    a, generator = drawn(5, 3), torch.Generator()
    for distance in (frechet, squared_mmd):
        with pytest.raises(ValueError, match="a has 3 features and b 4: take both from the same network"):
            distance(a, drawn(5, 4))
    for subsets, size in ((0, 3), (1, 6), (1, 1)):
        with pytest.raises(ValueError, match=f"{subsets} subsets of {size} rows cannot be drawn from 5 and 5"):
            kid(a, a, subsets, size, generator)
    with pytest.raises(ValueError, match="draws is 1"):
        bootstrap(a, a, frechet, 1, generator)
    with pytest.raises(ValueError, match="one row for each noise"):
        difference(a, a[:4], a, frechet, 9, generator)


def test_distances_are_those_of_torchmetrics() -> None:
    fid, identity = imported("torchmetrics.image.fid").FrechetInceptionDistance, torch.nn.Identity()
    identity.num_features = 6  # type: ignore[assignment]
    a, b = drawn(50, 6), drawn(50, 6, 1) * 2 + 1
    metric = fid(feature=identity)
    metric.update(a, real=True)
    metric.update(b, real=False)
    assert frechet(a, b) == pytest.approx(metric.compute().item(), rel=1e-10)


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance`")
def test_kid_is_that_of_torchmetrics() -> None:
    metric = imported("torchmetrics.image.kid").KernelInceptionDistance
    a, b = drawn(50, 6), drawn(50, 6, 1) * 2 + 1
    theirs = metric(feature=torch.nn.Identity(), subsets=2, subset_size=50)
    theirs.update(a, real=True)
    theirs.update(b, real=False)
    mean, _ = kid(a, b, 2, 50, torch.Generator())
    assert mean == pytest.approx(theirs.compute()[0].item(), rel=1e-10)


# Intervals


def test_an_interval_holds_the_expected_value_about_as_often_as_it_says() -> None:
    reference = Statistics(torch.zeros(8).double(), torch.eye(8).double(), 1000)

    def sample(seed: int) -> Tensor:
        return drawn(60, 8, seed) * 1.5 + 0.5

    expected = torch.tensor([frechet(sample(1000 + s), reference) for s in range(1000)])
    generator = torch.Generator().manual_seed(0)
    found = [bootstrap(sample(s), reference, frechet, 60, generator) for s in range(80)]
    covered = sum(i.low <= expected.mean() <= i.high for i in found) / 80
    assert 0.85 <= covered <= 0.99
    assert sum(i.spread for i in found) / 80 == pytest.approx(float(expected.std()), rel=0.2)


def test_the_long_tail_of_the_draws_is_below_the_value() -> None:
    # the expectation of a measure that is now and then far too large is rather below a value than above it
    found = bootstrap(drawn(20, 1), drawn(20, 1), lambda a, _: float((2 * a.mean()).exp()), 400, torch.Generator())
    assert found.value - found.low > 1.2 * (found.high - found.value)


def test_the_reference_is_resampled_where_it_is_features() -> None:
    a, b = drawn(100, 3), drawn(30, 3, 1) + 1
    fixed = bootstrap(a, Statistics.of(b), frechet, 100, torch.Generator().manual_seed(0))
    both = bootstrap(a, b, frechet, 100, torch.Generator().manual_seed(0))
    assert both.value == fixed.value and both.spread > 1.3 * fixed.spread


def test_a_paired_difference_is_tighter_than_an_unpaired_one() -> None:
    x = drawn(200, 4)
    y, reference = x + 0.01 * drawn(200, 4, 1), drawn(200, 4, 2) + 1
    paired = difference(x, y, reference, frechet, 80, torch.Generator().manual_seed(0))
    alone = [bootstrap(s, reference, frechet, 80, torch.Generator().manual_seed(i)) for i, s in enumerate((x, y))]
    assert paired.value == pytest.approx(alone[0].value - alone[1].value, abs=1e-12)
    assert 0 < paired.spread < 0.1 * math.hypot(alone[0].spread, alone[1].spread)
    assert paired.low < 0 < paired.high
    same = difference(x, x, reference, squared_mmd, 5, torch.Generator())
    assert (same.low, same.high, same.spread) == (0, 0, 0)


# Networks


def random_weights() -> dict[str, Tensor]:
    """Of the published shapes, from a fixed seed, such that features are of the order of 1."""
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in Network().state_dict().items()}
    weights = {}
    for key, shape in shapes.items():
        if key.endswith("conv.weight"):
            weights[key] = torch.randn(shape, generator=generator) * math.sqrt(2 / math.prod(shape[1:]))
        elif key.endswith(("bn.weight", "running_var")):
            weights[key] = torch.rand(shape, generator=generator) + 0.5
        elif not key.endswith("num_batches_tracked"):
            weights[key] = 0.1 * torch.randn(shape, generator=generator)
    return weights


@pytest.fixture(scope="module")
def weights_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save(random_weights(), path)
    return path


def test_inception_is_that_of_torch_fidelity_and_not_called_fid_by_other_weights(weights_file: Path) -> None:
    before = torch.get_rng_state()
    network: Features = Inception(weights_file)
    assert torch.equal(before, torch.get_rng_state())
    assert not network.is_inception and network.label == f"Frechet distance (inception file {network.sha256[:8]})"  # type: ignore[attr-defined]
    ramp = torch.linspace(-1.2, 1.2, 3 * 40 * 40).reshape(1, 3, 40, 40)
    found = network(torch.cat([ramp, ramp.flip(1, 3)]))
    assert found.shape == (2, network.size) == (2, 2048) and found.dtype == torch.float64
    # torch-fidelity 0.4's network with these weights, after torchmetrics 1.9's resizing; it needs torchvision
    recorded = torch.tensor([[0.0493, 1.1893, 0.0438, 0.9594], [0.0245, 1.4826, 0.6615, 2.1122]]).double()
    torch.testing.assert_close(found[:, [1, 511, 1500, 2047]], recorded, rtol=1e-3, atol=1e-3)
    noise = (
        torch.rand(1, 3, 500, 500, generator=torch.Generator().manual_seed(0)) * 2 - 1
    )  # antialiasing shows here only
    recorded = torch.tensor([[0.0126, 1.9608, 0.429, 2.0016]]).double()
    torch.testing.assert_close(network(noise)[:, [1, 511, 1500, 2047]], recorded, rtol=1e-3, atol=1e-3)
    grey = network(ramp[:, :1])
    torch.testing.assert_close(grey, network(ramp[:, :1].repeat(1, 3, 1, 1)))


def test_a_file_of_the_known_digest_is_called_fid(weights_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(features.KNOWN, Inception(weights_file).sha256, "published")
    network = Inception(weights_file)
    assert network.is_inception and network.label == "FID" and network.name == "published"


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path, weights = tmp_path / "weights.pth", random_weights()
    with pytest.raises(FileNotFoundError, match="nothing is downloaded here"):
        Inception(path)
    key = "Mixed_7c.branch3x3_2b.conv.weight"
    missing = {k: v for k, v in weights.items() if k != key}
    for state, message in (
        (missing, f"has no weight {key}"),
        (weights | {key: torch.zeros(2)}, f"has {key} of shape \\(2,\\), expected \\(384, 384, 3, 1\\)"),
        ([1, 2], "holds no dictionary of tensors"),
        ({"a": Path()}, "cannot be read, it may be damaged or of another kind"),  # code to unpickle
    ):
        torch.save(state, path)
        with pytest.raises(ValueError, match=message):
            Inception(path)
    torch.save(weights, path)
    for content in (path.read_bytes()[:1_000_000], b"no weights", b""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="cannot be read, it may be damaged or of another kind"):
            Inception(path)


@pytest.mark.parametrize(
    "images", [torch.zeros(3, 8, 8), torch.zeros(1, 2, 8, 8), torch.zeros(0, 3, 8, 8), torch.zeros(1, 3, 8, 8).byte()]
)
def test_images_of_another_form_are_refused(images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"expected floating point \(N, C, H, W\) in \[-1, 1\]"):
        Classifier("untrained", 3, 4)(images)


def test_images_that_are_not_finite_are_refused_and_not_averaged() -> None:
    images = torch.zeros(3, 1, 8, 8)
    images[1, 0, 2, 2] = math.nan
    with pytest.raises(ValueError, match="1 of 3 images are not finite"):
        Classifier("untrained", 1, 4)(images)


def test_reference_statistics_are_those_of_a_torchmetrics_state(tmp_path: Path) -> None:
    x, path = drawn(30, 4) + 2, tmp_path / "afhq_256_fid_stats.pth"
    state = {
        "real_features_sum": x.sum(0),
        "real_features_cov_sum": x.T @ x,
        "real_features_num_samples": torch.tensor(30),
        "inception.fc.bias": torch.zeros(3),
    }
    torch.save(state, path)
    found, ours = reference_statistics(path), Statistics.of(x)
    torch.testing.assert_close((found.mean, found.covariance), (ours.mean, ours.covariance))
    assert found.count == 30
    for change, message in (
        ({"real_features_cov_sum": None}, "has no real_features_cov_sum"),
        ({"real_features_cov_sum": torch.zeros(3, 3)}, r"expected \(F,\) and \(F, F\) of 2 or more"),
        ({"real_features_num_samples": torch.tensor(1)}, "of 1 images"),
    ):
        torch.save(state | change, path)
        with pytest.raises(ValueError, match=message):
            reference_statistics(path)


def test_the_classifier_tells_digits_apart_and_is_the_same_again(tmp_path: Path) -> None:
    data = Digits()
    network = Classifier.train("digits", data, steps=120)
    assert network.accuracy(data) > 0.9
    images, _ = data.held_out()
    found = network(images)
    assert found.shape == (len(images), network.size) and found.dtype == torch.float64
    network.save(tmp_path / "digits.safetensors")
    loaded: Features = Classifier.load(tmp_path / "digits.safetensors")
    assert torch.equal(loaded(images), found)
    assert not loaded.is_inception and loaded.label == "Frechet distance in the features of digits"
    # what a quality measure is for: a digit blurred is further from digits than other digits are
    even, odd = found[::2], found[1::2]
    blurred = network(torch.nn.functional.avg_pool2d(images[1::2], 5, 1, 2))
    assert frechet(even, blurred) > 2 * frechet(even, odd)
    short = [Classifier.train("digits", data, steps=3, seed=seed)(images[:9]) for seed in (1, 1, 2)]
    assert torch.equal(short[0], short[1]) and not torch.equal(short[0], short[2])


def test_the_classifier_learns_rotations_where_there_are_no_labels() -> None:
    before = torch.get_rng_state()
    assert Classifier.train("bars", Bars(), steps=30).accuracy(Bars()) > 0.9
    assert torch.equal(before, torch.get_rng_state())


def test_classifiers_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "classifier.safetensors"
    with pytest.raises(FileNotFoundError, match="train a classifier"):
        Classifier.load(path)
    Classifier("bars", 3, 4).save(path)
    with pytest.raises(ValueError, match="images have 1 channels, bars was trained on 3"):
        Classifier.load(path)(torch.zeros(1, 1, 8, 8))
    content = path.read_bytes()
    for damaged in (content[:-9], b"", b"no tensors"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"is damaged, or not what Classifier\.save writes"):
            Classifier.load(path)
    for metadata in (None, {"name": "another"}):
        save_file({"weight": torch.zeros(1)}, path, metadata=metadata)
        with pytest.raises(ValueError, match=r"is damaged, or not what Classifier\.save writes"):
            Classifier.load(path)


# Scores of single images


@pytest.mark.parametrize("score", [brisque, clip_iqa])
def test_without_piq_one_error_says_what_still_works(score: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "piq", None)
    with pytest.raises(ImportError, match="The Frechet distance, KID and the bootstrap intervals work without it"):
        score(torch.zeros(1, 3, 32, 32))


def test_a_broken_torchvision_is_reported_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "piq.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "piq", raising=False)
    with pytest.raises(
        ImportError, match=r"RuntimeError: operator torchvision::nms does not exist.*torchvision that fits"
    ):
        brisque(torch.zeros(1, 3, 32, 32))


def test_scores_get_images_from_0_to_1_and_load_no_pickled_code(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, channels = [], []

    def score(images: Tensor, reduction: str = "none") -> Tensor:
        channels.append(images.shape[1])
        seen.append((images.min().item(), images.max().item(), os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"]))
        return images.mean((1, 2, 3))

    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)
    monkeypatch.setitem(sys.modules, "piq", SimpleNamespace(brisque=score, CLIPIQA=lambda: score))
    images = torch.linspace(-1.5, 1.5, 70 * 64).reshape(70, 1, 8, 8)
    for measure in (brisque, clip_iqa):
        torch.testing.assert_close(measure(images), features.unit(images).mean((1, 2, 3)).double())
    assert min(s[0] for s in seen) == 0 and max(s[1] for s in seen) == 1 and {s[2] for s in seen} == {"1"}
    assert channels == [1, 1, 3, 3]  # two batches each; CLIP sees colours only
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


@pytest.mark.parametrize("score", [brisque, clip_iqa])
def test_a_failed_download_is_named(score: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> Any:
        raise ConnectionError("no route")

    monkeypatch.setitem(sys.modules, "piq", SimpleNamespace(brisque=offline, CLIPIQA=offline))
    with pytest.raises(OSError, match=r"could not download .* \(no route\): run it once on a machine with a network"):
        score(torch.zeros(1, 3, 32, 32))
