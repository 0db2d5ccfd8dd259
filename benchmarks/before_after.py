"""Two commits of this library against each other: the loop's own time, flows, masked flows and language models, interleaved.

    git worktree add /tmp/before COMMIT
    python benchmarks/before_after.py --before /tmp/before [--checkpoint FLOW] [--model LM] [--runs 9] [--out results.json]

Each commit runs in a process of its own, and the two take turns (A B A B), case after case. Ratios are after / before of the medians;
`bits` says whether both gave the same bits at tolerance 0.
"""

import argparse
import hashlib
import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
Case = Callable[[], tuple[float, str]]


def overhead(batch: int, schedule: Any) -> Case:
    """Microseconds per pass on a system whose evaluation costs next to nothing."""
    import torch
    from torch import Tensor

    import parallel_decode as pd

    class Free(pd.TriangularSystem):
        length = 256

        def __init__(self) -> None:
            self.guess, self.values, self.calls = torch.zeros(batch, 256, 1), torch.ones(batch, 256, 1), 0

        def initial(self) -> Tensor:
            return self.guess

        def evaluate(self, x: Tensor, window: pd.Window) -> Tensor:
            self.calls += 1
            p = window.positions
            return self.values[:, p.start : p.stop : p.step] * self.calls

    def case() -> tuple[float, str]:
        system, began = Free(), time.perf_counter()
        solution = pd.solve(system, schedule, tol=1e-6)
        return (time.perf_counter() - began) / solution.passes * 1e6, ""

    return case


def flow(checkpoint: str, batch: int, schedule: Any, tol: float | None) -> Case:
    """Seconds of drawing from a trained TarFlow."""
    import torch

    import parallel_decode as pd
    from parallel_decode.adapters.tarflow import TarFlow, digits

    made = digits() if checkpoint == "digits" else TarFlow.from_checkpoint(checkpoint)
    z = torch.randn(batch, *made.var.shape, generator=torch.Generator().manual_seed(0))
    y = torch.arange(batch) % made.num_classes if made.num_classes else None

    def case() -> tuple[float, str]:
        began = time.perf_counter()
        value = pd.solve(made.system(z, y=y), schedule, tol=tol).value
        return time.perf_counter() - began, _digest(value)

    return case


def masked(library: str, features: int, batch: int, tol: float) -> Case:
    """Seconds of drawing from a masked flow that was trained for a while on scikit-learn's digits (8 x 8, or their first 8 pixels of a row)."""
    import torch
    import zuko
    from nflows.distributions import StandardNormal
    from nflows.flows import Flow
    from nflows.transforms import CompositeTransform, MaskedAffineAutoregressiveTransform, ReversePermutation
    from sklearn.datasets import load_digits

    from parallel_decode.adapters.maf import parallel

    torch.manual_seed(0)
    data = torch.tensor(load_digits().data, dtype=torch.float32)[:, 24 : 24 + features if features < 64 else None]
    data = data if features < 64 else torch.tensor(load_digits().data, dtype=torch.float32)
    data = (data - data.mean()) / data.std()
    made: Any
    loss: Any
    if library == "zuko":
        made = zuko.flows.MAF(features, hidden_features=(128, 128), transforms=3)

        def density(x: Any) -> Any:
            return made().log_prob(x)

    else:
        layers = [[MaskedAffineAutoregressiveTransform(features, 128), ReversePermutation(features)] for _ in range(3)]
        made = Flow(CompositeTransform([part for layer in layers for part in layer]), StandardNormal([features]))

        def density(x: Any) -> Any:
            return made.log_prob(x)

    optimizer = torch.optim.Adam(made.parameters(), 1e-3)
    for _ in range(300):
        x = data[torch.randint(len(data), (128,))]
        loss = -density(x + 0.2 * torch.randn_like(x)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    fast = parallel(made.eval(), tol=tol)
    z = torch.randn(batch, features, generator=torch.Generator().manual_seed(0))

    def case() -> tuple[float, str]:
        with torch.no_grad():
            began = time.perf_counter()
            value = fast().transform.inv(z) if library == "zuko" else fast._transform.inverse(z)[0]
            return time.perf_counter() - began, _digest(value)

    return case


def language(checkpoint: str, batch: int, how: str, tokens: int) -> Case:
    """Seconds of generating `tokens` from 8 held-out prompts of code by `auto`."""
    import torch
    from language import HOW, prompts
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from parallel_decode.adapters.causal_lm import parallel_generate

    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint)
    model.eval()
    words = AutoTokenizer.from_pretrained(checkpoint)
    words.model_max_length = 10**9
    batches = prompts(words, "code", 8).split(batch)  # type: ignore[no-untyped-call]
    end = model.generation_config.eos_token_id
    settings = HOW[how] | {"max_new_tokens": tokens, "pad_token_id": end, "eos_token_id": None}

    def case() -> tuple[float, str]:
        torch.manual_seed(0)
        began = time.perf_counter()
        texts = [
            model.generate(ids, attention_mask=torch.ones_like(ids), custom_generate=parallel_generate, **settings)
            for ids in batches
        ]
        return time.perf_counter() - began, _digest(torch.cat(texts))

    return case


def _digest(value: Any) -> str:
    return hashlib.sha256(value.detach().contiguous().numpy().tobytes()).hexdigest()[:16]


def cases(checkpoint: str | None, model: str | None) -> dict[str, Callable[[], Case]]:
    """What is measured, by name; each is made once in each process."""
    import parallel_decode as pd

    schedules = {"sequential": pd.Sequential(), "jacobi": pd.Jacobi(), "jacobi-gs 8": pd.JacobiGaussSeidel(8), "sliding 64": pd.Sliding(64)}  # fmt: skip
    made: dict[str, Callable[[], Case]] = {}
    for batch in (1, 16, 256):
        for name, schedule in schedules.items():
            made[f"overhead, {name}, batch {batch}"] = lambda b=batch, s=schedule: overhead(b, s)  # type: ignore[misc]
    for path in ["digits", *([checkpoint] if checkpoint else [])]:
        for batch in (1, 4, 16):
            for name in ("sequential", "jacobi", "sliding 64"):
                title = f"{Path(path).name}, {name}, batch {batch}"
                made[title] = lambda p=path, b=batch, s=schedules[name]: flow(p, b, s, None)  # type: ignore[misc]
        made[f"{Path(path).name}, sliding 64 at tol 0, batch 1"] = lambda p=path: flow(p, 1, pd.Sliding(64), 0.0)  # type: ignore[misc]
    for library in ("zuko", "nflows"):
        for features, batch in ((8, 1), (64, 64), (64, 1024)):
            title = f"{library} MAF, D = {features}, batch {batch}, exact"
            made[title] = lambda k=library, f=features, b=batch: masked(k, f, b, 0.0)  # type: ignore[misc]
        made[f"{library} MAF, D = 64, batch 64, 1e-5"] = lambda k=library: masked(k, 64, 64, 1e-5)  # type: ignore[misc]
    for batch, how, tokens in product((1, 4, 8), ("greedy", "T = 0.7", "T = 1.0"), (48, 128)) if model else ():
        made[f"language, {how}, batch {batch}, {tokens} tokens"] = lambda a=(model, batch, how, tokens): language(*a)  # type: ignore[misc]
    return made


def serve(checkpoint: str | None, model: str | None) -> None:
    """A worker: names on the standard input, seconds and digests on the standard output."""
    known, ready = cases(checkpoint, model), dict[str, Case]()
    for line in sys.stdin:
        name = line.rstrip("\n")
        if name not in ready:
            ready[name] = known[name]()
            ready[name]()
        turns, end = [ready[name]()], time.perf_counter() + 0.2
        while time.perf_counter() < end:  # short cases are repeated within a turn
            turns.append(ready[name]())
        print(json.dumps([statistics.median(took for took, _ in turns), turns[0][1]]), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="a checkout of the other commit")
    parser.add_argument("--checkpoint", help="of a trained TarFlow, besides the digits")
    parser.add_argument("--model", help="of `benchmarks/language_model.py`, to time language models")
    parser.add_argument("--only", default="", help="a part of the names")
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.checkpoint, options.model)
        return
    if options.before is None:
        parser.error("--before is missing: a checkout of the other commit")
    names = [name for name in cases(options.checkpoint, options.model) if options.only in name]
    command = [
        sys.executable,
        __file__,
        "--serve",
        *(["--checkpoint", options.checkpoint] if options.checkpoint else []),
        *(["--model", options.model] if options.model else []),
    ]
    workers = [
        subprocess.Popen(
            command,
            env=os.environ | {"PYTHONPATH": str(place)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for place in (options.before.resolve(), ROOT)
    ]
    rows = {}
    print(f"{'case':50}{'before':>12}{'after':>12}{'ratio':>8}  bits")
    for name in names:
        times: list[list[float]] = [[], []]
        digests: list[set[str]] = [set(), set()]
        for _ in range(options.runs):
            for worker, seconds, digest in zip(workers, times, digests, strict=True):
                assert worker.stdin and worker.stdout
                worker.stdin.write(name + "\n")
                worker.stdin.flush()
                took, bits = json.loads(worker.stdout.readline())
                seconds.append(took)
                digest.add(bits)
        before, after = map(statistics.median, times)
        ratio = statistics.median(a / b for b, a in zip(*times, strict=True))
        same = digests[0] == digests[1] and len(digests[0]) == 1
        rows[name] = {"before": before, "after": after, "ratio": round(ratio, 3), "same_bits": same}
        print(f"{name:50}{before:12.4g}{after:12.4g}{ratio:8.3f}  {'same' if same else 'other'}", flush=True)
    for worker in workers:
        worker.terminate()
    if options.out:
        importlib.import_module("parallel_decode.adapters.tarflow.bench.record").write(
            options.out, {"runs": options.runs, "before": str(options.before), "cases": rows}
        )


if __name__ == "__main__":
    main()
