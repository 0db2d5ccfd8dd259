"""`generate`, prompt lookup, and `parallel_generate` on a language model, interleaved.

    python benchmarks/language.py --model runs/language [--out benchmarks/results/language_cpu.json] [--batches 1,4,8] [--threads 1,2]

The model is that of `benchmarks/language_model.py`, or any checkpoint of the Hub (`--model NAME_OR_DIR`). Prompts are held-out pieces of Python's standard
library (code) and of its language reference (prose). Each run generates for all prompts; ratios are medians over the rounds, the first 48
tokens are measured by runs of their own.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from language_model import texts
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import parallel_decode as pd
from parallel_decode.adapters.causal_lm import Adaptive, parallel_generate
from parallel_decode.adapters.tarflow.bench.record import write

PROMPT, SHORT = 128, 48  # tokens of a prompt; of a short run
OWN: dict[str, dict[str, Any]] = {
    "sequential": {"schedule": "sequential"},
    "Jacobi, window 8": {"schedule": pd.Sliding(8, per_row=True), "guess": "last"},
    "n-gram, window 8": {"schedule": pd.Sliding(8, per_row=True)},
    "auto": {"schedule": "auto"},
    "auto, lockstep": {"schedule": Adaptive(per_row=False)},
}
HOW: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "T = 0.7": {"do_sample": True, "temperature": 0.7, "top_k": 0},
    "T = 1.0": {"do_sample": True, "temperature": 1.0, "top_k": 0},
}


def prompts(words: Any, kind: str, count: int, seed: int = 0) -> Tensor:
    """Pieces of held-out texts, shape (count, PROMPT)."""
    generator = torch.Generator().manual_seed(seed)
    pieces = []
    sources = [words(text)["input_ids"] for text in texts(held_out=True)[("code", "prose").index(kind)]]
    sources = [ids for ids in sources if len(ids) > 2 * PROMPT]
    for index in torch.randperm(len(sources), generator=generator).repeat(count)[:count].tolist():
        ids = sources[index]
        at = int(torch.randint(len(ids) - PROMPT, (), generator=generator))
        pieces.append(torch.tensor(ids[at : at + PROMPT]))
    return torch.stack(pieces)


def measure(model: Any, batches: list[Tensor], how: dict[str, Any], length: int, rounds: int) -> dict[str, Any]:
    """Every method in turn, round after round."""
    shared = {
        **how,
        "max_new_tokens": length,
        "pad_token_id": model.generation_config.eos_token_id,
        "eos_token_id": None,
    }

    def run(**more: Any) -> Callable[[], tuple[list[Tensor], int]]:
        def generate() -> tuple[list[Tensor], int]:
            torch.manual_seed(0)
            texts, forwards = [], 0
            for ids in batches:
                report: dict[str, Any] = {"forwards": length}
                own = {"report": report} if "custom_generate" in more else {}
                options = {"attention_mask": torch.ones_like(ids), **shared, **more, **own}
                texts.append(model.generate(ids, **options)[:, ids.shape[1] :])
                forwards += report["forwards"]
            return texts, forwards

        return generate

    methods = {"generate": run()}
    if len(batches[0]) == 1:
        methods["prompt lookup"] = run(prompt_lookup_num_tokens=10)
    methods |= {name: run(custom_generate=parallel_generate, **own) for name, own in OWN.items()}
    if len(batches[0]) == 1:
        del methods["auto, lockstep"]
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    outputs: dict[str, list[Tensor]] = {}
    counts: dict[str, int] = {}
    for number in range(rounds + 1):
        for name, method in methods.items():
            began = time.perf_counter()
            outputs[name], counts[name] = method()
            if number:
                seconds[name].append(time.perf_counter() - began)
    if "prompt lookup" in methods:
        counts["prompt lookup"] = _forwards(model, methods["prompt lookup"])
    base, tokens = seconds["generate"], length * len(batches)
    return {
        name: {
            "ratio": statistics.median(a / b for a, b in zip(base, taken, strict=True)),
            "seconds": statistics.median(taken),
            "tokens_per_forward": tokens / counts[name],
            "same": sum(int((a == b).all(1).sum()) for a, b in zip(outputs[name], outputs["generate"], strict=True))
            / sum(map(len, batches)),
        }
        for name, taken in seconds.items()
    }


def _forwards(model: Any, method: Callable[[], Any]) -> int:
    """How many forwards a method of transformers takes. (Hooks would keep rows together in ours.)"""
    count = [0]
    hook = model.register_forward_pre_hook(lambda *args: count.__setitem__(0, count[0] + 1))
    method()
    hook.remove()
    return count[0]


def checking(model: Any, ids: Tensor, length: int) -> tuple[float, float]:
    """What checking the model costs as a share of what `generate` takes for one prompt: the first time, and in a process that recalls the answer."""
    from parallel_decode.adapters.causal_lm.model_check import _KNOWN, ModelCheck
    from parallel_decode.adapters.causal_lm.prompt import Prompt

    options = {"do_sample": False, "max_new_tokens": length, "eos_token_id": None, "pad_token_id": 0}
    shares: dict[str, list[float]] = {"off": [], "kept": []}
    with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ):
        for where in ("off", "kept") * 8:
            os.environ["PARALLEL_DECODE_CACHE"] = "off" if where == "off" else folder
            _KNOWN.clear()
            began = time.perf_counter()
            ModelCheck(model, Prompt(ids[:1], 0), {}).result()
            middle = time.perf_counter()
            model.generate(ids[:1], attention_mask=torch.ones_like(ids[:1]), **options)
            shares[where].append((middle - began) / (time.perf_counter() - middle))
    return statistics.median(shares["off"][1:]), statistics.median(
        shares["kept"][1:]
    )  # the first warms up, and is kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="runs/language")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--batches", default="1,4,8")
    parser.add_argument("--threads", default="2,1", help="batch 1 greedy alone for all but the first")
    parser.add_argument("--kinds", default="code,prose")
    parser.add_argument("--how", default=",".join(HOW))
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=192)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    model = (
        AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype))
        .to(options.device)
        .eval()
    )
    words = AutoTokenizer.from_pretrained(options.model)
    words.model_max_length = 10**9
    figures: list[dict[str, Any]] = []
    threads = list(map(int, options.threads.split(",")))
    torch.set_num_threads(threads[0])
    share, recalled = checking(model, prompts(words, "code", 1).to(options.device), options.tokens)
    print(
        f"checking the model: {share:.1%} of generate's time for {options.tokens} tokens, recalling that: {recalled:.2%}"
    )
    print(
        "time: generate's over the method's; tokens: per forward and row; same: share of rows with generate's text; first 48: time over 48 tokens"
    )
    for count in threads:
        torch.set_num_threads(count)
        for kind in options.kinds.split(","):
            ids = prompts(words, kind, options.prompts).to(options.device)
            for batch in map(int, options.batches.split(",")):
                for how, settings in HOW.items():
                    if how not in options.how.split(","):
                        continue
                    if count != threads[0] and (batch > 1 or how != "greedy"):
                        continue
                    batches = list(ids.split(batch))  # type: ignore[no-untyped-call]
                    found = measure(model, batches, settings, options.tokens, options.rounds)
                    first = measure(model, batches, settings, SHORT, options.rounds) if how == "greedy" else {}
                    print(f"\n{kind}, batch {batch}, {how}, {count} threads")
                    for name, row in found.items():
                        row["first_48"] = first.get(name)
                        text = f"  {name:20} time {row['ratio']:5.2f}x   tokens {row['tokens_per_forward']:5.2f}   same {row['same']:4.0%}"
                        print(text + (f"   first 48: {first[name]['ratio']:5.2f}x" if first else ""), flush=True)
                    figures.append({"kind": kind, "batch": batch, "how": how, "threads": count, "methods": found})
                    if options.out:
                        write(
                            options.out,
                            {
                                "model": options.model,
                                "tokens": options.tokens,
                                "trial": share,
                                "recalled": recalled,
                                "rows": figures,
                            },
                        )


if __name__ == "__main__":
    main()
