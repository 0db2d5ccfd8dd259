"""The report: every experiment's figures as tables, plots and sentences, in Markdown and as one HTML file."""

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt

from paper_repro.catalogue import EXPERIMENTS

STYLE = "body{font:15px/1.5 sans-serif;max-width:70em;margin:2em auto;padding:0 1em}img{max-width:100%}table{border-collapse:collapse;margin:1em 0}td,th{border:1px solid #ccc;padding:.2em .6em;text-align:right}td:first-child,th:first-child{text-align:left}"
INTRODUCTION = """# Selective Jacobi Decoding, reproduced

The experiments of *Selective Jacobi Decoding* (arXiv 2505.24791) on flows that were trained here, by `python -m paper_repro all`. The paper's figures stand beside ours where it has any: they are
of other flows, on other data and on GPUs, so ratios and shapes compare, and seconds do not."""
NOT_HERE = """Cells of the paper's tables that need what cannot be had here: its CIFAR and AFHQ rows need those images, and Apple's weights for AFHQ (`--data cifar10 --root FOLDER`, `--data afhq --checkpoint
afhq_model_8_768_8_8_0.07.pth`); FID needs the published Inception weights, CLIP-IQA and BRISQUE those of `piq`. Where they are missing, the distance is in the features of a classifier that was trained here, and is called so."""


def write(folder: Path, sets: Sequence[str]) -> Path:
    """Write report.md and report.html from the figures of each data set, `folder/<data>/<experiment>.json`, and draw their plots.

    Raises:
        FileNotFoundError: there are no figures.
    """
    parts = [part for data in sets if (part := _part(folder, data))]
    if not parts:
        raise FileNotFoundError(f"{folder} holds no figures of {', '.join(sets)}: run the experiments first")
    text = "\n\n".join([INTRODUCTION, NOT_HERE, *parts]) + "\n"
    (folder / "report.md").write_text(text)
    html = MarkdownIt("commonmark").enable("table").render(text)
    for picture in sorted(folder.rglob("*.png")):
        name = picture.relative_to(folder).as_posix()
        html = html.replace(
            f'src="{name}"', f'src="data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"'
        )
    page = folder / "report.html"
    page.write_text(f"<!doctype html><meta charset=utf-8><title>SeJD, reproduced</title><style>{STYLE}</style>{html}")
    return page


def _part(folder: Path, data: str) -> str:
    """The sections of a data set, or nothing."""
    sections = []
    for name, experiment in EXPERIMENTS.items():
        file = folder / data / f"{name}.json"
        if not file.is_file():
            continue
        figures: dict[str, Any] = json.loads(file.read_text())
        experiment.draw(figures, file.with_suffix(".png"))
        pictures = sorted(picture.relative_to(folder).as_posix() for picture in file.parent.glob(f"{name}*.png"))
        sections += [
            f"### {experiment.TITLE}",
            experiment.tell(figures, data),
            *(f"![{name}]({picture})" for picture in pictures),
        ]
        machine, versions = figures["machine"], figures["versions"]
        sections.append(
            f"*{machine['gpu'] or machine['processor']}, {machine['threads']} threads, torch {versions['torch']}, commit {versions['commit']}, {figures['seconds']:.0f} s.*"
        )
    return "\n\n".join([f"## {data}", *sections]) if sections else ""
