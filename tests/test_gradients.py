"""Gradients through `solve`: theorem 6, and the flows."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import zuko
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import parallel_decode as pd
from parallel_decode._adjoint import Adjoint
from parallel_decode.adapters.maf import parallel
from parallel_decode.adapters.tarflow import TarFlow, digits
from parallel_decode.testing import check_system
from tests.systems import Chain, theorem

SCHEDULES = ("sequential", "jacobi", "gs-jacobi", "jacobi-gs", "sliding", "auto")


def sequential(weights: Tensor, z: Tensor) -> Tensor:
    """x_l = z_l + sum_m tanh(x_m) W_lm, one position after the other."""
    x: list[Tensor] = []
    for position in range(z.shape[1]):
        before = torch.stack(x, 1) if x else z[:, :0]
        x.append(z[:, position] + torch.einsum("blij,bl...j->b...i", weights[:, position, :position], before.tanh()))
    return torch.stack(x, 1)


def system(weights: Tensor, z: Tensor) -> pd.TriangularSystem:
    """The same as a system."""
    mask = torch.ones(z.shape[1], z.shape[1], dtype=z.dtype).tril(-1)[None, :, :, None, None]
    return pd.from_function(lambda x: z + torch.einsum("blmij,bmj->bli", weights * mask, x.tanh()), torch.zeros_like(z))


def problem(seed: int, batch: int, length: int, event: int, scale: float, sparse: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(batch, length, length, event, event, generator=generator, dtype=torch.float64) * scale
    weights = weights * (torch.rand(1, length, length, 1, 1, generator=generator) < sparse)
    z = torch.randn(batch, length, event, generator=generator, dtype=torch.float64)
    return weights.requires_grad_(), z.requires_grad_()


@theorem
@given(
    seed=st.integers(0, 2**20),
    batch=st.integers(1, 3),
    length=st.integers(1, 12),
    event=st.integers(1, 3),
    scale=st.sampled_from([0.1, 1.0, 3.0]),
    size=st.sampled_from([1e-8, 1.0, 1e8]),
    schedule=st.sampled_from(SCHEDULES),
)
def test_6_gradients_are_those_of_the_sequential_computation(
    seed: int, batch: int, length: int, event: int, scale: float, size: float, schedule: str
) -> None:
    weights, z = problem(seed, batch, length, event, scale)
    loss = torch.randn(z.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * size
    truth = sequential(weights, z)
    expected = torch.autograd.grad((truth * loss).sum(), (weights, z))
    solution = pd.solve(system(weights, z), schedule, tol=0, differentiable=True)
    torch.testing.assert_close(solution.value, truth, rtol=1e-12, atol=1e-12)
    found = torch.autograd.grad((solution.value * loss).sum(), (weights, z))
    for f, e in zip(found, expected, strict=True):
        assert (f - e).abs().max() <= 1e-12 * max(e.abs().max().item(), 1e-300)


@theorem
@given(seed=st.integers(0, 2**20), length=st.integers(2, 14))
def test_6_the_adjoint_ends_within_depth_plus_2_passes(seed: int, length: int) -> None:
    weights, z = problem(seed, 1, length, 1, 1.0, sparse=0.2)
    linked = (weights[0, :, :, 0, 0] != 0).tril(-1)
    depth = [0] * length
    for position in range(length):
        depth[position] = max([depth[m] + 1 for m in range(position) if linked[position, m]], default=0)
    x = pd.solve(system(weights, z), tol=0).value.requires_grad_()
    y = system(weights, z).evaluate(x, pd.Window.full(length))
    adjoint = Adjoint(y, x, torch.ones_like(x))
    check_system(adjoint)
    solution = pd.solve(adjoint, "jacobi", tol=0)
    assert solution.passes <= min(length, max(depth) + 2)
    jacobian = torch.autograd.functional.jacobian(lambda t: system(weights, z).evaluate(t, pd.Window.full(length)), x)  # type: ignore[no-untyped-call]
    matrix = torch.eye(length, dtype=torch.float64) - jacobian[0, :, 0, 0, :, 0]
    v = torch.linalg.solve_triangular(matrix.T, torch.ones(length, 1, dtype=torch.float64), upper=True)
    torch.testing.assert_close(solution.value.flip(1)[0], v)


def test_gradcheck() -> None:
    weights, z = problem(0, 2, 6, 2, 1.0)
    assert torch.autograd.gradcheck(
        lambda weights, z: pd.solve(system(weights, z), tol=0, differentiable=True).value, (weights, z)
    )


def _penalty(value: Callable[[Tensor], Tensor], z: Tensor) -> None:
    (grad,) = torch.autograd.grad(value(z).sum(), z, create_graph=True)
    (value(z).sum() + grad.norm()).backward()


SECOND_DERIVATIVES: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Any]] = {
    "grad with create_graph": lambda value, z: torch.autograd.grad(value(z).sum(), z, create_graph=True),
    "backward with create_graph": lambda value, z: value(z).sum().backward(create_graph=True),  # type: ignore[no-untyped-call]
    "hessian": lambda value, z: torch.autograd.functional.hessian(lambda z: value(z).sum(), z),  # type: ignore[no-untyped-call]
    "vectorised hessian": lambda value, z: torch.autograd.functional.hessian(
        lambda z: value(z).sum(), z, vectorize=True
    ),  # type: ignore[no-untyped-call]
    "hvp": lambda value, z: torch.autograd.functional.hvp(lambda z: value(z).sum(), z, torch.ones_like(z)),  # type: ignore[no-untyped-call]
    "vhp": lambda value, z: torch.autograd.functional.vhp(lambda z: value(z).sum(), z, torch.ones_like(z)),  # type: ignore[no-untyped-call]
    "jacobian with create_graph": lambda value, z: torch.autograd.functional.jacobian(value, z, create_graph=True),  # type: ignore[no-untyped-call]
    "gradgradcheck": lambda value, z: torch.autograd.gradgradcheck(value, (z,)),
    "gradient penalty": _penalty,
}


def _solved(z: Tensor) -> Tensor:
    weights, _ = problem(0, 1, 4, 1, 1.0)
    return pd.solve(system(weights.detach(), z), tol=0, differentiable=True).value.pow(3)


def _of_layers(z: Tensor) -> Tensor:
    return pd.solve(Chain(z[..., 0]), tol=0, differentiable=True).value


def _of_a_library(z: Tensor) -> Tensor:
    torch.manual_seed(0)
    fast = parallel(zuko.flows.MAF(4, transforms=1).double())
    return fast().transform.inv(z[..., 0])  # type: ignore[no-any-return]


@pytest.mark.parametrize("value", [_solved, _of_layers, _of_a_library])
@pytest.mark.parametrize("way", SECOND_DERIVATIVES)
def test_a_second_derivative_is_an_error_that_says_so(way: str, value: Callable[[Tensor], Tensor]) -> None:
    _, z = problem(0, 1, 4, 1, 1.0)
    with pytest.raises(RuntimeError, match=r"cannot be differentiated twice|a second derivative"):
        SECOND_DERIVATIVES[way](value, z)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("slope", [1e3, 1e7, 1e12])
def test_gradients_of_badly_scaled_systems(slope: float, dtype: torch.dtype) -> None:
    """x_1 = slope z_0 ..., x_2 = x_1 / slope: 1 in the end, though in between the adjoint is far smaller than the gradient that comes in."""
    slopes = torch.tensor([1.0, slope, 1 / slope, slope, 1 / slope, 1.0], dtype=dtype)
    z = torch.zeros(1, 6, dtype=dtype, requires_grad=True)

    def f(x: Tensor) -> Tensor:
        return z + slopes * torch.nn.functional.pad(x, (1, -1))

    expected = torch.cat([slopes[1:].flip(0).cumprod(0).flip(0), torch.ones(1, dtype=dtype)])
    for tol in (None, 0.0):
        value = pd.solve(pd.from_function(f, torch.zeros(1, 6, dtype=dtype)), tol=tol, differentiable=True).value
        (grad,) = torch.autograd.grad(value[0, -1], z)
        torch.testing.assert_close(grad[0], expected, rtol=1e-5, atol=0)


@theorem
@given(seed=st.integers(0, 2**20), length=st.integers(2, 12), tol=st.sampled_from([None, 0.0]))
def test_gradients_where_scales_differ_from_position_to_position(seed: int, length: int, tol: float | None) -> None:
    g = torch.Generator().manual_seed(seed)
    scale = 10 ** (torch.rand(length, generator=g, dtype=torch.float64) * 16 - 8)
    weights = torch.randn(1, length, length, generator=g, dtype=torch.float64).tril(-1) * scale[:, None] / scale
    z = torch.randn(1, length, generator=g, dtype=torch.float64).requires_grad_()
    made = pd.from_function(lambda x: z + (weights * x[:, None]).sum(2), torch.zeros(1, length, dtype=torch.float64))
    value = pd.solve(made, "sequential", tol=tol, differentiable=True).value
    out = int(torch.randint(0, length, (), generator=g))
    (grad,) = torch.autograd.grad(value[0, out], z)
    one = torch.eye(length, dtype=torch.float64)
    expected, sizes = (  # the sizes are those of the sums without cancellation
        torch.linalg.solve_triangular((one - w).T, one[:, out : out + 1], upper=True)[:, 0]
        for w in (weights[0], weights[0].abs())
    )
    assert ((grad[0] - expected).abs() <= 1e-11 * sizes).all()


@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (2, 4, 0), (0, 0)])
def test_gradients_of_nothing(shape: tuple[int, ...]) -> None:
    z = torch.zeros(shape, requires_grad=True)
    value = pd.solve(pd.from_function(lambda x: z + x * 0, torch.zeros(shape)), differentiable=True).value
    (grad,) = torch.autograd.grad(value.sum(), z, allow_unused=True)
    assert grad is None if shape[1] == 0 else grad.shape == shape  # without positions f is not evaluated


def test_a_graph_that_is_retained_can_be_used_again() -> None:
    weights, z = problem(0, 1, 4, 1, 1.0)
    value = pd.solve(system(weights, z), differentiable=True).value
    first = torch.autograd.grad(value.sum(), weights, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(value.sum(), weights)[0], first)


def test_nothing_is_differentiated_unless_asked_and_enabled() -> None:
    weights, z = problem(0, 1, 4, 1, 1.0)
    assert not pd.solve(system(weights, z)).value.requires_grad
    with torch.no_grad():
        assert not pd.solve(system(weights, z), differentiable=True).value.requires_grad


def test_an_evaluate_without_gradients_is_an_error() -> None:
    with pytest.raises(ValueError, match="without no_grad"):
        pd.solve(pd.from_function(torch.no_grad()(lambda x: x.roll(1, 1) * 0), torch.zeros(1, 4)), differentiable=True)


def test_integers_have_no_gradients() -> None:
    tokens = pd.from_function(lambda x: x * 0, torch.zeros(1, 4, dtype=torch.long))
    with pytest.raises(TypeError, match="only floats have gradients"):
        pd.solve(tokens, differentiable=True)


def test_a_row_without_a_solution_has_no_gradient_and_spoils_no_other() -> None:
    z = torch.ones(2, 6, dtype=torch.float64, requires_grad=True)
    factor = torch.tensor([[1.0], [1e200]], dtype=torch.float64)
    diverges = pd.from_function(
        lambda x: z + factor * torch.nn.functional.pad(x, (1, -1)) ** 2, torch.zeros(2, 6, dtype=torch.float64)
    )
    solution = pd.solve(diverges, differentiable=True)
    assert [s.succeeded for s in solution.status] == [True, False]
    (grad,) = torch.autograd.grad(solution.value[0].sum(), z)
    assert grad[0].isfinite().all() and grad[0, 0] > 1


@pytest.mark.parametrize("guidance", [0.0, 1.5])
def test_gradients_of_a_tarflow_sample(guidance: float) -> None:
    torch.manual_seed(0)
    flow = TarFlow(1, 8, 2, 64, num_blocks=3, layers_per_block=1, num_classes=4).double()
    for p in flow.parameters():
        torch.nn.init.normal_(p, std=0.1)
    z, y = torch.randn(2, 16, 4, dtype=torch.float64, requires_grad=True), torch.tensor([1, 3])
    weight = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    leaves = [z, *flow.parameters()]

    solution = pd.solve(flow.system(z, y=y, guidance=guidance), tol=0, differentiable=True)
    found = torch.autograd.grad((solution.value * weight).sum(), leaves, allow_unused=True)

    value = None
    layers = flow.system(z, y=y, guidance=guidance)
    for index in range(layers.depth):  # the sequential computation, kept as a graph
        layer = layers.layer(index, value)
        value = torch.zeros_like(z)
        for position in range(16):
            new = layer.evaluate(value, pd.Window(range(position, position + 1), 0))
            value = torch.cat([value[:, :position], new, value[:, position + 1 :]], 1)
    assert value is not None
    expected = torch.autograd.grad((layers.output(value) * weight).sum(), leaves, allow_unused=True)
    for f, e in zip(found, expected, strict=True):
        assert (f is None) == (e is None)
        if f is not None and e is not None:
            assert (f - e).abs().max() <= 1e-12 * max(e.abs().max().item(), 1e-12)


def test_a_sample_of_digits_has_a_gradient() -> None:
    flow = digits()

    def brightness(z: Tensor, **how: Any) -> Tensor:
        image = flow.sample(z=z, y=3, **how)
        assert isinstance(image, Tensor)
        return image.square().mean()

    z = torch.randn(1, *flow.var.shape, generator=torch.Generator().manual_seed(0), requires_grad=True)
    (grad,) = torch.autograd.grad(brightness(z, differentiable=True), z)
    step = 1e-3 * grad / grad.norm()
    with torch.no_grad():
        change = brightness(z + step, tol=0) - brightness(z - step, tol=0)
    assert change.item() == pytest.approx(2e-3 * grad.norm().item(), rel=0.05)
