"""Do selective ideas carry over to image tokens? Which tokens, rows and layers a token depends on, and what a width for each row of the picture would gain.

    python benchmarks/image_token_redundancy.py [--model FOLDER] [--out benchmarks/results/image_token_redundancy_cpu.json] [--figure docs/image_tokens.png]

- *Neighbours*: the total variation between a token's distribution and what it is if one token before it is replaced by a random one.
- *Layers*: the same, if a layer is left out.
- *Rows*: forwards spent in each row of the picture by the width of the window; a selective rule has the best width for each row (in hindsight, by the measured time
  of a pass), and what it gains over the best width for all is an upper bound for rules that go by rows.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import parallel_decode as pd
from parallel_decode.adapters.image_tokens import Images, generate_images
from parallel_decode.adapters.image_tokens.class_conditional import ClassConditional, photographs
from parallel_decode.adapters.tarflow.bench.record import write

WIDTHS = (1, 4, 8, 16, 32)
SHARED: dict[str, Any] = {"top_k": 0, "temperature": 1.0, "top_p": 1.0, "do_sample": True}


def draw(model: ClassConditional, labels: Tensor, seed: int, width: int, sampling: str = "gumbel") -> Images:
    torch.manual_seed(seed)
    schedule = "sequential" if width == 1 else pd.Sliding(width)
    return generate_images(model, {"labels": labels}, schedule=schedule, sampling=sampling, **SHARED)


@torch.no_grad()
def distributions(model: ClassConditional, labels: Tensor, tokens: Tensor) -> Tensor:
    """Of every token given those before it, shape (N, L, V)."""
    ids = torch.cat([labels[:, None] + model.tokens, tokens[:, :-1]], 1)
    places = torch.arange(ids.shape[1]).expand_as(ids)
    return torch.cat(
        [
            model(part, position_ids=at).logits.softmax(-1)  # logits_to_keep = 0 keeps all
            for part, at in zip(ids.split(32), places.split(32), strict=True)  # type: ignore[no-untyped-call]
        ]
    )


def variation(p: Tensor, q: Tensor) -> Tensor:
    return (p - q).abs().sum(-1) / 2


def neighbours(model: ClassConditional, labels: Tensor, tokens: Tensor, draws: int) -> dict[str, list[float]]:
    """By the neighbour that is replaced: the total variation at the token, means over the quarters of the picture from above."""
    generator, width = torch.Generator().manual_seed(0), model.columns
    base, at = distributions(model, labels, tokens), torch.arange(len(tokens))
    found: dict[str, list[list[float]]] = {}
    offsets = {"left": 1, "left of that": 2, "above": width, "above, right": width - 1, "two above": 2 * width}
    for name, offset in offsets.items():
        found[name] = [[] for _ in range(4)]
        for _ in range(draws):
            place = torch.randint(2 * width, model.length, (len(tokens),), generator=generator)
            other = tokens.clone()
            other[at, place - offset] = torch.randint(model.tokens, (len(tokens),), generator=generator)
            moved = variation(distributions(model, labels, other)[at, place], base[at, place])
            for quarter, value in zip((4 * place // model.length).tolist(), moved.tolist(), strict=True):
                found[name][quarter].append(value)
    return {name: [sum(part) / len(part) for part in quarters] for name, quarters in found.items()}


class Passing(nn.Module):
    """A layer that is left out."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states


def layers(model: ClassConditional, labels: Tensor, tokens: Tensor) -> list[float]:
    """The mean total variation without each layer."""
    base, stack, found = distributions(model, labels, tokens), model.model.model.layers, []
    for index, layer in enumerate(stack):
        stack[index] = Passing()
        found.append(float(variation(distributions(model, labels, tokens), base).mean()))
        stack[index] = layer
    return found


def rows(model: ClassConditional, labels: Tensor, sampling: str) -> dict[str, Any]:
    """Forwards in each row of the picture by width, seconds of a pass by width, and what a rule by rows would gain."""
    spent, seconds = {}, {}
    for width in WIDTHS:
        counts, taken, passes = torch.zeros(model.rows), 0.0, 0
        for seed, label in enumerate(labels.split(1)):  # type: ignore[no-untyped-call]
            stats = draw(model, label, seed, width, sampling).solution.layers[0]
            began = torch.cat([torch.zeros(1, dtype=torch.long), stats.fronts[:-1, 0]])
            counts += torch.bincount(began // model.columns, minlength=model.rows)[: model.rows]
            taken, passes = taken + stats.seconds, passes + stats.passes
        spent[width], seconds[width] = (counts / len(labels)).tolist(), taken / passes
    times = torch.tensor([[count * seconds[width] for count in spent[width]] for width in WIDTHS])
    whole = times.sum(1)
    return {
        "forwards": spent,
        "seconds_of_a_pass": seconds,
        "best_width": WIDTHS[int(whole.argmin())],
        "gain_of_a_rule_by_rows": float(whole.min() / times.min(0).values.sum()),
        "forwards_saved_by_a_rule_by_rows": float(
            1 - torch.tensor(list(spent.values())).min(0).values.sum() / min(map(sum, spent.values()))
        ),
    }


def figure(model: ClassConditional, figures: dict[str, Any], seed: int, path: Path) -> None:
    """Above: pictures by three samplings with the pass in which each token became final; below: neighbours, layers and rows."""
    picture = Figure(figsize=(15, 7), layout="constrained")
    axes = picture.subplots(2, 6)
    label = torch.tensor([3])
    for index, (name, sampling) in enumerate(
        (("the sequential sample", "gumbel"), ("maximal coupling", "maximal"), ("speculative", "speculative"))
    ):
        found = draw(model, label, seed, 16, sampling)
        assert found.pixels is not None
        fronts = found.solution.layers[0].fronts[:, 0]
        final = torch.searchsorted(fronts, torch.arange(model.length), right=True) + 1
        axes[0, 2 * index].imshow(found.pixels[0].permute(1, 2, 0))
        axes[0, 2 * index].set_title(name, fontsize=9)
        shown = axes[0, 2 * index + 1].imshow(final.view(model.rows, model.columns), cmap="viridis")
        axes[0, 2 * index + 1].set_title(f"final after pass (of {len(fronts)})", fontsize=9)
        picture.colorbar(shown, ax=axes[0, 2 * index + 1], shrink=0.6)
    for axis in axes[0]:
        axis.set_axis_off()
    grid = axes[1, 0].get_gridspec()
    for axis in axes[1]:
        axis.remove()
    near, left_out, spent = (picture.add_subplot(grid[1, at : at + 2]) for at in (0, 2, 4))
    for name, values in figures["neighbours"].items():
        near.plot(range(1, 5), values, marker="o", label=name)
    near.set(
        title="a neighbour is replaced",
        xlabel="quarter of the picture, from above",
        ylabel="total variation",
        ylim=(0, None),
    )
    near.set_xticks(range(1, 5))
    near.legend(fontsize=7)
    left_out.bar(range(1, len(figures["layers"]) + 1), figures["layers"])
    left_out.set(title="a layer is left out", xlabel="layer", ylabel="total variation")
    for width, counts in figures["rows"]["maximal"]["forwards"].items():
        spent.plot(range(1, model.rows + 1), counts, label=f"window of {width}")
    spent.set(title="forwards in each row (maximal)", xlabel="row of the picture", ylabel="forwards", ylim=(0, None))
    spent.legend(fontsize=7)
    picture.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=Path, help="a folder of ClassConditional.save_pretrained; the photographs that ship by default"
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--pictures", type=int, default=64)
    parser.add_argument("--draws", type=int, default=4)
    options = parser.parse_args()
    model = photographs() if options.model is None else ClassConditional.from_pretrained(options.model)
    labels = torch.arange(options.pictures) % model.num_classes
    tokens = torch.cat([draw(model, part, i, 1).tokens for i, part in enumerate(labels.split(16))])  # type: ignore[no-untyped-call]
    figures: dict[str, Any] = {
        "neighbours": neighbours(model, labels, tokens, options.draws),
        "layers": layers(model, labels, tokens),
        "rows": {
            sampling: rows(model, labels[: options.pictures // 4], sampling) for sampling in ("gumbel", "maximal")
        },
    }
    for name, values in figures["neighbours"].items():
        print(f"{name:14} replaced: total variation by quarter " + " ".join(f"{value:.3f}" for value in values))
    print("layers left out: " + " ".join(f"{value:.3f}" for value in figures["layers"]))
    for sampling, row in figures["rows"].items():
        print(
            f"{sampling}: best width {row['best_width']}, a width for each row gains {row['gain_of_a_rule_by_rows']:.3f}x in time, and saves {row['forwards_saved_by_a_rule_by_rows']:.1%} of the forwards"
        )
    if options.out:
        write(options.out, figures)
    if options.figure:
        figure(model, figures, 0, options.figure)


if __name__ == "__main__":
    main()
