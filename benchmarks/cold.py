"""First calls: fresh processes of `auto`, of sequential decoding and of fixed windows, in turn.

    PYTHONPATH=.:benchmarks python benchmarks/cold.py flow [--checkpoint FLOW] [--batches 1,4,16] [--out benchmarks/results/cold_cpu.json]
    PYTHONPATH=.:benchmarks python benchmarks/cold.py language --model LM [--batches 1,4,8] [--tokens 48,128] [--how greedy,T=1] [--out ...]

Each process is forked from one that has imported the library and loaded the model, and has run nothing; it tells the seconds of each call. `auto` starts with an empty
folder of what other processes learnt ("empty"), and with what two processes of twenty calls left there ("filled"). Ratios are to the processes of the same round that
decode sequentially (flows: this library's sequential decoding; language models: `generate` as it is), and medians over the rounds.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

import parallel_decode as pd
from parallel_decode.adapters.tarflow import TarFlow, digits
from parallel_decode.adapters.tarflow.bench.record import write

LOOKS = ("first", "first five", "last")
WIDTHS = (16, 32, 64, 128)
OFF = "off"
Call = Callable[[int], object]  # of the number of the call


def process(call: Call, count: int, threads: int, kept: str) -> list[float]:
    """Seconds of each call, in a process of its own."""
    context = get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def run() -> None:
        os.environ["PARALLEL_DECODE_CACHE"] = kept
        torch.set_num_threads(threads)
        seconds = []
        for number in range(count):
            began = time.perf_counter()
            call(number)
            seconds.append(time.perf_counter() - began)
        sender.send(seconds)

    child = context.Process(target=run)
    child.start()
    sender.close()
    try:
        found: list[float] = receiver.recv()
    except EOFError:
        raise RuntimeError("a process failed, for the reason above") from None
    child.join()
    return found


def looks(seconds: list[float]) -> dict[str, float]:
    """Of the first call, the first five and the second half."""
    last = seconds[len(seconds) // 2 :]
    return dict(zip(LOOKS, (seconds[0], statistics.mean(seconds[:5]), statistics.median(last)), strict=True))


def measure(base: Call, auto: Call, others: dict[str, Call], options: argparse.Namespace) -> dict[str, Any]:
    """Of each way the ratio of the base's seconds to its own, in each look: median, least and most over the rounds."""
    ways: dict[str, Call] = {"base": base, "auto, empty": auto, "auto, filled": auto, **others}
    ratios: dict[str, dict[str, list[float]]] = {way: {look: [] for look in LOOKS} for way in ways}
    with tempfile.TemporaryDirectory() as filled:
        for _ in range(2):
            process(auto, 20, options.threads, filled)
        for _ in range(options.processes):
            seconds: dict[str, float] = {}
            for way, call in ways.items():
                with tempfile.TemporaryDirectory() as empty:
                    kept = {"auto, empty": empty, "auto, filled": filled}.get(way, OFF)
                    found = looks(process(call, options.calls, options.threads, kept))
                seconds = seconds or found
                for look in LOOKS:
                    ratios[way][look].append(seconds[look] / found[look])
    return {
        way: {look: {"ratio": statistics.median(r), "range": [min(r), max(r)]} for look, r in each.items()}
        for way, each in ratios.items()
        if way != "base"
    }


def flows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Batches of the digits' flow, or of a checkpoint."""
    model = digits() if options.checkpoint is None else TarFlow.from_checkpoint(options.checkpoint)

    def by(schedule: Any, batch: int) -> Call:
        y = torch.arange(batch) % model.num_classes if model.num_classes else None

        def call(number: int) -> object:
            z = torch.randn(batch, *model.var.shape, generator=torch.Generator().manual_seed(number))
            return model.sample(z=z, y=y, schedule=schedule)

        return call

    for batch in map(int, (options.batches or "1,4,16").split(",")):
        others = {f"sliding {width}": by(pd.Sliding(width), batch) for width in WIDTHS}
        name = "digits" if options.checkpoint is None else options.checkpoint.name
        ways = measure(by("sequential", batch), by("auto", batch), others, options)
        yield {"model": name, "batch": batch, "ways": ways}


def language(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Batches, ways of choosing and lengths of a language model's text; another prompt for each call."""
    from language import prompts
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from parallel_decode.adapters.causal_lm import parallel_generate

    model: Any = AutoModelForCausalLM.from_pretrained(options.model)
    model.eval()
    words = AutoTokenizer.from_pretrained(options.model)
    texts = prompts(words, options.kind, 64)

    def by(schedule: Any, batch: int, sampled: bool, tokens: int) -> Call:
        shared: dict[str, Any] = {
            "do_sample": sampled,
            "max_new_tokens": tokens,
            "eos_token_id": None,
            "pad_token_id": model.generation_config.eos_token_id,
        }
        shared |= {"temperature": 1.0, "top_k": 0} if sampled else {}
        shared |= {} if schedule is None else {"custom_generate": parallel_generate, "schedule": schedule}

        def call(number: int) -> object:
            torch.manual_seed(number)
            ids = texts[torch.arange(number * batch, (number + 1) * batch) % len(texts)]
            return model.generate(ids, attention_mask=torch.ones_like(ids), **shared)

        return call

    for batch in map(int, (options.batches or "1,4,8").split(",")):
        for how in options.how.split(","):
            for tokens in map(int, options.tokens.split(",")):
                case = batch, how != "greedy", tokens
                others = {"sequential": by("sequential", *case), "window 8": by(pd.Sliding(8, per_row=True), *case)}
                ways = measure(by(None, *case), by("auto", *case), others, options)
                yield {"model": options.kind, "batch": batch, "how": how, "tokens": tokens, "ways": ways}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=("flow", "language"))
    parser.add_argument("--checkpoint", type=Path, help="of another flow than the digits'")
    parser.add_argument("--model", default="runs/language", help="a language model, see benchmarks/language_model.py")
    parser.add_argument("--kind", default="code", help="of prompts: code or prose")
    parser.add_argument("--how", default="greedy,T=1")
    parser.add_argument("--tokens", default="48,128")
    parser.add_argument("--batches")
    parser.add_argument("--processes", type=int, default=7)
    parser.add_argument("--calls", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)  # no pool of threads before the forks
    figures: dict[str, Any] = {"processes": options.processes, "calls": options.calls, "threads": options.threads}
    figures["rows"] = []
    for row in (flows if options.family == "flow" else language)(options):
        figures["rows"].append(row)
        print("\n" + ", ".join(f"{key} {value}" for key, value in row.items() if key != "ways"), end="")
        print(": first call, first five, second half, in times of the base")
        for way, each in row["ways"].items():
            print(f"  {way:14}" + "".join(f"{each[look]['ratio']:7.2f}x" for look in LOOKS), flush=True)
        if options.out:
            write(options.out, figures)


if __name__ == "__main__":
    main()
