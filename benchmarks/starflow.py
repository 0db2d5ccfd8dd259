"""A STARFlow against Apple's own code on the same random weights: names, forward, sequential reverse, and block Jacobi with its deviation.

    python benchmarks/starflow.py --peer-starflow DIR [--batch 2] [--runs 3] [--out FILE]

DIR is a checkout of Apple's ml-starflow (github.com/apple/ml-starflow); this runs its Python code, which needs einops and tqdm. The flows are small
and their weights are random: the deviations say whether the same is computed, and the times and passes are no measure of trained flows.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peers
import torch
from torch import Tensor, nn

from parallel_decode.adapters.starflow import StarFlow
from parallel_decode.adapters.tarflow.bench.measure import Outcome, interleave, row, short

IMAGE: dict[str, Any] = dict(
    in_channels=4, img_size=8, patch_size=1, channels=128, num_blocks=3, layers_per_block=[2, 2, 4], rope=True, sos=True, txt_size=8, txt_dim=32,
    cond_top_only=True, use_softplus=True, use_final_norm=True, soft_clip=4, seq_order="L2R",
)  # fmt: skip
VIDEO: dict[str, Any] = IMAGE | dict(
    img_size=4, pt_seq_len=8, top_block_channels=192, learnable_self_denoiser=True, conditional_denoiser=True, denoiser_window=2,
    temporal_causal=2, shallow_block_local=True,
)  # fmt: skip
OTHERS = dict(
    use_swiglu=True, use_qk_norm=True, use_post_norm=True, use_bias=False, norm_type="rms_norm", hf_style_rope=True
)
FLOWS: dict[str, tuple[dict[str, Any], int, float]] = {  # arguments, frames, guidance
    "image": (IMAGE, 0, 0.0),
    "image, guided": (IMAGE, 0, 2.5),
    "image, other layers": (
        IMAGE | OTHERS | dict(num_heads=4, num_kv_heads=2, head_dim=32, use_softplus=False),
        0,
        2.5,
    ),
    "image, text in all blocks, R2L": (IMAGE | dict(cond_top_only=False, seq_order="R2L", patch_size=2), 0, 2.5),
    "image, without text and start": (IMAGE | dict(cond_top_only=False, txt_size=0, txt_dim=0, sos=False), 0, 0.0),
    "video": (VIDEO, 3, 2.5),
    "video, blocks over all frames": (VIDEO | dict(shallow_block_local=False), 3, 2.5),
    "video, windows of 3 frames": (VIDEO | dict(local_attn_window=3), 6, 2.5),
}


def random_flow(config: dict[str, Any]) -> StarFlow:
    """A flow whose weights make every position depend on those before."""
    torch.manual_seed(0)
    flow = StarFlow(**config)
    for name, p in flow.named_parameters():
        nn.init.normal_(p, std=0.02 if "proj_out" in name else 0.3 if "norm" in name else p.shape[-1] ** -0.5)
    return flow.eval()


@torch.no_grad()
def compare(
    folder: Path, config: dict[str, Any], frames: int, guidance: float, batch: int, runs: int
) -> dict[str, Any]:
    """The figures of one flow: largest deviations, absolute, of ours from Apple's, and Apple's Jacobi from its sequential decoding."""
    flow = random_flow(config)
    apple = peers.starflow(folder, flow, config)
    StarFlow(**config).load_state_dict(apple.state_dict(), strict=True)
    side, window = config["img_size"], config.get("local_attn_window")
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(1))
    x, z = (draw(batch, *([frames] if frames else []), config["in_channels"], side, side) for _ in range(2))
    width = config["txt_dim"]
    texts = [draw(batch, config["txt_size"], width) for _ in range(2)] if width else [None, None]
    text = torch.cat(texts) if width and guidance else texts[0]  # type: ignore[arg-type]
    options = dict(text=texts[0], text_unconditional=texts[1], guidance=guidance, context_length=2 if window else None)
    figures: dict[str, Any] = {"tensors": len(flow.state_dict())}
    if not window:
        figures["forward"] = _far(flow(x, texts[0])[0], apple(x, texts[0])[0])
    if config.get("learnable_self_denoiser"):
        figures["denoised"] = _far(flow.denoised(x, texts[0]), x - 0.3 * apple(x, texts[0], denoiser=True))

    def theirs(**more: Any) -> Outcome:
        return Outcome(apple(z.clone(), text, reverse=True, guidance=guidance, context_length=2, **more))

    def ours(schedule: str) -> Outcome:
        value, solution = flow.sample(z=z, schedule=schedule, return_solution=True, **options)  # type: ignore[arg-type]
        return Outcome(value, tuple(layer.passes for layer in solution.layers))

    cases: dict[str, Callable[[], Outcome]] = {name: partial(ours, name) for name in ("sequential", "sliding", "auto")}
    if not window:
        cases["Apple, sequential"] = theirs
    if config["sos"]:
        for threshold in (0.001, 1e-12):
            cases[f"Apple, Jacobi {threshold}"] = partial(
                theirs, jacobi=True, jacobi_th=threshold, jacobi_block_size=16
            )
    timings = interleave(cases, baseline="sequential", runs=runs)
    truth = timings["sequential"].outcome.value
    figures["methods"] = {
        name: row(timing, {"speed_up": timings["sequential"]})
        | {"passes": timing.outcome.passes, "deviation": _far(timing.outcome.value, truth)}
        for name, timing in timings.items()
    }
    return figures


def _far(a: Tensor, b: Tensor) -> float:
    return short(float((a - b).abs().max()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-starflow", type=Path, required=True)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path, help="for the figures, as JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:  # their Jacobi asks other processes whether they are done
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        found = {}
        for name, (config, frames, guidance) in FLOWS.items():
            found[name] = compare(options.peer_starflow, config, frames, guidance, options.batch, options.runs)
            figures = {key: value for key, value in found[name].items() if key != "methods"}
            print(f"{name}: {', '.join(f'{key} {value}' for key, value in figures.items())}")
            for method, timing in found[name]["methods"].items():
                print(
                    f"    {method:24} {timing['seconds']:8.3f} s   deviation {timing['deviation']:.1e}   passes {timing['passes'] or '?'}"
                )
        torch.distributed.destroy_process_group()
    if options.out is not None:
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
