"""The drop-ins of `parallel`: the contract of each library, bits, gradients, and what is left alone."""

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nflows.distributions
import nflows.flows
import nflows.transforms as nt
import normflows
import pytest
import torch
import zuko
from torch import Tensor, nn

import parallel_decode as pd
from parallel_decode.adapters.maf import inverse, parallel
from parallel_decode.adapters.maf.inverse import Parallel, _swept
from parallel_decode.adapters.maf.order import Order, generations, reach
from parallel_decode.adapters.maf.system import MaskedSystem, Sweeps
from parallel_decode.testing import check_system

D, C = 12, 3
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the libraries' own


def nflows_flow(*transforms: nn.Module) -> Any:
    parts = [part for t in transforms for part in (t, nt.ReversePermutation(D))]
    return nflows.flows.Flow(nt.CompositeTransform(parts), nflows.distributions.StandardNormal([D]))


def normflows_flow(*flows: nn.Module) -> Any:
    return normflows.NormalizingFlow(normflows.distributions.DiagGaussian(D, trainable=False), list(flows))


def chain_adjacency() -> Tensor:
    """Feature i depends on i - 1 and i - 3, written in a shuffled order."""
    adjacency = torch.eye(D).bool()
    order = torch.randperm(D, generator=torch.Generator().manual_seed(1))
    for i in range(D):
        for back in (1, 3):
            if i >= back:
                adjacency[order[i], order[i - back]] = True
    return adjacency


SMALL: dict[str, Any] = {"hidden_features": [32, 32]}
FLOWS: dict[str, Callable[[], nn.Module]] = {
    "zuko MAF": lambda: zuko.flows.MAF(D, C, transforms=2, **SMALL),
    "zuko MAF, no context": lambda: zuko.flows.MAF(D, transforms=3, randperm=True, **SMALL),
    "zuko MAF, residual": lambda: zuko.flows.MAF(D, C, transforms=2, residual=True, **SMALL),
    "zuko MAF, 4 passes": lambda: zuko.flows.MAF(D, C, transforms=2, passes=4, **SMALL),
    "zuko MAF, 5 passes": lambda: zuko.flows.MAF(D, C, transforms=2, passes=5, **SMALL),
    "zuko NSF": lambda: zuko.flows.NSF(D, C, transforms=2, **SMALL),
    "zuko NAF": lambda: zuko.flows.NAF(D, C, transforms=1, network={"hidden_features": [8]}, **SMALL),
    "zuko adjacency": lambda: zuko.flows.Flow(
        [zuko.flows.MaskedAutoregressiveTransform(D, C, adjacency=chain_adjacency(), **SMALL)],
        zuko.flows.MAF(D, C).base,
    ),
    "nflows MAF": lambda: nflows_flow(*(nt.MaskedAffineAutoregressiveTransform(D, 32) for _ in range(2))),
    "nflows MAF, context": lambda: nflows_flow(nt.MaskedAffineAutoregressiveTransform(D, 32, context_features=C)),
    "nflows MAF, feedforward": lambda: nflows_flow(
        nt.MaskedAffineAutoregressiveTransform(D, 32, use_residual_blocks=False, random_mask=True)
    ),
    "nflows rational quadratic": lambda: nflows_flow(
        nt.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(
            D, 32, context_features=C, tails="linear", tail_bound=4.0
        )
    ),
    "nflows quadratic": lambda: nt.MaskedPiecewiseQuadraticAutoregressiveTransform(D, 32),
    "nflows cubic": lambda: nt.MaskedPiecewiseCubicAutoregressiveTransform(8, D, 32),
    "nflows linear": lambda: nt.MaskedPiecewiseLinearAutoregressiveTransform(8, D, 32),
    "normflows MAF": lambda: normflows_flow(*(normflows.flows.MaskedAffineAutoregressive(D, 32) for _ in range(2))),
    "nflows MAF, batch norm": lambda: nflows_flow(nt.MaskedAffineAutoregressiveTransform(D, 32, use_batch_norm=True)),
    "normflows MAF, context": lambda: normflows_flow(
        normflows.flows.MaskedAffineAutoregressive(D, 32, context_features=C)
    ),
    "normflows NSF": lambda: normflows_flow(
        normflows.flows.AutoregressiveRationalQuadraticSpline(D, 1, 32, init_identity=False, permute_mask=True)
    ),
}


def conditional(name: str) -> bool:
    return name in ("nflows MAF, context", "nflows rational quadratic", "normflows MAF, context") or (
        name.startswith("zuko") and "no context" not in name
    )


def make(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """With larger weights than at first, so that features really depend on one another."""
    torch.manual_seed(0)
    flow = FLOWS[name]().to(dtype)
    with torch.no_grad():
        for parameter in flow.parameters():
            if parameter.dim() == 2:
                parameter.add_(0.15 * torch.randn_like(parameter))
    return flow.eval()


def draw(flow: Any, name: str, n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """n samples, or n noises where the slow direction is the density's; always of the same noise."""
    torch.manual_seed(1)
    context = torch.randn(2, C, dtype=dtype)
    if name.startswith("zuko"):
        shape = n if conditional(name) else 2 * n
        return flow(context if conditional(name) else None).rsample((shape,)).reshape(-1, D)  # type: ignore[no-any-return]
    if name.startswith("nflows"):
        transform: Any = flow._transform if isinstance(flow, nflows.flows.Flow) else flow
        y = (torch.randn if transform is not flow else torch.rand)(2 * n, D, dtype=dtype)
        return transform.inverse(y, context.repeat(n, 1) if conditional(name) else None)[0]  # type: ignore[no-any-return]
    x = torch.randn(2 * n, D, dtype=dtype)
    if conditional(name):
        return flow.flows[0].inverse(x, context.repeat(n, 1))[0]  # type: ignore[no-any-return]
    return flow.forward(x) if "NSF" in name else flow.inverse(x)  # type: ignore[no-any-return]


def log_prob(flow: Any, name: str, x: Tensor) -> Tensor:
    context = torch.zeros(len(x), C, dtype=x.dtype)
    if name.startswith("zuko"):
        return flow(context if conditional(name) else None).log_prob(x)  # type: ignore[no-any-return]
    if name == "normflows MAF, context":
        return flow.flows[0].inverse(x, context)[1]  # type: ignore[no-any-return]
    if isinstance(flow, nt.Transform):
        return flow(x.clamp(0.01, 0.99))[1]  # type: ignore[no-any-return]
    return flow.log_prob(x, *([context] if conditional(name) else []))  # type: ignore[no-any-return]


def drop_ins(flow: nn.Module) -> list[Parallel]:
    return [module for module in flow.modules() if isinstance(module, Parallel)]


@pytest.mark.parametrize("name", FLOWS)
def test_tol_0_gives_the_librarys_own_bits(name: str) -> None:
    flow = make(name)
    fast = parallel(flow)
    with torch.no_grad():
        x = draw(flow, name, 20)
        assert torch.equal(draw(fast, name, 20), x)
        assert torch.equal(log_prob(fast, name, x), log_prob(flow, name, x))
    found = drop_ins(fast)
    assert found and not drop_ins(flow)
    assert all(module.last_solution is not None for module in found)


@pytest.mark.parametrize("name", FLOWS)
def test_a_tolerance_is_kept(name: str) -> None:
    flow = make(name, torch.float64)
    with torch.no_grad():
        x, fast = draw(flow, name, 30, torch.float64), parallel(flow, tol=1e-6)
        torch.testing.assert_close(draw(fast, name, 30, torch.float64), x, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", FLOWS)
def test_gradients_are_the_librarys(name: str) -> None:
    flow = make(name, torch.float64)
    fast = parallel(flow)
    weight = torch.randn(8, D, dtype=torch.float64)
    leaves = [p for p in flow.parameters() if p.requires_grad]
    expected, found = (
        torch.autograd.grad((draw(f, name, 4, torch.float64) * weight).sum(), leaves, allow_unused=True)
        for f in (flow, fast)
    )
    scale = max(e.abs().max().item() for e in expected if e is not None)
    # NAF's and the cubic spline's scalar inverses are themselves iterations with gradients of their own
    tol = 1e-5 if name in ("zuko NAF", "nflows cubic") else 1e-12
    for f, e in zip(found, expected, strict=True):
        f, e = (torch.zeros(1) if t is None else t for t in (f, e))
        assert (f - e).abs().max() <= tol * scale


@pytest.mark.parametrize("name", [name for name in FLOWS if name.startswith("nflows")])
def test_nflows_samples_and_their_densities(name: str) -> None:
    flow = make(name)
    if not isinstance(flow, nflows.flows.Flow):
        pytest.skip("a transform alone")
    context = [torch.randn(2, C)] if conditional(name) else []
    drawn: list[list[Tensor]] = []
    for f in (flow, parallel(flow)):
        torch.manual_seed(4)
        with torch.no_grad():
            drawn.append([f.sample(7, *context), *f.sample_and_log_prob(7, *context)])
    assert all(torch.equal(a, b) for a, b in zip(*drawn, strict=True))


def test_gradients_reach_context_and_log_determinant() -> None:
    for name in ("zuko MAF", "nflows MAF, context"):
        flow: Any = make(name, torch.float64)
        gradients = []
        for f in (flow, parallel(flow)):
            context = torch.ones(1, C, dtype=torch.float64, requires_grad=True)
            torch.manual_seed(2)
            if name.startswith("zuko"):
                x, log_p = f(context).rsample_and_log_prob((5,))
            else:
                y = torch.randn(5, D, dtype=torch.float64)
                x, log_p = f._transform.inverse(y, context.expand(5, C))
            (x.square().mean() + log_p.mean()).backward()
            assert context.grad is not None
            gradients.append(context.grad)
        torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", FLOWS)
def test_it_is_the_same_module_to_its_users(name: str) -> None:
    flow = make(name)
    classes = [type(m) for m in flow.modules()]
    before = {key: value.clone() for key, value in flow.state_dict().items()}
    fast = parallel(flow)
    assert type(fast) is type(flow) or isinstance(fast, type(flow))
    assert list(fast.state_dict()) == list(before)
    assert all(a is b for a, b in zip(flow.parameters(), fast.parameters(), strict=True))
    with torch.no_grad():
        x = draw(fast, name, 3)
        apart = copy.deepcopy(fast)
        assert torch.equal(draw(apart, name, 3), x)
        for parameter in apart.parameters():
            parameter.zero_()
        assert torch.equal(draw(fast, name, 3), x)
        fast.load_state_dict(before)
        fast.double()
        assert draw(fast, name, 3, torch.float64).dtype == torch.float64
        fast.float()
        assert torch.equal(draw(flow, name, 3), x)
    fast.train()
    assert not flow.training
    fast.register_forward_hook(lambda *_: None)
    assert not flow._forward_hooks
    assert [type(m) for m in flow.modules()] == classes


@pytest.mark.parametrize("name", FLOWS)
def test_it_is_pickled_if_the_flow_is(name: str) -> None:
    flow = make(name)
    try:
        pickle.dumps(flow)
    except (AttributeError, pickle.PicklingError):
        pytest.skip("the library's own flow cannot be pickled")
    fast = parallel(flow)
    with torch.no_grad():
        x = draw(fast, name, 3)
        again = pickle.loads(pickle.dumps(fast))
        assert torch.equal(draw(again, name, 3), x)
        buffer = io.BytesIO()
        torch.save(fast, buffer)


@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (0,)])
def test_zukos_shapes(shape: tuple[int, ...]) -> None:
    flow = make("zuko MAF")
    fast, slow = parallel(flow), flow
    for context in (torch.randn(C), torch.randn(4, C)):
        with torch.no_grad():
            torch.manual_seed(3)
            x = slow(context).sample(shape)
            torch.manual_seed(3)
            assert torch.equal(fast(context).sample(shape), x)
            transform, own = fast.transform(context), slow.transform(context)  # type: ignore[operator]
            y = own(x)
            assert torch.equal(transform.inv(y), own.inv(y))


def test_other_bits_within_a_tolerance_in_every_shape() -> None:
    flow = make("zuko MAF")
    fast = parallel(flow, tol=1e-6)
    with torch.no_grad():
        y, context = torch.randn(6, 1, D), torch.randn(4, C)
        torch.testing.assert_close(
            fast.transform(context).inv(y),  # type: ignore[operator]
            flow.transform(context).inv(y.expand(6, 4, D)),  # type: ignore[operator]
            atol=1e-4,
            rtol=1e-4,
        )


def test_it_stops_early_and_says_so() -> None:
    flow = zuko.flows.MAF(64, transforms=2)
    fast = parallel(flow)
    assert str(parallel.report(fast)).count(": parallel") == 2
    with torch.no_grad():
        fast().sample((16,))
    for module in drop_ins(fast):
        assert module.last_solution is not None
        assert module.last_solution.passes < 24
        assert f"{module.last_solution.passes} passes in place of 64" in str(parallel.report(fast))


def test_rows_that_are_done_leave_a_large_batch_within_a_tolerance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inverse, "MANY", 1)
    for name in ("nflows MAF, context", "zuko MAF"):
        calls: list[int] = []
        flow: Any = make(name, torch.float64)
        fast = parallel(flow, tol=1e-9)
        first = next(m for m in fast.modules() if isinstance(m, nn.Linear) and hasattr(m, "mask"))
        first.register_forward_hook(lambda module, args, output: calls.append(len(args[0])))  # noqa: B023
        y = torch.randn(64, D, dtype=torch.float64) * torch.logspace(-6, 0.5, 64)[:, None]
        context = torch.randn(64, C, dtype=torch.float64)
        with torch.no_grad():
            if name == "zuko MAF":
                x, truth = (f.transform(context).inv(y) for f in (fast, flow))
            else:
                x, truth = (f._transform.inverse(y, context)[0] for f in (fast, flow))
        torch.testing.assert_close(x, truth, atol=1e-7, rtol=1e-7)
        assert calls[0] == 64 and min(calls) <= 48


def test_what_there_is_nothing_to_gain_from_is_left_alone() -> None:
    coupling = zuko.flows.NICE(D)
    assert [type(m) for m in parallel(coupling).modules()] == [type(m) for m in coupling.modules()]
    two = zuko.flows.MAF(D, passes=2)
    assert not drop_ins(parallel(two))
    assert "as it was: its inverse takes 2 passes" in str(parallel.report(parallel(two)))
    assert "no autoregressive transform" in str(parallel.report(parallel(nn.Linear(2, 2))))
    flow = make("nflows MAF")
    flow._transform._transforms[0].autoregressive_net = nn.Linear(D, 2 * D)  # type: ignore[union-attr, index]
    assert len(drop_ins(parallel(flow))) == 1 and "expected a MADE" in str(parallel.report(parallel(flow)))


def test_a_network_that_is_random_in_training_is_the_librarys_then() -> None:
    torch.manual_seed(0)
    flow = nflows_flow(nt.MaskedAffineAutoregressiveTransform(D, 32, dropout_probability=0.5, use_batch_norm=True))
    fast = parallel(flow).train()
    for f in (flow.train(), fast):
        torch.manual_seed(5)
        f.sample(4)
    assert drop_ins(fast)[0].last_solution is None
    fast.eval().sample(4)
    assert drop_ins(fast)[0].last_solution is not None


def test_sequential_inversion_is_finite_where_the_librarys_is_not() -> None:
    torch.manual_seed(1)
    flow = zuko.flows.MAF(48, transforms=1, hidden_features=[64, 64])
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.mul_(12)
        y = torch.randn(32, 48)
        own, ours = flow.transform().inv(y), (fast := parallel(flow)).transform().inv(y)
        truth = torch.zeros_like(y)  # position by position, the tail held at zero
        (transform,) = flow.transform.transforms
        for position in range(48):
            truth[:, position] = transform.meta(None, truth).inv(y)[:, position]
    finite = own.isfinite().all(1)
    assert torch.equal(ours[finite], own[finite])
    assert truth.isfinite().all(1).sum() > finite.sum()
    assert torch.equal(ours.isfinite().all(1), truth.isfinite().all(1))
    last = drop_ins(fast)[0].last_solution
    assert last is not None and 0 < len(last.value) < 32, "rows that do not overflow are not solved again"


def test_a_row_that_is_lost_does_not_hold_up_the_others() -> None:
    flow = zuko.flows.MAF(64, transforms=1)
    fast = parallel(flow)
    y = torch.randn(4, 64)
    y[1, 0] = torch.nan
    with torch.no_grad():
        own, ours = flow.transform().inv(y), fast.transform().inv(y)
    assert torch.equal(own[[0, 2, 3]], ours[[0, 2, 3]]) and ours[1].isnan().all()
    calls: list[int] = []
    flow.transform.transforms[0].hyper.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        parallel(flow).transform().inv(y)
    assert len(calls) < 40


def test_masks_that_were_loaded_anew_are_read_anew() -> None:
    torch.manual_seed(0)
    first, second = (zuko.flows.MAF(D, transforms=2, randperm=True) for _ in range(2))
    fast = parallel(first)
    with torch.no_grad():
        fast().sample((2,))
        first.load_state_dict(second.state_dict())
        torch.manual_seed(1)
        x = second().sample((9,))
        torch.manual_seed(1)
        assert torch.equal(fast().sample((9,)), x)


def test_parallel_twice_takes_the_last_tolerance() -> None:
    fast = parallel(parallel(make("zuko MAF")), tol=0.5)
    assert [module.parallel_inverse.tol for module in drop_ins(fast)] == [0.5, 0.5]


@pytest.mark.parametrize("tol", [-1.0, float("nan"), "0", True])
def test_a_tolerance_that_is_none_is_an_error(tol: Any) -> None:
    with pytest.raises(ValueError, match="tol is"):
        parallel(make("zuko MAF"), tol=tol)


def test_what_is_no_module_is_an_error() -> None:
    with pytest.raises(TypeError, match="flow is a str"):
        parallel("flow")  # type: ignore[type-var]


@pytest.mark.parametrize("name", ["zuko MAF, no context", "zuko MAF, 5 passes", "zuko adjacency"])
def test_its_systems_keep_the_promises_of_systems(name: str) -> None:
    flow = make(name, torch.float64)
    lazy: Any = drop_ins(parallel(flow))[0]
    y, c = torch.randn(3, D, dtype=torch.float64), torch.zeros(C, dtype=torch.float64) if conditional(name) else None

    def of(rows: Any) -> Callable[[Tensor], Tensor]:
        return lambda x: lazy.meta(c, x).inv(y[rows])

    check_system(MaskedSystem(of(slice(None)), y, lazy.parallel_inverse.order(lazy), of))


def test_orders() -> None:
    depends = torch.zeros(5, 5)
    depends[0, 3] = depends[1, 0] = depends[2, 3] = 1  # 3, 4 | 0, 2 | 1
    found = generations(depends)
    assert found is not None and found.tolist() == [1, 2, 1, 0, 0]
    order = Order(found)
    x = torch.arange(10.0).view(2, 5) + 1
    assert order.positions(x)[0].tolist() == [[4, 5], [1, 3], [2, 0]]
    assert torch.equal(order.original(order.positions(x)), x)
    depends[3, 1] = 1
    assert generations(depends) is None
    chain = nn.Sequential(zuko.nn.MaskedLinear(torch.tensor([[True, False], [True, True]])), nn.ReLU())
    assert reach(chain, 2).tolist() == [[1, 0], [1, 1]]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["maf", "zuko_maf", "zuko_nsf"])
def test_posteriors_of_sbi(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # sbi writes its logs there
    from sbi.inference import NPE

    torch.manual_seed(0)
    prior = torch.distributions.MultivariateNormal(torch.zeros(D), torch.eye(D))
    theta = prior.sample((100,))
    inference = NPE(prior, density_estimator=kind, show_progress_bars=False)
    estimator = inference.append_simulations(theta, theta + torch.randn(100, D)).train(max_num_epochs=2)
    posterior, fast = (inference.build_posterior(e) for e in (estimator, parallel(estimator)))
    posterior, fast = (p.set_default_x(torch.zeros(D)) for p in (posterior, fast))
    for x in (None, torch.ones(D)):
        samples = []
        for each in (posterior, fast):
            torch.manual_seed(1)
            samples.append(each.sample((20,), x=x, show_progress_bars=False))
        assert torch.equal(*samples)
        assert torch.equal(posterior.log_prob(samples[0], x=x), fast.log_prob(samples[0], x=x))
    assert drop_ins(fast.posterior_estimator)[0].last_solution is not None


@pytest.mark.parametrize("spoilt", range(6))
def test_what_overflows_far_from_the_first_feature_freezes_nothing(spoilt: int) -> None:
    """Sweeps do not know the order of the features, so no position may become final before the sweeps are done."""

    def sweep(x: Tensor) -> Tensor:  # feature d is 1 + feature d + 1: the last comes first
        y = 1 + torch.nn.functional.pad(x, (-1, 1))
        y[1, spoilt] = torch.where(x[1, spoilt:].sum() == 0, torch.inf, y[1, spoilt])  # by the first guess alone
        return y

    x, left, _ = _swept(Sweeps(sweep, torch.zeros(3, 6), 6), 0.0)
    assert left is not None and left.tolist() == [False, True, False]
    assert x[~left].tolist() == [[6, 5, 4, 3, 2, 1]] * 2


def test_sweeps_cannot_be_solved_by_schedules_that_freeze() -> None:
    sweeps = Sweeps(lambda x: x * 0, torch.ones(2, 4), 4)
    for schedule in ("sequential", "jacobi", pd.Sliding(2), "auto"):
        with pytest.raises(ValueError, match=r"the positions of Sweeps are not in order: .*freeze=False"):
            pd.solve(sweeps, schedule)
