"""Other people's samplers, from a checkout that the user has, on the flow's own weights.

Loading a checkout runs its Python code.
"""

import importlib.util
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from parallel_decode.adapters.itarflow import ITarFlow
from parallel_decode.adapters.starflow import StarFlow
from parallel_decode.adapters.tarflow import TarFlow
from parallel_decode.adapters.tarflow.base import Flow
from parallel_decode.adapters.tarflow.bench.measure import Method, Outcome
from parallel_decode.adapters.tarflow.bench.suite import APPLE, spread

KINDS: dict[str, type[Flow]] = {"tarflow": TarFlow, "itarflow": ITarFlow, "starflow": StarFlow, "gs-jacobi": TarFlow}
JACOBI = "Apple's Jacobi"


def methods(
    flow: Any,
    folders: Mapping[str, Path | None],
    segments: Sequence[int] = (),
    caps: Sequence[int] = (),
    guesses: Sequence[int] = (0,),
) -> dict[str, Method]:
    """The samplers of the checkouts that were given.

    Args:
        flow: whose weights they are to have.
        folders: the checkouts, by names of `KINDS`; None for those that are not there.
        segments, caps, guesses: see `gs_jacobi`; the last of each serves all blocks that remain.

    Raises:
        ValueError: a folder is not such a checkout, or does not take this flow.
    """
    named: dict[str, Method] = {}
    for name, folder in folders.items():
        if folder is None:
            continue
        given, wanted = type(flow), KINDS[name]
        if not issubclass(given, wanted):
            raise ValueError(  # noqa: TRY004 - what the file holds is no error of type
                f"--peer-{name} draws from a {wanted.__name__}, and this flow is a {given.__name__}: leave it out"
            )
        if name == "gs-jacobi":
            lists = spread(segments, caps, guesses, depth=len(flow.blocks))
            named["GS-Jacobi's own code"] = gs_jacobi(folder, flow, *lists)
        elif name == "starflow":
            named |= starflow(folder, flow)
        else:
            named[APPLE] = (tarflow if name == "tarflow" else itarflow)(folder, flow)
    return named


def tarflow(folder: Path, flow: TarFlow) -> Method:
    """Apple's sampler, position by position over a growing key-value cache (github.com/apple/ml-tarflow).

    Raises:
        ValueError: `folder` holds no `transformer_flow.py`, or one whose `Model` does not take this flow's weights.
    """
    model = _model(folder, "transformer_flow.py", "Apple's ml-tarflow", flow)

    @torch.no_grad()
    def reverse(z: Tensor, y: Tensor | None) -> Outcome:
        return Outcome(model.reverse(z.clone(), y))  # type: ignore[operator]

    return reverse


def itarflow(folder: Path, flow: ITarFlow) -> Method:
    """The same of Apple's ml-itarflow (github.com/apple/ml-itarflow), at the flow's `noise_std`.

    Raises:
        ValueError: see `tarflow`; or the flow has no `noise_std`.
    """
    level, model = flow.noise_std, itarflow_model(folder, flow)
    if level is None:
        raise ValueError("the flow does not know the noise level to draw at: pass --noise-std")

    @torch.no_grad()
    def reverse(z: Tensor, y: Tensor | None) -> Outcome:
        return Outcome(model.reverse(z.clone(), y, t=torch.full_like(z[:, :1, 0], level)))  # type: ignore[operator]

    return reverse


def itarflow_model(folder: Path, flow: ITarFlow) -> nn.Module:
    """The `Model` of a checkout of ml-itarflow, with the flow's sizes and weights."""
    return _model(folder, "transformer_flow.py", "Apple's ml-itarflow", flow)


def starflow(folder: Path, flow: StarFlow) -> dict[str, Method]:
    """Apple's ml-starflow (github.com/apple/ml-starflow), which needs einops and tqdm: its sampler and, where it takes the flow, its block Jacobi.

    The latter has the threshold and the block of its script for images.

    Raises:
        ValueError: see `tarflow`.
    """
    model = starflow_model(folder, flow)

    @torch.no_grad()
    def reverse(z: Tensor, text: Tensor | None, **options: Any) -> Outcome:
        return Outcome(model(z.clone(), text, reverse=True, **options))

    named: dict[str, Method] = {APPLE: reverse}
    if flow.config.sos and flow.config.rope:
        as_one_process()
        named[JACOBI] = partial(reverse, jacobi=True, jacobi_th=0.001, jacobi_block_size=16)
    return named


def starflow_model(folder: Path, flow: StarFlow) -> nn.Module:
    """The `Model` of a checkout of ml-starflow, with the flow's arguments and weights."""
    return _model(folder, "transformer_flow.py", "Apple's ml-starflow", flow)


def as_one_process() -> None:
    """Let Apple's Jacobi ask all processes whether they are done, where there is one."""
    if not torch.distributed.is_initialized():
        store = torch.distributed.HashStore()  # type: ignore[attr-defined]
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)


def gs_jacobi(
    folder: Path, flow: TarFlow, segments: Sequence[int], caps: Sequence[int], guesses: Sequence[int]
) -> Method:
    """GS-Jacobi by its authors' code (github.com/encoreus/GS-Jacobi_for_TarFlow).

    Args:
        folder: the checkout.
        flow: whose weights are used; one that scales (nvp).
        segments, caps, guesses: their `num_GS_list`, `max_jacobi_list` and `guess_list` (0 is z, 1 zeros), one for
            each block in the order of generation.

    Raises:
        ValueError: `folder` holds no `GS_Jacobi_sampling.py`, or one that does not take this flow's weights.
    """
    if not flow.nvp:
        raise ValueError("GS-Jacobi's code knows only flows that scale, and this one only shifts (nvp=False)")
    model = _model(folder, "GS_Jacobi_sampling.py", "GS-Jacobi_for_TarFlow", flow, without=("nvp",))
    lists = {"num_GS_list": list(segments), "max_jacobi_list": list(caps), "guess_list": list(guesses)}

    @torch.no_grad()
    def reverse(z: Tensor, y: Tensor | None) -> Outcome:
        return Outcome(model.reverse(z.clone(), y, **lists))  # type: ignore[operator]

    return reverse


def _model(folder: Path, name: str, what: str, flow: Flow, without: Sequence[str] = ()) -> nn.Module:
    """The `Model` of a checkout, with the flow's sizes and weights."""
    module = _module(folder / name, what)
    if not hasattr(module, "Model"):
        raise ValueError(f"{folder / name} has no class Model: expected the file of {what}")
    state = flow.state_dict()
    arguments = {n: v for n, v in asdict(flow.config).items() if n not in ("noise_std", *without)}
    lists = {n: list(v) for n, v in arguments.items() if isinstance(v, tuple)}
    try:
        model = module.Model(**(arguments | lists))
        own = model.state_dict()
        model.load_state_dict(state, strict=False)  # which may not say what it left out
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"the Model of {folder / name} does not take this flow: {error}") from error
    missing, unexpected = [key for key in own if key not in state], [key for key in state if key not in own]
    foreign = [key for key in missing if not key.endswith(flow.constants)] + unexpected
    if foreign:
        raise ValueError(f"the Model of {folder / name} has other parameters than this flow: {', '.join(foreign[:4])}")
    return model.to(flow.noise_like.device, flow.noise_like.dtype).eval()  # type: ignore[no-any-return]


def _module(path: Path, what: str) -> ModuleType:
    if not path.is_file():
        raise ValueError(f"{path.parent} has no {path.name}, expected a checkout of {what}")
    spec = importlib.util.spec_from_file_location(f"_parallel_decode_peer_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    kept = list(sys.path)
    sys.path.insert(0, str(path.parent))  # for what it imports from beside itself
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"{path} cannot be imported: {type(error).__name__}: {error}") from error
    finally:
        sys.path[:] = kept
    return module
