"""What a flow is handed, and what is changed in it, acts or is refused: nothing is wrong without a word."""

import copy
import json
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import parallel_decode as pd
from parallel_decode.adapters.tarflow import TarFlow, digits
from parallel_decode.adapters.tarflow.changes import check_decodable
from tests.flows import flow, labels, noise

# labels

DTYPES = sorted({d for d in vars(torch).values() if isinstance(d, torch.dtype)}, key=str)
INTEGERS = [getattr(torch, f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)]
IMAGES = torch.linspace(-1, 1, 3 * 64, dtype=torch.float64).reshape(3, 1, 8, 8)
ENTRIES: dict[str, Callable[[TarFlow, Any], Tensor]] = {
    "sample": lambda made, y: made.sample(z=noise(), y=y, schedule="sequential"),  # type: ignore[dict-item,return-value]
    "forward": lambda made, y: made(IMAGES, y)[0],
    "log_prob": lambda made, y: made.log_prob(IMAGES, y),
    "denoised": lambda made, y: made.denoised(IMAGES, y),
    "system": lambda made, y: pd.solve(made.system(noise(), y=y), "sequential").value,
    "example": lambda made, y: pd.solve(made.example(3, y=y), "sequential").value,
}


@pytest.fixture(scope="module")
def conditional() -> TarFlow:
    return flow(num_classes=3, noise_std=0.1)


@pytest.mark.parametrize("entry", ENTRIES)
def test_labels_mean_the_same_everywhere_and_in_every_integer_type(entry: str, conditional: TarFlow) -> None:
    """As a mask or by a wrap of 8 bits they would be other classes."""
    draw = ENTRIES[entry]
    for numbers, unsigned in (([2, 0, 2], True), ([0, -1, 2], False)):
        expected = draw(conditional, torch.tensor(numbers))
        given: list[Any] = [numbers, tuple(numbers), np.array(numbers)[::-1][::-1], np.array(numbers, dtype=">i4")]
        given += [torch.tensor(numbers).to(d) for d in INTEGERS if unsigned or d.is_signed]
        assert all(torch.equal(draw(conditional, y), expected) for y in given)
    one = draw(conditional, torch.tensor([2, 2, 2]))
    for y in (2, np.int64(2), np.uint8(2), torch.tensor(2), torch.tensor(2, dtype=torch.uint8)):
        assert torch.equal(draw(conditional, y), one)
    assert torch.equal(draw(conditional, -1), draw(conditional, torch.tensor([-1, -5, -1])))
    assert not torch.allclose(one, draw(conditional, -1), atol=1e-4)


def test_an_example_for_no_classes_in_particular_is_of_all_in_turn(conditional: TarFlow) -> None:
    drawn = [ENTRIES["example"](conditional, y) for y in (None, torch.arange(3), -1)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.allclose(drawn[0], drawn[2], atol=1e-4)


def other_types() -> Iterator[Any]:
    """Three numbers in each type of torch that is not one of whole numbers of 8 bits or more."""
    for dtype in DTYPES:
        if dtype not in INTEGERS:
            try:
                yield torch.zeros(3).to(dtype)
            except (RuntimeError, NotImplementedError, TypeError):  # quantised, or of bits: no conversion
                try:
                    yield torch.empty(3, dtype=dtype)
                except (RuntimeError, NotImplementedError, TypeError):
                    continue


BAD_LABELS: list[Any] = [3, 2**40, 2**70, [0, 1, 3], torch.tensor([0, 1, 2**40]), 2.0, True, [True, False, True], "012"]
BAD_LABELS += [[0, 1], [0], [], [[0], [1], [2]], [0, [1], 2], [0.5, 1, 2], [None] * 3, object(), {"y": 1}]
BAD_LABELS += [torch.zeros(3, 1).long(), torch.zeros(2).long(), torch.zeros(3, device="meta").long()]
BAD_LABELS += [torch.tensor([0, 2**63 + 5, 1], dtype=torch.uint64), np.array([0, 2**63 + 5, 1], dtype=np.uint64)]
BAD_LABELS += [np.array([0.0, 1.0, 2.0]), np.array([True] * 3), np.array(["0"] * 3), torch.zeros(3).long().to_sparse()]


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.filterwarnings("ignore:.*ComplexHalf|.*quantized|.*sparse:UserWarning")
def test_other_labels_are_refused_before_anything_is_drawn(entry: str, conditional: TarFlow) -> None:
    others = list(other_types())
    assert len(others) > 8
    for y in [*BAD_LABELS, *others]:
        with pytest.raises(ValueError, match=r"y (is|holds)|ask for"):
            ENTRIES[entry](conditional, y)
    with pytest.raises(ValueError, match="this flow has no classes: leave it out"):
        ENTRIES[entry](flow(noise_std=0.1), torch.tensor([0, 0, 0]))


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_labels_may_be_transformed_and_compiled(conditional: TarFlow) -> None:
    """Their values cannot be looked at then."""
    x, y = torch.randn(1, 1, 8, 8, dtype=torch.float64), torch.tensor([2])
    expected = conditional.log_prob(x, y)
    compiled = torch.compile(conditional.log_prob, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x, y), expected)
    mapped = torch.func.vmap(lambda label: conditional.log_prob(x, label[None]))(torch.tensor([2, 0]))
    assert torch.allclose(mapped[0], expected)


# images, noise, and their numbers


@pytest.mark.parametrize("shape", [(3, 1, 4, 4), (3, 1, 16, 16), (3, 3, 8, 8), (1, 8, 8), (3, 64)], ids=str)
def test_images_of_another_size_are_refused(shape: tuple[int, ...]) -> None:
    """Smaller ones would be read as the first patches of larger ones."""
    for call in (flow().forward, flow().log_prob, flow(noise_std=0.1).denoised):
        with pytest.raises(ValueError, match=r"x is .* expected floats of shape \(batch, 1, 8, 8\)"):
            call(torch.zeros(shape, dtype=torch.float64))


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    *(({"n": n}, ValueError, "n is") for n in (0, -1, 10**20)),
    *(({"n": n}, TypeError, "expected a whole number") for n in (True, 1.5, "3", torch.tensor(2))),
    *(({"z": noise() * bad}, ValueError, "z holds values that are not finite") for bad in (torch.nan, torch.inf)),
    *(({"z": noise().to(d)}, ValueError, "expected floats") for d in (torch.complex64, torch.int64, torch.bool)),
    ({"z": noise().numpy()}, TypeError, "z is a ndarray"),
    ({"n": 1, "generator": 0}, TypeError, r"generator is 0, expected a torch.Generator"),
    *(({"n": 1, "tol": tol}, (TypeError, ValueError), "tol is") for tol in (-1, torch.nan, True, "x")),  # type: ignore[list-item]
    *(({"n": 1, "schedule": s}, (TypeError, ValueError), "schedule is") for s in ("x", None, pd.Jacobi)),  # type: ignore[list-item]
    *(({"n": 1, "guidance": g}, TypeError, "guidance is") for g in ("1", None)),
    *(({"n": 1, "guidance": 1.0, "guide_what": w}, TypeError, "guide_what is") for w in (None, 3)),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD, ids=str)
def test_bad_numbers_are_named(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        flow().sample(**options)


def test_images_are_of_float32_at_least_whatever_the_noise() -> None:
    """In half precision they would stray by more than the tolerance says."""
    single = flow().float()
    for dtype in (torch.float16, torch.bfloat16):
        z = noise().to(dtype)
        assert torch.equal(single.sample(z=z, schedule="jacobi"), single.sample(z=z.float(), schedule="jacobi"))  # type: ignore[arg-type]
        half = flow().to(dtype).sample(z=z, schedule="jacobi")
        assert isinstance(half, Tensor) and half.dtype == torch.float32
    with pytest.raises(ValueError, match="meta device, which holds no values"):
        flow().to("meta").sample(2)


# denoising, and the attributes


def test_denoising_needs_no_gradients_around_it() -> None:
    made = flow(num_classes=3, noise_std=0.1)
    expected = made.sample(z=noise(), y=labels(3), denoise=True, schedule="sequential")
    for context in (torch.inference_mode, torch.no_grad):
        with context():
            z, y = noise() + 0, torch.tensor([0, -1, 2])
            got = made.sample(z=z, y=y, denoise=True, schedule="sequential")
        assert isinstance(got, Tensor) and isinstance(expected, Tensor) and (got - expected).abs().max() < 1e-12
    with torch.inference_mode():
        cannot = flow(noise_std=0.1)
    with pytest.raises(ValueError, match=r"made in torch\.inference_mode"):
        cannot.sample(2, denoise=True)


def test_images_that_denoising_spoils_are_told() -> None:
    with pytest.warns(UserWarning, match=r"images \[0, 1\] of 2 are not finite"):
        flow(noise_std=1e200).sample(2, denoise=True, return_solution=True)


def test_noise_std_is_checked_whenever_it_is_set_and_saved_as_it_is(tmp_path: Path) -> None:
    made = flow().float()
    for bad in (torch.nan, torch.inf, -0.1, True, "0.1", torch.tensor(0.1), [0.1]):
        with pytest.raises((TypeError, ValueError), match="noise_std is"):
            flow(noise_std=bad)
        with pytest.raises((TypeError, ValueError), match="noise_std is"):
            made.noise_std = bad  # type: ignore[assignment]
        assert made.noise_std is None
    values: list[Any] = [0.25, 0, None, np.float32(0.5)]
    for value in values:
        made.noise_std = value
        for one in (made, copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
            one.save_pretrained(tmp_path)
            assert TarFlow.from_checkpoint(tmp_path).noise_std == one.noise_std == value
    other = copy.deepcopy(made)
    other.noise_std = 0.75
    assert made.noise_std == 0.5 and other.noise_std == 0.75


def test_what_the_weights_depend_on_cannot_be_set(tmp_path: Path) -> None:
    one, eight, two, wide, classes = (np.int64(size) for size in (1, 8, 2, 64, 3))
    made = TarFlow(one, eight, two, wide, two, one, num_classes=classes)  # type: ignore[arg-type]
    for name in ("in_channels", "img_size", "patch_size", "nvp", "num_classes"):
        with pytest.raises(AttributeError):
            setattr(made, name, 4)
    made.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["img_size"] == made.img_size == 8 and saved["num_classes"] == 3 and saved["layers_per_block"] == 1


def test_flows_go_on_as_they_are_when_copied_moved_or_trained() -> None:
    made = flow(num_classes=3)
    z, y = noise(), labels(3)
    expected = made.sample(z=z, y=y, schedule="jacobi")
    assert isinstance(expected, Tensor)
    made.requires_grad_(False).train()
    flows: list[Any] = [
        made,
        copy.deepcopy(made),
        pickle.loads(pickle.dumps(made)),
        torch.compile(made, backend="eager"),
    ]
    for one in flows:
        assert torch.equal(one.sample(z=z, y=y, schedule="jacobi"), expected)
    system = made.system(z, y=y)
    for p in made.parameters():
        p.mul_(1.1)
    later = made.sample(z=z, y=y, schedule="jacobi")
    assert isinstance(later, Tensor) and (later - expected).abs().max() > 1e-3
    assert torch.equal(pd.solve(system, "jacobi").value, later)
    assert torch.equal(nn.DataParallel(made)(expected, y)[0], made(expected, y)[0])


# changed modules

LEAVES = ["attention.norm", "attention.qkv", "attention.proj", "mlp.norm", "mlp.main.0", "mlp.main.1", "mlp.main.2"]
CALLED = ["proj_in", "proj_out", "attn_blocks.1", *(f"attn_blocks.1.{name}" for name in LEAVES)]
CALLED += [f"attn_blocks.1.{name}" for name in ("attention", "mlp", "mlp.main")]
LINEAR = [
    name for name in CALLED if name.endswith(("proj_in", "proj_out", "qkv", "attention.proj", "main.0", "main.2"))
]


def scaled(value: Any) -> Any:
    return tuple(map(scaled, value)) if isinstance(value, tuple) else 1.2 * value


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        for name in ("weight", "bias"):
            setattr(self, name, getattr(inner, name, None))

    def forward(self, *given: Any) -> Any:
        return scaled(self.inner(*given))


def put(made: nn.Module, name: str, module: Any) -> None:
    parent, _, last = name.rpartition(".")
    setattr(made.get_submodule(parent), last, module)


def replace_forward(made: nn.Module, name: str) -> None:
    module, own = made.get_submodule(name), made.get_submodule(name).forward
    module.forward = lambda *given: scaled(own(*given))


def subclass(made: nn.Module, name: str) -> None:
    module = made.get_submodule(name)
    kind = type(module)
    module.__class__ = type("Sub", (kind,), {"forward": lambda self, *given: scaled(kind.forward(self, *given))})


def moved(module: nn.Module, given: Any, *kwargs: Any) -> Any:
    given = given[0] + 0.3 * given[0].sin(), *given[1:]  # which no norm undoes
    return (given, *kwargs) if kwargs else given


CHANGES: dict[str, Callable[[nn.Module, str], object]] = {
    "hook": lambda made, name: made.get_submodule(name).register_forward_hook(lambda m, i, o: scaled(o)),
    "hook of keywords": lambda made, name: made.get_submodule(name).register_forward_hook(
        lambda m, i, k, o: scaled(o), with_kwargs=True
    ),
    "hook before": lambda made, name: made.get_submodule(name).register_forward_pre_hook(moved),
    "hook before, of keywords": lambda made, name: made.get_submodule(name).register_forward_pre_hook(
        moved, with_kwargs=True
    ),
    "forward": replace_forward,
    "subclass": subclass,
    "wrapper": lambda made, name: put(made, name, Wrapper(made.get_submodule(name))),
    "wrapper, compiled": lambda made, name: put(
        made, name, torch.compile(Wrapper(made.get_submodule(name)), backend="eager", dynamic=True)
    ),
}


def parametrized(function: Callable[..., object], *options: Any) -> Callable[[nn.Module, str], object]:
    def change(made: nn.Module, name: str) -> None:
        module: Any = made.get_submodule(name)
        function(module, *options)
        for part in ("weight_g", "original0"):
            for parameter, value in module.named_parameters():
                if parameter.endswith(part):
                    value.data.mul_(1.2)

    return change


class WeightOnly(nn.Module):
    """As weight-only quantisation makes it: whole numbers and a scale for each row."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.scale = inner.weight.detach().abs().amax(1, keepdim=True).clamp(min=1e-8) / 7
        self.register_buffer("weight", (inner.weight.detach() / self.scale).round().to(torch.int8))
        self.bias = inner.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)  # type: ignore[operator]


class Enlarged(Tensor):
    """Weights that compute otherwise, as those of torchao do, in a module that stays a Linear."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, given: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(function, types, given, kwargs)  # type: ignore[no-untyped-call]
        return 1.2 * result.as_subclass(Tensor) if function is nn.functional.linear else result


def enlarge(made: nn.Module, name: str) -> None:
    module: Any = made.get_submodule(name)
    module.weight = nn.Parameter(module.weight.detach().as_subclass(Enlarged))


def lora(made: nn.Module, name: str) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=[name], init_lora_weights=False)
    peft.inject_adapter_in_model(config, made)
    made.double()


LINEAR_CHANGES: dict[str, Callable[[nn.Module, str], object]] = {
    "weight_norm": parametrized(parametrizations.weight_norm),
    "spectral_norm": parametrized(parametrizations.spectral_norm),
    "pruned": parametrized(prune.l1_unstructured, "weight", 0.5),
    "weight only": lambda made, name: put(made, name, WeightOnly(made.get_submodule(name))),  # type: ignore[arg-type]
    "subclass of Tensor": enlarge,
    "without bias": lambda made, name: setattr(made.get_submodule(name), "bias", None),
    "LoRA": lora,
}


@torch.no_grad()
@pytest.mark.parametrize("change", [*CHANGES, *LINEAR_CHANGES])
def test_what_was_changed_acts_in_samples_as_it_does_in_forward(change: str) -> None:
    """Wherever it acts in `forward`: samples are the inverse of that, whichever the schedule."""
    unchanged = flow(num_classes=3)(IMAGES, labels(3))[0]
    for name in CALLED if change in CHANGES else LINEAR:
        made = flow(num_classes=3).eval()
        (CHANGES | LINEAR_CHANGES)[change](made, f"blocks.1.{name}")
        assert (made(IMAGES, labels(3))[0] - unchanged).abs().max() > 1e-5, name
        for schedule in ("sequential", pd.Sliding(5), pd.Jacobi()) if change == "hook" else (pd.Sliding(5),):
            images = made.sample(z=noise() / 4, y=labels(3), schedule=schedule, tol=0.0)
            z, _ = made(images, labels(3))
            assert (z - noise() / 4 * made.var.sqrt()).abs().max() < 1e-8, name


@contextmanager
def everywhere(register: Callable[..., Any], *function: Any) -> Iterator[None]:
    handle = register(*function)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("name", ["", "blocks.1"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_decoding_never_calls_may_not_be_changed(change: str, name: str) -> None:
    made = flow()
    if change.startswith(("subclass", "wrapper")) and not name:
        return  # another flow, with a sampler of its own or none
    CHANGES[change](made, name)
    with pytest.raises(ValueError, match=r"^(the flow|block 1) (has|is a)"):
        made.sample(1)


def test_hooks_on_all_modules_are_refused_while_they_are_there() -> None:
    modules, made = torch.nn.modules.module, flow()
    for register in (modules.register_module_forward_hook, modules.register_module_forward_pre_hook):
        with everywhere(register, lambda *given: None), pytest.raises(ValueError, match="for global hooks"):
            made.sample(1)
    made.sample(1)


def test_compiled_blocks_are_decoded_as_they_were() -> None:
    made = flow()
    expected = made.sample(z=noise(), schedule="jacobi")
    block: Any = made.blocks[1]
    block.attn_blocks[0] = torch.compile(block.attn_blocks[0], backend="eager")
    made.blocks[1] = torch.compile(block, backend="eager")  # type: ignore[assignment]
    made.blocks[0].compile(backend="eager")
    assert torch.equal(made.sample(z=noise(), schedule="jacobi"), expected)  # type: ignore[arg-type]


class Mixing(nn.Module):
    """A layer that subtracts the mean of all that it is given."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        return y - y.mean(0)  # type: ignore[no-any-return]


@pytest.mark.filterwarnings(
    "ignore:torch.ao.quantization|.*quantized:DeprecationWarning", "ignore:.*quantized:UserWarning"
)
def test_modules_that_are_no_functions_of_one_position_are_refused() -> None:
    """A window would give other values than all positions do, and no schedule the inverse."""
    dropped, mixed, quantised = flow().train(), flow(), flow().float()
    put(dropped, "blocks.1.proj_in", nn.Sequential(dropped.get_submodule("blocks.1.proj_in"), nn.Dropout(0.1)))
    put(mixed, "blocks.2.attn_blocks.0.mlp", Mixing(mixed.get_submodule("blocks.2.attn_blocks.0.mlp")))
    if {"qnnpack", "fbgemm"} & set(torch.backends.quantized.supported_engines):
        torch.ao.quantization.quantize_dynamic(quantised, {nn.Linear}, inplace=True)  # type: ignore[no-untyped-call]
        quantised.eval()
    else:
        quantised = mixed
    for made in (dropped, mixed, quantised):
        with pytest.raises(ValueError, match=r"modules of block \d were changed, and give a position other values"):
            made.sample(2)
    dropped.eval().sample(2)
    one = TarFlow(1, 8, 8, 64, 1, 1)  # of one position, where nothing is read
    CHANGES["hook"](one, "blocks.0.proj_in")
    one.sample(2)


def test_gradients_pass_through_the_hooks_of_backward() -> None:
    made, calls = flow(), list[str]()
    made.blocks[1].attn_blocks[0].mlp.register_full_backward_hook(lambda *given: calls.append("called"))  # type: ignore[union-attr,index]
    images = made.sample(z=noise(), schedule="sequential", differentiable=True)
    assert isinstance(images, Tensor)
    images.sum().backward()  # type: ignore[no-untyped-call]
    assert calls


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_changed_modules_in_low_precision(dtype: torch.dtype) -> None:
    low = flow().to(dtype)
    CHANGES["hook"](low, "blocks.1.attn_blocks.1.attention")
    full = flow()
    CHANGES["hook"](full, "blocks.1.attn_blocks.1.attention")
    expected = full.sample(z=noise(), schedule="sequential")
    assert isinstance(expected, Tensor)
    for made, context in ((low, False), (full.float(), True)):
        with torch.autocast("cpu", dtype, enabled=context):
            got = made.sample(z=noise().float(), schedule="sequential")
        assert isinstance(got, Tensor) and (got - expected).abs().max() < 0.1 * expected.abs().max()


def test_flows_as_they_were_built_need_no_check(monkeypatch: pytest.MonkeyPatch) -> None:
    made = digits()
    monkeypatch.setattr("parallel_decode.adapters.tarflow.changes._decodes_as_forward", None)
    check_decodable(made)
    assert not any(block.changed() for block in made.blocks)  # type: ignore[operator]
