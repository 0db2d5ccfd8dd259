"""What a GPU does differently: other kernels, CUDA graphs, transfers. Skipped where there is none."""

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import parallel_decode as pd
from parallel_decode.adapters.causal_lm import parallel_generate
from parallel_decode.adapters.itarflow import ITarFlow
from parallel_decode.adapters.starflow import StarFlow
from parallel_decode.adapters.tarflow import TarFlow, digits
from parallel_decode.adapters.tarflow.base import Flow

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
SCHEDULES = [pd.Sequential(), pd.Jacobi(), pd.Sliding(16), pd.Sliding(16, per_row=True), pd.Selective(), pd.Auto()]
CORRECTED = pd.Sliding(32, correction=pd.SecantCorrection())


@pytest.fixture(scope="module")
def flow() -> TarFlow:
    return digits().cuda()


def noise(flow: TarFlow, batch: int, seed: int = 0) -> Tensor:
    z = torch.randn(batch, *flow.var.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return z.to(flow.var)


def drawn(flow: TarFlow, z: Tensor, schedule: pd.Schedule | pd.Selective, **options: object) -> Tensor:
    labels = torch.arange(len(z)) % 10
    images = flow.sample(z=z, y=labels, schedule=schedule, **options)  # type: ignore[arg-type]
    assert isinstance(images, Tensor)
    return images


@pytest.mark.parametrize("schedule", [*SCHEDULES, CORRECTED], ids=repr)
def test_double_precision_is_that_of_the_cpu(flow: TarFlow, schedule: pd.Schedule | pd.Selective) -> None:
    wide, here = copy.deepcopy(flow).double(), digits().double()
    z = noise(wide, 3)
    expected = drawn(here, z.cpu(), pd.Sequential())
    assert (drawn(wide, z, schedule, tol=1e-12).cpu() - expected).abs().max() < 1e-9


@pytest.mark.parametrize("options", [{}, {"guidance": 1.0, "annealed_guidance": True}], ids=str)
@pytest.mark.parametrize("schedule", [*SCHEDULES, CORRECTED], ids=repr)
def test_captured_windows_draw_what_eager_ones_do(
    flow: TarFlow, schedule: pd.Schedule | pd.Selective, options: dict[str, object]
) -> None:
    for seed in range(2):  # replayed on noise that was not captured
        z = noise(flow, 2, seed)
        expected = drawn(flow, z, pd.Sequential(), **options)
        assert (drawn(flow, z, schedule, compile=True, **options) - expected).abs().max() < 2e-3


def successors() -> list[tuple[Flow, dict[str, Any]]]:
    """A flow with noise levels and blocks of two patch sizes, and one of latents and texts, with what to draw from them."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(in_channels=1, img_size=8, channels=64, num_blocks=2, layers_per_block=[1, 2])
    text: dict[str, Any] = dict(rope=True, sos=True, txt_size=3, txt_dim=5, cond_top_only=True, use_softplus=True)
    made: list[Flow] = [ITarFlow(**sizes, patch_sizes=[2, 4], num_classes=3), StarFlow(**sizes, patch_size=2, **text)]
    for each in made:
        for name, p in each.named_parameters():
            torch.nn.init.normal_(p, std=0.03 if "proj_out" in name else 0.15)
        each.double().cuda()
    texts = [torch.randn(n, 3, 5, dtype=torch.float64).cuda() for n in (2, 1)]
    options = {"y": [0, 2], "t": 0.3}, {"text": texts[0], "text_unconditional": texts[1]}
    return list(zip(made, options, strict=True))


@pytest.mark.parametrize("guidance", [0.0, 1.0])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_captured_windows_of_its_successors_draw_what_eager_ones_do(
    schedule: pd.Schedule | pd.Selective, guidance: float
) -> None:
    for made, options in successors():
        like, options = made.noise_like, options | {"guidance": guidance}
        for seed in range(2):
            generator = torch.Generator().manual_seed(seed)
            z = torch.randn(2, *like.shape, generator=generator, dtype=torch.float64).to(like)
            expected = made.sample(z=z, schedule="sequential", **options)
            got = made.sample(z=z, schedule=schedule, tol=1e-12, compile=True, **options)
            assert isinstance(expected, Tensor) and isinstance(got, Tensor) and (got - expected).abs().max() < 1e-9


def test_captured_windows_of_several_batch_sizes_and_types_take_turns(flow: TarFlow) -> None:
    for batch in (1, 4, 1, 4):
        for dtype in (None, torch.bfloat16):
            with torch.autocast("cuda", dtype, enabled=dtype is not None):
                z = noise(flow, batch, batch)
                sequential = drawn(flow, z, pd.Sequential())
                captured = drawn(flow, z, pd.Sequential(), compile=True)
                assert (captured - sequential).abs().mean() < (1e-4 if dtype is None else 0.1)


def test_captured_windows_see_weights_that_changed() -> None:
    flow = digits().cuda()
    z = noise(flow, 2)
    before = drawn(flow, z, pd.Sliding(16), compile=True)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.mul_(0.9)
    after = drawn(flow, z, pd.Sliding(16), compile=True)
    assert (after - drawn(flow, z, pd.Sequential())).abs().max() < 2e-3 < (after - before).abs().max()


def test_gradients_are_those_of_the_cpu() -> None:
    grads = []
    for flow in (digits().double(), digits().double().cuda()):
        z = noise(flow, 2).requires_grad_()
        images = drawn(flow, z, pd.Sliding(32), tol=1e-12, differentiable=True)
        weight = flow.get_parameter("blocks.0.proj_in.weight")
        grads += [g.cpu() for g in torch.autograd.grad(images.square().sum(), [z, weight])]
    for here, there in zip(grads[:2], grads[2:], strict=True):
        assert (here - there).abs().max() < 1e-7 * here.abs().max()


@pytest.mark.parametrize("schedule", ["sequential", "jacobi", pd.Sliding(8), "auto"], ids=str)
@pytest.mark.parametrize("how", [{"do_sample": False}, {"do_sample": True, "top_k": 20}], ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_language_models_have_the_text_of_generate(
    schedule: pd.Schedule | str, how: dict[str, object], batch: int
) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2
    )
    model: Any = transformers.LlamaForCausalLM(config).cuda().double().eval()  # type: ignore[call-arg]
    ids = torch.randint(1, 64, (batch, 12)).cuda()
    mask = torch.ones_like(ids)
    mask[1:, :3] = 0
    options = {"attention_mask": mask, "max_new_tokens": 40, "pad_token_id": 0, "eos_token_id": None, **how}
    torch.manual_seed(1)
    expected = model.generate(ids, **options)
    after = torch.cuda.get_rng_state()
    torch.manual_seed(1)
    text = model.generate(ids, custom_generate=parallel_generate, schedule=schedule, **options)
    assert torch.equal(text, expected)
    assert torch.equal(torch.cuda.get_rng_state(), after)
