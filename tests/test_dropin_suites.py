"""What the suites of zuko 1.6.0, nflows 0.14 and normflows 1.7.3 check of autoregressive flows, through the drop-ins.

Written anew after zuko's tests/test_flows.py and test_bayesian.py, nflows' tests/transforms/autoregressive_test.py and
tests/flows/autoregressive_test.py, and normflows' flow_test.py beside its flows. Features are 8 where they have 3 to 20: at most three
passes are left to the library. Everything drawn is compared with the library's own as well, with the generator's state.

Left out: coupling, continuous and element-wise flows, which have no autoregressive inverse (`parallel` leaves them as they are); and
nflows' MaskedUMNNAutoregressiveTransform, which has an inverse of its own and needs a package that is not among ours.
"""

import pickle
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import normflows
import pytest
import torch
import zuko
from nflows import transforms as nt
from nflows.flows.autoregressive import MaskedAutoregressiveFlow
from nflows.transforms.base import Transform
from torch import Tensor, nn
from torch.autograd.functional import jacobian
from zuko.bayesian import BayesianModel
from zuko.flows import MaskedAutoregressiveTransform

from parallel_decode.adapters.maf import parallel
from parallel_decode.adapters.maf.inverse import Parallel

D, C, N = 8, 5, 16
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the libraries' own


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"], autouse=True)
def default_dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(before)


def drawn(flow: Any, draw: Callable[[Any], Any]) -> tuple[list[Tensor], Tensor]:
    """What is drawn, and the state that it leaves the generator in."""
    torch.manual_seed(7)
    found = draw(flow)
    return list(found) if isinstance(found, tuple) else [found], torch.get_rng_state()


def check_drawn(flow: Any, fast: Any, draw: Callable[[Any], Any]) -> list[Tensor]:
    (own, state), (ours, after) = drawn(flow, draw), drawn(fast, draw)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(own, ours, strict=True))
    assert torch.equal(state, after), "a generator is used otherwise than by the library"
    return ours


def made_parallel(flow: Any) -> Any:
    fast = parallel(flow)
    assert any(isinstance(module, Parallel) for module in fast.modules()), str(parallel.report(fast))
    return fast


def has_gradients(flow: nn.Module) -> bool:
    found = all(p.grad is not None and bool(p.grad.isfinite().all()) for p in flow.parameters())
    flow.zero_grad(set_to_none=True)
    return found


# zuko

SMALL: dict[str, Any] = {"transforms": 2, "hidden_features": (16, 16)}
TINY: dict[str, Any] = {"transforms": 1, "hidden_features": (8,), "signal": 4, "network": {"hidden_features": (8,)}}
ZUKO: dict[str, Callable[[], Any]] = {
    "MAF": lambda: zuko.flows.MAF(D, C, **SMALL),
    "MAF, random orders": lambda: zuko.flows.MAF(D, C, randperm=True, **SMALL),
    "NSF": lambda: zuko.flows.NSF(D, C, **SMALL),
    "NCSF": lambda: zuko.flows.NCSF(D, C, **SMALL),
    "SOSPF": lambda: zuko.flows.SOSPF(D, C, **SMALL),
    "BPF": lambda: zuko.flows.BPF(D, C, **SMALL),
    "NAF": lambda: zuko.flows.NAF(D, C, **TINY),
    "UNAF": lambda: zuko.flows.UNAF(D, C, **TINY),
}


@pytest.mark.parametrize("name", ZUKO)
def test_zukos_flows(name: str) -> None:
    flow = ZUKO[name]()
    fast, x, c = made_parallel(flow), torch.rand(N, D), torch.randn(C)

    log_p = fast(c).log_prob(x)
    assert log_p.shape == (N,) and torch.equal(log_p, flow(c).log_prob(x))
    (-log_p.mean()).backward()
    assert has_gradients(fast)

    assert check_drawn(flow, fast, lambda f: f(c).sample((N,)))[0].shape == (N, D)
    assert fast(c).has_rsample
    (drew, *_) = check_drawn(flow, fast, lambda f: f(c).rsample_and_log_prob())
    drew.square().sum().sqrt().backward()  # type: ignore[no-untyped-call]
    assert has_gradients(fast)

    c = torch.randn(N, C)
    transform = fast(c).transform
    assert torch.allclose(transform.inv(transform(x)), x, atol=1e-4)

    again = pickle.loads(pickle.dumps(fast))
    assert torch.equal(again(c).log_prob(x), fast(c).log_prob(x))
    check_drawn(flow, again, lambda f: f(c).sample())
    assert "order" in repr(fast) and len(repr(fast).splitlines()) == len(repr(flow).splitlines())


def chain(order: Tensor) -> Tensor:
    """The adjacency of a chain in some order, with some further dependencies."""
    adjacency = (torch.rand(D, D) < 0.25).tril() | torch.eye(D).bool() | torch.eye(D).roll(-1, 1).tril().bool()
    return adjacency[order][:, order]


TRIANGULAR: dict[str, Callable[[Tensor], dict[str, Any]]] = {
    "full": lambda order: {},
    "4 passes": lambda order: {"passes": 4},
    "order": lambda order: {"order": order},
    "adjacency": lambda order: {"adjacency": chain(order)},
    "adjacency of the context": lambda order: {"adjacency": torch.cat([chain(order), torch.rand(D, C) < 0.25], 1)},
}


@pytest.mark.parametrize("name", TRIANGULAR)
def test_zukos_triangular_transforms(name: str) -> None:
    arguments = TRIANGULAR[name](torch.randperm(D))
    for context in (0, C) if "context" not in name else (C,):
        lazy = made_parallel(MaskedAutoregressiveTransform(D, context, **arguments))
        c = torch.randn(context) if context else None
        for x in (torch.randn(N, D), torch.randn(D)):
            y = lazy(c)(x)
            assert y.shape == x.shape and y.requires_grad
            assert torch.allclose(lazy(c).inv(y), x, atol=1e-4)
        for transform, at, sign in ((lazy(c), x, 1), (lazy(c).inv, y.detach(), -1)):  # of the inverse too
            slopes = jacobian(transform, at)  # type: ignore[no-untyped-call]
            log_det = torch.linalg.slogdet(slopes).logabsdet
            assert torch.allclose(sign * lazy(c).log_abs_det_jacobian(x, y), log_det, atol=1e-4)
            assert torch.allclose(slopes.diag().abs().log().sum(), log_det, atol=1e-4)
            if "adjacency" in arguments and sign == 1:
                assert (slopes[~arguments["adjacency"][:, :D]] == 0).all()


@pytest.mark.parametrize("local_trick", [False, True])
@pytest.mark.parametrize("name", ["MAF", "NSF", "SOSPF", "BPF"])
def test_zukos_bayesian_flows(name: str, local_trick: bool) -> None:
    flow, c = ZUKO[name](), torch.randn(C)
    model = BayesianModel(flow, init_logvar=-2.0)
    fast = BayesianModel(made_parallel(flow), init_logvar=-2.0)
    fast.load_state_dict(model.state_dict())

    def draw(model: Any) -> tuple[Tensor, ...]:
        with model.reparameterize(local_trick=local_trick) as drawn:
            return drawn(c).sample((N,)), drawn(c).rsample(), drawn(c).log_prob(torch.zeros(D))

    check_drawn(model, fast, draw)
    check_drawn(model, fast, lambda model: model.sample_model()(c).sample((N,)))
    with fast.reparameterize(local_trick=local_trick) as drawn:
        drawn(c).rsample().square().sum().sqrt().backward()
    assert all(p.grad is not None for p in (*fast.means.parameters(), *fast.logvars.parameters()))
    assert all(p.grad is None for p in fast.base.parameters())
    assert repr(fast)


# nflows, and normflows

NETWORKS: dict[str, dict[str, Any]] = {
    "residual": {},
    "feedforward": {"use_residual_blocks": False},
    "random masks": {"use_residual_blocks": False, "random_mask": True},
}
WITH_NETWORKS: dict[str, Any] = {
    "nflows affine": partial(nt.MaskedAffineAutoregressiveTransform, D, 30, num_blocks=5),
    "nflows linear": partial(nt.MaskedPiecewiseLinearAutoregressiveTransform, 10, D, 30),
    "nflows quadratic": partial(nt.MaskedPiecewiseQuadraticAutoregressiveTransform, D, 30),
    "nflows cubic": partial(nt.MaskedPiecewiseCubicAutoregressiveTransform, 10, D, 30),
    "nflows rational quadratic": partial(
        nt.MaskedPiecewiseRationalQuadraticAutoregressiveTransform, D, 30, tails="linear", tail_bound=2.0
    ),
    "normflows affine": partial(normflows.flows.MaskedAffineAutoregressive, D, 30, num_blocks=5),
}
SPLINES: dict[str, Callable[[], Any]] = {
    "normflows rational quadratic": lambda: normflows.flows.AutoregressiveRationalQuadraticSpline(D, 2, 30),
    "normflows circular": lambda: normflows.flows.CircularAutoregressiveRationalQuadraticSpline(D, 2, 30, [0, 3]),
    "normflows circular, bounds": lambda: normflows.flows.CircularAutoregressiveRationalQuadraticSpline(
        D, 2, 30, [0, 3], tail_bound=torch.tensor([3.0, 5, 4, 3, 6, 3, 3, 4])
    ),
}
TRANSFORMS: dict[str, Callable[[], Any]] = SPLINES | {
    f"{name}, {network}": partial(make, **arguments)
    for name, make in WITH_NETWORKS.items()
    for network, arguments in NETWORKS.items()
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_of_nflows_and_normflows(name: str, default_dtype: torch.dtype) -> None:
    flow = TRANSFORMS[name]()
    fast, x = made_parallel(flow), torch.rand(10, D)
    close = partial(torch.testing.assert_close, rtol=1e-3, atol=1e-3)  # theirs: from 1e-6 of affine to 1e-3 of splines
    (y, log_det), (z, log_det_inverse) = fast(x), fast.inverse(x)
    for outputs, log_dets in ((y, log_det), (z, log_det_inverse)):
        assert outputs.shape == (10, D) and log_dets.shape == (10,)
        assert outputs.dtype == log_dets.dtype == default_dtype
        assert outputs.isfinite().all() and log_dets.isfinite().all()
    for there, back in ((fast, fast.inverse), (fast.inverse, fast)):
        y, log_det = there(x)
        again, log_det_back = back(y)
        close(again, x)
        close(log_det + log_det_back, torch.zeros(10))
    for direction in ("__call__", "inverse"):
        check_drawn(flow, fast, lambda f: getattr(f, direction)(torch.rand(10, D)))  # noqa: B023


@pytest.mark.parametrize("arguments", [{}, {"batch_norm_between_layers": True}, {"use_random_permutations": True}])
def test_nflows_masked_autoregressive_flow(arguments: dict[str, Any]) -> None:
    flow = MaskedAutoregressiveFlow(D, 30, num_layers=3, num_blocks_per_layer=2, **arguments).eval()
    fast, x = made_parallel(flow), torch.randn(10, D)
    log_p = fast.log_prob(x)
    assert log_p.shape == (10,) and torch.equal(log_p, flow.log_prob(x))
    assert check_drawn(flow, fast, lambda f: f.sample(10))[0].shape == (10, D)
    assert check_drawn(flow, fast, lambda f: f.sample(10, batch_size=3))[0].shape == (10, D)
    x, log_p = check_drawn(flow, fast, lambda f: f.sample_and_log_prob(10))
    torch.testing.assert_close(fast.log_prob(x), log_p, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(fast._transform.inverse(fast.transform_to_noise(x))[0], x, rtol=1e-3, atol=1e-3)


def test_a_composition_of_nflows_and_its_inverse() -> None:
    parts: list[Transform] = [nt.MaskedAffineAutoregressiveTransform(D, 30) for _ in range(2)]
    fast = made_parallel(nt.CompositeTransform([*parts, nt.InverseTransform(nt.CompositeTransform(parts))]))
    x = torch.randn(10, D)
    y, log_det = fast(x)
    torch.testing.assert_close(y, x, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(log_det, torch.zeros(10), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("context", [None, C])
def test_normflows_models(context: int | None) -> None:
    base = normflows.distributions.DiagGaussian(D)
    target = normflows.distributions.target.Target(torch.zeros(()), torch.zeros(()))
    target.log_prob = lambda z, context=None: -z.square().sum(1)
    flows = [
        normflows.flows.AutoregressiveRationalQuadraticSpline(D, 1, 20, num_context_channels=context) for _ in range(2)
    ]
    kind = normflows.NormalizingFlow if context is None else normflows.ConditionalNormalizingFlow
    flow = kind(base, flows, target)
    fast, x = made_parallel(flow), torch.randn(10, D)
    given = {} if context is None else {"context": torch.randn(10, C)}
    x, log_p = check_drawn(flow, fast, lambda f: f.sample(10, **given))
    torch.testing.assert_close(fast.log_prob(x, **given), log_p, rtol=1e-3, atol=1e-3)
    fast.forward_kld(x.detach(), **given).backward()
    assert has_gradients(fast)
    gradients = []
    for f in (flow, fast):
        torch.manual_seed(1)
        f.reverse_kld(10, **given, score_fn=False).backward()
        gradients.append([p.grad for p in f.parameters()])
        f.zero_grad(set_to_none=True)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-5)
