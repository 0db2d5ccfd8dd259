"""The iTARFlow adapter against its plain definition, its contract, and the format of Apple's checkpoints."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner

import parallel_decode as pd
from benchmarks import peers
from parallel_decode.adapters.itarflow import ITarFlow
from parallel_decode.adapters.tarflow import TarFlow, base, shards
from parallel_decode.adapters.tarflow.decoding import FlowSystem
from parallel_decode.adapters.tarflow.load import load
from parallel_decode.adapters.tarflow.probe import probe
from parallel_decode.cached.graphs import Graphs
from parallel_decode.cli import app
from parallel_decode.testing import check_system
from tests import itarflow_reference as reference
from tests.flows import Evil
from tests.flows import flow as tarflow
from tests.systems import SCHEDULES

ROOT = Path(__file__).parents[1]
CONFIGS: dict[str, dict[str, Any]] = {
    "deep": dict(patch_sizes=[2], channels=[64], num_blocks=2, layers_per_block=[1, 3], num_classes=3),
    "patches": dict(patch_sizes=[2, 4, 2], channels=[64, 128, 64], num_blocks=3, layers_per_block=[1], num_classes=3),
    "shared": dict(
        patch_sizes=[4], channels=[64], num_blocks=2, layers_per_block=[1, 2], nvp=False, shared_backbone_layers=1
    ),
}
SCALES = {"deep": 1.0, "patches": 1.5, "shared": 1.0}
GUIDANCE: list[dict[str, Any]] = [
    {},
    {"guidance": 1.3},
    {"guidance": 0.7, "guide_rule": "starflow"},
    {"guidance": 0.7, "annealed_guidance": True, "attn_temp": 1.5, "guide_flows": 1},
    {"guidance": 0.4, "guide_rule": "starflow", "guide_flows": 2, "annealed_guidance": True},
]
T = torch.tensor([[0.3], [0.05], [0.7]], dtype=torch.float64)


def flow(name: str = "patches", **options: Any) -> ITarFlow:
    """A small flow whose weights are random enough to make every position depend on those before."""
    torch.manual_seed(0)
    made = ITarFlow(1, 8, **CONFIGS[name], input_scale=SCALES[name], **options)
    for key, p in made.named_parameters():
        torch.nn.init.normal_(p, std=0.03 if "proj_out" in key else 0.15)
    made.var.uniform_(0.5, 2)
    return made.double()


def noise(made: ITarFlow, batch: int = 3) -> Tensor:
    return torch.randn(batch, *made.var.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def images(made: ITarFlow, batch: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(batch, 1, made.img_size, made.img_size, generator=generator, dtype=torch.float64)


def labels(made: ITarFlow) -> Tensor | None:
    return torch.tensor([0, -1, 2]) if made.num_classes else None


def draw(made: ITarFlow, **options: Any) -> Tensor:
    given = {"z": noise(made), "y": labels(made), "t": T, "schedule": "sequential"} | options
    drawn = made.sample(**given)
    assert isinstance(drawn, Tensor)
    return drawn


# against the definition


@pytest.mark.parametrize("name", CONFIGS)
def test_forward_follows_the_definition_and_knows_its_determinant(name: str) -> None:
    made = flow(name)
    x, y = images(made), labels(made)
    z, logdet = made(x, y, T)
    expected = reference.forward(made.state_dict(), x, y, T, made.patch_sizes, SCALES[name])
    assert (z - expected[0]).abs().max() < 1e-11 and (logdet - expected[1]).abs().max() < 1e-11
    one = None if y is None else y[:1]
    jacobian = torch.autograd.functional.jacobian(lambda x: made(x, one, T[:1])[0], x[:1])  # type: ignore[no-untyped-call]
    size = x[0].numel()
    volume = torch.linalg.slogdet(jacobian.reshape(size, size))[1]
    assert logdet[0].item() == pytest.approx(volume.item(), rel=1e-10, abs=1e-10)
    assert (draw(made, z=z / made.var.sqrt()) - x).abs().max() < 1e-11


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("guidance", GUIDANCE, ids=str)
def test_samples_follow_the_definition(name: str, guidance: dict[str, Any]) -> None:
    made = flow(name)
    with torch.no_grad():
        given = made.state_dict(), noise(made), labels(made), T, made.patch_sizes, SCALES[name]
        expected = reference.reverse(*given, **guidance)
    for schedule in ("sequential", pd.Jacobi(tol=0), pd.Sliding(3, tol=0)):
        assert (draw(made, schedule=schedule, **guidance) - expected).abs().max() < 1e-11
    single = draw(made.float(), z=noise(made).float(), t=T.float(), **guidance)
    assert single.dtype == torch.float32 and (single - expected).abs().max() < 1e-3  # 3e-4 on an AMD EPYC


def test_guidance_and_the_level_change_what_is_drawn() -> None:
    """Otherwise the tests above would prove little."""
    made = flow()
    drawn = [draw(made), draw(made, t=0.3), *(draw(made, **guidance) for guidance in GUIDANCE[1:])]
    for index, one in enumerate(drawn):
        assert all((one - other).abs().max() > 1e-3 for other in drawn[:index])
    assert torch.equal(draw(made, t=0.3), draw(made, t=torch.full((3, 1), 0.3, dtype=torch.float64)))


@pytest.mark.parametrize("schedule", [*SCHEDULES, pd.Selective()], ids=repr)
@pytest.mark.parametrize("guidance", [GUIDANCE[0], GUIDANCE[3]], ids=str)
def test_every_schedule_gives_the_sequential_samples(schedule: pd.Schedule, guidance: dict[str, Any]) -> None:
    made = flow()
    got = draw(made, schedule=schedule, tol=0.0, **guidance)
    assert (got - draw(made, **guidance)).abs().max() < 1e-11


@pytest.mark.parametrize(("name", "guidance"), [("patches", GUIDANCE[4]), ("shared", {}), ("deep", GUIDANCE[1])])
def test_contract(name: str, guidance: dict[str, Any]) -> None:
    made = flow(name)
    check_system(made.system(noise(made), y=labels(made), t=T, **guidance))


def test_rows_that_go_on_alone_keep_their_class_and_level() -> None:
    made, rows, window = flow(), torch.tensor([0, 2]), pd.Window.full(16)
    layer = made.system(noise(made), y=labels(made), t=T, **GUIDANCE[1]).layer(0, None)
    with torch.no_grad():
        expected = layer.evaluate(layer.initial(), window)[rows]
        layer.initial()
        alone = layer.select(rows)
        assert alone is not None and (alone.evaluate(alone.initial(), window) - expected).abs().max() < 1e-12


def test_captured_windows_of_blocks_of_different_shapes_draw_the_same() -> None:
    """Each shape has storage and inputs of its own; here they are not captured, which only a GPU can."""
    made, graphs = flow(), Graphs(capture=False)
    for t in (T, T.flip(0)):  # new levels are copied to where the old ones were
        system = made.system(noise(made), y=labels(made), t=t, **GUIDANCE[4])
        assert isinstance(system, FlowSystem)
        system.graphs = graphs
        got = pd.solve(system, pd.Sliding(4), tol=1e-13).value
        assert (got - draw(made, t=t, **GUIDANCE[4])).abs().max() < 1e-11
    assert graphs.runs


def test_gradients_are_those_of_sequential_decoding() -> None:
    made = flow()
    state = dict(made.named_parameters()) | {"var": made.var}
    z, t = noise(made).requires_grad_(), T.clone().requires_grad_()
    asked = [z, t, *(p for name, p in state.items() if "time_embed.mlp.0.bias" in name or "blocks.2.proj_in" in name)]
    weight = images(made)
    expected = torch.autograd.grad(
        (reference.reverse(state, z, labels(made), t, made.patch_sizes, 1.5, **GUIDANCE[2]) * weight).sum(), asked
    )
    got = draw(made, z=z, t=t, schedule="jacobi", tol=1e-13, differentiable=True, **GUIDANCE[2])
    found = torch.autograd.grad((got * weight).sum(), asked)
    for one, other in zip(found, expected, strict=True):
        assert other.abs().max() > 1e-6 and (one - other).abs().max() < 1e-9


def test_a_block_of_one_patch_only_passes_it_on() -> None:
    made = ITarFlow(1, 4, patch_sizes=[1, 4, 2], channels=64, num_blocks=3, layers_per_block=1).double()
    with torch.no_grad():
        expected = reference.reverse(made.state_dict(), noise(made), None, T, made.patch_sizes, annealed_guidance=True)
    assert (draw(made, schedule="jacobi", annealed_guidance=True) - expected).abs().max() < 1e-9


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_levels_may_be_transformed_and_compiled() -> None:
    """Their values cannot be looked at then."""
    made = flow()
    x, y = images(made, 1), torch.tensor([2])
    expected = made.log_prob(x, y, t=T[:1])
    compiled = torch.compile(made.log_prob, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x, y, t=T[:1]), expected)
    mapped = torch.func.vmap(lambda t: made.log_prob(x, y, t=t[None]))(T)
    assert torch.allclose(mapped[0], expected) and not torch.allclose(mapped[1], expected)


# rows that are not finite


def test_rows_that_are_not_finite_are_drawn_again_for_their_class_and_level(monkeypatch: pytest.MonkeyPatch) -> None:
    made = flow(noise_std=0.3)
    drawn: list[Tensor] = []

    def huge_in_the_second_row(n: int, like: Tensor, generator: Any) -> Tensor:
        z = torch.randn(n, *like.shape, generator=torch.Generator().manual_seed(len(drawn)), dtype=like.dtype)
        drawn.append(z.clone())
        z[1] *= 1e200 if len(drawn) < 3 else 1  # not finite twice
        return z

    monkeypatch.setattr(base, "standard_normal", huge_in_the_second_row)
    got = made.sample(y=torch.tensor([0, 1, 2]), t=T, schedule="sequential", **GUIDANCE[1])
    assert isinstance(got, Tensor) and len(drawn) == 3
    z = torch.cat([drawn[0][:1], drawn[2][1:2], drawn[0][2:]])
    assert (got - draw(made, z=z, y=torch.tensor([0, 1, 2]), **GUIDANCE[1])).abs().max() < 1e-11


def test_rows_of_a_given_z_that_are_not_finite_are_told() -> None:
    made = flow()
    z = noise(made)
    z[2] *= 1e200
    with pytest.warns(UserWarning, match=r"images \[2\] of 3 are not finite: draw them from another z"):
        draw(made, z=z)
    torch.nn.init.constant_(made.blocks[0].proj_out.bias, 1000.0)  # type: ignore[arg-type,union-attr]
    with pytest.warns(UserWarning, match=r"images \[0, 1\] of 2 are not finite"):  # however often they are drawn
        made.sample(2, t=0.3, schedule="jacobi")


# denoising, and the prior


def by_the_reference(made: ITarFlow, x: Tensor, levels: list[Tensor], clamp: bool) -> Tensor:
    """Denoised by Euler's rule."""
    for level, following in zip(levels, [*levels[1:], 0 * levels[0]], strict=True):
        x = x.requires_grad_()
        z, logdet = reference.forward(made.state_dict(), x, labels(made), level, made.patch_sizes, 1.5)
        (score,) = torch.autograd.grad((logdet - (z.square() / made.var).sum((1, 2)) / 2).sum(), x)
        clean = x.detach() + level[..., None, None] ** 2 * score
        clean = clean.clamp(-1, 1) if clamp else clean
        x = x.detach() - (x.detach() - clean) / level[..., None, None] * (level - following)[..., None, None]
    return x


@pytest.mark.parametrize("clamp", [False, True])
def test_denoising_follows_the_score_down_the_levels(clamp: bool) -> None:
    made, t = flow(), T / 4  # at higher levels random weights blow up
    x = images(made)
    expected = by_the_reference(made, x.clone(), [t, (t + 0.01) / 2, torch.full_like(t, 0.01)], clamp)
    got = made.denoise_iteratively(x, labels(made), t=t, steps=3, clamp=clamp)
    assert (got - expected).abs().max() < 1e-10 * expected.abs().max() and (got - x).abs().max() > 1e-3
    one = made.denoise_iteratively(x, labels(made), t=t, steps=1)
    assert (one - made.denoised(x, labels(made), t)).abs().max() < 1e-12


def test_denoising_of_a_standard_normal_has_its_closed_form() -> None:
    made = ITarFlow(1, 4, patch_sizes=2, channels=64, num_blocks=2, layers_per_block=1, noise_std=0.3).double()
    for block in made.blocks:
        torch.nn.init.zeros_(block.proj_out.bias)  # type: ignore[arg-type,union-attr]  # the identity
    x = images(made)
    factor, levels = 1.0, torch.linspace(0.3, 0.01, 30, dtype=torch.float64).tolist()
    for level, following in zip(levels, [*levels[1:], 0.0], strict=True):
        factor *= 1 - level**2 + following / level * level**2
    assert (made.denoise_iteratively(x) - factor * x).abs().max() < 1e-12  # 30 steps: one for every 0.01
    drawn = made.sample(z=noise(made), denoise=True, schedule="jacobi")
    raw = made.sample(z=noise(made), schedule="jacobi")
    assert isinstance(drawn, Tensor) and isinstance(raw, Tensor)
    assert (drawn - factor * raw).abs().max() < 1e-12
    seeded = (torch.Generator().manual_seed(3) for _ in range(3))
    some, same = (made.denoise_iteratively(x, steps=2, stochastic=True, generator=next(seeded)) for _ in range(2))
    renewed = torch.randn(x.shape, generator=next(seeded), dtype=torch.float64)
    ratio = 0.01 / 0.3
    second = (1 - 0.09) * x + 0.01 * (ratio * 0.3 * x + (1 - ratio**2) ** 0.5 * renewed)
    assert torch.equal(some, same) and (some - (1 - 1e-4) * second).abs().max() < 1e-12


def test_the_prior_follows_the_mean_square_of_z() -> None:
    made = flow("shared")
    before, z = made.var.clone(), noise(made)
    made.update_prior(z.requires_grad_())
    assert torch.allclose(made.var, 0.9 * before + 0.1 * z.square().mean(0), rtol=1e-12) and not made.var.requires_grad
    with pytest.raises(ValueError, match=r"z is .* expected floats of shape \(batch, 4, 16\)"):
        made.update_prior(z[:, :3])


def test_log_prob_is_the_density_at_a_level() -> None:
    made = flow()
    x = images(made)
    z, logdet = made(x, labels(made), T)
    expected = torch.distributions.Normal(0, made.var.sqrt()).log_prob(z).sum((1, 2)) + logdet  # type: ignore[no-untyped-call]
    assert torch.allclose(made.log_prob(x, labels(made), t=T), expected, rtol=1e-12)


# what comes from the shared pieces


def test_plans_probes_and_half_precision(tmp_path: Path) -> None:
    made = flow(noise_std=0.3)
    plan = pd.calibrate(made, 2, runs=1, progress=False, schedules=["jacobi", pd.Sliding(4)], guidance=0.7)
    plan.save(tmp_path / "plan.json")
    again = pd.Plan.load(tmp_path / "plan.json")
    y = torch.tensor([0, 1])
    got = made.sample(z=noise(made, 2), y=y, guidance=0.7, schedule=again, tol=1e-13)
    assert isinstance(got, Tensor) and len(again.layers) == 3
    assert (got - draw(made, z=noise(made, 2), y=y, t=0.3, guidance=0.7)).abs().max() < 1e-11
    with pytest.warns(UserWarning, match="made for rule guide_scales, and is used for rule guide_gaussians"):
        made.sample(z=noise(made, 2), y=y, guidance=0.7, guide_rule="starflow", schedule=again)
    found = probe(made, 2, hidden=(1,), positions=2, t=0.5)
    assert [len(block.jacobian) > 0 for block in found.blocks] == [True] * 3
    with torch.autocast("cpu", torch.bfloat16):
        low = draw(made.float(), z=noise(made).float(), t=0.3, schedule="jacobi")
    full = draw(made, z=noise(made).float(), t=0.3)
    assert low.dtype == torch.float32 and (low - full).abs().max() < 0.05 * full.abs().max()


# bad input


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"t": None}, ValueError, "t, the noise level, was left out, .* pass t=0.3, say, or noise_std= to the flow"),
        ({"t": 0.0}, ValueError, "t is 0.0, expected noise levels above 0"),
        ({"t": float("nan")}, ValueError, "t is nan, expected noise levels above 0"),
        ({"t": torch.ones(3)}, ValueError, r"t is torch.float32 of shape \(3,\), expected floats of shape \(3, 1\)"),
        ({"t": torch.ones(2, 1)}, ValueError, r"shape \(2, 1\), expected floats of shape \(3, 1\)"),
        ({"t": torch.ones(3, 1).long()}, ValueError, "t is torch.int64"),
        ({"t": "0.3"}, TypeError, "t is '0.3', expected a number, or a tensor"),
        ({"t": True}, TypeError, "t is True"),
        ({"guide_rule": "flow"}, ValueError, "guide_rule is 'flow', expected 'tarflow' or 'starflow'"),
        ({"guide_flows": 0}, ValueError, "guide_flows is 0, expected at least 1"),
        ({"guidance": -1.0}, ValueError, "guidance is -1.0"),
        ({"guide_what": "a"}, TypeError, "guide_what"),
        ({"y": 3}, ValueError, "y holds class 3"),
        ({"z": torch.zeros(3, 4, 4)}, ValueError, r"expected floats of shape \(batch, 16, 4\)"),
    ],
    ids=str,
)
def test_bad_samples(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        draw(flow(), **options)


def test_bad_denoising() -> None:
    made = flow()
    for t_end in (0.1, 0.0, float("nan")):
        with pytest.raises(ValueError, match=f"t_end is {t_end}, expected a number above 0, and none above t"):
            made.denoise_iteratively(images(made), t=T, t_end=t_end)
    with pytest.raises(ValueError, match="steps is 0, expected at least 1"):
        made.denoise_iteratively(images(made), t=T, steps=0)
    with pytest.raises(ValueError, match="t, the noise level, was left out"):
        made.denoise_iteratively(images(made))
    with pytest.raises(ValueError, match=r"x is .* expected floats of shape \(batch, 1, 8, 8\)"):
        made.denoise_iteratively(images(made)[..., :2], t=0.3)


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"patch_sizes": [2, 3]}, ValueError, "img_size is 8, expected a multiple of every patch size, 3"),
        ({"patch_sizes": [2, 2, 2]}, ValueError, r"patch_sizes is \[2, 2, 2\], expected one number, or one for each of 2"),
        ({"patch_sizes": "22"}, TypeError, "patch_sizes is '22', expected a whole number"),
        ({"channels": [64, 100]}, ValueError, "channels is 100, expected a multiple of 64"),
        ({"layers_per_block": [0, 1]}, ValueError, "layers_per_block is 0, expected at least 1"),
        ({"input_scale": 0}, ValueError, "input_scale is 0, expected a finite number above 0"),
        ({"input_scale": "1"}, TypeError, "input_scale is '1', expected a number"),
        ({"noise_std": -1}, ValueError, "noise_std is -1"),
        ({"channels": [64, 128], "shared_backbone_layers": 1}, ValueError, "expected one width for blocks that share"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_flows(config: dict[str, Any], error: type[Exception], message: str) -> None:
    good = dict(patch_sizes=2, channels=64, num_blocks=2, layers_per_block=1)
    with pytest.raises(error, match=message):
        ITarFlow(1, 8, **(good | config))


# checkpoints


def published(made: ITarFlow, old: bool = False) -> dict[str, Tensor]:
    """What Apple's code saves for this flow: the same names, and a causal mask for each block."""
    masks = {f"blocks.{i}.attn_mask": torch.ones(16, 16).tril() for i in range(len(made.blocks))}
    state = dict(made.state_dict()) | masks
    return {name.replace("head_blocks", "attn_blocks") if old else name: value for name, value in state.items()}


def test_names_and_shapes_are_those_of_public_checkpoints() -> None:
    def layer(name: str, c: int) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {
            f"{name}.{part}.norm.{kind}": (c,) for part in ("attention", "mlp") for kind in ("weight", "bias")
        }
        linear = {
            "attention.qkv": (3 * c, c),
            "attention.proj": (c, c),
            "mlp.main.0": (4 * c, c),
            "mlp.main.2": (c, 4 * c),
        }
        for part, shape in linear.items():
            shapes |= {f"{name}.{part}.weight": shape, f"{name}.{part}.bias": shape[:1]}
        return shapes  # fmt: skip

    def block(index: int, length: int, dim: int, c: int, outputs: int, layers: list[str]) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {"pos_embed": (length, c)}
        linear = {
            "proj_in": (c, dim),
            "proj_out": (outputs, c),
            "time_embed.mlp.0": (4 * c, c),
            "time_embed.mlp.2": (c, 4 * c),
        }
        for part, shape in linear.items():
            shapes |= {f"{part}.weight": shape, f"{part}.bias": shape[:1]}
        for name in layers:
            shapes |= layer(name, c)
        return {f"blocks.{index}.{name}": shape for name, shape in shapes.items()}  # fmt: skip

    def shapes(name: str) -> dict[str, tuple[int, ...]]:
        return {key: tuple(value.shape) for key, value in flow(name).state_dict().items()}

    classes = {f"blocks.{i}.class_embed": (3, 1, c) for i, c in enumerate((64, 128, 64))}
    assert shapes("patches") == {
        **block(0, 16, 4, 64, 8, ["head_blocks.0"]),
        **block(1, 4, 16, 128, 32, ["head_blocks.0"]),
        **block(2, 16, 4, 64, 8, ["head_blocks.0"]),
        **classes,
        "var": (16, 4),
    }
    assert shapes("shared") == {
        **layer("shared_backbone.0", 64),
        **block(0, 4, 16, 64, 16, ["shared_backbone.0"]),
        **block(1, 4, 16, 64, 16, ["shared_backbone.0", "head_blocks.0"]),
        "var": (4, 16),
    }


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("old", [False, True])
def test_checkpoints_load_with_their_configuration_read_off(tmp_path: Path, name: str, old: bool) -> None:
    made = flow(name).float()
    torch.save(published(made, old), tmp_path / "model.pth")
    loaded = ITarFlow.from_checkpoint(tmp_path / "model.pth", noise_std=0.3, input_scale=SCALES[name])
    assert loaded.noise_std == 0.3 and not loaded.training and loaded.patch_sizes == made.patch_sizes
    assert (draw(loaded, z=noise(made).float(), t=0.3) - draw(made, z=noise(made).float(), t=0.3)).abs().max() == 0
    assert loaded.state_dict().keys() == made.state_dict().keys()
    given = ITarFlow.from_checkpoint(tmp_path / "model.pth", in_channels=1, img_size=made.img_size, **CONFIGS[name])
    assert sum(p.numel() for p in given.parameters()) == sum(p.numel() for p in made.parameters())
    again = flow(name).float()
    for p in again.parameters():
        torch.nn.init.zeros_(p)
    again.load_state_dict(published(made, old))
    assert all(torch.equal(value, made.state_dict()[key]) for key, value in again.state_dict().items())
    with pytest.raises(ValueError, match=r"does not fit this configuration: .*patch_sizes is 8, expected"):
        ITarFlow.from_checkpoint(tmp_path / "model.pth", patch_sizes=8)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_hub_round_trip(tmp_path: Path, name: str) -> None:
    made = flow(name, noise_std=0.1).float()
    made.save_pretrained(tmp_path / "saved")
    for loaded in (ITarFlow.from_pretrained(tmp_path / "saved"), ITarFlow.from_checkpoint(tmp_path / "saved")):
        assert loaded.noise_std == 0.1 and loaded.input_scale == SCALES[name]
        z = noise(made).float()
        assert torch.equal(draw(loaded, z=z, t=None, schedule="jacobi"), draw(made, z=z, t=None, schedule="jacobi"))


def test_bad_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"var": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        ITarFlow.from_checkpoint(tmp_path / "evil.pth")
    assert "ran" not in capsys.readouterr().out
    state = published(flow().float())
    damaged = {
        "is not an ITarFlow checkpoint": {"weight": torch.zeros(3)},
        "it has no time embedding, as of a TarFlow": dict(tarflow().float().state_dict()),
        "'blocks.1.pos_embed' is missing": {k: v for k, v in state.items() if k != "blocks.1.pos_embed"},
        "is missing": {k: v for k, v in state.items() if "time_embed.mlp.2" not in k},
        "is unknown": state | {"blocks.0.other": torch.zeros(2)},
        "are not all positive and finite": state | {"var": torch.zeros(16, 4)},
        "no square of": state | {"blocks.2.proj_in.weight": torch.zeros(64, 5)},
    }
    for message, content in damaged.items():
        save_file(content, tmp_path / "bad.safetensors")
        with pytest.raises(ValueError, match=message):
            ITarFlow.from_checkpoint(tmp_path / "bad.safetensors")
    save_file(state, tmp_path / "good.safetensors")
    with pytest.raises(ValueError, match="does not fit this configuration"):
        TarFlow.from_checkpoint(tmp_path / "good.safetensors")


def test_no_tensor_that_is_missing_or_of_another_shape_gives_a_raw_error(tmp_path: Path) -> None:
    made = flow("shared").float()
    for name, value in made.state_dict().items():
        for damaged in (value[..., None], None):
            state = {key: v.clone() for key, v in made.state_dict().items() if key != name}
            if damaged is not None:
                state[name] = damaged.clone()
            save_file(state, tmp_path / "bad.safetensors")
            one_of_several = ".shared_backbone." in f".{name}" and not name.startswith("blocks.0.")
            try:
                ITarFlow.from_checkpoint(tmp_path / "bad.safetensors")
            except ValueError:
                assert not one_of_several, "a copy of a shared layer need not be read"
            else:
                assert one_of_several, f"{name} was damaged, and it was loaded"


# commands, and peers

PEER = """
import torch
import parallel_decode as pd
from parallel_decode.adapters.itarflow import ITarFlow

class Model(ITarFlow):
    def __init__(self, *, shared_backbone_layers, **config):
        super().__init__(**config, shared_backbone_layers=shared_backbone_layers)

    def forward(self, x, y, t):
        z, logdet = super().forward(x, y, t)
        return z, [], logdet / x[0].numel(), []

    def load_state_dict(self, state, strict=True):
        super().load_state_dict(state, strict)

    def reverse(self, x, y=None, t=None, lerp_style="tarflow", **options):
        system = self.system(x, y=y, t=t, guide_rule=lerp_style, **options)
        return pd.solve(system, "sequential").value
"""


def test_the_comparison_with_a_checkout_says_what_is_equal(tmp_path: Path) -> None:
    (tmp_path / "transformer_flow.py").write_text(PEER)
    command = [sys.executable, str(ROOT / "benchmarks" / "itarflow_peer.py"), "--peer-itarflow", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("  ")]
    assert len(lines) > 20 and all(float(line[-2]) < 1e-11 for line in lines if line[-2] != "float64")
    (tmp_path / "transformer_flow.py").write_text("class Model" + PEER.partition("class Model")[2])
    with pytest.raises(ValueError, match="cannot be imported: NameError"):
        peers.itarflow_model(tmp_path, flow())
    (tmp_path / "transformer_flow.py").write_text(
        PEER.replace("super().__init__(**config", "super().__init__(**config | {'num_classes': 5}")
    )
    with pytest.raises(ValueError, match=r"(?s)does not take this flow: .*class_embed"):
        peers.itarflow_model(tmp_path, flow())


def test_shards_of_another_level_are_refused(tmp_path: Path) -> None:
    made = flow(noise_std=0.3).float()
    shards.draw(made, tmp_path, 2, schedule="jacobi", batch_size=2)
    made.noise_std = 0.2
    with pytest.raises(ValueError, match=r"holds images of other settings: noise_std is 0.3 there and 0.2 here"):
        shards.draw(made, tmp_path, 2, schedule="jacobi", batch_size=2)


def test_the_commands_take_either_kind_of_flow(tmp_path: Path) -> None:
    flow(noise_std=0.3).float().save_pretrained(tmp_path / "flow")
    save_file(published(flow().float()), tmp_path / "flow.safetensors")
    tarflow().float().save_pretrained(tmp_path / "tarflow")
    assert isinstance(load(tmp_path / "flow"), ITarFlow) and isinstance(load(tmp_path / "tarflow"), TarFlow)
    assert (
        load(tmp_path / "flow").noise_std == 0.3 and load(tmp_path / "flow.safetensors", noise_std=0.5).noise_std == 0.5
    )
    checkpoint = ("--checkpoint", tmp_path / "flow.safetensors", "--noise-std", 0.3)
    for words in (
        ("bench", *checkpoint, "--batches", 2, "--runs", 1, "--methods", "auto,GS", "--gs-segments", "2,1"),
        ("bench", *checkpoint, "--batches", 1, "--runs", 1, "--blocks", "--methods", "sliding 16"),
        ("probe", *checkpoint, "--n", 2, "--positions", 2, "--out", tmp_path / "probe"),
        ("sample", *checkpoint, "--n", 2, "--in-channels", 1, "--schedule", "jacobi", "--out", tmp_path / "out"),
        ("sample", *checkpoint, "--n", 3, "--in-channels", 1, "--shard-size", 2, "--batch-size", 2, "--out", tmp_path / "many"),
    ):  # fmt: skip
        result = CliRunner().invoke(app, [*map(str, words)])
        assert result.exit_code == 0, result.output
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"0000.png", "0001.png", "grid.png"}
    result = CliRunner().invoke(app, ["bench", "--checkpoint", str(tmp_path / "flow.safetensors"), "--batches", "1"])
    assert result.exit_code == 2 and "the noise level, was left out" in result.output.replace("\n", " ")
    for model, name, message in (
        (flow(), "tarflow", "--peer-tarflow draws from a TarFlow, and this flow is a ITarFlow"),
        (flow(), "gs-jacobi", "--peer-gs-jacobi draws from a TarFlow"),
        (tarflow(), "itarflow", "--peer-itarflow draws from a ITarFlow, and this flow is a TarFlow"),
        (tarflow(), "starflow", "--peer-starflow draws from a StarFlow"),
    ):
        with pytest.raises(ValueError, match=message):
            peers.methods(model, {name: tmp_path})
