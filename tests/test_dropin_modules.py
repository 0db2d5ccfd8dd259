"""Drop-ins as modules: names, hooks, replicas, types, devices and shapes make no difference to the library's own."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import normflows
import pytest
import torch
import zuko
from nflows import transforms as nt
from torch import Tensor, nn

from parallel_decode.adapters.maf import parallel
from parallel_decode.adapters.maf.inverse import Parallel
from tests.test_maf import FLOWS, C, D, conditional, draw, drop_ins, make

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the libraries' own
THREE = ["zuko MAF", "nflows MAF, context", "normflows MAF, context"]
OVERRIDDEN = {"forward", "inverse", "parallel_inverse", "parallel_depends", "last_solution"}


def same_draws(flow: nn.Module, fast: nn.Module, name: str) -> bool:
    return torch.equal(draw(flow, name, 4).detach(), draw(fast, name, 4).detach())


@pytest.mark.parametrize("name", FLOWS)
def test_no_attribute_of_a_library_is_hidden(name: str) -> None:
    flow = make(name)
    fast = parallel(flow)
    for module, twin in zip(flow.modules(), fast.modules(), strict=True):
        if isinstance(twin, Parallel):
            names = {n for part in type(twin).__mro__ for n in vars(part) if part.__module__.startswith("parallel")}
            ours = {n for n in names if not n.startswith(("__", "_abc"))}
            assert ours <= OVERRIDDEN
            assert ours & set(dir(module)) in ({"forward"}, {"inverse"})
            assert set(vars(twin)) - set(vars(module)) == {"parallel_inverse"}
        assert twin.extra_repr() == module.extra_repr()
    assert repr(fast).count("\n") == repr(flow).count("\n")
    assert [n for n, _ in fast.named_modules()] == [n for n, _ in flow.named_modules()]
    assert str(parallel.report(fast))


def replica(module: nn.Module) -> Any:
    """What `nn.DataParallel` runs on each of its devices: parameters are copies, and no parameters any more."""
    twins = {each: each._replicate_for_data_parallel() for each in module.modules()}  # type: ignore[no-untyped-call]
    for each, twin in twins.items():
        for key, child in each._modules.items():
            setattr(twin, key, child and twins[child])
        for key, parameter in each._parameters.items():
            setattr(twin, key, None if parameter is None else parameter * 1)
    return twins[module]


@pytest.mark.parametrize("name", THREE)
def test_gradients_of_replicas_reach_the_parameters(name: str) -> None:
    flow = make(name, torch.float64)
    leaves = list(flow.parameters())
    own, ours = (
        torch.autograd.grad(draw(f, name, 3, torch.float64).square().sum(), leaves)
        for f in (flow, replica(parallel(flow)))
    )
    torch.testing.assert_close(ours, own)
    assert same_draws(flow.float(), nn.DataParallel(parallel(flow)).module, name)


@pytest.mark.parametrize("name", THREE)
def test_gradients_reach_what_a_hook_adds(name: str) -> None:
    flow, shift = make(name, torch.float64).requires_grad_(False), torch.zeros(1, dtype=torch.float64)
    shift.requires_grad_()
    for module in flow.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda module, args, output: output + shift)
    own, ours = (
        torch.autograd.grad(draw(f, name, 3, torch.float64).square().sum(), shift) for f in (flow, parallel(flow))
    )
    torch.testing.assert_close(ours, own)


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "forward hook": lambda m: m.register_forward_hook(lambda module, args, output: 2 * output),
    "forward pre-hook": lambda m: m.register_forward_pre_hook(lambda module, args: (args[0] + 0.1, *args[1:])),
    "forward of an instance": lambda m: setattr(m, "forward", lambda *args, own=m.forward: own(*args) + 0.1),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", THREE)
def test_what_is_put_on_an_inner_module_acts_in_samples(name: str, change: str) -> None:
    flow = make(name)
    before = draw(flow, name, 4).detach()
    for kind in ("Masked", "MaskedLinear", "MADE", "MaskedMLP", "MaskedResidualBlock", "ReLU"):
        flow = make(name)
        fast, apart = parallel(flow), parallel(copy.deepcopy(flow))
        changed = 0
        for module in (*flow.modules(), *fast.modules()):
            if type(module).__name__ == kind:
                CHANGES[change](module)
                changed += 1
        if changed:
            assert same_draws(flow, fast, name) and same_draws(flow, copy.deepcopy(fast), name), kind
            assert not torch.equal(draw(fast, name, 4), before)
            assert torch.equal(draw(apart, name, 4).detach(), before)


def test_hooks_of_all_modules_act_in_samples() -> None:
    for name in THREE:
        flow = make(name)
        handle = nn.modules.module.register_module_forward_hook(
            lambda module, args, output: 1.5 * output if isinstance(module, nn.Linear) else output
        )
        with handle:
            assert same_draws(flow, parallel(flow), name)


class Lora(nn.Module):
    """A layer and a small one beside it."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer, self.beside = layer, nn.Linear(layer.in_features, layer.out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + 0.1 * self.beside(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", THREE)
def test_a_layer_that_was_replaced_acts_in_samples_or_is_refused(name: str) -> None:
    flow: Any = make(name)
    before = parallel(flow)
    drop_in: Any = drop_ins(before)[0]
    network = drop_in.hyper if name.startswith("zuko") else drop_in.autoregressive_net
    last = len(network) - 1 if name.startswith("zuko") else "final_layer"
    wrapped = Lora(network[last] if isinstance(last, int) else network.final_layer)
    for module in (*flow.modules(), *before.modules()):  # in both, after `parallel`
        if type(module) is type(network) and module is not None:
            own = module[last] if isinstance(last, int) else module.final_layer
            if own is wrapped.layer or torch.equal(own.weight, wrapped.layer.weight):
                setattr(module, str(last), wrapped)
    with torch.no_grad():
        assert same_draws(flow, before, name)
    assert "has a Lora, which has no mask" in str(parallel.report(parallel(flow)))  # and before it


class Halved(nt.MaskedAffineAutoregressiveTransform):  # type: ignore[misc]
    def _unconstrained_scale_and_shift(self, autoregressive_params: Tensor) -> Any:
        scale, shift = super()._unconstrained_scale_and_shift(autoregressive_params)
        return scale / 2, shift


class HalvedNormflows(normflows.flows.MaskedAffineAutoregressive):  # type: ignore[misc]
    def _unconstrained_scale_and_shift(self, autoregressive_params: Tensor) -> Any:
        scale, shift = super()._unconstrained_scale_and_shift(autoregressive_params)
        return scale / 2, shift


class HalvedZuko(zuko.flows.MaskedAutoregressiveTransform):  # type: ignore[misc]
    def half(self, c: Tensor, x: Tensor) -> Any:
        return self.meta(c, x / 2)

    def forward(self, c: Any = None) -> Any:
        transform = super().forward(c)
        transform.meta = lambda x: self.half(c, x)
        return transform


def test_methods_that_a_subclass_overrides_act_in_samples() -> None:
    y = torch.randn(5, D)
    for flow in (Halved(D, 16), HalvedNormflows(D, 16)):
        for tol in (0.0, 1e-6):
            own, ours = flow.inverse(y), parallel(flow, tol=tol).inverse(y)
            torch.testing.assert_close(ours, own, rtol=1e-4, atol=1e-4)
    lazy = HalvedZuko(D)
    assert torch.equal(parallel(lazy)().inv(y), lazy().inv(y))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", THREE)
def test_half_precision_and_autocast_give_the_librarys_bits(name: str, dtype: torch.dtype) -> None:
    flow = make(name)
    fast = parallel(flow)
    for grad in (torch.no_grad, torch.enable_grad, torch.inference_mode):
        with grad(), torch.autocast("cpu", dtype):
            assert same_draws(flow, fast, name)
            own, ours = (draw(f, name, 4, dtype) for f in (flow, fast))  # the context or the noise is narrow
            assert torch.equal(ours, own) and ours.dtype == own.dtype
    with torch.no_grad():
        own, ours = (draw(f.to(dtype), name, 4, dtype) for f in (flow, fast))
    assert torch.equal(ours, own) and ours.dtype == dtype


@pytest.mark.parametrize("name", THREE)
def test_another_default_device_or_type_makes_no_difference(name: str) -> None:
    flow = make(name)
    y, context = torch.randn(3, D), torch.randn(3, C)

    def inverse(f: Any) -> Tensor:
        if name.startswith("zuko"):
            return f.transform(context).inv(y)  # type: ignore[no-any-return]
        return (f._transform.inverse if name.startswith("nflows") else f.flows[0].inverse)(y, context)[0]  # type: ignore[no-any-return]

    own = inverse(flow)
    leaves = list(flow.parameters())
    slopes = torch.autograd.grad(own.sum(), leaves, allow_unused=True)
    for default in (torch.device("meta"), torch.float64):
        with default if isinstance(default, torch.device) else nullcontext():
            torch.set_default_dtype(default if isinstance(default, torch.dtype) else torch.float32)
            try:
                ours = inverse(parallel(flow))
                assert torch.equal(ours, own) and ours.dtype == own.dtype
                found = torch.autograd.grad(ours.sum(), leaves, allow_unused=True)
            finally:
                torch.set_default_dtype(torch.float32)
        torch.testing.assert_close(found, slopes, rtol=1e-4, atol=1e-5)


def test_rows_that_overflow_are_solved_under_another_default_device() -> None:
    torch.manual_seed(1)
    flow = zuko.flows.MAF(48, transforms=1, hidden_features=[64, 64]).requires_grad_(False)
    for parameter in flow.parameters():
        parameter.mul_(12)
    transform, y = parallel(flow).transform(), torch.randn(32, 48)
    own = flow.transform().inv(y).isfinite().all(1).sum()
    ours = transform.inv(y)
    with torch.device("meta"):
        again = transform.inv(y)
    assert torch.equal(again.nan_to_num(), ours.nan_to_num()) and ours.isfinite().all(1).sum() > own


@pytest.mark.parametrize(
    "shapes", [((), (4,)), ((0,), ()), ((0,), (0,)), ((2, 1), (3,)), ((1, 1), (1,)), ((3,), (2, 1))]
)
def test_shapes_of_noise_and_context_broadcast_as_in_zuko(shapes: tuple[tuple[int, ...], ...]) -> None:
    flow = make("zuko MAF")
    y, c = torch.randn(*shapes[0], D), torch.randn(*shapes[1], C)
    for context in (c, c.double().to(torch.int64), c.expand(*c.shape)):
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                own, ours = flow.transform(context).inv(y), parallel(flow).transform(context).inv(y)  # type: ignore[operator]
            assert torch.equal(ours, own) and ours.requires_grad == own.requires_grad


@pytest.mark.parametrize("name", THREE)
def test_wrong_shapes_are_the_librarys_errors(name: str) -> None:
    flow: Any = make(name)
    for y, c in ((D, C + 1), (D, None), (D - 1, C), (D + 1, C)):
        found: list[object] = []
        for f in (flow, parallel(flow)):
            noise, context = torch.ones(2, y), None if c is None else torch.ones(2, c)
            transform = f.transform(context).inv if name.startswith("zuko") else None
            try:
                if transform is not None:
                    found.append(transform(noise).sum())
                else:
                    found.append(
                        (f._transform if name.startswith("nflows") else f.flows[0]).inverse(noise, context)[0].sum()
                    )
            except (RuntimeError, ValueError) as error:
                found.append(type(error))
        assert found[0] == found[1], (y, c, found)


@pytest.mark.parametrize("name", ["nflows MAF, context", "normflows MAF, context"])
def test_empty_batches_and_noise_that_is_not_finite(name: str) -> None:
    flow: Any = make(name)
    (module,) = [m for m in flow.modules() if m in drop_ins(parallel(flow)) or hasattr(m, "autoregressive_net")]
    fast: Any = parallel(module)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            empty = [f.inverse(torch.randn(0, D), torch.randn(0, C)) for f in (module, fast)]
            assert [t.shape for t in empty[0]] == [t.shape for t in empty[1]]
            for bad in (torch.inf, -torch.inf, torch.nan):
                y = torch.randn(3, D)
                y[1, 4] = bad
                own, ours = (f.inverse(y, torch.zeros(3, C)) for f in (module, fast))
                for a, b in zip(own, ours, strict=True):
                    assert torch.equal(a[[0, 2]], b[[0, 2]]) and not b[1].isfinite().all()


@pytest.mark.parametrize("name", THREE)
def test_weights_that_change_in_place_are_used_and_inputs_are_left_alone(name: str) -> None:
    flow = make(name)
    fast = parallel(flow)
    draw(fast, name, 2)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.mul_(0.9)
    assert same_draws(flow, fast, name)
    for parameter in flow.parameters():
        parameter.data = parameter.data * 0.9
    assert same_draws(flow, fast, name)
    flow.requires_grad_(False)
    assert not draw(fast, name, 2).requires_grad and same_draws(flow, fast, name)
    assert conditional(name)
