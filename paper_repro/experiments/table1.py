"""The paper's Table 1: time, speed-up and quality of each method."""

import statistics
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

import parallel_decode as pd
from paper_repro.experiments import methods
from paper_repro.experiments.layers import LEARNS
from paper_repro.experiments.table import table
from paper_repro.paper import TABLE_1
from paper_repro.quality import (
    Classifier,
    Features,
    Inception,
    bootstrap,
    brisque,
    clip_iqa,
    difference,
    frechet,
    kid,
    reference_statistics,
)
from paper_repro.setup import Setup
from parallel_decode.adapters.tarflow.bench.measure import deviations

TITLE = "Table 1: time and quality"


def run(setup: Setup) -> dict[str, Any]:
    schedules = {**methods.paper(), **methods.ours()}
    features = _features(setup)
    reference = torch.cat([features(images) for images in setup.needed_images().reference(64)])
    fixed: Any = reference if setup.fid_stats is None else reference_statistics(setup.fid_stats)
    times = _times(setup, schedules)
    images, passes, failed = _images(setup, schedules)
    found = {name: features(drawn.nan_to_num(0)) for name, drawn in images.items()}
    draws, generator = setup.pick(200, 200, 10), torch.Generator().manual_seed(setup.seed)
    rows = {}
    for name, own in found.items():
        mmd, spread = kid(own, reference, setup.pick(100, 50, 2), min(len(own), len(reference), 1000) // 2, generator)
        rows[name] = {
            **times[name],
            "passes": passes[name],
            "not_finite": failed[name],
            "distance": asdict(bootstrap(own, fixed, frechet, draws, generator)),
            "over_sequential": asdict(difference(own, found["sequential"], fixed, frechet, draws, generator)),
            "kid": [mmd, spread],
            **deviations(images[name], images["sequential"]),
        }
    scores: dict[str, Any] = {}
    for label, score in (("BRISQUE", brisque), ("CLIP-IQA", clip_iqa)):
        try:
            scores[label] = {name: float(score(drawn.nan_to_num(0)).mean()) for name, drawn in images.items()}
        except (ValueError, ImportError) as error:
            scores[label] = str(error)
    return {
        "batch": setup.batch,
        "samples": len(images["sequential"]),
        "measure": features.label,
        "is_fid": features.is_inception,
        "accuracy": features.accuracy(setup.needed_images()) if isinstance(features, Classifier) else None,
        "reference": len(reference),
        "methods": rows,
        "scores": scores,
    }


def _features(setup: Setup) -> Features:
    """Those of FID, if their weights were given; else of a classifier that is trained now, and kept."""
    if setup.inception is not None:
        return Inception(setup.inception, str(setup.flow.var.device))
    path = setup.out / "classifier.safetensors"
    if not path.exists():
        setup.out.mkdir(parents=True, exist_ok=True)
        name = f"a classifier of {setup.data}"
        Classifier.train(name, setup.needed_images(), steps=setup.pick(2000, 500, 5), seed=setup.seed).save(path)
    return Classifier.load(path)


def _times(setup: Setup, schedules: dict[str, pd.Schedule | pd.Selective]) -> dict[str, dict[str, float]]:
    """Seconds of a batch, medians of interleaved rounds; with denoising by the same gradient step for all."""
    z, y = setup.noise()
    system = setup.flow.system(z, y=y)
    seconds: dict[str, list[float]] = {name: [] for name in schedules}
    clean: list[float] = []
    for name, schedule in schedules.items():
        for _ in range(setup.pick(LEARNS, LEARNS, 1) if name.startswith("auto") else 1):
            value = pd.solve(system, schedule).value
    for _ in range(setup.runs):
        for name, schedule in schedules.items():
            began = time.perf_counter()
            value = pd.solve(system, schedule).value
            seconds[name].append(time.perf_counter() - began)
        began = time.perf_counter()
        if setup.flow.noise_std is not None:
            setup.flow.denoised(value, y)[0, 0, 0, 0].item()  # waits for it
        clean.append(time.perf_counter() - began)
    denoising = statistics.median(clean)
    return {
        name: {
            "seconds": statistics.median(taken),
            "with_denoising": statistics.median(taken) + denoising,
            "speed_up": statistics.median(s / t for s, t in zip(seconds["sequential"], taken, strict=True)),
        }
        for name, taken in seconds.items()
    }


def _images(
    setup: Setup, schedules: dict[str, pd.Schedule | pd.Selective]
) -> tuple[dict[str, Tensor], dict[str, list[float]], dict[str, int]]:
    """Images of every method from the same noise, its mean passes of each block, and how many images were not finite."""
    drawn: dict[str, list[Tensor]] = {name: [] for name in schedules}
    passes: dict[str, list[tuple[int, ...]]] = {name: [] for name in schedules}
    for turn in range(-(-setup.pick(50_000, 512, 8) // setup.batch)):
        z, y = setup.setting(seed=setup.seed + 1 + turn).noise(setup.flow)
        for name, schedule in schedules.items():
            solution = pd.solve(setup.flow.system(z, y=y), schedule)
            value = solution.value if setup.flow.noise_std is None else setup.flow.denoised(solution.value, y)
            drawn[name].append(value.cpu())
            passes[name].append(tuple(layer.passes for layer in solution.layers))
    images = {name: torch.cat(parts) for name, parts in drawn.items()}
    means = {name: [statistics.mean(block) for block in zip(*each, strict=True)] for name, each in passes.items()}
    return images, means, {name: int((~x.flatten(1).isfinite().all(1)).sum()) for name, x in images.items()}


def tell(figures: dict[str, Any], data: str) -> str:
    rows, scores = [], figures["scores"]
    measured = {label: of for label, of in scores.items() if isinstance(of, dict)}
    for name, one in figures["methods"].items():
        rows.append(
            [
                name,
                one["seconds"],
                f"{one['speed_up']:.2f}x",
                one["with_denoising"],
                float(sum(one["passes"])),
                _interval(one["distance"]),
                "-" if name == "sequential" else _interval(one["over_sequential"], "+.3g"),
                "{:.2g} ({:.1g})".format(*one["kid"]),
                *(of[name] for of in measured.values()),
                one["largest_deviation"],
            ]
        )
    header = [
        "method",
        "seconds",
        "speed-up",
        "with denoising",
        "passes",
        "distance",
        "over sequential",
        "KID",
        *measured,
        "largest deviation",
    ]
    paper = [
        [of, name, row.seconds, f"{row.speed_up}x", row.fid, row.clip_iqa, row.brisque]
        for of, table_ in TABLE_1.items()
        if of == data or data not in TABLE_1
        for name, row in table_.items()
    ]
    degraded = [n for n, one in figures["methods"].items() if n != "sequential" and one["over_sequential"]["low"] > 0]
    verdict = (
        f"The distance is larger than that of sequential decoding, beyond its interval, for {', '.join(degraded)}."
        if degraded
        else "For no method is the distance larger than that of sequential decoding beyond its interval: no degradation is seen."
    )
    missing = [f"{label} could not be had: {why}" for label, why in scores.items() if not isinstance(why, dict)]
    what = "FID" if figures["is_fid"] else f"{figures['measure']} (not an FID)"
    said = (
        f"Distance: {what}, of {figures['samples']} images against {figures['reference']}, with 95% intervals by bootstrap; the difference to sequential decoding is paired, from the "
        f"same noise. Seconds of a batch of {figures['batch']}, medians of interleaved runs. {verdict}"
    )
    if figures["accuracy"] is not None:
        said += f" The classifier finds {figures['accuracy']:.0%} of the held-out labels (rotations, where the data have none): the less, the less its distances say."
    return "\n\n".join(
        [
            table(header, rows),
            said,
            *missing,
            "The paper:",
            table(["data", "method", "seconds", "speed-up", "FID", "CLIP-IQA", "BRISQUE"], paper),
        ]
    )


def _interval(of: dict[str, float], form: str = ".3g") -> str:
    return f"{of['value']:{form}} [{of['low']:{form}}, {of['high']:{form}}]"


def draw(figures: dict[str, Any], path: Path) -> None:
    figure = Figure(figsize=(10, 4), layout="constrained")
    what = "FID" if figures["is_fid"] else "Frechet distance (not an FID)"
    panels = {"distance": what, "over_sequential": "difference to sequential decoding"}
    for axes, (key, label) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        for name, one in figures["methods"].items():
            of = one[key]
            below, above = max(of["value"] - of["low"], 0), max(of["high"] - of["value"], 0)
            axes.errorbar(one["speed_up"], of["value"], yerr=[[below], [above]], marker="o", capsize=3, label=name)
        axes.set(title="same noise, paired" if key == "over_sequential" else "speed and quality", ylabel=label)
        axes.set(xlabel="speed-up over sequential decoding")
    figure.axes[1].axhline(0, color="gray", linewidth=0.8)
    figure.axes[1].legend(fontsize=8)
    figure.savefig(path, dpi=110)
