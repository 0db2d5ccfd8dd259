"""`ITarFlow` against Apple's own code, on random weights: names and shapes, forward, and the sequential sampler.

    python benchmarks/itarflow_peer.py --peer-itarflow DIR

DIR is a checkout of Apple's ml-itarflow; this runs its Python code. It computes norms and exponentials in float32 by `Tensor.float`; for
the columns of float64 that method leaves tensors as they are. Deviations are the largest absolute ones.
"""

import argparse
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import peers
import torch
from torch import Tensor, nn

from parallel_decode.adapters.itarflow import ITarFlow

CONFIGS: dict[str, dict[str, Any]] = {
    "deep-shallow": dict(in_channels=3, img_size=8, patch_sizes=[2], channels=[64], num_blocks=4, layers_per_block=[1, 1, 1, 3], num_classes=3),
    "patch sizes, widths": dict(in_channels=1, img_size=8, patch_sizes=[2, 4, 2], channels=[64, 128, 64], num_blocks=3, layers_per_block=[1, 1, 2], num_classes=3, input_scale=1.5),
    "shared, only shifts": dict(in_channels=1, img_size=8, patch_sizes=[2], channels=[64], num_blocks=3, layers_per_block=[1, 2, 3], nvp=False, shared_backbone_layers=1),
}  # fmt: skip
GUIDANCE: list[dict[str, Any]] = [
    {},
    {"guidance": 1.3},
    {"guidance": 0.7, "annealed_guidance": True, "attn_temp": 1.5, "guide_flows": 1},
    {"guidance": 0.7, "guide_rule": "starflow"},
]


def random_flow(config: dict[str, Any], dtype: torch.dtype) -> ITarFlow:
    """Weights that make every position depend on those before."""
    torch.manual_seed(0)
    flow = ITarFlow(**config)
    for name, p in flow.named_parameters():
        nn.init.normal_(p, std=0.03 if "proj_out" in name else 0.15)
    flow.var.uniform_(0.5, 2)
    return flow.to(dtype).eval()


def no_float(dtype: torch.dtype) -> AbstractContextManager[Any]:
    """In float64, `Tensor.float` that does nothing."""
    return mock.patch.object(Tensor, "float", lambda x: x) if dtype == torch.float64 else nullcontext()


def rows(folder: Path, config: dict[str, Any], dtype: torch.dtype) -> dict[str, float]:
    """Deviations, by what was compared."""
    flow = random_flow(config, dtype)
    model: Any = peers.itarflow_model(folder, flow)
    theirs = {n: v.shape for n, v in model.state_dict().items() if not n.endswith(".attn_mask")}
    if theirs != {n: v.shape for n, v in flow.state_dict().items()}:
        raise SystemExit("the state dicts have other names or shapes")
    x, z = torch.randn(3, flow.in_channels, 8, 8, dtype=dtype), torch.randn(3, *flow.var.shape, dtype=dtype)
    y = torch.tensor([0, 2, 1]) if flow.num_classes else None
    t = torch.tensor([[0.3], [0.05], [0.7]], dtype=dtype)
    found: dict[str, float] = {}
    with torch.no_grad(), no_float(dtype):
        z_theirs, _, logdet_theirs, _ = model(x, y, t)
        z_ours, logdet_ours = flow(x, y, t)
        found["forward: z"] = _largest(z_ours - z_theirs)
        found["forward: log-determinant per value"] = _largest(logdet_ours / x[0].numel() - logdet_theirs)
        for options in GUIDANCE:
            given = {"lerp_style" if name == "guide_rule" else name: value for name, value in options.items()}
            ours: Any = flow.sample(z=z, y=y, t=t, schedule="sequential", **options)
            singly = [
                model.reverse(z[i : i + 1].clone(), None if y is None else y[i : i + 1], t=t[i : i + 1], **given)
                for i in range(len(z))
            ]
            name = ", ".join(f"{name} {value}" for name, value in options.items()) or "no guidance"
            found[f"reverse: {name}, row by row"] = _largest(ours - torch.cat(singly))
            found[f"reverse: {name}, in one batch"] = _largest(ours - model.reverse(z.clone(), y, t=t, **given))

    flow.var.fill_(1)  # as for their step of denoising, which descends 0.5 mean z^2 - the log-determinant
    with no_float(dtype):
        noisy = x.clone().requires_grad_()
        z_theirs, _, logdet_theirs, _ = model(noisy, y, t[:1].expand(3, 1))
        (slope,) = torch.autograd.grad((0.5 * z_theirs.square().mean((1, 2)) - logdet_theirs).sum(), noisy)
        step = -x[0].numel() * t[0].square() * slope
        found["one step of denoising, relative"] = _largest(flow.denoised(x, y, 0.3) - x - step) / _largest(step)
    return found


def _largest(difference: Tensor) -> float:
    return float(difference.abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-itarflow", type=Path, required=True)
    folder = parser.parse_args().peer_itarflow
    print(f"{'':92} {'float64':>9} {'float32':>9}")
    for name, config in CONFIGS.items():
        print(f"{name}: names and shapes of the state dicts are equal")
        double, single = (rows(folder, config, dtype) for dtype in (torch.float64, torch.float32))
        for what, deviation in double.items():
            print(f"  {what:90} {deviation:9.1e} {single[what]:9.1e}")


if __name__ == "__main__":
    main()
