"""Does the redundancy hold in a flow that is not yet trained? (A question that the paper leaves open.)"""

from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

import parallel_decode as pd
from paper_repro.experiments import methods
from paper_repro.experiments.table import table
from paper_repro.setup import Setup, small
from paper_repro.train import train
from parallel_decode.adapters.tarflow import TarFlow
from parallel_decode.adapters.tarflow.probe import probe

TITLE = "Redundancy through training"
LOOKS = 6


def run(setup: Setup) -> dict[str, Any]:
    """Trains a flow of its own, and looks at it on the way."""
    images = setup.needed_images()
    folder = setup.out / "training"
    every = setup.pick(5000, 100, 2)
    device = str(setup.flow.var.device)
    looks = []
    lines = train(
        folder,
        images,
        small(images, setup.scale),
        steps=LOOKS * every,
        batch_size=setup.pick(128, 16, 2),
        lr=1e-3,
        seed=setup.seed,
        save_every=every,
        device=device,
        again=True,
    )
    for line in lines:
        flow = TarFlow.from_checkpoint(folder).to(device)
        looks.append({**line, "blocks": look(flow, setup)})
    return {"looks": looks, "images": setup.pick(64, 16, 2)}


def look(flow: TarFlow, setup: Setup) -> list[dict[str, float]]:
    """Of each block: passes of Jacobi at the default tolerance and of UJD, and the redundancy."""
    n = setup.pick(64, 16, 2)
    generator = torch.Generator(flow.var.device).manual_seed(setup.seed)
    found = probe(flow, n, generator=generator, hidden=(1,), lags=(1,), positions=setup.pick(16, 8, 2))
    z, y = setup.setting(n).noise(flow)
    ujd = pd.solve(flow.system(z, y=y), methods.paper()["UJD"]).layers
    return [
        {
            "passes": block.passes["jacobi"],
            "ujd": layer.passes,
            "cosine": block.redundancy[1][0],
            "jacobian_norm": block.jacobian[1],
        }
        for block, layer in zip(found.blocks, ujd, strict=True)
    ]


def tell(figures: dict[str, Any], data: str) -> str:
    looks = figures["looks"]
    blocks = range(1, 1 + len(looks[0]["blocks"]))
    rows = [
        [look["step"], look["held_out"], *(f"{block['passes']} ({block['cosine']:.3f})" for block in look["blocks"])]
        for look in looks
    ]
    first, last = looks[0]["blocks"], looks[-1]["blocks"]
    hardest = 1 + max(range(len(last)), key=lambda index: last[index]["passes"])
    early = 1 + max(range(len(first)), key=lambda index: first[index]["passes"])
    return table(["step", "held-out loss", *(f"block {block}" for block in blocks)], rows) + (
        f"\n\nPasses of Jacobi at the default tolerance, and in brackets the cosine similarity with the nearest predecessor hidden, means of {figures['images']} images. Block {early} is the hardest at the first look and block "
        f"{hardest} at the last; its passes go from {first[hardest - 1]['passes']} to {last[hardest - 1]['passes']}, those of all blocks from {sum(b['passes'] for b in first)} to {sum(b['passes'] for b in last)}."
    )


def draw(figures: dict[str, Any], path: Path) -> None:
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps = [look["step"] for look in figures["looks"]]
    for index in range(len(figures["looks"][0]["blocks"])):
        of = [look["blocks"][index] for look in figures["looks"]]
        left.plot(steps, [block["passes"] for block in of], marker="o", label=f"block {index + 1}")
        right.plot(steps, [block["cosine"] for block in of], marker="o", label=f"block {index + 1}")
    left.set(title="passes of Jacobi", xlabel="steps of training", ylabel="passes")
    right.set(title="redundancy of the nearest predecessor", xlabel="steps of training", ylabel="cosine similarity")
    left.legend(fontsize=8)
    figure.savefig(path, dpi=110)
