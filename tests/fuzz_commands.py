"""Bad and odd command lines: every option of every command, with values that it may not take. `python -m tests.fuzz_commands` tries them all.

A command line must succeed, or say in one line on stderr what is wrong and exit with code 2. Whatever fails leaves nothing behind.
"""

import argparse
import itertools
import os
import random
import signal
import tempfile
import time
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from typer.testing import CliRunner

from paper_repro.__main__ import app as paper
from parallel_decode.adapters.tarflow import TarFlow
from parallel_decode.cli import app

NUMBERS = ["x", "", "-1", "nan", "9" * 25, "0x1"]
VALUES: dict[type, list[str]] = {
    int: [*NUMBERS, "0", "1.5", "1e3", "-9223372036854775809"],
    float: [*NUMBERS, "inf", "-inf", "1e999"],
    str: ["", " ", "☃", "abacus", "-1", "1,,2", "9" * 25, "[/red]", "0"],
}
READ = ["missing", "file", "folder", "", "a.pth", "file/x", "n" * 300, "☃\udcff", "[/red].pth"]
WRITE = ["file/x", "/proc/x", "/dev/full/x", "n" * 300, "", "dangling/x", "☃\udcff", "file", "folder", "a.xyz", "\0"]
LEAST = {  # what makes the command quick where it runs, and what it needs
    "demo": "--n 1 --runs 1 --learn 0",
    "sample": "--out {out} --checkpoint a.pth --n 1 --schedule sequential",
    "bench": "--checkpoint a.pth --batches 1 --runs 1 --methods UJD",
    "probe": "--out {out} --checkpoint a.pth --n 2",
    "images": "--model model --n 1 --out {out}.png",
    "train": "--out {out} --patch-size 8 --channels 64 --blocks 1 --layers 1 --steps 1 --batch-size 2",
    "image-tokens": "--out {out} --tokenizer-steps 1 --prior-steps 1 --channels 8 --layers 1 --batch 1",
    "itarflow": "--out {out} --steps 1 --channels 64 --layers 1 --batch 1",
    "starflow": "--out {out} --autoencoder-steps 1 --steps 1 --channels 64 --layers 1 --batch 1",
    "table1": "--out {out} --smoke --steps 1 --checkpoint a.pth",
    "samples": "--out {out} --smoke --steps 1 --checkpoint a.pth",
    "all": "--out {out} --smoke --steps 1 --data nothing",
}
QUICK = ("sample", "bench", "probe", "train", "table1")  # what imports no diffusers


@dataclass(frozen=True)
class Case:
    """A command line, for one of the two programs."""

    program: str
    words: tuple[str, ...]


def cases(names: typing.Container[str] = LEAST) -> Iterator[Case]:
    """All of them, for the commands of these names."""
    for program, commands in (("parallel-decode", app), ("paper_repro", paper)):
        for words in ([], ["nothing"], ["--nothing"], [""], ["--help", "x"]):
            yield Case(program, tuple(words))
        for command in commands.registered_commands:
            assert command.callback is not None
            name = command.name or command.callback.__name__.replace("_", "-")
            if name not in names or (program == "paper_repro" and name == "sample"):
                continue
            least = LEAST[name].format(out="out").split()
            for words in (["--nothing"], ["stray"], ["--out"], ["--device"]):
                yield Case(program, (name, *least, *words))
            for option, values in options(command.callback):
                for value in values:
                    yield Case(program, (name, *least, option, value))


def options(callback: Callable[..., Any]) -> Iterator[tuple[str, list[str]]]:
    """The options of a command that take a value, and bad or odd ones."""
    for name, annotation in typing.get_type_hints(callback).items():
        kinds = {annotation, *typing.get_args(annotation)} - {type(None)}
        option = "--class" if name == "classes" and "temperature" in typing.get_type_hints(callback) else f"--{name}"
        if Path in kinds:
            yield option.replace("_", "-"), WRITE if name == "out" else READ
        for kind in (int, float, str):
            if kind in kinds:
                yield option.replace("_", "-"), VALUES[kind]


def prepare(images: bool) -> None:
    """Files in the current folder for the command lines to find; `images` needs diffusers."""
    torch.manual_seed(0)
    Path("file").write_text("something else")
    Path("folder").mkdir()
    os.symlink("nowhere", "dangling")
    torch.save(TarFlow(1, 4, 1, 64, 2, 1, num_classes=2).state_dict(), "a.pth")
    if images:
        from tests.test_class_conditional import tiny

        tiny().save_pretrained("model")


def complaint(case: Case) -> str | None:
    """What is wrong with how a command line ends; None if nothing is."""
    before = set(Path().rglob("*"))
    began = time.perf_counter()
    done = CliRunner().invoke({"parallel-decode": app, "paper_repro": paper}[case.program], list(case.words))
    seconds = time.perf_counter() - began
    left = [path for path in set(Path().rglob("*")) - before if path.is_file() or path.is_symlink()]
    new = sorted(str(path) for path in left)
    for path in left:
        path.unlink()
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        return f"raised {type(done.exception).__name__}: {done.exception}"
    if parts := [name for name in new if ".part" in name]:
        return f"left {parts}"
    if done.exit_code == 0 or not case.words:
        return None
    last = done.stderr.replace("\r", "\n").splitlines()[-1:]
    lines = [line for line in done.stderr.splitlines() if line and "%|" not in line]  # but for bars of progress
    if done.exit_code != 2 or len(lines) != 1 or not last[0].startswith("error: ") or len(last[0]) < 15:
        return f"exit code {done.exit_code} and stderr {done.stderr!r}"
    if seconds > 5:
        return f"an error after {seconds:.0f} s"
    return f"an error that left {new}" if new else None


def train(folder: str, resume: bool, replacements: int | None = None) -> None:
    """Train in a process of its own, which kills itself before so many of its files are replaced."""
    torch.set_num_threads(1)
    replace = os.replace
    count = itertools.count()

    def fatal(source: Any, target: Any) -> None:
        if next(count) == replacements:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    os.replace = fatal  # type: ignore[assignment]
    words = "--patch-size 4 --channels 64 --blocks 2 --layers 1 --steps 12 --save-every 2 --batch-size 8 --ema 0.5"
    paper(["train", "--out", folder, *words.split(), *["--resume"] * resume])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, help="how many; all if left out")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    chosen = list(cases())
    random.Random(arguments.seed).shuffle(chosen)
    chosen = chosen[: arguments.count]
    bad = 0
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        prepare(images=True)
        for case in chosen:
            if what := complaint(case):
                bad += 1
                print(f"{case.program} {case.words}: {what}", flush=True)
        os.chdir("/")
    print(f"{len(chosen)} command lines, {bad} complaints")
    raise SystemExit(bool(bad))


if __name__ == "__main__":
    main()
