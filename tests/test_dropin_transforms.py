"""Drop-ins under torch's transforms: what the library's own flow gives there, or a refusal by name."""

from collections.abc import Callable
from typing import Any

import normflows
import pytest
import torch
import zuko
from nflows import transforms as nt
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.autograd.functional import hessian, jacobian
from torch.fx.experimental.proxy_tensor import make_fx

from parallel_decode.adapters.maf import parallel
from parallel_decode.adapters.maf.inverse import Parallel

D, C = 5, 2
DOUBLE = torch.float64
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # the libraries' own
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),  # of vmap, in the libraries too
]

Function = Callable[[Tensor], Tensor]


class ZukoCase:
    """Functions of a vector, of a zuko flow; `c` is its context."""

    flow = staticmethod(lambda: zuko.flows.MAF(D, C, transforms=2, hidden_features=[8]))
    c = torch.linspace(-1, 1, C, dtype=DOUBLE)

    @staticmethod
    def inverse(flow: Any, x: Tensor) -> Tensor:
        return flow.transform(ZukoCase.c).inv(x)  # type: ignore[no-any-return]

    @staticmethod
    def log_prob(flow: Any, x: Tensor) -> Tensor:
        return flow(ZukoCase.c).log_prob(x)[None]  # type: ignore[no-any-return]

    @staticmethod
    def sample(flow: Any, x: Tensor) -> Tensor:
        """rsample, a function of the context."""
        torch.manual_seed(3)
        return flow(x[:C]).rsample()  # type: ignore[no-any-return]


class SplineCase(ZukoCase):
    flow = staticmethod(lambda: zuko.flows.NSF(D, C, transforms=1, bins=4, hidden_features=[8]))


class NflowsCase:
    """Functions of a vector, of an affine transform of nflows; it takes batches."""

    flow: Any = staticmethod(lambda: nt.MaskedAffineAutoregressiveTransform(D, 8, context_features=C))

    @staticmethod
    def inverse(flow: Any, x: Tensor) -> Tensor:
        return flow.inverse(x[None], x[None, :C])[0][0]  # type: ignore[no-any-return]

    @staticmethod
    def log_prob(flow: Any, x: Tensor) -> Tensor:
        return flow(x[None], x[None, :C])[1]  # type: ignore[no-any-return]

    @staticmethod
    def sample(flow: Any, x: Tensor) -> Tensor:
        """The inverse of a noise in a context, with its log determinant."""
        noise = torch.linspace(-1, 1, D, dtype=DOUBLE)[None]
        z, log_det = flow.inverse(noise, x[None, :C])
        return torch.cat([z[0], log_det])


class NormflowsCase(NflowsCase):
    flow = staticmethod(lambda: normflows.flows.MaskedAffineAutoregressive(D, 8, context_features=C))


CASES: dict[str, Any] = {"zuko MAF": ZukoCase, "zuko NSF": SplineCase, "nflows": NflowsCase, "normflows": NormflowsCase}


def dual(f: Function, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        y = f(forward_ad.make_dual(x, x.cos()))  # type: ignore[no-untyped-call]
        return forward_ad.unpack_dual(y).tangent  # type: ignore[no-untyped-call, no-any-return]


def batched(f: Function, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    y = f(x)
    return torch.autograd.grad(y, x, torch.eye(len(y), dtype=DOUBLE), is_grads_batched=True)[0]


TRANSFORMS: dict[str, Callable[[Function, Tensor], Tensor]] = {
    "vmap": lambda f, x: torch.func.vmap(f, randomness="same")(torch.stack([x, 2 * x])),
    "grad": lambda f, x: torch.func.grad(lambda x: f(x).sum())(x),
    "jacrev": lambda f, x: torch.func.jacrev(f, chunk_size=2)(x),
    "jacfwd": lambda f, x: torch.func.jacfwd(f, randomness="same")(x),
    "hessian": lambda f, x: torch.func.jacrev(torch.func.jacrev(f))(x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x.cos(),))[1],
    "vjp": lambda f, x: torch.func.vjp(f, x)[1](f(x).cos())[0],
    "jacobian": lambda f, x: jacobian(f, x),  # type: ignore[no-untyped-call]
    "dual numbers": dual,
    "checkpoint": lambda f, x: jacobian(lambda x: torch.utils.checkpoint.checkpoint(f, x, use_reentrant=False), x),  # type: ignore[no-untyped-call]
    "gradcheck": lambda f, x: torch.tensor(torch.autograd.gradcheck(f, x.clone().requires_grad_(), fast_mode=True)),
}
REFUSED: dict[str, tuple[str, Callable[[Function, Tensor], Any]]] = {
    "is_grads_batched": ("batched gradients", batched),
    "jacobian(vectorize=True)": ("batched gradients", lambda f, x: jacobian(f, x, vectorize=True)),  # type: ignore[no-untyped-call]
    "hessian": ("second derivative", lambda f, x: hessian(lambda x: f(x).sum(), x)),  # type: ignore[no-untyped-call]
}


def pair(case: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    flow = case.flow().to(DOUBLE).eval()
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    fast = parallel(flow)
    assert any(isinstance(module, Parallel) for module in fast.modules())
    return flow, fast


@pytest.mark.parametrize("direction", ["inverse", "log_prob", "sample"])
@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("library", CASES)
def test_a_transform_gives_what_it_gives_of_the_librarys_flow(library: str, name: str, direction: str) -> None:
    case, x = CASES[library], torch.linspace(-0.8, 0.9, D, dtype=DOUBLE)
    flow, fast = pair(case)
    transform = TRANSFORMS[name]
    if name == "vmap" and direction == "sample" and issubclass(case, NflowsCase):
        for f in (flow, fast):  # both libraries add the context in place
            with pytest.raises(RuntimeError, match="doesn't match the broadcast shape"):
                transform(lambda x: case.sample(f, x), x)  # noqa: B023
        return
    own, ours = (transform(lambda x: getattr(case, direction)(f, x), x) for f in (flow, fast))  # noqa: B023
    torch.testing.assert_close(ours, own, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("library", CASES)
def test_what_an_inverse_does_not_support_is_refused_by_name(library: str, name: str) -> None:
    case, x = CASES[library], torch.linspace(-0.8, 0.9, D, dtype=DOUBLE)
    (what, transform), (flow, fast) = REFUSED[name], pair(case)
    with pytest.raises(NotImplementedError, match=f"{what}.*flow that was given to `parallel`"):
        transform(lambda x: case.inverse(fast, x), x)
    transform(lambda x: case.inverse(flow, x), x)  # the way out that the message names
    own, ours = (transform(lambda x: case.log_prob(f, x), x) for f in (flow, fast))  # noqa: B023
    torch.testing.assert_close(ours, own)


class Inverting(nn.Module):
    """A module whose forward is a case's inverse."""

    def __init__(self, case: Any, flow: nn.Module) -> None:
        super().__init__()
        self.case, self.flow = case, flow

    def forward(self, x: Tensor) -> Tensor:
        return self.case.inverse(self.flow, x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("library", CASES)
def test_gradients_of_each_sample_by_functional_call(library: str) -> None:
    case, x = CASES[library], torch.randn(3, D, dtype=DOUBLE)
    found = []
    for flow in pair(case):
        module = Inverting(case, flow)

        def loss(parameters: dict[str, Tensor], x: Tensor, module: nn.Module = module) -> Tensor:
            return torch.func.functional_call(module, parameters, x).square().sum()  # type: ignore[no-any-return]

        found.append(torch.func.vmap(torch.func.grad(loss), (None, 0))(dict(module.named_parameters()), x))
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.filterwarnings("ignore")  # each tensor read as a number
@pytest.mark.parametrize("record", ["jit.trace", "make_fx"])
@pytest.mark.parametrize("library", CASES)
def test_a_recording_holds_for_other_values_than_those_it_was_made_of(library: str, record: str) -> None:
    case = CASES[library]
    flow, fast = pair(case)
    module, x, other = Inverting(case, fast), torch.zeros(D, dtype=DOUBLE), 3 * torch.randn(D, dtype=DOUBLE)
    with torch.no_grad():
        recorded = torch.jit.trace(module, x) if record == "jit.trace" else make_fx(module)(x)  # type: ignore[no-untyped-call]
        torch.testing.assert_close(recorded(other), case.inverse(flow, other), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("library", CASES)
def test_tensors_without_values_keep_their_shapes(library: str) -> None:
    case, x = CASES[library], torch.zeros(D, dtype=DOUBLE)
    _, fast = pair(case)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert case.inverse(fast, mode.from_tensor(x)).shape == (D,)
    if not library.startswith("zuko"):  # the context of the others is of x
        assert case.inverse(fast.to("meta"), x.to("meta")).is_meta
        assert "meta device" in str(parallel.report(parallel(case.flow().to("meta"))))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # torch's own, of the library's inverse too
@pytest.mark.parametrize("library", CASES)
def test_a_compiled_inverse_is_the_librarys(library: str) -> None:
    case, x = CASES[library], torch.randn(D, dtype=DOUBLE)
    flow, fast = pair(case)
    compiled = torch.compile(Inverting(case, fast), backend="eager")
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(compiled(x), case.inverse(flow, x))
