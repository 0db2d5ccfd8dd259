"""Damaged, foreign and hostile files of each kind: `number` goes through what is enumerated, `rng` draws the details.

Each function writes one file or folder for a loader, and returns the loader's name, a label, and what the loader is given.
"""

import collections
import io
import json
import os
import pickle
import random
import struct
import tarfile
import warnings
import zipfile
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from diffusers import VQModel
from safetensors.torch import save, save_file
from torch import Tensor
from transformers import LlamaConfig

import parallel_decode as pd
from parallel_decode.adapters.image_tokens.class_conditional import ClassConditional
from parallel_decode.adapters.image_tokens.prior import Prior
from parallel_decode.adapters.tarflow import TarFlow
from parallel_decode.plan import Measurement

Damaged = tuple[str, str, Any]
MARKER = "executed"
NUMBERS: list[Any] = [
    -8,
    -1,
    0,
    1,
    3,
    10**9,
    10**30,
    0.5,
    8.0,
    1e300,
    True,
    False,
    None,
    "8",
    "",
    [],
    [8],
    {},
    {"name": 8},
]


@cache
def state() -> dict[str, Tensor]:
    """The weights of a small flow."""
    return dict(TarFlow(1, 4, 2, 64, 2, 1, num_classes=2).state_dict())


@cache
def image_model() -> ClassConditional:
    """A model of image tokens, 4 x 4 of 16 codes, with a tokenizer."""
    sizes: dict[str, Any] = {"vocab_size": 16, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_classes": 3, "rows": 4, "columns": 4}
    blocks: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    }
    vq: Any = VQModel(block_out_channels=(8, 8), latent_channels=4, num_vq_embeddings=16, norm_num_groups=4, **blocks)  # type: ignore[no-untyped-call]
    return ClassConditional(Prior(LlamaConfig(**sizes)), vq)


@cache
def llamagen() -> dict[str, Tensor]:
    """A state of LlamaGen's names: two layers of two heads of 8 channels."""
    shapes: dict[str, tuple[int, ...]] = {
        "tok_embeddings": (16, 16),
        "cls_embedding.embedding_table": (4, 16),
        "norm": (16,),
        "output": (16, 16),
    }
    layer = {"attention.wqkv": (48, 16), "attention.wo": (16, 16), "attention_norm": (16,), "ffn_norm": (16,)}
    layer |= {"feed_forward.w1": (24, 16), "feed_forward.w2": (16, 24), "feed_forward.w3": (24, 16)}
    shapes |= {f"layers.{n}.{name}": shape for n in range(2) for name, shape in layer.items()}
    return {f"{name}.weight": torch.ones(shape) for name, shape in shapes.items()}


@cache
def written(suffix: str) -> bytes:
    """The same as a file."""
    if suffix == ".safetensors":
        return save(state())
    file = io.BytesIO()
    torch.save(state(), file)
    return file.getvalue()


def put(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def spoilt(content: bytes, number: int, rng: random.Random) -> tuple[str, bytes]:
    """Cut, flip, overwrite, insert, repeat; half of the places are among the first or last 2,000 bytes, where structure is."""
    size = len(content)
    near = rng.randrange(min(2000, size))
    at = rng.choice([near, size - 1 - near, rng.randrange(size), rng.randrange(size)])
    few = rng.randrange(1, 200)
    ways: list[tuple[str, bytes]] = [
        ("cut", content[:at]),
        ("cut at the front", content[at:]),
        ("a bit", content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]),
        ("zeros", content[:at] + bytes(few) + content[at + few :]),
        ("ones", content[:at] + b"\xff" * few + content[at + few :]),
        ("noise", content[:at] + rng.randbytes(few) + content[at + few :]),
        ("inserted", content[:at] + rng.randbytes(few) + content[at:]),
        ("removed", content[:at] + content[at + few :]),
        ("appended", content + rng.randbytes(few)),
        ("twice", content + content),
        ("only noise", rng.randbytes(few)),
        ("empty", b""),
    ]
    return ways[number % len(ways)]


def spoilt_bytes(folder: Path, number: int, rng: random.Random) -> Damaged:
    suffix = (".pth", ".safetensors")[number % 2]
    label, content = spoilt(written(suffix), number // 2, rng)
    if rng.random() < 0.3:
        more, content = spoilt(content or b"\0", rng.randrange(9), rng)
        label += f", {more}"
    return "checkpoint", f"{suffix}: {label}", put(folder / f"bytes{suffix}", content)


def _deep(depth: int) -> Any:
    value: Any = torch.zeros(1)
    for _ in range(depth):
        value = {"var": value}
    return value


def _to(dtype: torch.dtype) -> Callable[[Tensor], Any]:
    return lambda t: t.to(dtype)


TENSORS: dict[str, Callable[[Tensor], Any]] = {
    **{f"{dtype}": _to(dtype) for dtype in (
        torch.bool, torch.uint8, torch.int8, torch.int64, torch.complex64, torch.float16, torch.bfloat16, torch.float64,
        torch.float8_e4m3fn, torch.float8_e5m2,
    )},
    "quantised": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
    "sparse": lambda t: t.to_sparse(),
    "csr": lambda t: t.flatten(0, -2).to_sparse_csr() if t.dim() > 1 else t.to_sparse(),
    "nested": lambda t: torch.nested.nested_tensor([t, t]),
    "on meta": lambda t: t.to("meta"),
    "expanded": lambda t: torch.zeros(1).expand(10**6, 10**6),
    "expanded to its shape": lambda t: torch.zeros(1).expand(t.shape),
    "zero-size": lambda t: torch.zeros(0, 10**12),
    "of no numbers": lambda t: torch.zeros(0),
    "a number": lambda t: t.flatten()[0].clone(),
    "one more axis": lambda t: t[None].clone(),
    "flat": lambda t: t.flatten().clone(),
    "transposed": lambda t: t.T if t.dim() == 2 else t,
    "transposed in memory": lambda t: t.T.contiguous() if t.dim() == 2 else t[:1].clone(),
    "half": lambda t: t[: len(t) // 2].clone(),
    "double": lambda t: torch.cat([t, t]),
    "a view of more": lambda t: torch.cat([t, t])[: len(t)],
    "NaN": lambda t: torch.full_like(t, torch.nan),
    "infinite": lambda t: torch.full_like(t, torch.inf),
    "negative": lambda t: -torch.ones_like(t),
    "zero": torch.zeros_like,
    "a Parameter": torch.nn.Parameter,
    "a Buffer": lambda t: torch.nn.Buffer(t),
    "an array": lambda t: t.numpy(),
    "numbers": lambda t: t.tolist(),
    "nothing": lambda t: None,
    "text": lambda t: "var",
    "a dict": lambda t: {"var": t},
    "a type": lambda t: torch.float32,
    "a size": lambda t: t.shape,
}  # fmt: skip


def other_tensors(folder: Path, number: int, rng: random.Random) -> Damaged:
    label, change = list(TENSORS.items())[number % len(TENSORS)]
    named = [
        "var",
        "blocks.0.proj_in.weight",
        "blocks.0.proj_out.bias",
        "blocks.0.class_embed",
        rng.choice(list(state())),
    ]
    name = named[number // len(TENSORS) % len(named)]
    label = f"{name}: {label}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of types that are deprecated, or prototypes
        try:
            changed = dict(state()) | {name: change(state()[name])}
        except (RuntimeError, NotImplementedError):  # torch cannot
            changed = dict(state()) | {name: None}
        path = folder / "tensors.pth"
        if rng.random() < 0.4:
            try:
                save_file(changed, path.with_suffix(".safetensors"))
                return "checkpoint", label, path.with_suffix(".safetensors")
            except Exception:  # noqa: BLE001 - what it cannot hold is for torch.save
                path.with_suffix(".safetensors").unlink(missing_ok=True)
        torch.save(changed, path)
    return "checkpoint", label, path


def _renamed(old: str, new: str) -> dict[str, Tensor]:
    return {name.replace(old, new): value for name, value in state().items()}


def _contents(rng: random.Random) -> dict[str, Any]:
    some = torch.zeros(2)
    added: list[Any] = [
        "blocks.10000.x",
        "blocks.1000000.proj_in.weight",
        "blocks.0.attn_blocks.1000000.x.y",
        "blocks.-1.x.y",
        "blocks.x.y",
    ]
    added += [
        "blocks.²",
        "blocks.",
        "",
        ".",
        "a" * 10**5,
        "\0",
        "\ud800",
        3,
        -1,
        0.5,
        None,
        True,
        b"var",
        ("var", 0),
        float("nan"),
    ]
    added += ["blocks.0.attn_mask", "epoch"]
    many = {
        f"blocks.{n}.{rest}": state()["var"]
        for n in range(300)
        for rest in ("proj_in.weight", "attn_blocks.0.attention.qkv.weight")
    }
    return {
        **{f"added {str(name)[:40]!r}": state() | {name: some} for name in added},
        **{f"without {name}": {k: v for k, v in state().items() if k != name} for name in rng.sample(list(state()), 12)},
        "a gap of blocks": _renamed("blocks.1.", "blocks.2."),
        "a gap of layers": _renamed("attn_blocks.0.", "attn_blocks.1."),
        "the second block alone": _renamed("blocks.0.", "blocks.7."),
        "the first block alone": {k: v for k, v in state().items() if "blocks.1." not in k},
        "module.": _renamed("", "module.") and {f"module.{k}": v for k, v in state().items()},
        "state_dict": {"state_dict": state()},
        "model and optimizer": {"model": state(), "optimizer": {"lr": 1e-3, "steps": [1, 2]}, "epoch": 3, "rng": torch.get_rng_state()},
        "pairs": list(state().items()),
        "a tuple": (state(), 1),
        "a tensor": state()["var"],
        "a number": 3,
        "text": "var",
        "nothing": None,
        "no names": {},
        "a flow": TarFlow(1, 4, 2, 64, 1, 1),
        "deep": _deep(300),
        "a set": {"var", "blocks"},
        "a counter": collections.Counter({"var": 3}),
        "only masks": {f"blocks.{n}.attn_mask": torch.zeros(2, 2, dtype=torch.bool) for n in range(3)},
        "boolean masks": state() | {f"blocks.{n}.attn_mask": torch.ones(4, 4, dtype=torch.bool) for n in range(2)},
        "tied": state() | dict.fromkeys(state(), state()["var"]),
        "many blocks of one tensor": state() | many,
        "many names": state() | {f"x{n}": some for n in range(3000)},
        "with metadata": collections.OrderedDict(TarFlow(1, 4, 2, 64, 2, 1).state_dict(keep_vars=True)),
        "wide": {"var": torch.zeros(1, 4), "blocks.0.proj_in.weight": torch.zeros(2**17, 1), "blocks.0.attn_blocks.0.attention.qkv.weight": some},
        "long": state() | {"var": torch.ones(700**2, 4)},
    }  # fmt: skip


def other_contents(folder: Path, number: int, rng: random.Random) -> Damaged:
    contents = _contents(rng)
    label = list(contents)[number % len(contents)]
    path = folder / "contents.pth"
    ways: list[dict[str, Any]] = [{}, {}, {}, {"pickle_protocol": 4}, {"_use_new_zipfile_serialization": False}]
    options = rng.choice(ways)
    torch.save(contents[label], path, **options)
    return "checkpoint", f"{label} {options or ''}", path


class Call:
    """Pickled, a call of a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.called = function, arguments

    def __reduce__(self) -> Any:
        return self.called


class Storage(tuple[Any, ...]):
    """Pickled, a reference to a storage."""


def pickled(value: Any) -> bytes:
    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            return tuple(value) if isinstance(value, Storage) else None

    file = io.BytesIO()
    Pickler(file, protocol=2).dump(value)
    return file.getvalue()


def archive(data: bytes, more: Mapping[str, bytes] | None = None, compression: int = zipfile.ZIP_STORED) -> bytes:
    """A file as of `torch.save`, with more members, or other contents of some."""
    file = io.BytesIO()
    contents = {"data.pkl": data, "byteorder": b"little", "data/0": bytes(64), "version": b"3\n"} | dict(more or {})
    with zipfile.ZipFile(file, "w", compression, compresslevel=1) as members:
        for name, content in contents.items():
            members.writestr(f"archive/{name}", content)
    return file.getvalue()


def _tensor(
    shape: Any = (4, 4),
    strides: Any = (4, 1),
    offset: Any = 0,
    kind: Any = torch.FloatStorage,
    key: Any = "0",
    length: Any = 16,
) -> Call:
    storage = Storage(("storage", kind, key, "cpu", length))
    return Call(torch._utils._rebuild_tensor_v2, storage, offset, shape, strides, False, collections.OrderedDict())


def _pickles(folder: Path, rng: random.Random) -> dict[str, Callable[[], bytes]]:
    marker = str(folder / MARKER)
    key: Any = ("x",)
    for _ in range(60):
        key = (key, key)
    wide: tuple[Any, ...] = ("x",) * 1000
    for _ in range(3):
        wide = (wide,) * 1000
    pairs = [(f"{n}", n) for n in range(5000)]
    big = 10**12
    values: dict[str, Callable[[], Any]] = {
        "runs a command": lambda: Call(os.system, f"touch {marker}"),
        "opens a file": lambda: Call(open, marker, "w"),
        "evaluates": lambda: Call(eval, f"open({marker!r}, 'w')"),
        "loads a file": lambda: Call(torch.load, marker),
        "bytearray": lambda: {"var": Call(bytearray, big)},
        "bytearray of a GB": lambda: {"var": Call(bytearray, 10**9)},
        "Tensor": lambda: {"var": Call(torch.Tensor, 10**6, 10**6)},
        "Tensor of a GB": lambda: {"var": Call(torch.Tensor, 25 * 10**7)},
        "OrderedDicts of a list": lambda: {"var": [Call(collections.OrderedDict, pairs) for _ in range(5000)]},
        "good": lambda: {"var": _tensor(), "blocks.0.proj_in.weight": _tensor()},
        "storage of a TB": lambda: {"var": _tensor(length=big)},
        "negative storage": lambda: {"var": _tensor(length=-1)},
        "storage of half": lambda: {"var": _tensor(length=8)},
        "other storage": lambda: {"var": _tensor(key="1")},
        "storage by number": lambda: {"var": _tensor(key=0)},
        "storage in the archive's parent": lambda: {"var": _tensor(key="../data.pkl")},
        "storage of bytes": lambda: {"var": _tensor(kind=torch.UntypedStorage, length=64)},
        "storage of nothing": lambda: {"var": _tensor(kind=torch.Tensor)},
        "storage of doubles": lambda: {"var": _tensor(kind=torch.DoubleStorage, length=8)},
        "huge": lambda: {"var": _tensor((10**6, 10**6), (0, 0))},
        "huge and moving": lambda: {"var": _tensor((10**6, 10**6), (10**6, 1))},
        "overflowing": lambda: {"var": _tensor((2**62, 2**62), (0, 0))},
        "empty and huge": lambda: {"var": _tensor((0, 2**62), (1, 1))},
        "negative shape": lambda: {"var": _tensor((-4, -4), (4, 1))},
        "negative strides": lambda: {"var": _tensor((4, 4), (-4, 1))},
        "beyond": lambda: {"var": _tensor(offset=10)},
        "before": lambda: {"var": _tensor(offset=-1)},
        "far beyond": lambda: {"var": _tensor(offset=2**62)},
        "shape of text": lambda: {"var": _tensor("44", "41")},
        "shape of bools": lambda: {"var": _tensor((True, True), (1, 1))},
        "shape of floats": lambda: {"var": _tensor((4.0, 4.0), (4.0, 1.0))},
        "no strides": lambda: {"var": _tensor(strides=())},
        "thousands of axes": lambda: {"var": _tensor((1,) * 5000, (1,) * 5000)},
        "list of storages": lambda: {"var": [Storage(("storage", torch.FloatStorage, "0", "cpu", 16))] * 10},
        "other identity": lambda: {"var": Storage(("module", 1))},
        "identity of a number": lambda: {"var": Storage((1,))},
        "a device that is not there": lambda: {"var": Storage(("storage", torch.FloatStorage, "0", "abacus:7", 16))},
        "a list as a name": lambda: {"var": Call(collections.OrderedDict, [([], 1)])},
        "sparse": lambda: {
            "var": Call(torch._utils._rebuild_sparse_tensor, torch.sparse_coo, (_tensor(), _tensor(), (4, 4)))
        },
    }
    names = pickled({"a": 1})
    rest: dict[str, bytes] = {
        "a wide name": b"\x80\x02}" + pickled(wide)[2:-1] + b"Ns.",
        "a name of tuples": b"\x80\x02}" + pickled(key)[2:-1] + b"Ns.",
        "deep tuples": b"\x80\x02)" + b"\x85" * 10**6 + b".",
        "a deep name": b"\x80\x02})" + b"\x85" * 60_000 + b"Ns.",
        "deep lists": b"\x80\x02" + b"]" * 50_000 + b"a" * 49_999 + b".",
        "dicts": b"\x80\x02" + b"}" * 60_000 + b".",
        "many dicts": b"\x80\x02(" + b"}" * 3 * 10**6 + b"t.",
        "OrderedDicts": b"\x80\x02ccollections\nOrderedDict\nq\0" + b"h\0)R" * 15_000 + b".",
        "marks": b"\x80\x02" + b"(" * 60_000 + b".",
        "no stop": names[:-1],
        "no stack": b"\x80\x02s.",
        "no mark": b"\x80\x02}u.",
        "no memo": b"\x80\x02h\x07.",
        "odd items": b"\x80\x02}(X\x01\0\0\0au.",
        "only a stop": b".",
        "protocol 9": b"\x80\x09N.",
        "protocol 0": pickle.dumps({"var": 1}, 0),
        "protocol 5": pickle.dumps({"var": 1}, 5),
        "a long string": b"\x80\x02X\xff\xff\xff\xff.",
        "a long number": b"\x80\x02\x8b\xff\xff\xff\x7f" + b"\1" * 50_000 + b".",
        "digits": b"\x80\x02I" + b"9" * 50_000 + b"\n.",
        "opcodes": b"\x80\x02" + bytes(rng.choice(b"()}]Nqh.tusaeRQbX\x85\x86\x87\x88K\x01") for _ in range(300)),
        "set_ of a tensor": pickled({"var": _tensor()})[:-1] + b"b.",
    }
    made: dict[str, Callable[[], bytes]] = {label: partial(_pickled_later, value) for label, value in values.items()}
    return made | {label: partial(bytes, data) for label, data in rest.items()}


def _pickled_later(make: Callable[[], Any]) -> bytes:
    return pickled(make())


def hostile_pickles(folder: Path, number: int, rng: random.Random) -> Damaged:
    pickles = _pickles(folder, rng)
    path = folder / "pickle.pth"
    if number % 3 == 2:  # the pickle of a good file, a little damaged
        with zipfile.ZipFile(io.BytesIO(written(".pth"))) as good:
            members = {name.partition("/")[2]: good.read(name) for name in good.namelist()}
        label, data = spoilt(members.pop("data.pkl"), 2 + rng.randrange(6), rng)
        return "checkpoint", f"a good pickle, {label}", put(path, archive(data, members))
    label = list(pickles)[number // 3 * 2 % len(pickles) if number % 3 == 0 else (number // 3 * 2 + 1) % len(pickles)]
    compression = zipfile.ZIP_DEFLATED if rng.random() < 0.1 else zipfile.ZIP_STORED
    data = pickles[label]()
    content = data if rng.random() < 0.05 else archive(data, None, compression)
    return "checkpoint", f"pickle: {label}", put(path, content)


def _claiming(content: bytes, size: int, member: int) -> bytes:
    """With another size of a member in the directory."""
    at = -1
    for _ in range(1 + member):
        at = content.index(b"PK\1\2", at + 1)
    return content[: at + 20] + struct.pack("<II", size, size) + content[at + 28 :]


def hostile_archives(folder: Path, number: int, rng: random.Random) -> Damaged:
    path, good = folder / "archive.pth", pickled({"var": _tensor()})

    def tar() -> bytes:
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w") as tarred:
            tarred.addfile(tarfile.TarInfo("storages"), io.BytesIO())
        return file.getvalue()

    def many(count: int, name: str) -> bytes:
        return archive(good, {name.format(n): b"" for n in range(count)})

    def twice() -> bytes:
        return archive(good, {"data/1": b"x"}).replace(b"data/1", b"data/0")

    def old() -> bytes:
        torch.save(state(), path, _use_new_zipfile_serialization=False)
        return path.read_bytes()

    def huge_old() -> bytes:  # which torch.load would make a storage of a TB for
        content = old()
        return content.replace(struct.pack("<BH", 77, 16384), struct.pack("<Bi", 74, 2**31 - 1), 2)

    zeros = b"\x80\x02" + b"N" * 2**26
    ways: dict[str, Callable[[], bytes]] = {
        "a deflated pickle": lambda: archive(zeros, None, zipfile.ZIP_DEFLATED),
        "a deflated storage": lambda: archive(pickled({"var": _tensor(length=2**24)}), {"data/0": bytes(2**26)}, zipfile.ZIP_DEFLATED),
        "a deflated version": lambda: archive(good, {"version": b"3" * 2**26}, zipfile.ZIP_DEFLATED),
        "a deflated byteorder": lambda: archive(good, {"byteorder": bytes(2**26)}, zipfile.ZIP_DEFLATED),
        "bzip2": lambda: archive(good, None, zipfile.ZIP_BZIP2),
        "lzma": lambda: archive(good, None, zipfile.ZIP_LZMA),
        "a good file, deflated": lambda: archive(good, None, zipfile.ZIP_DEFLATED),
        "many members": lambda: many(20_000, "x{}"),
        "members of one name": twice,
        "no pickle": lambda: archive(good).replace(b"data.pkl", b"data.pkk"),
        "a folder's name": lambda: archive(good).replace(b"archive/", b"archive_"),
        "other names": lambda: archive(good).replace(b"archive/data/0", b"brchive/data/0"),
        "no archive name": lambda: archive(good).replace(b"archive/", b"///////"),
        **{f"member {m} claims {s}": partial(_claiming, archive(good), s, m) for m in range(4) for s in (0, 10, 2**31, 2**32 - 1)},
        "big-endian": lambda: archive(good, {"byteorder": b"big"}),
        "no endian": lambda: archive(good, {"byteorder": b"middle"}),
        "format version": lambda: archive(good, {".format_version": b"9", ".storage_alignment": b"0"}),
        "alignment of text": lambda: archive(good, {".storage_alignment": b"many"}),
        "TorchScript": lambda: archive(good, {"constants.pkl": good, "code/x.py": b"import os"}),
        "something before": lambda: b"#!/bin/sh\n" + written(".pth"),
        "a comment": lambda: written(".pth")[:-2] + b"\x05\0hello",
        "tar": tar,
        "before torch 1.6": old,
        "before torch 1.6, claiming more": huge_old,
        "before torch 1.6, cut": lambda: old()[: rng.randrange(4000)],
        "only an end": lambda: b"PK\5\6" + bytes(18),
        "an end that claims": lambda: b"PK\5\6" + b"\xff" * 16 + b"\0\0",
        "safetensors": lambda: written(".safetensors"),
        "a web page": lambda: b"<!doctype html><title>404</title>" * 50,
        "Git LFS": lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
    }  # fmt: skip
    label = list(ways)[number % len(ways)]
    return "checkpoint", f"archive: {label}", put(path, ways[label]())


def _header(entries: Any, content: bytes = b"", length: int | None = None) -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + content


def hostile_headers(folder: Path, number: int, rng: random.Random) -> Damaged:
    def one(**changed: Any) -> dict[str, Any]:
        return {"var": {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]} | changed}

    dtypes = ["F16", "F64", "F8_E4M3", "F8_E8M0", "F4", "BOOL", "C64", "U64", "I8", "X", "", None, 3]
    shapes: list[Any] = [
        [-4, -4],
        [2**62, 4],
        [0, 2**62],
        [2**32, 2**32],
        [4.0, 4],
        ["4"],
        [],
        None,
        "x",
        [[4, 4]],
        [1] * 5000,
        [0],
    ]
    offsets: list[Any] = [
        [0, 2**62],
        [64, 0],
        [0, 63],
        [0, 65],
        [-1, 63],
        [0],
        [],
        None,
        [0.0, 64],
        [2**64, 2**64 + 64],
        [1, 65],
    ]
    small = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    good = written(".safetensors")
    headers: dict[str, bytes] = {
        **{f"dtype {d!r}": _header(one(dtype=d), bytes(64)) for d in dtypes},
        **{f"shape {str(s)[:20]}": _header(one(shape=s), bytes(64)) for s in shapes},
        **{f"no bytes of shape {str(s)[:20]}": _header(one(shape=s, data_offsets=[0, 0])) for s in shapes},
        **{f"offsets {o!r}": _header(one(data_offsets=o), bytes(64)) for o in offsets},
        **{f"length {n}": struct.pack("<Q", n) + good[8:] for n in (0, 1, 7, 2**20, 2**40, 2**63, 2**64 - 1)},
        "100 MB of spaces": _header(b" " * 3 * 2**20 + b"{}"),
        "deep": _header(b'{"a":' * 30_000),
        "deep lists": _header(b"[" * 50_000),
        "many entries": _header({f"{n}": small for n in range(20_000)}),
        "some entries": _header({f"{n}": small for n in range(900)}),
        "a list": _header([]),
        "nothing": _header({}),
        "null": _header(None),
        "metadata": _header({"__metadata__": {"a": 3}}),
        "metadata alone": _header({"__metadata__": {"a": "b"}}),
        "twice": _header(b'{"var":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"var":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}', bytes(8)),
        "overlapping": _header({"var": one()["var"], "x": one()["var"]}, bytes(64)),
        "a hole": _header({"var": one()["var"], "x": {"dtype": "F32", "shape": [1], "data_offsets": [80, 84]}}, bytes(84)),
        "not text": _header(b"\xff" * 100),
        "pickle": written(".pth"),
    }  # fmt: skip
    label = list(headers)[number % len(headers)]
    return "checkpoint", f"header: {label}", put(folder / "header.safetensors", headers[label])


def spoilt_json(good: Any, number: int, rng: random.Random) -> tuple[str, bytes]:
    """A good value with one part replaced, removed or added; or its text damaged."""
    text = json.dumps(good).encode()
    whole: dict[str, bytes] = {
        "empty": b"", "null": b"null", "a list": b"[]", "no entries": b"{}", "text": b'"x"', "a number": b"3", "deep": b"[" * 10**5,
        "deep entries": b'{"a":' * 10**5, "deep but whole": b"[" * 900 + b"]" * 900, "UTF-16": text.decode().encode("utf-16"), "BOM": b"\xef\xbb\xbf" + text,
        "not text": b"\xff\xfe\xfd", "twice": text + text, "large": b" " * 2**21 + text, "lists": b"[" + b"[]," * 2**19 + b"[]]",
        "zero bytes": bytes(1000), "digits": b"9" * 10**5, "a name twice": text[:1] + b'"format": 1, ' + text[1:-1] + b', "format": 2}',
    }  # fmt: skip
    if number % 3 == 0:
        return list(whole.items())[number // 3 % len(whole)]
    if number % 3 == 1 and rng.random() < 0.3:
        return spoilt(text, rng.randrange(12), rng)
    changed = json.loads(text)
    places: list[tuple[Any, Any]] = []

    def walk(value: Any) -> None:
        for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
            places.append((value, key))
            walk(value[key])

    walk(changed)
    inside, key = places[number // 3 * 2 % len(places) if number % 3 == 1 else rng.randrange(len(places))]
    new = rng.choice([*NUMBERS, "NaN", "Infinity", "1e999", "removed", "added"])
    if new == "removed":
        del inside[key]
    elif new == "added" and isinstance(inside, dict):
        inside["attn_implementation"] = "kernels-community/flash-attn"
    else:
        inside[key] = f"@{new}@" if new in ("NaN", "Infinity", "1e999") else new
    text = json.dumps(changed).encode().replace(b'"@', b"").replace(b'@"', b"")
    return f"{key} is {new!r}", text


def damaged_configs(folder: Path, number: int, rng: random.Random) -> Damaged:
    good = {"channels": 64, "img_size": 4, "in_channels": 1, "layers_per_block": 1, "noise_std": 0.1, "num_blocks": 2}
    good |= {"num_classes": 2, "nvp": True, "patch_size": 2}
    label, text = spoilt_json(good, number, rng)
    put(folder / "model.safetensors", written(".safetensors"))
    put(folder / "config.json", text)
    return ("checkpoint", "pretrained")[number % 2], f"config.json: {label}", folder


def damaged_folders(folder: Path, number: int, rng: random.Random) -> Damaged:
    kind = ("pretrained", "checkpoint", "images", "plan")[number % 4]
    weights, config = folder / "model.safetensors", folder / "config.json"
    put(weights, written(".safetensors"))
    put(config, b'{"in_channels": 1, "img_size": 4, "patch_size": 2}')

    def replaced(path: Path, make: Callable[[Path], Any]) -> Path:
        path.unlink()
        make(path)
        return folder

    def leftovers() -> Path:
        put(folder / "model.safetensors.index.json", b'{"weight_map": {"var": "model-00001-of-00002.safetensors"}}')
        weights.rename(folder / "model-00001-of-00002.safetensors")
        return folder

    ways: dict[str, Callable[[], Any]] = {
        "no config": lambda: replaced(config, lambda _: None),
        "no weights": lambda: replaced(weights, lambda _: None),
        "a folder as config": lambda: replaced(config, Path.mkdir),
        "folder as weights": lambda: replaced(weights, Path.mkdir),
        "a loop as config": lambda: replaced(config, lambda path: path.symlink_to(path)),
        "a loop as weights": lambda: replaced(weights, lambda path: path.symlink_to(path)),
        "a link to nowhere as weights": lambda: replaced(weights, lambda path: path.symlink_to(folder / "none")),
        "a pipe as config": lambda: replaced(config, os.mkfifo),
        "a pipe as weights": lambda: replaced(weights, os.mkfifo),
        "a pipe": lambda: replaced(config, os.mkfifo) / "config.json",
        "a loop": lambda: replaced(config, lambda path: path.symlink_to(path)) / "config.json",
        "leftovers of shards": leftovers,
        "empty weights": lambda: replaced(weights, lambda path: put(path, b"")),
        "empty config": lambda: replaced(config, lambda path: put(path, b"")),
        "weights of another suffix": lambda: replaced(weights, lambda path: put(path.with_name("pytorch_model.bin"), written(".pth"))),
        "a file": lambda: config,
        "no folder": lambda: folder / "none",
        "below a file": lambda: config / "none",
        "a long name": lambda: folder / ("x" * 300),
        "a zero byte": lambda: folder / "x\0y",
        "/dev/zero": lambda: Path("/dev/zero"),
        "/dev/null": lambda: Path("/dev/null"),
        "an empty name": lambda: "",
    }  # fmt: skip
    label = list(ways)[number // 4 % len(ways)]
    return kind, f"{kind}: {label}", ways[label]()


def damaged_image_models(folder: Path, number: int, rng: random.Random) -> Damaged:
    model = image_model()
    model.save_pretrained(folder)
    config, weights = folder / "config.json", folder / "model.safetensors"
    if number % 4:
        label, text = spoilt_json(json.loads(config.read_text()), number // 4 * 3 + number % 4 - 1, rng)
        put(config, text)
        return "images", f"config.json: {label}", folder
    if number % 8:
        label, content = spoilt(weights.read_bytes(), number // 8, rng)
        put(weights, content)
    else:
        changes = list(TENSORS)
        label = changes[number // 8 % len(changes)]
        values = dict(model.state_dict())
        name = rng.choice(list(values))
        try:
            save_file(values | {name: TENSORS[label](values[name])}, weights)
        except Exception:  # noqa: BLE001 - what safetensors cannot hold
            save_file({k: v for k, v in values.items() if k != name}, weights)
    return "images", f"weights: {label}", folder


def damaged_states(folder: Path, number: int, rng: random.Random) -> Damaged:
    values: Any = dict(llamagen())
    options: dict[str, Any] = {"head_dim": 8, "rows": 4}
    added = [
        "layers.1000000.x",
        "layers.10.attention.wqkv.weight",
        "layers.2.attention.wqkv.weight",
        "",
        3,
        None,
        b"x",
        ("x", 1),
    ]
    if number % 3 == 0:
        label, change = list(TENSORS.items())[number // 3 % len(TENSORS)]
        name = rng.choice(list(values))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                values[name] = change(values[name])
            except (RuntimeError, NotImplementedError):
                values[name] = None
        label = f"{name}: {label}"
    elif number % 3 == 1:
        new = NUMBERS[number // 6 % len(NUMBERS)]
        name = ("head_dim", "rows")[number // 3 % 2]
        options[name], label = new, f"{name}={new!r}"
    else:
        way = number // 3 % (len(added) + 5)
        label = f"{way}"
        if way < len(added):
            values[added[way]] = torch.zeros(2)
        else:
            less = dict(list(values.items())[: -1 - rng.randrange(9)])
            values = [less, {"model": values}, list(values), None, {}][way - len(added)]
    return "llamagen", f"LlamaGen: {label}", (values, options)


def damaged_plans(folder: Path, number: int, rng: random.Random) -> Damaged:
    path = folder / "plan.json"
    schedules = [
        pd.Sequential(),
        pd.Sliding(8, per_row=True, tol=1e-3),
        pd.Jacobi(correction=pd.SecantCorrection(lags=(1, 4))),
    ]
    measured = tuple(tuple(Measurement(s, 0.5, 3, 1e-6) for s in schedules) for _ in range(2))
    pd.Plan(tuple(schedules), {"model": "x", "batch": 3, "guidance": 0.5}, measured).save(path)
    good = json.loads(path.read_text())
    if number % 25 == 0:
        with path.open("wb") as file:
            file.truncate(100 * 2**20)
        return "plan", "100 MB", path
    if number % 25 == 1:
        version = rng.choice(["parallel_decode plan 2", "parallel_decode plan", 1, None, ["parallel_decode plan 1"]])
        put(path, json.dumps(good | {"format": version}).encode())
        return "plan", f"format {version!r}", path
    if number % 25 == 2:
        nested: Any = {"name": "jacobi"}
        for _ in range(rng.choice([1, 5, 300])):
            nested = {"name": rng.choice(["jacobi", "secant", "selective", "auto"]), "correction": nested}
        put(path, json.dumps(good | {"layers": [nested]}).encode())
        return "plan", "corrections of corrections", path
    label, text = spoilt_json(good, number, rng)
    return "plan", label, put(path, text)


CHECKPOINTS = (
    spoilt_bytes, other_tensors, other_contents, hostile_pickles, hostile_archives, hostile_headers, damaged_configs, damaged_folders,
    damaged_image_models, damaged_states,
)  # fmt: skip
