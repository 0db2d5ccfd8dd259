"""`verify=True`: the residual, and a bound on the error that holds to the last bit (theorem 4)."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import parallel_decode as pd
from tests.systems import problem, sampled, shift, theorem


@theorem
@given(
    seed=st.integers(0, 2**20),
    length=st.integers(1, 24),
    passes=st.integers(1, 30),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    scale=st.sampled_from([0.1, 1.0, 10.0]),
)
def test_the_bound_holds_where_rounding_is_all_that_is_left(
    seed: int, length: int, passes: int, dtype: torch.dtype, scale: float
) -> None:
    """Against the solution in exact arithmetic of the numbers that the system is made of, as float64 gives it."""
    g = torch.Generator().manual_seed(seed)
    weights = (torch.randn(length, length, generator=g) * scale).tril(-1).to(dtype)
    constant = torch.randn(2, length, generator=g).to(dtype)
    guess = torch.randn(2, length, generator=g).to(dtype)

    def system(dtype: torch.dtype) -> pd.TriangularSystem:
        w, c = weights.to(dtype), constant.to(dtype)
        return pd.from_function(lambda x: c + x @ w.T, guess.to(dtype), lipschitz=w.abs())

    (layer,) = (solution := pd.solve(system(dtype), "jacobi", max_passes=passes, verify=True)).layers
    assert layer.residual is not None and layer.bound is not None
    truth = pd.solve(system(torch.float64), "sequential").value
    slack = 0.0 if dtype != torch.float64 else 1e-11 * (1 + truth.abs().max())  # the truth is rounded, too
    finite = truth.isfinite() & solution.value.isfinite()
    assert ((solution.value.double() - truth).abs() <= layer.bound.double() + slack)[finite].all()


@sampled
@given(seed=st.integers(0, 2**20), length=st.integers(1, 12), passes=st.integers(1, 6))
def test_the_bound_holds_for_integers(seed: int, length: int, passes: int) -> None:
    g = torch.Generator().manual_seed(seed)
    weights = torch.randint(-2, 3, (length, length), generator=g).tril(-1)
    constant = torch.randint(-9, 10, (2, length), generator=g)
    system = pd.from_function(
        lambda x: constant + (weights * x[:, None]).sum(2), torch.zeros_like(constant), lipschitz=weights.abs().double()
    )
    (layer,) = (solution := pd.solve(system, "jacobi", max_passes=passes, verify=True)).layers
    truth = pd.solve(system, "sequential").value
    assert layer.bound is not None
    assert ((solution.value - truth).abs() <= layer.bound * (1 + 1e-12)).all()


def test_the_residual_of_integers_is_their_difference() -> None:
    system = pd.from_function(lambda x: 5 + shift(x), torch.zeros(1, 4, dtype=torch.long))
    solution = pd.solve(system, "jacobi", max_passes=1, verify=True)
    assert solution.value.tolist() == [[5, 5, 5, 5]]
    assert solution.layers[0].residual is not None and solution.layers[0].residual.tolist() == [[0, 5, 5, 5]]
    large = pd.from_function(lambda x: 2**62 + 1 + 0 * x, torch.full((1, 2), 2**62))
    (layer,) = pd.solve(large, "jacobi", initial=torch.full((1, 2), 2**62), max_passes=1, verify=True).layers
    assert layer.residual is not None and layer.residual.tolist() == [[0, 0]]
    flags = pd.from_function(lambda x: ~shift(x), torch.zeros(1, 4, dtype=torch.bool))
    (layer,) = pd.solve(flags, "jacobi", max_passes=1, verify=True).layers
    assert layer.residual is not None and layer.residual.tolist() == [[0, 1, 1, 1]]


def test_integers_that_are_one_float_are_still_different() -> None:
    """2^62 and 2^62 + 1."""

    def f(x: Tensor) -> Tensor:
        y = torch.full_like(x, 2**62)
        y[:, 1] += x[:, 0] % 2
        return y

    system = pd.from_function(f, torch.full((1, 2), 2**62 + 1))
    (layer,) = pd.solve(system, "jacobi", max_passes=1, verify=True).layers
    assert layer.residual is not None and layer.residual.tolist() == [[0, 1]]


def test_an_exact_solution_has_a_bound_of_a_few_epsilons() -> None:
    """Not so wide that it says nothing."""
    system = pd.from_function(
        lambda x: 1 + shift(x) / 2,
        torch.zeros(1, 30, dtype=torch.float64),
        lipschitz=torch.eye(30).roll(1, 0).tril(-1) / 2,
    )
    (layer,) = pd.solve(system, tol=0, verify=True).layers
    assert layer.bound is not None and layer.residual is not None and layer.residual.max() == 0
    assert 0 < layer.bound.max() < 1e3 * torch.finfo(torch.float64).eps


@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (2, 4, 0), (0, 0)])
@pytest.mark.parametrize("constants", [False, True])
def test_nothing_can_be_verified(shape: tuple[int, ...], constants: bool) -> None:
    lipschitz = torch.zeros(shape[1], shape[1]) if constants else None
    solution = pd.solve(pd.from_function(lambda x: x, torch.zeros(shape), lipschitz=lipschitz), verify=True)
    (layer,) = solution.layers
    assert layer.residual is not None and layer.residual.shape == shape[:2]
    assert (layer.bound is not None) == constants and (layer.bound is None or layer.bound.shape == shape[:2])
    assert solution.residual is not None and solution.residual.tolist() == [0.0] * shape[0]


def test_the_positions_before_a_value_that_is_not_finite_have_a_residual() -> None:
    made = problem("overflowing", 2, 12, 3)
    solution = pd.solve(made.system(), tol=0, verify=True)
    (layer,) = solution.layers
    assert layer.residual is not None and not solution.value.isfinite().all()
    assert torch.equal(layer.residual.isfinite(), solution.value.isfinite())
    assert not layer.residual.nan_to_num().any()


def test_the_bound_allows_for_so_much_rounding() -> None:
    """Row l of C sums to q_l: its terms and itself are bounded by (q_l + 1) times the largest number, each rounded L + 4 times."""
    constants = torch.tensor([[0.0, 0.0], [0.5, 0.0]], dtype=torch.float64)
    system = pd.from_function(lambda x: 1 + 0.5 * shift(x), torch.zeros(1, 2, dtype=torch.float64), lipschitz=constants)
    (layer,) = pd.solve(system, "sequential", verify=True).layers
    assert layer.bound is not None
    once = (2 + 4) * torch.finfo(torch.float64).eps
    expected = torch.tensor([[1.0 * once, 1.5 * 1.5 * once + 0.5 * 1.0 * once]], dtype=torch.float64)
    torch.testing.assert_close(layer.bound, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("step", [1, -1])
def test_large_integers_that_are_equal_as_floats_have_a_residual(step: int) -> None:
    large = torch.full((1, 3), 2**60)
    moved = pd.from_function(lambda x: torch.where(shift(x) == large, large + step, large), large)
    (layer,) = pd.solve(moved, "jacobi", max_passes=1, verify=True).layers
    assert layer.residual is not None and layer.residual.tolist() == [[0.0, 0.0, 1.0]]
