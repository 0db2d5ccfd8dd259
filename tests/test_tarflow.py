"""The TarFlow adapter against its plain definition, its contract, and Apple's checkpoint format."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import parallel_decode as pd
from parallel_decode.adapters.tarflow import TarFlow, base, decoding
from parallel_decode.adapters.tarflow.transformer import gelu
from parallel_decode.adapters.tarflow.weights import Linear
from parallel_decode.cached import Reads, RowReads
from parallel_decode.cached.graphs import Graphs
from parallel_decode.testing import check_system
from tests.flows import Evil, flow, labels, noise
from tests.systems import SCHEDULES, Uncached

GUIDANCE: list[dict[str, Any]] = [
    {},
    {"guidance": 1.3},
    {"guidance": 0.7, "guide_what": "b", "annealed_guidance": True, "attn_temp": 1.5},
]


def transformer(weights: dict[str, Tensor], block: int, x: Tensor, y: Tensor | None, flip: bool, temp: float) -> Tensor:
    """The transformer of one block by its definition, for x (B, L, D) in the block's order; no cache, explicit softmax."""
    w = {
        name.removeprefix(f"blocks.{block}."): value
        for name, value in weights.items()
        if name.startswith(f"blocks.{block}.")
    }

    def linear(name: str, h: Tensor) -> Tensor:
        return h @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(name: str, h: Tensor) -> Tensor:
        centred = h - h.mean(-1, keepdim=True)
        return (
            centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]
        )

    pos = w["pos_embed"].flip(0) if flip else w["pos_embed"]
    h = linear("proj_in", x) + pos
    if "class_embed" in w:
        mean = w["class_embed"].mean(0)
        h = h + (
            mean if y is None else torch.stack([mean if label < 0 else w["class_embed"][label] for label in y.tolist()])
        )
    later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    for j in range(2):
        name = f"attn_blocks.{j}"
        q, k, v = linear(f"{name}.attention.qkv", norm(f"{name}.attention.norm", h)).chunk(3, -1)  # one head of 64
        scores = (q @ k.mT / 8 / temp).masked_fill(later, -math.inf)
        h = h + linear(f"{name}.attention.proj", scores.softmax(-1) @ v)
        hidden = linear(f"{name}.mlp.main.0", norm(f"{name}.mlp.norm", h))
        h = h + linear(f"{name}.mlp.main.2", hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2)
    return linear("proj_out", h)


def reference(made: TarFlow, z: Tensor, y: Tensor | None, nvp: bool, **options: Any) -> Tensor:
    """Sampling by its definition: every position by a run of the whole transformer on what is there so far."""
    weights = made.state_dict()
    scale, what = options.get("guidance", 0.0), options.get("guide_what", "ab")
    temp, annealed = options.get("attn_temp", 1.0), options.get("annealed_guidance", False)
    x = z * weights["var"].sqrt()
    for block in (2, 1, 0):
        flip = block % 2 == 1
        z = x.flip(1) if flip else x
        x = z.clone()
        for position in range(1, 16):
            out = transformer(weights, block, x, y, flip, 1.0)[:, position - 1]
            a, b = out.chunk(2, -1) if nvp else (torch.zeros_like(out), out)
            if scale:
                out = transformer(weights, block, x, None, flip, temp)[:, position - 1]
                a_u, b_u = out.chunk(2, -1) if nvp else (torch.zeros_like(out), out)
                g = scale * position / 15 if annealed else scale
                a, b = (a + g * (a - a_u) if "a" in what else a), (b + g * (b - b_u) if "b" in what else b)
            x[:, position] = z[:, position] * a.exp() + b
        x = x.flip(1) if flip else x
    rows: Tensor = x.reshape(len(x), 4, 4, 2, 2)  # patches (row, column) of pixels (row, column)
    return rows.permute(0, 1, 3, 2, 4).reshape(len(x), 1, 8, 8)


@pytest.mark.parametrize("nvp", [True, False])
@pytest.mark.parametrize("num_classes", [0, 3])
@pytest.mark.parametrize("guidance", GUIDANCE, ids=str)
def test_samples_follow_the_definition(nvp: bool, num_classes: int, guidance: dict[str, Any]) -> None:
    made, y = flow(nvp, num_classes), labels(num_classes)
    with torch.no_grad():
        expected = reference(made, noise(), y, nvp, **guidance)
    for schedule in ("sequential", pd.Jacobi(tol=0), pd.Sliding(3, tol=0)):
        got = made.sample(z=noise(), y=y, schedule=schedule, **guidance)
        assert isinstance(got, Tensor) and (got - expected).abs().max() < 1e-12
    single = made.float().sample(z=noise().float(), y=y, schedule="sequential", **guidance)
    assert isinstance(single, Tensor) and (single - expected).abs().max() < 1e-5


@pytest.mark.parametrize("nvp", [True, False])
@pytest.mark.parametrize("num_classes", [0, 3])
def test_forward_inverts_sampling_and_knows_its_determinant(nvp: bool, num_classes: int) -> None:
    made, y = flow(nvp, num_classes), labels(num_classes)
    x = made.sample(z=noise(), y=y, schedule="sequential")
    assert isinstance(x, Tensor)
    z, logdet = made(x, y)
    assert (z - noise() * made.var.sqrt()).abs().max() < 1e-12
    of_first = None if y is None else y[:1]
    jacobian = torch.autograd.functional.jacobian(lambda x: made(x, of_first)[0], x[:1])  # type: ignore[no-untyped-call]
    expected = torch.linalg.slogdet(jacobian.reshape(64, 64))[1]
    assert logdet[0].item() == pytest.approx(expected.item(), rel=1e-10, abs=1e-10)


@pytest.mark.parametrize("nvp", [True, False])
@pytest.mark.parametrize("guidance", GUIDANCE, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_contract(nvp: bool, guidance: dict[str, Any], dtype: torch.dtype) -> None:
    made = flow(nvp, 3).to(dtype)
    check_system(made.system(noise().to(dtype), y=labels(3), **guidance))


@pytest.mark.parametrize("schedule", [*SCHEDULES, pd.Selective()], ids=repr)
@pytest.mark.parametrize("guidance", GUIDANCE, ids=str)
def test_every_schedule_gives_the_sequential_samples(schedule: pd.Schedule, guidance: dict[str, Any]) -> None:
    made = flow(True, 3)
    expected = made.sample(z=noise(), y=labels(3), schedule="sequential", **guidance)
    got, solution = made.sample(z=noise(), y=labels(3), schedule=schedule, tol=0.0, return_solution=True, **guidance)
    assert isinstance(expected, Tensor) and isinstance(got, Tensor)
    assert (got - expected).abs().max() < 1e-12
    assert torch.equal(got, solution.value) and solution.passes <= 3 * 16


@pytest.mark.parametrize("schedule", [pd.Sliding(2), pd.Sliding(5), pd.GaussSeidelJacobi(6), pd.Jacobi()], ids=repr)
def test_a_cached_key_belongs_to_the_final_value(schedule: pd.Schedule) -> None:
    """At a loose tolerance final values differ from those before them: what is kept has to be of the final ones."""
    system = flow().system(noise()).layer(0, None)
    cached, uncached = (pd.solve(s, schedule, tol=0.1) for s in (system, Uncached(system)))
    assert (cached.value - uncached.value).abs().max() < 1e-12 and cached.passes == uncached.passes


def test_a_guess_that_overflows_inside_the_transformer_does_not_spoil_the_cache() -> None:
    made = flow()
    expected = pd.solve(made.system(noise()), "sequential")
    huge = [torch.full_like(noise(), 1e308)] * 3  # its LayerNorm overflows, and 0 * NaN spoils whole rows of attention
    for schedule in (pd.Jacobi(), pd.Sliding(5), pd.GaussSeidelJacobi(6), pd.JacobiGaussSeidel(3)):
        solution = pd.solve(made.system(noise()), schedule, tol=0, initial=huge)
        assert (solution.value - expected.value).abs().max() < 1e-12
        assert all(layer.passes <= 16 for layer in solution.layers)


@pytest.mark.parametrize("schedule", [pd.Sliding(5), pd.GaussSeidelJacobi(6), pd.JacobiGaussSeidel(3)], ids=repr)
def test_nor_do_good_guesses_with_some_that_overflow(schedule: pd.Schedule) -> None:
    """Rows are ahead of one another when a window first meets such a guess."""
    system = flow().system(noise()).layer(0, None)
    truth = pd.solve(system, "sequential").value
    for seed in range(20):
        draw = torch.rand(3, 16, 1, generator=torch.Generator().manual_seed(seed))
        guess = torch.where(draw < 0.15, 1e308, torch.where(draw < 0.4, 0.0, truth))
        solution = pd.solve(system, schedule, tol=1e-3, initial=guess)
        assert (solution.value - truth).abs().max() < 0.1 and solution.passes <= 16


class Adapted(torch.nn.Module):
    """A linear layer with a low-rank change, as LoRA makes it: its `weight` is that of the layer before."""

    def __init__(self, base: torch.nn.Linear) -> None:
        super().__init__()
        self.base, self.weight, self.bias = base, base.weight, base.bias
        self.change = torch.randn_like(base.weight[:, :1]) @ torch.randn_like(base.weight[:1]) / 10

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.change.T  # type: ignore[no-any-return]


class Doubled(torch.nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


@pytest.mark.parametrize(
    "what", ["replaced", "hooked", "hooked before", "parametrized", "without bias", "another norm"]
)
def test_modules_that_somebody_changed_are_what_is_decoded(what: str) -> None:
    """Samples are the inverse of the flow as it is now, not of the weights that its plain modules would have."""
    torch.manual_seed(0)
    made = flow()
    plain = pd.solve(made.system(noise()), "sequential").value
    block: Any
    for block in made.blocks:
        attention = block.attn_blocks[0].attention
        if what == "replaced":
            attention.qkv = Adapted(attention.qkv)
        elif what == "hooked":
            attention.proj.register_forward_hook(lambda module, given, output: 3 * output)
        elif what == "hooked before":
            attention.qkv.register_forward_pre_hook(lambda module, given: (2 * given[0],))
        elif what == "parametrized":
            torch.nn.utils.parametrize.register_parametrization(attention.qkv, "weight", Doubled())
        elif what == "without bias":
            attention.qkv = torch.nn.Linear(64, 192, bias=False).double()
        else:
            attention.norm = torch.nn.RMSNorm(64).double()
    for schedule in ("sequential", pd.Sliding(4)):
        images = pd.solve(made.system(noise()), schedule, tol=1e-12).value
        z, _ = made(images)
        assert (z - noise() * made.var.sqrt()).abs().max() < 1e-9
        assert (images - plain).abs().max() > 1e-3


def test_rows_drawn_again_are_of_the_batch_that_a_plan_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    made, drawn = flow(), list[int]()
    plan = pd.calibrate(made, 3, runs=1, progress=False, schedules=["jacobi"])

    def huge_in_the_second_row(n: int, like: Tensor, generator: object) -> Tensor:
        drawn.append(n)
        z = noise(n)
        z[1] *= 1e300 if len(drawn) == 1 else 1
        return z

    monkeypatch.setattr(base, "standard_normal", huge_in_the_second_row)
    got, solution = made.sample(3, schedule=plan, return_solution=True)  # it would warn of another batch
    expected = made.sample(z=noise(), schedule="jacobi")
    assert isinstance(expected, Tensor) and drawn == [3, 3] and (got - expected).abs().max() < 1e-8
    assert [status.succeeded for status in solution.status] == [True, False, True], "it is of the first draw"


def test_a_plan_for_another_batch_warns_where_the_user_called() -> None:
    made = flow()
    plan = pd.calibrate(made, 2, runs=1, progress=False, schedules=["jacobi"])
    with pytest.warns(UserWarning, match="made for batch 2, and is used for batch 3") as caught:
        made.sample(z=noise(), schedule=plan)
    assert [warning.filename for warning in caught] == [__file__]


def test_another_module_in_the_place_of_a_block_is_refused() -> None:
    made = flow()
    made.blocks[1] = torch.nn.Identity()
    with pytest.raises(ValueError, match="block 1 is a Identity with hooks or a forward of its own"):
        made.sample(z=noise())


def test_windows_that_were_captured_before_a_module_changed_are_not_replayed() -> None:
    made, graphs = flow(), Graphs(capture=False)

    def draw() -> Tensor:
        system = made.system(noise())
        assert isinstance(system, decoding.FlowSystem)
        system.graphs = graphs
        return pd.solve(system, pd.Sliding(4)).value

    draw()
    attention: Any = made.blocks[0].attn_blocks[0].attention  # type: ignore[index,union-attr]
    attention.proj.register_forward_hook(lambda module, given, output: 3 * output)
    with pytest.raises(RuntimeError, match="make a new system"):
        draw()


def test_what_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequential decoding reads each position once; a window reads itself, and at tol=0 nothing before the front again."""
    made, read = flow(), list[int]()
    take = Reads.take

    def looked(self: Reads, x: Tensor) -> Tensor:
        read.append(take(self, x).shape[1])
        return take(self, x)

    monkeypatch.setattr(Reads, "take", looked)
    first = made.system(noise()).layer(0, None)
    pd.solve(first, "sequential")
    assert read == [0] + [1] * 15
    read.clear()
    pd.solve(first, pd.Sliding(4), tol=0)
    assert read[0] == 3 and max(read) == 4


@pytest.mark.parametrize("guidance", GUIDANCE, ids=str)
@pytest.mark.parametrize("captured", [False, True], ids=["", "static shapes"])
def test_ragged_windows_dropped_rows_guidance_and_correction_together(
    guidance: dict[str, Any], captured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of very different difficulty, so that they part; the answer is that of sequential decoding."""
    made, z = flow(num_classes=3), noise() * torch.tensor([0.01, 0.01, 1.0], dtype=torch.float64)[:, None, None]
    y, read, dropped = labels(3), list[object](), list[Tensor]()
    expected = pd.solve(made.system(z, y=y, **guidance), "sequential").value
    take, select = RowReads.take, decoding.BlockSystem.select

    def looked(self: RowReads, x: Tensor) -> Tensor:
        read.append(self)
        return take(self, x)

    def selected(self: decoding.BlockSystem, rows: Tensor) -> decoding.BlockSystem | None:
        dropped.append(rows)
        return select(self, rows)

    monkeypatch.setattr(RowReads, "take", looked)
    monkeypatch.setattr(decoding.BlockSystem, "select", selected)
    for schedule in (
        pd.Sliding(5, per_row=True, correction=pd.SecantCorrection()),
        pd.Sliding(16, per_row=True, correction=pd.SecantCorrection(memory=2, lags=(1, 4))),
    ):
        system = made.system(z, y=y, **guidance)
        assert isinstance(system, decoding.FlowSystem)
        if captured:
            system.graphs = Graphs(capture=False)
        for _ in range(2):  # what is kept from one call to the next does not disturb the next
            for tol, atol in ((1e-12, 1e-10), (0, 1e-12)):
                solution = pd.solve(system, schedule, tol=tol)
                assert (solution.value - expected).abs().max() < atol
        with torch.enable_grad():
            assert system.layer(0, None).evaluate(z, pd.Window.full(16)).requires_grad
    assert read and (dropped or captured)


def test_a_differentiable_evaluation_is_the_same_and_its_gradient_right() -> None:
    made = flow(num_classes=3)
    system = made.system(noise(), y=labels(3), guidance=0.7, attn_temp=1.5).layer(0, None)
    with torch.no_grad():
        expected = system.evaluate(noise(), pd.Window.full(16))
    x = noise().requires_grad_()
    got = system.evaluate(x, pd.Window.full(16))
    assert (got - expected).abs().max() < 1e-12
    (slope,) = torch.autograd.grad(got[1, 9, 2], x, retain_graph=True)
    moved = noise()
    moved[1, 4, 1] += 1e-6
    with torch.no_grad():
        difference = (system.evaluate(moved, pd.Window.full(16)) - expected)[1, 9, 2] / 1e-6
    assert slope[1, 4, 1].item() == pytest.approx(difference.item(), rel=1e-4)
    assert not slope[1, 9:].any() and not slope[0].any()
    assert torch.autograd.grad(got.sum(), made.blocks[2].proj_in.weight)[0].any()  # type: ignore[union-attr,arg-type]


def test_the_cache_holds_keys_and_values_alone() -> None:
    """For all layers of one block at a time, and only once."""
    system = flow().system(noise())
    assert isinstance(system, decoding.FlowSystem)
    pd.solve(system, pd.Sliding(4))
    assert [kv.shape for kv in system.storage.kv] == [(3, 16, 2, 1, 64)] * 2


@pytest.mark.parametrize("rows", [1, 3, 400])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_gelu_of_decoding_is_that_of_the_module(rows: int, dtype: torch.dtype) -> None:
    h = torch.randn(rows, 256, generator=torch.Generator().manual_seed(0)).to(dtype) * 3
    value, expected = gelu(h), torch.nn.GELU()(h)
    assert value.shape == h.shape and value.is_contiguous()
    torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_residual_stream_is_overwritten_only_where_it_may_be(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module = torch.nn.Linear(8, 4)
    linear, h, x = Linear.of(module, torch.float32), torch.randn(3, 4, dtype=dtype), torch.randn(3, 8)
    expected, before = h + module(x), h.clone()
    torch.testing.assert_close(linear.add_to(h, x), expected)  # something may have to be differentiated
    assert torch.equal(h, before)
    with torch.inference_mode():
        held = h.clone()
        given = linear.add_to(held, x)
    torch.testing.assert_close(given, expected)
    assert (given is held) == (dtype == torch.float32)


def test_images_that_are_not_finite_are_told() -> None:
    made = flow()
    torch.nn.init.constant_(made.blocks[0].proj_out.bias, 1000.0)  # type: ignore[arg-type,union-attr]
    with pytest.warns(UserWarning, match=r"images \[0, 1\] of 2 are not finite: draw them from another z"):
        made.sample(2, schedule="jacobi")


def test_one_block_and_a_sequence_of_labels() -> None:
    one = TarFlow(1, 8, 2, 64, 1, 1, num_classes=3)
    _, solution = one.sample(y=[0, 2], schedule="selective", return_solution=True)
    assert [layer.schedule for layer in solution.layers] == [pd.Sequential()]


def test_log_prob_is_the_density() -> None:
    made = TarFlow(1, 8, 2, 64, 2, 1, nvp=False).double()
    for block in made.blocks:
        torch.nn.init.zeros_(block.proj_out.bias)  # type: ignore[arg-type,union-attr]  # the identity
    made.var.uniform_(0.5, 2)
    x = torch.randn(3, 1, 8, 8, dtype=torch.float64)
    expected = torch.distributions.Normal(0, made.var.sqrt()).log_prob(made.patchify(x)).sum((1, 2))  # type: ignore[no-untyped-call]
    assert torch.allclose(made.log_prob(x), expected, rtol=1e-12)


def test_bfloat16_autocast() -> None:
    made = flow().float()
    with torch.autocast("cpu", torch.bfloat16):
        expected = made.sample(z=noise().float(), schedule="sequential")
        got, solution = made.sample(z=noise().float(), schedule="jacobi", return_solution=True)
    assert isinstance(expected, Tensor) and isinstance(got, Tensor)
    assert got.dtype == torch.float32 and (got - expected).abs().max() < 0.05 * expected.abs().max()
    assert solution.passes < 3 * 16
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(got, made.sample(z=noise().float(), schedule="jacobi", tol=2**-8))  # type: ignore[arg-type]
    made.noise_std = 0.1
    halved, solution = made.bfloat16().sample(z=noise().float(), denoise=True, return_solution=True)
    assert isinstance(halved, Tensor) and halved.isfinite().all()
    assert (solution.value - expected).abs().max() < 0.1 * expected.abs().max()


def test_denoising_is_a_step_of_the_score() -> None:
    normal = TarFlow(1, 8, 2, 64, 2, 1, noise_std=0.5).double()
    for block in normal.blocks:
        torch.nn.init.zeros_(block.proj_out.bias)  # type: ignore[arg-type,union-attr]  # the identity on a standard normal
    clean, solution = normal.sample(z=noise(), denoise=True, return_solution=True)
    assert isinstance(clean, Tensor)
    assert (clean - 0.75 * solution.value).abs().max() < 1e-12
    made = flow(num_classes=3, noise_std=0.1)
    x = made.sample(z=noise(), y=labels(3))
    assert isinstance(x, Tensor)
    step = made.denoised(x, labels(3)) - x
    moved = x.clone()
    moved[1, 0, 3, 4] += 1e-5
    with torch.no_grad():
        slope = (made.log_prob(moved, labels(3)) - made.log_prob(x, labels(3)))[1] / 1e-5
    assert step[1, 0, 3, 4].item() == pytest.approx(0.01 * slope.item(), rel=1e-3)


def test_n_labels_and_generator() -> None:
    made = flow(num_classes=3)
    one = made.sample(2, y=1, generator=torch.Generator().manual_seed(3))
    again = made.sample(y=torch.tensor([1, 1]), generator=torch.Generator().manual_seed(3))
    other = made.sample(2, y=2, generator=torch.Generator().manual_seed(3))
    assert isinstance(one, Tensor) and isinstance(again, Tensor) and isinstance(other, Tensor)
    assert one.shape == (2, 1, 8, 8) and torch.allclose(one, again, atol=1e-8) and not torch.allclose(one, other)
    unconditional = (made.sample(z=noise(), y=y, schedule="jacobi") for y in (-1, None))
    assert torch.equal(*unconditional)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "ask for no number of samples"),
        ({"n": 2, "z": noise()}, r"ask for \[2, 3\] samples"),
        ({"z": noise()[:, :4]}, r"z is torch.float64 of shape \(3, 4, 4\), expected floats of shape \(batch, 16, 4\)"),
        ({"z": noise().to("meta")}, "z is on meta and the flow on cpu: move one of them"),
        ({"n": 1, "y": 3}, "y holds class 3, expected numbers below 3"),
        ({"n": 1, "y": torch.tensor([0.5])}, "y is torch.float32"),
        ({"n": 1, "y": [0, 1]}, r"ask for \[1, 2\] samples"),
        ({"n": 1, "denoise": True}, "denoising needs the standard deviation .* pass noise_std="),
        ({"n": 1, "guidance": -1.0}, "guidance is -1.0"),
        ({"n": 1, "guidance": 1.0, "guide_what": "c"}, "guide_what is 'c'"),
        ({"n": 1, "guidance": 1.0, "attn_temp": 0.0}, "attn_temp is 0.0"),
    ],
)
def test_bad_samples(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        flow(num_classes=3).sample(**options)


def test_bad_flows() -> None:
    with pytest.raises(ValueError, match="img_size is 9, expected a multiple of patch_size, 2"):
        TarFlow(1, 9, 2, 64, 1, 1)
    with pytest.raises(ValueError, match="channels is 100, expected a multiple of 64"):
        TarFlow(1, 8, 2, 100, 1, 1)
    with pytest.raises(ValueError, match="this flow has no classes: leave it out"):
        flow().sample(1, y=0)


# checkpoints


def apple_state(made: TarFlow) -> dict[str, Tensor]:
    """What Apple's code saves for this flow: the same names, and a causal mask for each block."""
    masks = {f"blocks.{i}.attn_mask": torch.ones(16, 16).tril() for i in range(3)}
    return dict(made.state_dict()) | masks


def test_names_are_those_of_public_checkpoints() -> None:
    layer = ["attention.norm", "attention.qkv", "attention.proj", "mlp.norm", "mlp.main.0", "mlp.main.2"]
    modules = ["proj_in", "proj_out", *(f"attn_blocks.{j}.{name}" for j in range(2) for name in layer)]
    names = {f"{module}.{kind}" for module in modules for kind in ("weight", "bias")} | {"pos_embed", "class_embed"}
    assert set(flow(num_classes=3).state_dict()) == {f"blocks.{i}.{name}" for i in range(3) for name in names} | {"var"}
    shapes = {name: tuple(value.shape) for name, value in flow(num_classes=3).state_dict().items()}
    assert shapes["blocks.0.pos_embed"] == (16, 64) and shapes["blocks.2.class_embed"] == (3, 1, 64)
    assert shapes["blocks.1.proj_out.weight"] == (8, 64) and shapes["var"] == (16, 4)


@pytest.mark.parametrize("nvp", [True, False])
@pytest.mark.parametrize("num_classes", [0, 3])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_checkpoints_load_with_their_configuration_read_off(
    tmp_path: Path, nvp: bool, num_classes: int, suffix: str
) -> None:
    made, path = flow(nvp, num_classes).float(), tmp_path / f"model{suffix}"
    if suffix == ".pth":
        torch.save(apple_state(made), path)
    else:
        save_file(apple_state(made), path)
    loaded = TarFlow.from_checkpoint(path, noise_std=0.07)
    assert loaded.noise_std == 0.07 and not loaded.training and loaded.nvp is nvp
    kept = loaded.state_dict()
    assert all(torch.equal(value, kept[name]) for name, value in made.state_dict().items())
    wide = TarFlow(4, 8, 2, 64, 3, 2, nvp=nvp, num_classes=num_classes)
    save_file(wide.state_dict(), tmp_path / "wide.safetensors")
    assert TarFlow.from_checkpoint(tmp_path / "wide.safetensors", in_channels=4).patch_size == 2
    with pytest.raises(ValueError, match=r"patches of 16 values, no square of \[3\] channels"):
        TarFlow.from_checkpoint(tmp_path / "wide.safetensors", in_channels=3)
    given_config = dict(in_channels=1, img_size=8, patch_size=2, channels=64, num_blocks=3, layers_per_block=2)
    TarFlow.from_checkpoint(path, **given_config, nvp=nvp, num_classes=num_classes)


def test_the_hub_round_trip(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = flow(num_classes=3, noise_std=0.1).float()
    made.save_pretrained(tmp_path / "saved")
    for loaded in (TarFlow.from_pretrained(tmp_path / "saved"), TarFlow.from_checkpoint(tmp_path / "saved")):
        assert loaded.noise_std == 0.1
        one, other = (one.sample(z=noise().float(), schedule="jacobi") for one in (loaded, made))
        assert torch.equal(one, other)  # type: ignore[arg-type]


def test_bad_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing.pth does not exist: give a .pth"):
        TarFlow.from_checkpoint(tmp_path / "nothing.pth")
    with pytest.raises(ValueError, match=r"a folder without config.json"):
        TarFlow.from_checkpoint(tmp_path)
    for suffix in (".pth", ".safetensors"):
        good, bad = tmp_path / f"good{suffix}", tmp_path / f"bad{suffix}"
        state = apple_state(flow().float())
        torch.save(state, good) if suffix == ".pth" else save_file(state, good)
        for content in (good.read_bytes()[: good.stat().st_size // 2], b"", b"<html>not found</html>"):
            bad.write_bytes(content)
            with pytest.raises(ValueError, match=f"bad{suffix} cannot be read as a checkpoint"):
                TarFlow.from_checkpoint(bad)
        with pytest.raises(ValueError, match=r"does not fit this configuration: img_size is 16, expected 8"):
            TarFlow.from_checkpoint(good, img_size=16)
    torch.save({"weight": torch.zeros(3)}, tmp_path / "foreign.pth")
    with pytest.raises(ValueError, match=r"foreign.pth is not a TarFlow checkpoint"):
        TarFlow.from_checkpoint(tmp_path / "foreign.pth")


def test_pickled_code_never_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"var": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        TarFlow.from_checkpoint(tmp_path / "evil.pth")
    assert "ran" not in capsys.readouterr().out
