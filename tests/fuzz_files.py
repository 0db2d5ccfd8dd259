"""Feed damaged files to the loaders, each in a process of its own with a bound on memory: `python -m tests.fuzz_files --count 2000 --plans 500`.

A loader may load a file, or raise one ValueError or FileNotFoundError that names it. What else it does is a fault.
"""

import argparse
import ctypes
import gc
import json
import os
import random
import resource
import select
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"

import torch

import parallel_decode as pd
from parallel_decode.adapters.image_tokens.class_conditional import ClassConditional
from parallel_decode.adapters.tarflow import TarFlow
from tests import fuzz_damage

SECONDS = 5.0
TIMES, ALLOWANCE = 4, 32 * 2**20  # of the file, and bytes for what any loading takes
LOADERS: dict[str, Callable[[Any], Any]] = {
    "checkpoint": TarFlow.from_checkpoint,
    "pretrained": TarFlow.from_pretrained,
    "images": ClassConditional.from_pretrained,
    "llamagen": lambda given: ClassConditional.from_llamagen(given[0], **given[1]),
    "plan": pd.Plan.load,
}


class Result(NamedTuple):
    """What came of one file; `fault` is empty if that was right."""

    label: str
    outcome: str
    text: str
    seconds: float
    grown: int
    fault: str


def judged(folder: Path, kind: str, given: Any, outcome: str, text: str, seconds: float, over: bool) -> str:
    """The fault, or nothing."""
    if (folder / fuzz_damage.MARKER).exists():
        return "executed code"
    if over or outcome == "MemoryError" or "MemoryError" in text or "allocate memory" in text:
        return "over-allocation"
    if seconds > SECONDS:
        return "hang"
    name = "" if kind == "llamagen" else Path(given).name
    right = (
        "loaded",
        "ValueError",
        "TypeError" if kind == "llamagen" else "FileNotFoundError",
    )  # TypeError: of head_dim
    if outcome not in right:
        return "raw traceback"
    return "file not named" if outcome != "loaded" and name not in text else ""


def feed(folder: Path, damage: Callable[..., fuzz_damage.Damaged], number: int, seed: int) -> Result:
    """Damage a file and load it, in this process."""
    kind, label, given = damage(folder, number, random.Random(f"{damage.__name__} {number} {seed}"))
    size = sum(path.lstat().st_size for path in folder.rglob("*"))
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, most = _memory("VmHWM"), TIMES * size + ALLOWANCE
    resource.setrlimit(resource.RLIMIT_AS, (_memory("VmSize") + most, resource.RLIM_INFINITY))
    start = time.perf_counter()
    try:
        LOADERS[kind](given)
        outcome, text = "loaded", ""
    except BaseException as error:  # noqa: BLE001 - that is the answer
        outcome, text = type(error).__name__, str(error)
        if isinstance(error, (ValueError, FileNotFoundError)):
            outcome = "ValueError" if isinstance(error, ValueError) else "FileNotFoundError"
    seconds = time.perf_counter() - start
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    grown = _memory("VmHWM") - before
    fault = judged(folder, kind, given, outcome, text, seconds, grown > most)
    return Result(f"{kind}: {label}", outcome, text[:600], seconds, grown, fault)


def run(damage: Callable[..., fuzz_damage.Damaged], number: int, seed: int) -> Result:
    """The same in a child, which is ended if it hangs."""
    with tempfile.TemporaryDirectory() as folder:
        reads, writes = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
                result = feed(Path(folder), damage, number, seed)
                os.write(writes, json.dumps(result).encode())
            except BaseException as error:  # noqa: BLE001
                os.write(
                    writes, json.dumps(Result("", type(error).__name__, str(error)[:600], 0, 0, "fuzzer")).encode()
                )
            finally:
                os._exit(0)
        os.close(writes)
        ready, _, _ = select.select([reads], [], [], 4 * SECONDS)
        content = os.read(reads, 2**16) if ready else b""
        os.close(reads)
        if not ready:
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
    name = f"{damage.__name__} {number}"
    if not content:
        return Result(name, "ended", f"status {status}", 4 * SECONDS, 0, "crash" if ready else "hang")
    result = Result(*json.loads(content))
    return result._replace(label=f"{name}: {result.label}")


def _memory(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def _warm_up() -> None:
    """Import all that loading imports."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for suffix in (".pth", ".safetensors"):
            TarFlow.from_checkpoint(fuzz_damage.put(Path(folder) / f"x{suffix}", fuzz_damage.written(suffix)))
        fuzz_damage.image_model().save_pretrained(folder)
        ClassConditional.from_pretrained(folder)
        ClassConditional.from_llamagen(fuzz_damage.llamagen(), head_dim=8)


def main(count: int, plans: int, stride: int, seed: int) -> Iterator[Result]:
    """What came of that many files of each, every `stride`-th of their sequence."""
    torch.set_num_threads(1)
    _warm_up()
    gc.collect()
    gc.freeze()  # a child's collector leaves alone, and does not copy, what is here
    families = fuzz_damage.CHECKPOINTS
    for n in range(count):
        yield run(families[n % len(families)], n // len(families) * stride, seed)
    for n in range(plans):
        yield run(fuzz_damage.damaged_plans, n * stride, seed)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("count", 2000), ("plans", 500), ("stride", 1), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--all", action="store_true", help="show every file")
    options = parser.parse_args()
    results = []
    for result in main(options.count, options.plans, options.stride, options.seed):
        results.append(result)
        if result.fault or options.all:
            print(
                f"{result.fault or 'ok'} | {result.label} | {result.outcome} | {result.text} | {result.seconds:.2f} s, {result.grown:,} bytes"
            )
    faults = Counter(result.fault for result in results if result.fault)
    outcomes = Counter(result.outcome for result in results)
    print(f"{len(results)} files; outcomes {dict(outcomes)}; faults {dict(faults)}")
    print(f"slowest {max(r.seconds for r in results):.2f} s; largest growth {max(r.grown for r in results):,} bytes")
    sys.exit(bool(faults))
