"""Image tokens by windows, on the class-conditional system that is trained here.

    python benchmarks/image_tokens.py [--model FOLDER] [--out benchmarks/results/image_tokens_cpu.json] [--batches 1,4] [--images 64]

Three tables: time and forwards of every method in turn (medians of interleaved rounds; pictures are not decoded); forwards by guess, coupling and width; and
whether the tokens of couplings are distributed as those of sequential decoding. `sequential` is our own decoder, one position a pass over a cache of fixed storage.
"SJD" and "SCD" are the methods of arXiv 2410.01699 and 2510.24211 as their papers have them (drafts of fresh positions at random; one window for all rows), by our own code.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import parallel_decode as pd
from paper_repro.quality import bootstrap, frechet
from parallel_decode.adapters.image_tokens import Images, generate_images
from parallel_decode.adapters.image_tokens.class_conditional import ClassConditional, photographs
from parallel_decode.adapters.tarflow.bench.record import write
from parallel_decode.tokens import Draft, Gumbel, Maximal

WIDTH = 16
SETTINGS = {"all": 0, "half": -1, "50": 50}  # top-k; -1 is half the codebook
Method = dict[str, Any]


def methods(model: ClassConditional) -> dict[str, Method]:
    """What is timed."""
    window = pd.Sliding(WIDTH, per_row=True)
    peer = {"schedule": pd.Sliding(WIDTH), "guess": at_random(model.tokens)}
    return {
        "sequential": {"schedule": "sequential"},
        "SJD (2410.01699)": {**peer, "sampling": "speculative"},
        "SCD (2510.24211)": {**peer, "sampling": "maximal"},
        f"gumbel, window {WIDTH}": {"schedule": window},
        f"speculative, window {WIDTH}": {"schedule": window, "sampling": "speculative"},
        f"maximal, window {WIDTH}": {"schedule": window, "sampling": "maximal"},
        f"maximal, window {2 * WIDTH}": {"schedule": pd.Sliding(2 * WIDTH, per_row=True), "sampling": "maximal"},
        "gumbel, auto": {},
        "maximal, auto": {"sampling": "maximal"},
    }


def at_random(tokens: int) -> Any:
    """Drafts of fresh positions are drawn at random, as in the papers."""
    generator = torch.Generator().manual_seed(0)

    class Random(Draft):
        fresh = True

        def __init__(self) -> None:
            super().__init__(lambda text, most: torch.randint(tokens, (most,), generator=generator).tolist())

    return Random()


class Oracle(Draft):
    """Of the tokens to the left and above the right one, if either is: no rule that chooses between them, and no tree of both, needs fewer forwards.

    Args:
        truth: the tokens of the picture, row by row.
        columns: in a row.
    """

    fresh = True

    def __init__(self, truth: list[int], columns: int) -> None:
        super().__init__(self.best)
        self.truth, self.columns = truth, columns

    def begin(self, prompts: Sequence[list[int]]) -> None:
        self.prompt = len(prompts[0])

    def best(self, text: list[int], most: int) -> list[int]:
        first = len(text) - self.prompt
        either = [
            {self.truth[max(i - 1, 0)], self.truth[max(i - self.columns, 0)]} for i in range(first, len(self.truth))
        ]
        return [token if token in two else min(two) for token, two in zip(self.truth[first:], either, strict=True)]


def draw(model: ClassConditional, labels: Tensor, seed: int, options: Method) -> Images:
    torch.manual_seed(seed)
    return generate_images(model, {"labels": labels}, do_sample=True, **options)


def timed(model: ClassConditional, batch: int, shared: Method, rounds: int) -> dict[str, Any]:
    """Every method in turn, round after round; the first round is not timed."""
    labels = torch.arange(batch) % model.num_classes
    ways = methods(model)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    passes: dict[str, list[int]] = {name: [] for name in ways}
    same: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, own in ways.items():
            began = time.perf_counter()
            found = draw(model, labels, number, shared | own)
            taken = time.perf_counter() - began
            if name == "sequential":
                truth = found.tokens
            if number:
                seconds[name].append(taken)
                passes[name].append(found.solution.passes)
                same[name].append(float((found.tokens == truth).all(1).double().mean()))
    base = seconds["sequential"]
    return {
        name: {
            "ratio": statistics.median(a / b for a, b in zip(base, taken, strict=True)),
            "seconds": statistics.median(taken),
            "forwards": statistics.mean(passes[name]),
            "same": statistics.mean(same[name]),
        }
        for name, taken in seconds.items()
    }


def forwards(model: ClassConditional, labels: Tensor, shared: Method) -> list[dict[str, Any]]:
    """Forwards by guess, coupling and width, each picture on its own."""
    pictures: list[tuple[int, Tensor]] = list(enumerate(labels.split(1)))  # type: ignore[no-untyped-call]
    truth = {
        seed: draw(model, label, seed, shared | {"schedule": "sequential"}).tokens[0].tolist()
        for seed, label in pictures
    }
    guesses: dict[str, Callable[[int], Any]] = {
        "last": lambda seed: "last",
        "left": lambda seed: "left",
        "above": lambda seed: "above",
        "random": lambda seed: at_random(model.tokens),
        "oracle": lambda seed: Oracle(truth[seed], model.columns),
    }
    rows = []
    for sampling in ("gumbel", "speculative", "maximal"):
        for guess, make in guesses.items():
            if guess == "oracle" and sampling != "gumbel":  # others draw other pictures
                continue
            for width in (4, 8, 16, 32, 64):
                own = {"sampling": sampling, "schedule": pd.Sliding(width)}
                counts = [
                    draw(model, label, seed, shared | own | {"guess": make(seed)}).solution.passes
                    for seed, label in pictures
                ]
                rows.append({"sampling": sampling, "guess": guess, "width": width, "forwards": statistics.mean(counts)})
    return rows


def distances_between_passes(model: ClassConditional, labels: Tensor, shared: Method) -> dict[str, float]:
    """The mean total variation between the distributions of a position in successive passes, by coupling: what couplings can gain."""
    found = {}
    for name, kind in (("gumbel", Gumbel), ("maximal", Maximal)):
        seen: list[Tensor] = []
        last: dict[int, Tensor] = {}
        original = kind.__call__

        def watch(self: Any, scores: Tensor, drafts: Tensor, guessed: Any, positions: Tensor, rows: Tensor) -> Tensor:
            now = dict(zip(positions[0].tolist(), scores.softmax(-1)[0], strict=True))
            seen.extend((p - last[at]).abs().sum() / 2 for at, p in now.items() if at in last)  # noqa: B023
            last.clear()  # noqa: B023
            last.update(now)  # noqa: B023
            return original(self, scores, drafts, guessed, positions, rows)  # noqa: B023

        kind.__call__ = watch  # type: ignore[method-assign]
        try:
            for seed, label in enumerate(labels.split(1)):  # type: ignore[no-untyped-call]
                last.clear()
                draw(model, label, seed, shared | {"sampling": name, "schedule": pd.Sliding(WIDTH)})
        finally:
            kind.__call__ = original  # type: ignore[method-assign]
        found[name] = float(torch.stack(seen).mean())
    return found


def distribution(model: ClassConditional, count: int, shared: Method) -> dict[str, Any]:
    """Are the tokens distributed as those of sequential decoding? A permutation test of the histograms of tokens and of horizontal pairs, and a Frechet distance in the
    tokenizer's features (its codebook's vectors, averaged over the quarters of a picture) to other sequential pictures."""
    labels = torch.arange(count) % model.num_classes

    def sample(seed: int, options: Method) -> Tensor:
        pieces = labels.split(16)  # type: ignore[no-untyped-call]
        return torch.cat([draw(model, part, 1000 * seed + i, shared | options).tokens for i, part in enumerate(pieces)])

    reference, truth = sample(1, {"schedule": "sequential"}), sample(2, {"schedule": "sequential"})
    window = pd.Sliding(WIDTH, per_row=True)
    found = {"sequential": truth}
    for sampling in ("gumbel", "speculative", "maximal"):
        found[sampling] = sample(3, {"sampling": sampling, "schedule": window})
    generator = torch.Generator().manual_seed(0)
    rows = {}
    for name, tokens in found.items():
        interval = bootstrap(features(model, tokens), features(model, reference), frechet, 200, generator)
        rows[name] = {
            "frechet": interval.value,
            "low": interval.low,
            "high": interval.high,
            "p_tokens": permuted(histograms(tokens, model.tokens), histograms(reference, model.tokens), generator),
            "p_pairs": permuted(pairs(model, tokens), pairs(model, reference), generator),
        }
    return rows


def features(model: ClassConditional, tokens: Tensor) -> Tensor:
    grid = (
        model.tokenizer.quantize.embedding.weight.detach()[tokens]
        .view(len(tokens), model.rows, model.columns, -1)
        .permute(0, 3, 1, 2)
    )
    return torch.nn.functional.adaptive_avg_pool2d(grid, 2).flatten(1).double()


def histograms(tokens: Tensor, count: int) -> Tensor:
    """Shares of tokens of each picture, (N, count)."""
    ones = torch.ones_like(tokens, dtype=torch.double)
    return torch.zeros(len(tokens), count, dtype=torch.double).scatter_add_(1, tokens, ones) / tokens.shape[1]


def pairs(model: ClassConditional, tokens: Tensor) -> Tensor:
    """Shares of horizontal neighbours, hashed to 4096."""
    grid = tokens.view(len(tokens), model.rows, model.columns)
    both = (grid[:, :, :-1] * 7919 + grid[:, :, 1:] * 104729) % 4096
    return histograms(both.flatten(1), 4096)


def permuted(a: Tensor, b: Tensor, generator: torch.Generator, draws: int = 500) -> float:
    """The p-value of |mean(a) - mean(b)| among permutations of the pictures."""
    both, count = torch.cat([a, b]), len(a)

    def distance(order: Tensor) -> float:
        return float((both[order[:count]].mean(0) - both[order[count:]].mean(0)).norm())

    own = distance(torch.arange(len(both)))
    beyond = sum(distance(torch.randperm(len(both), generator=generator)) >= own for _ in range(draws))
    return (beyond + 1) / (draws + 1)


def top_k(model: ClassConditional, name: str) -> int:
    return model.tokens // 2 if SETTINGS[name] == -1 else SETTINGS[name]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=Path, help="a folder of ClassConditional.save_pretrained; the photographs that ship by default"
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--batches", default="1,4,16")
    parser.add_argument("--top-k", default=",".join(SETTINGS))
    parser.add_argument("--guidance", default="0,3")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pictures", type=int, default=8, help="of the table of forwards")
    parser.add_argument("--images", type=int, default=256, help="of the tests of distributions; 0 leaves them out")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    model = photographs() if options.model is None else ClassConditional.from_pretrained(options.model)
    model = model.to(options.device).eval()
    model.pixels = lambda tokens: None  # type: ignore[method-assign]
    figures: dict[str, Any] = {"tokens": model.tokens, "length": model.length, "window": WIDTH, "rows": []}

    def keep() -> None:
        if options.out:
            write(options.out, figures)

    for batch in map(int, options.batches.split(",")):
        for scale in map(float, options.guidance.split(",")):
            for name in options.top_k.split(","):
                shared = {"top_k": top_k(model, name), "temperature": 1.0, "top_p": 1.0, "guidance_scale": scale}
                found = timed(model, batch, shared, options.rounds)
                print(f"\nbatch {batch}, guidance {scale:g}, top-k {name}")
                for method, row in found.items():
                    tokens = model.length / row["forwards"]
                    print(
                        f"  {method:26} time {row['ratio']:5.2f}x   forwards {row['forwards']:6.1f} ({tokens:4.2f} tokens each)   same {row['same']:4.0%}",
                        flush=True,
                    )
                figures["rows"].append({"batch": batch, "guidance": scale, "top_k": name, "methods": found})
                keep()
    labels = torch.arange(options.pictures) % model.num_classes
    shared = {"top_k": 0, "temperature": 1.0, "top_p": 1.0, "guidance_scale": 0.0}
    figures["forwards"] = forwards(model, labels, shared)
    print("\nforwards of a picture (T = 1, all tokens, no guidance), by coupling, guess and width")
    _grid(figures["forwards"])
    figures["total_variation"] = distances_between_passes(model, labels, shared)
    print(f"\nmean total variation between successive passes: {figures['total_variation']}")
    keep()
    if options.images:
        figures["distribution"] = distribution(model, options.images, shared)
        print("\nagainst other sequential pictures: Frechet distance [95%], p of token shares, p of pairs")
        for name, row in figures["distribution"].items():
            print(
                f"  {name:12} {row['frechet']:.4f} [{row['low']:.4f}, {row['high']:.4f}]   p {row['p_tokens']:.3f}   p {row['p_pairs']:.3f}"
            )
        keep()


def _grid(rows: Sequence[dict[str, Any]]) -> None:
    widths = sorted({row["width"] for row in rows})
    print(f"  {'':22}" + "".join(f"{width:>8}" for width in widths))
    key: Callable[[dict[str, Any]], tuple[str, str]] = lambda row: (row["sampling"], row["guess"])
    for name in dict.fromkeys(map(key, rows)):
        found = {row["width"]: row["forwards"] for row in rows if key(row) == name}
        print(f"  {', '.join(name):22}" + "".join(f"{found[width]:8.1f}" for width in widths))


if __name__ == "__main__":
    main()
