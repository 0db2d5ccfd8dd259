"""Weights from files that anybody may have written: safetensors, and what `torch.save` writes.

Nothing that a file names is called, and what is allocated is in proportion to the file, whatever sizes it claims.
"""

import os
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from parallel_decode._json_file import reason
from parallel_decode._pickle_check import check_pickle

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def read_weights(path: Path, skip: Callable[[str], bool] = lambda name: False) -> dict[str, Tensor]:
    """The tensors of a file, mapped where possible: `fill` copies them.

    Args:
        path: of the file; .safetensors, or another suffix for what `torch.save` wrote.
        skip: which names to leave out.

    Raises:
        FileNotFoundError: there is no such file, or it is a folder, say.
        ValueError: the file is damaged, or holds something else than a state dict of floating-point numbers.
    """
    if not os.path.isfile(path):  # a pipe would be waited for
        raise FileNotFoundError(f"{path} does not exist, or is not a file")
    size = path.stat().st_size
    most = 2**16 + size // 64  # of names and shapes: 170 bytes a tensor, next to weights of at least 100 kB a layer
    read = _safetensors if path.suffix.lower() == ".safetensors" else _zipped
    try:
        state: dict[str, Tensor] = read(path, size, most)
    except Exception as error:  # noqa: BLE001 - what parsers raise over damaged files is not ours to list
        raise ValueError(
            f"{path} cannot be read as a checkpoint, it may be damaged or of another kind: {reason(error)}"
        ) from None
    if isinstance(state, dict):
        state = {name: value for name, value in state.items() if not skip(str(name))}
    check_state(state, path)
    total = sum(tensor.nbytes for tensor in state.values())
    if total > size:
        raise ValueError(f"{path} claims tensors of {total:,} bytes, and has {size:,}: it may be damaged")
    return state


def check_state(state: Any, source: str | Path) -> None:
    """Check that these are named tensors of plain floating-point numbers, none of them expanded from fewer.

    Raises:
        ValueError: they are something else.
    """
    if not isinstance(state, Mapping):  # in a file a wrong type is a wrong value
        raise ValueError(f"{source} holds a {type(state).__name__}, expected a state dict: names and tensors")  # noqa: TRY004
    for name, tensor in state.items():
        if not _usable(tensor):
            raise ValueError(
                f"{source} holds {_described(tensor)} as {repr(name)[:60]}, expected floating-point numbers of 16, 32 or 64 bits, not "
                "expanded from fewer; of a file that holds more than weights, save the state dict alone"
            )


def fill(module: nn.Module, state: Mapping[str, Tensor], source: str | Path) -> None:
    """Give a module on the meta device these weights: copies, of the module's dtypes, on the default device.

    Raises:
        ValueError: names or shapes are not the module's.
    """
    wanted = module.state_dict(keep_vars=True)
    found = {
        id(own): name for name, own in wanted.items() if name in state
    }  # modules may share one under several names
    wrong = [f"{name} is missing" for name, own in wanted.items() if id(own) not in found]
    wrong += [f"{repr(name)[:60]} is unknown" for name in state if name not in wanted]
    wrong += [
        f"{name} has shape {tuple(state[name].shape)}, expected {tuple(like.shape)}"
        for name, like in wanted.items()
        if name in state and state[name].shape != like.shape
    ]
    if wrong:
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(f"{source} does not fit this configuration: {'; '.join(wrong[:3])}{more}")
    device, form = torch.get_default_device(), torch.contiguous_format
    copies = {
        key: state[name].to(device, wanted[name].dtype, copy=True, memory_format=form) for key, name in found.items()
    }
    module.load_state_dict({name: copies[id(own)] for name, own in wanted.items()}, assign=True)


def _usable(tensor: Any) -> bool:
    return (
        isinstance(tensor, Tensor)
        and tensor.dtype in FLOATS
        and tensor.layout is torch.strided
        and not (tensor.is_meta or tensor.is_nested)
        and 0 < tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
    )


def _described(value: Any) -> str:
    if not isinstance(value, Tensor) or value.is_nested:
        return f"a {'nested ' if isinstance(value, Tensor) else ''}{type(value).__name__}"
    layout = "" if value.layout is torch.strided else f"{value.layout} "
    return f"{layout}{value.dtype} of shape {tuple(value.shape)} on {value.device}"


def _safetensors(path: Path, size: int, most: int) -> Any:
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    if header > most:
        raise ValueError(f"its header has {header:,} bytes, expected at most {most:,}")
    with safe_open(path, "pt") as tensors:
        return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118


def _zipped(path: Path, size: int, most: int) -> Any:
    with path.open("rb") as file:
        end = zipfile._EndRecData(file)  # type: ignore[attr-defined]  # before ZipFile makes an object of each entry
    if not end or end[5] > most:
        raise ValueError("it is not a zip file of a few tensors, as torch.save writes since version 1.6")
    with zipfile.ZipFile(path) as archive:
        members = {member.filename.partition("/")[2]: member for member in archive.infolist()}
        if len(members) < len(archive.infolist()):
            raise ValueError("it holds members of the same name")
        for name, member in members.items():
            if member.compress_type != zipfile.ZIP_STORED or member.file_size > size:
                raise ValueError(f"its member {name[:60]!r} is compressed, which torch.save never does")
        if members["data.pkl"].file_size > most:
            raise ValueError(f"its pickle has {members['data.pkl'].file_size:,} bytes, expected at most {most:,}")
        storages = {name[5:]: member.file_size for name, member in members.items() if name.startswith("data/")}
        check_pickle(archive.read(members["data.pkl"]), storages)
    return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
