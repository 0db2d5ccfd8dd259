"""A STARFlow beside Apple's own code on the same weights: names, forward, sequential reverse, and block Jacobi with its deviation.

    python benchmarks/starflow.py --peer-starflow DIR [--checkpoint FOLDER [--texts FILE]] [--batches 1,4] [--runs 5] [--out FILE]

DIR is a checkout of Apple's ml-starflow (github.com/apple/ml-starflow); this runs its Python code, which needs einops and tqdm. Without a checkpoint
the flows are small, with random weights: their deviations say whether the same is computed, and their times and passes are no measure of trained
flows. FOLDER is what `save_pretrained` wrote, and FILE a .safetensors file of `text` (N, S, T), of all in turn, and `text_unconditional` (1, S, T).
"""

import argparse
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import peers
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from parallel_decode.adapters.starflow import StarFlow
from parallel_decode.adapters.tarflow.bench.measure import Outcome, interleave, row, short
from parallel_decode.adapters.tarflow.bench.record import write

IMAGE: dict[str, Any] = dict(
    in_channels=4, img_size=8, patch_size=1, channels=128, num_blocks=3, layers_per_block=[2, 2, 4], rope=True, sos=True, txt_size=8, txt_dim=32,
    cond_top_only=True, use_softplus=True, use_final_norm=True, soft_clip=4, seq_order="L2R",
)  # fmt: skip
VIDEO: dict[str, Any] = IMAGE | dict(
    img_size=4, pt_seq_len=8, top_block_channels=192, learnable_self_denoiser=True, conditional_denoiser=True, denoiser_window=2,
    temporal_causal=2, shallow_block_local=True,
)  # fmt: skip
OTHERS = dict(use_swiglu=True, use_qk_norm=True, use_post_norm=True, use_bias=False, norm_type="rms_norm", hf_style_rope=True)  # fmt: skip
FLOWS: dict[str, tuple[dict[str, Any], int, int, float]] = {  # arguments, frames, of them given, guidance
    "image": (IMAGE, 0, 0, 0.0),
    "image, guided": (IMAGE, 0, 0, 2.5),
    "image, other layers": (IMAGE | OTHERS | dict(num_heads=4, num_kv_heads=2, head_dim=32, use_softplus=False), 0, 0, 2.5),
    "image, text in all blocks, R2L": (IMAGE | dict(cond_top_only=False, seq_order="R2L", patch_size=2), 0, 0, 2.5),
    "image, without text and start": (IMAGE | dict(cond_top_only=False, txt_size=0, txt_dim=0, sos=False), 0, 0, 0.0),
    "video": (VIDEO, 3, 0, 2.5),
    "video, blocks over all frames": (VIDEO | dict(shallow_block_local=False), 3, 0, 2.5),
    "video from a frame": (VIDEO, 3, 1, 2.5),
    "video, windows of 3 frames": (VIDEO | dict(local_attn_window=3), 6, 0, 2.5),
}  # fmt: skip
CONTEXT = 2  # frames that windows have in common
LOOSE = 1e-3, 1e-2  # tolerances of ours, beside Apple's thresholds
ROUND = 16, 64  # positions of Apple's Jacobi: of the small flows here, and its own default


def random_flow(config: dict[str, Any]) -> StarFlow:
    """A flow whose weights make every position depend on those before."""
    torch.manual_seed(0)
    flow = StarFlow(**config)
    for name, p in flow.named_parameters():
        nn.init.normal_(p, std=0.02 if "proj_out" in name else 0.3 if "norm" in name else p.shape[-1] ** -0.5)
    return flow.eval()


@torch.no_grad()
def compare(
    folder: Path,
    flow: StarFlow,
    frames: int,
    known: int,
    guidance: float,
    texts: list[Tensor],
    batch: int,
    runs: int,
    width: int,
) -> dict[str, Any]:
    """Largest deviations, absolute: of ours from Apple's forward and denoiser, and of every sampler's latents from our sequential ones.

    Args:
        folder: Apple's code.
        flow: whose weights both have.
        frames, known: of a video, and how many of them are given; 0 for images.
        guidance: see `StarFlow.system`.
        texts: with a prompt, and without, (batch, S, T) each; none where the flow reads none.
        batch, runs: images, and rounds of each sampler.
        width: positions of Apple's Jacobi.
    """  # fmt: skip
    config, side = flow.config, flow.config.img_size
    apple = peers.starflow_model(folder, flow)
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(1))
    x, z = (draw(batch, *([frames] if frames else []), config.in_channels, side, side) for _ in range(2))
    text = texts[0] if texts else None
    both = torch.cat(texts) if guidance else text
    options: dict[str, Any] = dict(text=text, guidance=guidance)
    options |= dict(text_unconditional=texts[1]) if guidance else {}
    options |= dict(frames=x[:, :known]) if known else {}
    options |= dict(context_length=CONTEXT) if config.local_attn_window else {}
    figures: dict[str, Any] = {"tensors": len(flow.state_dict())}
    if not config.local_attn_window:
        figures["forward"] = _far(flow(x, text)[0], apple(x, text)[0])
    if config.learnable_self_denoiser:
        figures["denoiser"] = _far(flow.denoised(x, text), x - 0.3 * apple(x, text, denoiser=True))

    def theirs(**more: Any) -> Outcome:
        caches = apple(x[:, :known], both, context=True) if known else None
        given = dict(guidance=guidance, kv_caches=caches, context_length=CONTEXT)
        return Outcome(apple(z.clone(), both, reverse=True, **given, **more))

    def ours(schedule: str, tol: float | None = None) -> Outcome:
        value, solution = flow.sample(z=z, schedule=schedule, tol=tol, return_solution=True, **options)
        return Outcome(value, tuple(layer.passes for layer in solution.layers))

    cases: dict[str, Callable[[], Outcome]] = {name: partial(ours, name) for name in ("sequential", "sliding", "auto")}
    cases |= {f"auto, tol {tol:g}": partial(ours, "auto", tol) for tol in LOOSE}
    if not config.local_attn_window:  # of which Apple's sequential sampler knows nothing
        cases["Apple, sequential"] = theirs
    for threshold in (0.001, 0.005, 1e-12) if config.sos else ():
        more = dict(jacobi=True, jacobi_th=threshold, jacobi_block_size=width)
        cases[f"Apple, Jacobi {threshold}"] = partial(theirs, **more)
    timings = interleave(cases, baseline="sequential", runs=runs)
    truth = timings["sequential"].outcome.value
    against = {"speed_up": timings["sequential"]}
    against |= {"against_apple": timings["Apple, sequential"]} if "Apple, sequential" in timings else {}
    figures["methods"] = {
        name: row(timing, against) | {"passes": timing.outcome.passes, "deviation": _far(timing.outcome.value, truth)}
        for name, timing in timings.items()
    }
    return figures


def _far(a: Tensor, b: Tensor) -> float:
    return short(float((a - b).abs().max()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-starflow", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, help="a trained flow of images in place of the random ones")
    parser.add_argument("--texts", type=Path, help="what its text encoder made of prompts, and of none")
    parser.add_argument("--guidance", type=float, default=0.0, help="of the checkpoint's images")
    parser.add_argument("--batches", default="2", help="batch sizes, as 1,4,16")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path, help="for the figures, as JSON")
    options = parser.parse_args()
    trained = options.checkpoint is not None
    flows = {"checkpoint": ({}, 0, 0, options.guidance)} if trained else FLOWS
    found = {}
    peers.as_one_process()
    for name, (arguments, frames, known, guidance) in flows.items():
        flow = StarFlow.from_pretrained(options.checkpoint) if trained else random_flow(arguments)
        for batch in map(int, options.batches.split(",")):
            texts = _texts(flow, batch, options.texts)
            figures = compare(options.peer_starflow, flow, frames, known, guidance, texts, batch, options.runs, ROUND[trained])  # fmt: skip
            found[f"{name}, batch {batch}"] = figures | {"config": asdict(flow.config)}
            print(f"{name}, batch {batch}: {', '.join(f'{k} {v}' for k, v in figures.items() if k != 'methods')}")
            for method, timing in figures["methods"].items():
                words = f"{timing['seconds']:8.3f} s   deviation {timing['deviation']:.1e}   passes {timing['passes'] or '?'}"
                print(f"    {method:24} {words}")
    if options.out is not None:
        write(options.out, {"flows": found})


def _texts(flow: StarFlow, batch: int, path: Path | None) -> list[Tensor]:
    size = flow.config.txt_size, flow.config.txt_dim
    if not flow.config.txt_dim:
        return []
    if path is None:
        generator = torch.Generator().manual_seed(2)
        return [torch.randn(batch, *size, generator=generator) for _ in range(2)]
    held = load_file(path)
    return [held["text"][torch.arange(batch) % len(held["text"])], held["text_unconditional"].expand(batch, -1, -1)]


if __name__ == "__main__":
    main()
