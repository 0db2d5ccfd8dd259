"""What a choice of tokens takes for a window: softmax, draws, comparisons.

    python benchmarks/choices.py [--out results.json]

Every pass is a window that moved on by a few positions since the last, as in decoding; the choices take turns, one thread, medians.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch

from parallel_decode.adapters.tarflow.bench.record import write
from parallel_decode.tokens import Choice, Greedy, Gumbel, Maximal, Speculative

SIZES = [(2, 32, 16384), (1, 16, 151936), (8, 8, 32000)]  # rows, positions, tokens of the vocabulary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passes", type=int, default=40)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = {}
    print(f"{'B, W, V':20}{'greedy':>10}{'gumbel':>10}{'maximal':>10}{'speculative':>13}   milliseconds a pass")
    for batch, width, vocabulary in SIZES:
        choices: list[Choice] = [Greedy(), Gumbel(batch, torch.device("cpu")), Maximal(), Speculative()]
        times: list[list[float]] = [[] for _ in choices]
        text = torch.randint(vocabulary, (batch, width + 3 * options.passes))
        for index in range(options.passes):
            scores = 3 * torch.randn(batch, width, vocabulary)
            positions = (3 * index + torch.arange(width)).expand(batch, -1)
            drafts, guessed = text.gather(1, positions), (positions >= 3 * (index - 1) + width)
            for choice, each in zip(choices, times, strict=True):
                began = time.perf_counter()
                tokens = choice(scores, drafts, guessed, positions, torch.arange(batch))
                each.append(time.perf_counter() - began)
            text.scatter_(1, positions, tokens)
        medians = [1000 * statistics.median(each) for each in times]
        rows[f"{batch}, {width}, {vocabulary}"] = dict(
            zip(("greedy", "gumbel", "maximal", "speculative"), medians, strict=True)
        )
        print(f"{f'{batch}, {width}, {vocabulary}':20}" + "".join(f"{m:10.2f}" for m in medians), flush=True)
    if options.out:
        write(options.out, {"passes": options.passes, "threads": 1, "milliseconds": rows})


if __name__ == "__main__":
    main()
