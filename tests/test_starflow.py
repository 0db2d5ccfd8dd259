"""The STARFlow adapter against its plain definition, its contract, and the published names."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner

import parallel_decode as pd
from benchmarks import peers
from parallel_decode.adapters.starflow import StarFlow
from parallel_decode.adapters.starflow import config as configs
from parallel_decode.adapters.starflow.decoding import BlockSystem
from parallel_decode.adapters.tarflow import base
from parallel_decode.adapters.tarflow.bench import suite
from parallel_decode.adapters.tarflow.load import load
from parallel_decode.adapters.tarflow.probe import probe
from parallel_decode.cached import Reads
from parallel_decode.cached.graphs import Graphs
from parallel_decode.cli import app
from parallel_decode.testing import check_system
from tests.starflow_reference import Reference
from tests.systems import SCHEDULES, Uncached

BASE: dict[str, Any] = dict(
    in_channels=2, img_size=6, patch_size=2, channels=32, num_blocks=3, layers_per_block=[1, 1, 2], head_dim=16
)
TEXT: dict[str, Any] = dict(txt_size=3, txt_dim=5)
IMAGE = TEXT | dict(
    rope=True, sos=True, seq_order="L2R", cond_top_only=True, use_softplus=True, use_final_norm=True, soft_clip=4.0
)
OTHER_LAYERS: dict[str, Any] = dict(
    use_swiglu=True,
    use_bias=False,
    use_qk_norm=True,
    use_post_norm=True,
    norm_type="rms_norm",
    num_heads=4,
    num_kv_heads=2,
    hf_style_rope=True,
)
IMAGES: dict[str, dict[str, Any]] = {
    "embeddings of places": {},
    "start": dict(sos=True),
    "2-D, an empty block": dict(rope=True, layers_per_block=[1, 0, 1]),
    "as published": IMAGE,
    "text in all blocks, without start": TEXT,
    "text in all blocks, other layers": TEXT | OTHER_LAYERS | dict(rope=True, sos=True, pt_seq_len=5, soft_clip=1.5),
    "a wider deep block": IMAGE | dict(top_block_channels=48, num_blocks=2, layers_per_block=1),
    "a language model": IMAGE | dict(use_pretrained_lm="gemma3_1b", txt_dim=48),
}
LOCAL = IMAGE | dict(img_size=4, head_dim=20, temporal_causal=2, shallow_block_local=True)
VIDEOS: dict[str, tuple[dict[str, Any], int, int, int | None]] = {  # arguments, frames, of them given, context
    "all frames, turned over time": (LOCAL | dict(temporal_causal=0, shallow_block_local=False), 3, 0, None),
    "all frames, turned within": (LOCAL | dict(shallow_block_local=False, cond_top_only=False), 3, 0, None),
    "shallow blocks in frames": (LOCAL, 3, 0, None),
    "given frames": (LOCAL, 3, 2, None),
    "windows of frames": (LOCAL | dict(local_attn_window=3), 5, 0, None),
    "given frames, without start": (LOCAL | dict(sos=False), 3, 1, None),
    "given frames, windows": (LOCAL | dict(local_attn_window=3, num_blocks=2, layers_per_block=1), 6, 1, 1),
}
GUIDANCE = 1.5


@pytest.fixture(autouse=True)
def small_language_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shape of a language model, but small."""
    _, shape = configs.LANGUAGE_MODELS["gemma3_1b"]
    monkeypatch.setitem(configs.LANGUAGE_MODELS, "gemma3_1b", (2, shape | dict(head_dim=16, channels=48)))


def flow(**config: Any) -> StarFlow:
    """A small flow whose weights are random enough to make every position depend on those before."""
    torch.manual_seed(0)
    made = StarFlow(**BASE | config)
    for name, p in made.named_parameters():
        torch.nn.init.normal_(p, std=0.04 if "proj_out" in name else 0.2)
    return made.double().eval()


def reference(made: StarFlow, config: dict[str, Any]) -> Reference:
    deep: dict[str, Any] = {}
    if "use_pretrained_lm" in config:
        deep = OTHER_LAYERS | dict(head_dim=16, num_kv_heads=1)
    return Reference(made.state_dict(), BASE | config | dict(one_d=bool(deep), deep=deep) | dict(
        layers_per_block=made.config.layers_per_block
    ))  # fmt: skip


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def texts(config: dict[str, Any], batch: int = 3) -> dict[str, Any]:
    """A text for each row, and one for all without a prompt."""
    if not config.get("txt_dim"):
        return {}
    size = config["txt_size"], config["txt_dim"]
    return {"text": noise(batch, *size, seed=2), "text_unconditional": noise(1, *size, seed=3), "guidance": GUIDANCE}


def floats(given: dict[str, Any]) -> dict[str, Any]:
    return {name: value.float() if isinstance(value, Tensor) else value for name, value in given.items()}


def latents(config: dict[str, Any], frames: int = 0, batch: int = 3, seed: int = 1) -> Tensor:
    side = config.get("img_size", 6)
    return noise(batch, *([frames] if frames else []), 2, side, side, seed=seed)


@pytest.mark.parametrize("name", IMAGES)
def test_samples_and_densities_of_images_follow_the_definition(name: str) -> None:
    config = IMAGES[name]
    made, z, given = flow(**config), latents(config), texts(config)
    truth = reference(made, config)
    with torch.no_grad():
        text, null = given.get("text"), given.get("text_unconditional")
        expected, guided = truth.sample(z, text), truth.sample(z, text, null, GUIDANCE if given else 0.0)
        back, logdet = truth.forward(expected, text)
        got = made.sample(z=z, text=text, schedule="sequential")
    assert isinstance(got, Tensor) and (got - expected).abs().max() < 1e-12
    assert (back - z).abs().max() < 1e-12, "the reference does not invert itself"
    with torch.no_grad():
        there, det = made(expected, text)
    assert (there - z).abs().max() < 1e-12 and (det - logdet).abs().max() < 1e-12
    for schedule in ("sequential", pd.Jacobi(tol=0), pd.Sliding(4, tol=0)):
        got = made.sample(z=z, schedule=schedule, **given)
        assert isinstance(got, Tensor) and (got - guided).abs().max() < 1e-12
    assert not given or (guided - expected).abs().max() > 1e-3, "guidance changes nothing"
    single = made.float().sample(z=z.float(), schedule="sequential", **floats(given))
    assert isinstance(single, Tensor) and single.dtype == torch.float32 and (single - guided).abs().max() < 1e-4


@pytest.mark.parametrize("name", VIDEOS)
def test_samples_of_videos_follow_the_definition(name: str) -> None:
    config, count, known, context = VIDEOS[name]
    made, z, given = flow(**config), latents(config, count, 2), texts(config, 2)
    frames = latents(config, known, 2, seed=5) if known else None
    truth = reference(made, config)
    with torch.no_grad():
        expected = truth.sample(z, given["text"], given["text_unconditional"], GUIDANCE, frames, context)
    system = made.system(z, frames=frames, context_length=context, **given)
    for schedule in ("sequential", pd.Jacobi(tol=0), pd.Sliding(3, tol=0)):
        solution = pd.solve(system, schedule, verify=True)
        assert (solution.value - expected).abs().max() < 1e-12
        assert len(solution.status) == 2 and solution.residual is not None and solution.residual.shape == (2,)
    if frames is not None:
        assert (solution.value[:, :known] - frames).abs().max() < 1e-12
    if count <= (config.get("local_attn_window") or count):
        with torch.no_grad():
            back, logdet = made(expected, given["text"])
            there, det = truth.forward(expected, given["text"])
        assert (back - there).abs().max() < 1e-12 and (logdet - det).abs().max() < 1e-12


@pytest.mark.parametrize("name", ["2-D, an empty block", "as published", "text in all blocks, without start"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_contract_of_images(name: str, dtype: torch.dtype) -> None:
    config = IMAGES[name]
    made, given = flow(**config).to(dtype), texts(config, 2)
    given = floats(given) if dtype == torch.float32 else given
    check_system(made.system(latents(config, batch=2).to(dtype), **given))


@pytest.mark.parametrize("name", ["shallow blocks in frames", "given frames, windows"])
def test_contract_of_videos(name: str) -> None:
    config, count, known, context = VIDEOS[name]
    frames = latents(config, known, 2, seed=5) if known else None
    check_system(
        flow(**config).system(latents(config, count, 2), frames=frames, context_length=context, **texts(config, 2))
    )


@pytest.mark.parametrize("schedule", [*SCHEDULES, pd.Selective()], ids=repr)
def test_every_schedule_gives_the_sequential_samples(schedule: pd.Schedule) -> None:
    made, z, given = flow(**IMAGE), latents(IMAGE), texts(IMAGE)
    expected = made.sample(z=z, schedule="sequential", **given)
    got, solution = made.sample(z=z, schedule=schedule, tol=0.0, return_solution=True, **given)
    assert isinstance(expected, Tensor) and isinstance(got, Tensor)
    assert (got - expected).abs().max() < 1e-12
    assert torch.equal(got, solution.value) and solution.passes <= 3 * 9


@pytest.mark.parametrize("schedule", [pd.Sliding(2), pd.Sliding(5), pd.GaussSeidelJacobi(6), pd.Jacobi()], ids=repr)
def test_a_cached_key_belongs_to_the_final_value(schedule: pd.Schedule) -> None:
    """At a loose tolerance final values differ from those before them: what is kept has to be of the final ones."""
    system = flow(**IMAGE).system(latents(IMAGE), **texts(IMAGE)).layer(0, None)
    cached, uncached = (pd.solve(s, schedule, tol=0.1) for s in (system, Uncached(system)))
    assert (cached.value - uncached.value).abs().max() < 1e-12 and cached.passes == uncached.passes


def test_the_text_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequential decoding reads the text with the start embedding, and then each position once."""
    read, update = list[int](), Reads.write

    def written(self: Reads, storage: Tensor, values: Tensor) -> None:
        read.append(values.shape[1])
        update(self, storage, values)

    monkeypatch.setattr(Reads, "write", written)
    system = flow(**IMAGE).system(latents(IMAGE), **texts(IMAGE))
    pd.solve(system.layer(0, None), "sequential")
    assert read == [4, 4] + [1, 1] * 8  # two layers
    read.clear()
    pd.solve(system.layer(1, latents(IMAGE).reshape(3, 9, 8)), "sequential")
    assert read == [1] * 9, "a shallow block reads what it does not see"


def again(plain: BlockSystem, graphs: Graphs | None = None) -> BlockSystem:
    """The same system anew."""
    parts = plain.z, plain.known, plain.text, plain.angles, plain.guidance
    return BlockSystem(plain.block, *parts, graphs=graphs)


@pytest.mark.parametrize("name", ["as published", "text in all blocks, without start"])
def test_captured_windows_draw_the_same(name: str) -> None:
    config = IMAGES[name]
    made, z, given = flow(**config), latents(config), texts(config)
    system = made.system(z, **given)
    for index in range(2):
        value = None if index == 0 else pd.solve(system.layer(0, None), "sequential").value
        plain = system.layer(index, value)
        assert isinstance(plain, BlockSystem)
        expected, captured = pd.solve(plain, "sequential").value, again(plain, Graphs(capture=False))
        for schedule in ("sequential", pd.Sliding(4), pd.Sliding(4, per_row=True), pd.Jacobi()):
            for _ in range(2):  # what is kept from one solve to the next does not disturb the next
                assert (pd.solve(captured, schedule, tol=0).value - expected).abs().max() < 1e-12


@pytest.mark.parametrize("captured", [False, True])
def test_a_system_whose_cache_went_to_another_reads_all_of_it_again(captured: bool) -> None:
    """In the middle of a solve `changed_from` says what the system knew, and not what the storage holds now."""
    made, x = flow(**IMAGE), noise(3, 9, 8)
    plain = made.system(latents(IMAGE), **texts(IMAGE)).layer(0, None)
    assert isinstance(plain, BlockSystem)
    graphs = Graphs(capture=False)
    first, second = (again(plain, graphs if captured else None) for _ in range(2))
    second.storage = first.storage
    windows = [pd.Window(range(4), 0), pd.Window(range(4, 7), 4), pd.Window(range(7, 9), 7)]
    with torch.no_grad():
        for window in windows:
            for system, values in ((first, x), (second, 2 * x)):
                expected = window.take(plain.evaluate(values, pd.Window.full(9)))
                assert (system.evaluate(values, window) - expected).abs().max() < 1e-12


def test_rows_that_are_not_finite_say_so_and_disturb_no_others() -> None:
    made, z, given = flow(**IMAGE), latents(IMAGE), texts(IMAGE)
    expected = made.sample(z=z, schedule="sequential", **given)
    z[1] = 1.7e308
    for schedule in ("sequential", pd.Jacobi(), pd.Sliding(4, per_row=True)):
        got, solution = made.sample(z=z, schedule=schedule, tol=0.0, return_solution=True, **given)
        assert [status.succeeded for status in solution.status] == [True, False, True]
        assert isinstance(expected, Tensor) and isinstance(got, Tensor)
        assert (got[::2] - expected[::2]).abs().max() < 1e-12 and not got[1].isfinite().all()
    with pytest.warns(UserWarning, match=r"images \[1\] of 3 are not finite"):
        made.sample(z=z, schedule="sequential", **given)


def test_a_video_with_one_frame_that_is_not_finite_says_so() -> None:
    made, z, given = flow(**LOCAL), latents(LOCAL, 3, 2), texts(LOCAL, 2)
    z[1, 2] = 1.7e308
    _, solution = made.sample(z=z, schedule="sliding", return_solution=True, **given)
    assert [status.succeeded for status in solution.status] == [True, False]


def test_gradients_are_those_of_the_sequential_computation() -> None:
    config, count, known, _ = VIDEOS["given frames"]
    made, given = flow(**config), texts(config, 2)
    inputs = [latents(config, count, 2), given["text"], given["text_unconditional"], latents(config, known, 2, seed=5)]
    inputs = [x.requires_grad_() for x in inputs]
    z, text, null, frames = inputs
    names, weighting = ("blocks.2.proj_txt.weight", "blocks.0.proj_in.weight"), latents(config, count, 2, seed=7)
    weights = [made.get_parameter(name) for name in names]
    options: dict[str, Any] = dict(text=text, text_unconditional=null, guidance=GUIDANCE, frames=frames)
    got = made.sample(z=z, schedule=pd.Sliding(4), tol=0.0, differentiable=True, **options)
    assert isinstance(got, Tensor)
    slopes = torch.autograd.grad((got * weighting).sum(), [*inputs, *weights])
    truth = reference(made, config)
    truth.weights = truth.weights | dict(zip(names, weights, strict=True))
    sequential = truth.sample(z, text, null, GUIDANCE, frames)
    expected = torch.autograd.grad((sequential * weighting).sum(), [*inputs, *weights])
    for slope, right in zip(slopes, expected, strict=True):
        assert right.abs().max() > 1e-6 and (slope - right).abs().max() < 1e-9


class Adapted(torch.nn.Module):
    """A linear layer with a low-rank change, as LoRA makes it."""

    def __init__(self, base: torch.nn.Linear) -> None:
        super().__init__()
        self.base, self.weight, self.bias = base, base.weight, base.bias
        self.change = torch.randn_like(base.weight[:, :1]) @ torch.randn_like(base.weight[:1]) / 10

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.change.T  # type: ignore[no-any-return]


def test_modules_that_somebody_changed_are_what_is_decoded() -> None:
    made, z, given = flow(**IMAGE), latents(IMAGE), texts(IMAGE)
    plain = made.sample(z=z, schedule="sequential", **given)
    for block in made.blocks:
        attention: Any = block.attn_blocks[0].attention  # type: ignore[index,union-attr]
        attention.qkv = Adapted(attention.qkv)
        attention.proj.register_forward_hook(lambda module, given, output: 3 * output)
    got = made.sample(z=z, text=given["text"], schedule=pd.Sliding(4), tol=1e-12)
    assert isinstance(got, Tensor) and isinstance(plain, Tensor) and (got - plain).abs().max() > 1e-3
    assert (made(got, given["text"])[0] - z).abs().max() < 1e-9


def test_a_compiled_block_is_decoded_as_what_it_wraps() -> None:
    made, z, given = flow(**IMAGE), latents(IMAGE), texts(IMAGE)
    expected = made.sample(z=z, schedule="sequential", **given)
    for index in (0, 2):
        made.blocks[index] = torch.compile(made.blocks[index], backend="eager")  # type: ignore[assignment]
    assert torch.equal(made.sample(z=z, schedule="sequential", **given), expected)  # type: ignore[arg-type]


@pytest.mark.parametrize("config", [{}, IMAGE], ids=["embeddings of places", "as published"])
def test_one_patch_is_a_flow_too(config: dict[str, Any]) -> None:
    config = config | dict(img_size=2)
    made, z, given = flow(**config), latents(config), texts(config)
    for schedule in SCHEDULES:
        got = made.sample(z=z, schedule=schedule, **given)
        back, _ = made.sample(z=z, text=given.get("text"), schedule=schedule, return_solution=True)
        assert isinstance(got, Tensor) and got.shape == z.shape
        assert (made(back, given.get("text"))[0] - z).abs().max() < 1e-12


def test_hooks_that_decoding_would_not_call_are_refused() -> None:
    made, z, given = flow(**IMAGE), latents(IMAGE), texts(IMAGE)
    handle = made.blocks[0].register_forward_hook(lambda module, given, output: output)
    with pytest.raises(ValueError, match="hooks"):
        made.sample(z=z, **given)
    handle.remove()
    made.register_forward_hook(lambda module, given, output: output)
    with pytest.raises(ValueError, match="the flow has hooks"):
        made.sample(z=z, **given)


@pytest.mark.parametrize("name", ["embeddings of places", "as published", "a language model"])
def test_modules_that_give_a_position_other_values_by_itself_are_refused(name: str) -> None:
    made, z, given = flow(**IMAGES[name]), latents(IMAGES[name]), texts(IMAGES[name])
    layer: Any = made.deep.attn_blocks[0]
    layer.mlp = torch.nn.Sequential(layer.mlp, torch.nn.Dropout()).eval()
    expected = made.sample(z=z, schedule="sequential", **given)
    assert isinstance(expected, Tensor) and expected.isfinite().all(), "dropout does nothing in evaluation"
    with pytest.raises(ValueError, match=f"modules of block {len(made.transforms) - 1} were changed.*dropout"):
        made.train().sample(z=z, **given)


@pytest.mark.parametrize("frames", [0, 4])
@pytest.mark.parametrize("conditional", [True, False])
def test_the_learned_denoiser_follows_its_definition(frames: int, conditional: bool) -> None:
    config = LOCAL | dict(learnable_self_denoiser=True, conditional_denoiser=conditional, denoiser_window=2)
    made, x, text = flow(**config), latents(config, frames, 2), texts(config, 2)["text"]
    with torch.no_grad():
        expected = reference(made, config).denoised(x, text)
    assert (made.denoised(x, text) - expected).abs().max() < 1e-12 and (expected - x).abs().max() > 1e-3
    got, solution = made.sample(z=x, text=text, schedule="sliding", denoise=True, return_solution=True)
    assert isinstance(got, Tensor) and torch.equal(got, made.denoised(solution.value, text))


def test_without_it_denoising_takes_a_step_of_the_gradient() -> None:
    made, x, text = flow(**IMAGE), latents(IMAGE, batch=2).requires_grad_(), texts(IMAGE, 2)["text"]
    with pytest.raises(ValueError, match="noise_std"):
        made.sample(z=x.detach(), text=text, denoise=True)
    made.noise_std = 0.3
    z, logdet = reference(made, IMAGE).forward(x, text)
    (score,) = torch.autograd.grad((logdet - z.square().flatten(1).sum(1) / 2).sum(), x)
    assert (made.denoised(x, text) - (x + 0.09 * score)).abs().max() < 1e-12


def test_names_and_shapes_are_the_published_ones() -> None:
    config = LOCAL | dict(
        num_blocks=2, layers_per_block=[1, 1], use_qk_norm=True, use_post_norm=True, num_heads=2, num_kv_heads=1, learnable_self_denoiser=True,
        conditional_denoiser=True, pt_seq_len=3,
    )  # fmt: skip
    layer: dict[str, tuple[int, ...]] = {
        "attention.norm.weight": (32,), "attention.norm.bias": (32,), "attention.qkv.weight": (80, 32), "attention.qkv.bias": (80,),
        "attention.proj.weight": (32, 40), "attention.proj.bias": (32,), "attention.query_norm.weight": (20,), "attention.key_norm.weight": (20,),
        "attention.post_norm.weight": (32,), "mlp.norm.weight": (32,), "mlp.norm.bias": (32,), "mlp.post_norm.weight": (32,),
        "mlp.main.0.weight": (128, 32), "mlp.main.0.bias": (128,), "mlp.main.2.weight": (32, 128), "mlp.main.2.bias": (32,),
    }  # fmt: skip
    ends: dict[str, tuple[int, ...]] = {"proj_in.weight": (32, 8), "proj_in.bias": (32,), "final_norm.weight": (32,)}
    block = ends | {"proj_out.weight": (16, 32), "proj_out.bias": (16,), "sos_embed": (1, 1, 8)}
    text: dict[str, tuple[int, ...]] = {"proj_txt.weight": (32, 5), "proj_txt.bias": (32,)}
    denoiser = ends | {"proj_out.weight": (8, 32), "proj_out.bias": (8,)} | text
    expected = {f"blocks.{i}.{name}": shape for i in (0, 1) for name, shape in block.items()}
    expected |= {f"blocks.{i}.attn_blocks.0.{name}": shape for i in (0, 1) for name, shape in layer.items()}
    expected |= {f"blocks.1.{name}": shape for name, shape in text.items()}
    expected |= {f"learnable_self_denoiser.{name}": shape for name, shape in denoiser.items()}
    expected |= {
        f"learnable_self_denoiser.attn_blocks.{i}.{name}": shape for i in range(8) for name, shape in layer.items()
    }
    assert {name: tuple(t.shape) for name, t in flow(**config).state_dict().items()} == expected


def test_and_those_of_other_layers() -> None:
    made = flow(**TEXT | OTHER_LAYERS | dict(num_blocks=1, layers_per_block=[1]))
    expected: dict[str, tuple[int, ...]] = {
        "blocks.0.proj_in.weight": (32, 8), "blocks.0.proj_in.bias": (32,), "blocks.0.proj_out.weight": (16, 32),
        "blocks.0.proj_out.bias": (16,), "blocks.0.pos_embed": (9, 32), "blocks.0.proj_txt.weight": (32, 5),
        "blocks.0.proj_txt.bias": (32,),
    }  # fmt: skip
    layer: dict[str, tuple[int, ...]] = {
        "attention.norm.weight": (32,), "attention.qkv.weight": (128, 32), "attention.proj.weight": (32, 64), "attention.query_norm.weight": (16,),
        "attention.key_norm.weight": (16,), "attention.post_norm.weight": (32,), "mlp.norm.weight": (32,), "mlp.post_norm.weight": (32,),
        "mlp.gate_proj.weight": (128, 32), "mlp.up_proj.weight": (128, 32), "mlp.down_proj.weight": (32, 128),
    }  # fmt: skip
    expected |= {f"blocks.0.attn_blocks.0.{name}": shape for name, shape in layer.items()}
    assert {name: tuple(t.shape) for name, t in made.state_dict().items()} == expected


@pytest.mark.parametrize("kind", ["pth", "safetensors", "folder", "with constants"])
def test_checkpoints_load_as_they_are(kind: str, tmp_path: Path) -> None:
    made = flow(**IMAGE).float()
    state, path = made.state_dict(), tmp_path / ("flow.safetensors" if kind == "safetensors" else "flow.pth")
    if kind == "folder":
        # numbers of numpy are written too
        StarFlow(**BASE | IMAGE | dict(noise_std=np.float32(0.5))).save_pretrained(tmp_path / "numpy")
        made.save_pretrained(path)
        assert json.loads((path / "config.json").read_text())["layers_per_block"] == [1, 1, 2]
        loaded = StarFlow.from_pretrained(path, noise_std=0.3)
        assert loaded.noise_std == 0.3
    elif kind == "safetensors":
        save_file(state, path)
        loaded = StarFlow.from_checkpoint(path, **BASE | IMAGE)
    else:
        if kind == "with constants":  # which nothing reads
            masks = {f"blocks.{i}.attn_mask": torch.ones(12, 12) for i in range(3)}
            state = state | masks | {"var": torch.ones(9, 8), "feat_rope.freqs_cos": torch.ones(12, 16)}
            flow(**IMAGE).load_state_dict(state)
        torch.save(state, path)
        loaded = StarFlow.from_checkpoint(path, use_checkpoint=1, **BASE | IMAGE)
    found = loaded.state_dict()
    assert found.keys() == made.state_dict().keys()
    assert all(torch.equal(t, made.state_dict()[name]) for name, t in found.items()) and not loaded.training
    z, given = latents(IMAGE).float(), floats(texts(IMAGE))
    pair = [m.sample(z=z, schedule="sequential", **given) for m in (made, loaded)]
    assert torch.equal(*pair)  # type: ignore[arg-type]


class Evil:
    def __reduce__(self) -> Any:
        return print, ("run",)


def test_files_that_are_no_such_flow_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "flow.pth"
    torch.save({"blocks.0": Evil()}, path)
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        StarFlow.from_checkpoint(path, **BASE | IMAGE)
    assert not capsys.readouterr().out, "code of the file ran"
    torch.save(flow(**IMAGE).state_dict(), path)
    for change, message in (
        (dict(channels=48), "has shape"),
        (dict(use_bias=False), "is unknown"),
        (dict(use_qk_norm=True), "is missing"),
        (dict(num_blocks=10**9, layers_per_block=[1]), "fewer than there are layers"),
    ):
        with pytest.raises(ValueError, match=message):
            StarFlow.from_checkpoint(path, **BASE | IMAGE | change)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        StarFlow.from_checkpoint(tmp_path / "other.pth", **BASE | IMAGE)


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        (dict(channel=3), TypeError, "unexpected keyword argument 'channel'"),
        (dict(channels=0), ValueError, "channels is 0, expected at least 1"),
        (dict(channels=1.5), TypeError, "channels is 1.5, expected a whole number"),
        (dict(sos=2), TypeError, "sos is 2, expected True or False"),
        (dict(soft_clip=-1), ValueError, "soft_clip is -1, expected a finite number >= 0"),
        (dict(norm_type="batch"), ValueError, "norm_type is 'batch', expected one of"),
        (dict(seq_order="up"), ValueError, "seq_order is 'up', expected one of"),
        (dict(layers_per_block=None), TypeError, "layers_per_block is None, expected a whole number"),
        (dict(num_blocks="3"), TypeError, "num_blocks is '3', expected a whole number"),
        (dict(layers_per_block=[1, 2]), ValueError, "expected one number or 3"),
        (dict(layers_per_block=[1, 1, 0]), ValueError, "the last of them not 0"),
        (dict(img_size=7), ValueError, "img_size is no multiple of patch_size"),
        (dict(num_heads=3, num_kv_heads=2), ValueError, "num_heads is no multiple of num_kv_heads"),
        (dict(rope=True, head_dim=6), ValueError, "rope needs head_dim"),
        (dict(txt_dim=4), ValueError, "txt_dim needs txt_size"),
        (dict(cond_top_only=True), ValueError, "cond_top_only needs txt_size"),
        (dict(shallow_block_local=True), ValueError, "shallow_block_local needs cond_top_only"),
        (dict(local_attn_window=2), ValueError, "local_attn_window needs shallow_block_local"),
        (dict(temporal_causal=1), ValueError, "temporal_causal needs seq_order='L2R'"),
        (dict(use_pretrained_lm="gpt"), ValueError, "use_pretrained_lm is 'gpt', expected one of"),
    ],
    ids=str,
)
def test_arguments_that_do_not_fit_are_refused(config: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        StarFlow(**BASE | config)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(z="noise"), TypeError, "z is a str, expected a tensor"),
        (dict(z=noise(3, 9, 8)), ValueError, "z has shape (3, 9, 8), expected latents"),
        (dict(z=noise(3, 3, 6, 6)), ValueError, "z is torch.float64 of shape (3, 3, 6, 6), expected floats of shape (batch, 2, 6, 6)"),
        (dict(z=noise(3, 2, 6, 5)), ValueError, "expected height and width that patch_size, 2, divides"),
        (dict(z=noise(3, 2, 6, 6) * torch.nan), ValueError, "not finite"),
        (dict(text=None), ValueError, "this flow reads a text: pass text"),
        (dict(text=noise(3, 4, 5)), ValueError, "text is torch.float64 of shape (3, 4, 5), expected floats of shape (batch, 3, 5)"),
        (dict(text=noise(2, 3, 5)), ValueError, "ask for [2, 3] samples"),
        (dict(text_unconditional=None), ValueError, "pass text_unconditional"),
        (dict(text_unconditional=noise(2, 3, 5)), ValueError, "text_unconditional has 2 rows, expected 1 or 3"),
        (dict(guidance=-1), ValueError, "guidance is -1, expected a finite number >= 0"),
        (dict(guidance="much"), TypeError, "guidance is 'much', expected a number"),
        (dict(n=4), ValueError, "n=4, z and text ask for [3, 4] samples"),
        (dict(frames=noise(3, 1, 2, 6, 6)), ValueError, "expected the first frames of z"),
        (dict(schedule="fast"), ValueError, "fast"),
        (dict(heat=1), TypeError, "heat"),
    ],
    ids=lambda value: str(value)[:30],
)  # fmt: skip
def test_inputs_that_do_not_fit_are_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = dict(z=latents(IMAGE), **texts(IMAGE)) | change
    with pytest.raises(error, match=re.escape(message)):
        flow(**IMAGE).sample(**arguments)


def test_videos_that_do_not_fit_are_refused() -> None:
    made, z, given = flow(**LOCAL | dict(local_attn_window=3)), latents(LOCAL, 5, 2), texts(LOCAL, 2)
    with pytest.raises(ValueError, match="context_length is 3, expected 1 to 2"):
        made.sample(z=z, context_length=3, **given)
    with pytest.raises(ValueError, match="3 frames are given, expected fewer than 3"):
        made.sample(z=z, frames=latents(LOCAL, 3, 2), **given)
    with pytest.raises(ValueError, match="x has 5 frames, expected at most 3"):
        made(z, given["text"])
    with pytest.raises(ValueError, match="no places in time"):
        flow(rope=True).sample(z=noise(1, 3, 2, 6, 6))
    with pytest.raises(ValueError, match="need temporal_causal and shallow_block_local"):
        flow(**VIDEOS["all frames, turned within"][0]).sample(z=z, frames=z[:, :1], **given)
    with pytest.raises(ValueError, match="text was given"):
        flow().sample(z=noise(1, 2, 6, 6), text=noise(1, 3, 5))
    with pytest.raises(ValueError, match="no text to be guided by"):
        flow().sample(z=noise(1, 2, 6, 6), guidance=1.0)
    with pytest.raises(ValueError, match="embeddings of places"):
        flow().sample(z=noise(1, 2, 6, 8))


def test_latents_of_other_heights_and_widths_are_drawn_with_rotary_positions() -> None:
    made, given, z = flow(**IMAGE), texts(IMAGE), noise(3, 2, 4, 8)
    with torch.no_grad():
        expected = reference(made, IMAGE).sample(z, given["text"], given["text_unconditional"], GUIDANCE)
    got = made.sample(z=z, schedule=pd.Sliding(3, tol=0), **given)
    assert isinstance(got, Tensor) and (got - expected).abs().max() < 1e-12


def test_plans_are_made_and_used() -> None:
    made = flow(**IMAGE).float()
    plan = pd.calibrate(made, batch_size=2, guidance=GUIDANCE, runs=1, progress=False)
    assert len(plan.layers) == 3 and plan.made_for["guidance"] == GUIDANCE and plan.made_for["shape"] == "1x3x3"
    text = torch.zeros(1, 3, 5)
    drawn = made.sample(2, text=text, text_unconditional=text, guidance=GUIDANCE, schedule=plan)
    assert isinstance(drawn, Tensor) and drawn.shape == (2, 2, 6, 6)


def test_lower_precision_is_near() -> None:
    made, z, given = flow(**IMAGE).float(), latents(IMAGE).float(), floats(texts(IMAGE))
    expected = made.sample(z=z, schedule="sequential", **given)
    with torch.autocast("cpu", torch.bfloat16):
        for schedule in ("sequential", pd.Sliding(4)):
            got = made.sample(z=z, schedule=schedule, **given)
            assert isinstance(got, Tensor) and isinstance(expected, Tensor) and got.dtype == torch.float32
            assert 1e-6 < (got - expected).abs().max() < 0.3


def test_probes_see_what_makes_a_block_hard() -> None:
    """Hiding the nearest predecessors changes nothing in a block that does not read them, and only what comes before stays visible."""
    made = flow(**IMAGE).float()
    for layer in made.deep.attn_blocks:
        torch.nn.init.zeros_(layer.attention.proj.weight)  # type: ignore[union-attr,arg-type]
    found = probe(made, n=2, hidden=(1, 3), lags=(1, 2)).blocks
    assert len(found) == 3 and all(set(block.passes) == {"jacobi", "sliding"} for block in found)
    assert found[0].redundancy[1][1] < 1e-5 < found[1].redundancy[1][1] < found[1].redundancy[3][1]
    assert found[0].jacobian[2] < 1e-6 < found[0].jacobian[1] and found[1].jacobian[2] > 1e-4


def test_rows_that_are_not_finite_are_drawn_again_for_their_text(monkeypatch: pytest.MonkeyPatch) -> None:
    made, given = flow(**IMAGE), texts(IMAGE)
    drawn: list[Tensor] = []

    def huge_in_the_second_row(n: int, like: Tensor, generator: Any) -> Tensor:
        drawn.append(noise(n, *like.shape, seed=len(drawn)))
        z = drawn[-1].clone()
        z[1] = 1.7e308 if len(drawn) == 1 else z[1]
        return z

    monkeypatch.setattr(base, "standard_normal", huge_in_the_second_row)
    got = made.sample(schedule="sequential", **given)
    z = torch.cat([drawn[0][:1], drawn[1][1:2], drawn[0][2:]])
    expected = made.sample(z=z, schedule="sequential", **given)
    assert isinstance(got, Tensor) and isinstance(expected, Tensor) and (got - expected).abs().max() < 1e-12
    assert len(drawn) == 2


PEER = """
import parallel_decode as pd
from parallel_decode.adapters.starflow import StarFlow

class Model(StarFlow):
    def forward(self, x, text=None, reverse=False, jacobi=False, jacobi_th=0.0, jacobi_block_size=1):
        schedule = pd.Sliding(jacobi_block_size) if jacobi else "sequential"
        return pd.solve(self.system(x, text=text), schedule, tol=jacobi_th).value
"""


@pytest.mark.parametrize("name", ["as published", "start"])
def test_a_checkout_draws_from_the_same_weights(name: str, tmp_path: Path) -> None:
    (tmp_path / "transformer_flow.py").write_text(PEER)
    made, z, text = flow(**IMAGES[name]), latents(IMAGES[name]), texts(IMAGES[name]).get("text")
    try:
        drawn = peers.methods(made, {"starflow": tmp_path, "tarflow": None})
        assert torch.distributed.is_initialized() == (name == "as published"), "Apple's Jacobi asks all processes"
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    assert (
        list(drawn) == [suite.APPLE, peers.JACOBI][: 2 if name == "as published" else 1]
    )  # which needs rotary positions
    expected = made.sample(z=z, text=text, schedule="sequential")
    assert isinstance(expected, Tensor)
    far = [(method(z, text).value - expected).abs().max() for method in drawn.values()]
    assert far[0] == 0 and all(0 < one < 0.1 for one in far[1:])


def test_the_commands_that_need_no_prompts_take_a_folder(tmp_path: Path) -> None:
    made = flow(**IMAGE).float()
    made.save_pretrained(tmp_path / "flow")
    save_file(made.state_dict(), tmp_path / "flow.safetensors")
    assert isinstance(load(tmp_path / "flow"), StarFlow)
    folder = ("--checkpoint", tmp_path / "flow")
    for words in (
        ("bench", *folder, "--batches", 2, "--runs", 1, "--methods", "auto,GS", "--gs-segments", "3,1"),
        ("bench", *folder, "--batches", 1, "--runs", 1, "--blocks", "--methods", "sliding 9", "--gs-segments", "3,1"),
        ("probe", *folder, "--n", 2, "--positions", 2, "--out", tmp_path / "probe"),
    ):
        result = CliRunner().invoke(app, [*map(str, words)])
        assert result.exit_code == 0, result.output
    for checkpoint, message in (
        ("flow", "is a StarFlow, which needs an autoencoder"),
        ("flow.safetensors", "its weights do not tell in_channels"),
    ):
        given = "sample", "--checkpoint", tmp_path / checkpoint, "--out", tmp_path / "out"
        result = CliRunner().invoke(app, [*map(str, given)])
        assert result.exit_code == 2 and message in " ".join(result.output.split())
