"""What all commands share: one line on stderr for an error of the user, and checks before the work.

A `ValueError` of this library says what came and what was expected, so it is shown as it is. What a bug raises keeps its traceback.
"""

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from typer.core import TyperCommand, TyperGroup

from parallel_decode._outputs import check_output
from parallel_decode.solution import SolveError

Seed = Annotated[int, typer.Option(min=0)]
UsageError: type[Any] = typer.BadParameter.__mro__[1]  # which module has it depends on typer's version
MEMORY = ("allocate memory", "not enough memory", "Storage size calculation overflowed")  # all torch says on the CPU


@contextmanager
def user_errors(words: Sequence[str] = ()) -> Iterator[None]:
    """Show an error that the user can mend as one line on stderr, and exit with code 2; with code 130 if interrupted.

    Args:
        words: what was typed, to name a value that typer does not.
    """
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("\ninterrupted: the files that were written are whole", err=True)
        raise SystemExit(130) from None
    except UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            raise
        names = getattr(getattr(error, "param", None), "opts", ())
        given = "".join(f", not {value}" for name, value in pairwise(words) if name in names)
        _exit(error.format_message() + given)
    except BrokenPipeError:
        raise
    except (ModuleNotFoundError, OSError, SolveError, ValueError) as error:
        _exit(str(error))
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and not any(m in str(error) for m in MEMORY):
            raise
        _exit("there is not enough memory: ask for less at a time")


def _exit(message: str) -> None:
    typer.echo(f"error: {' '.join(message.split())}", err=True)
    raise SystemExit(2) from None


class _Checked:
    """Both at parsing and at running; a group parses its commands' words as it runs."""

    def make_context(self, info_name: Any, args: list[str], parent: Any = None, **extra: Any) -> Any:
        with user_errors(tuple(args)):
            return super().make_context(info_name, args, parent, **extra)  # type: ignore[misc]

    def invoke(self, context: Any) -> Any:
        with user_errors():
            check(context.params)
            return super().invoke(context)  # type: ignore[misc]


class Command(_Checked, TyperCommand):
    """A command; pass it as `cls`."""

    def parse_args(self, context: Any, args: list[str]) -> list[str]:
        if any(not word or (word.startswith("--") and word.endswith("=")) for word in args):
            raise typer.BadParameter("a value is empty, expected none that is: is a variable of the shell unset?")
        return super().parse_args(context, args)


class Group(_Checked, TyperGroup):
    """A group of commands; pass it as `cls`."""


def check(params: dict[str, Any]) -> None:
    """Check the options of a command: numbers are finite and fit in 64 bits, and --out can be written.

    Raises:
        OSError, ValueError: see `check_output`.

    Example:
        >>> check({"noise_std": math.nan})
        Traceback (most recent call last):
        ValueError: --noise-std is nan, expected a finite number
    """
    for name, value in params.items():
        option = f"--{name.replace('_', '-')}"
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{option} is {value}, expected a finite number")
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ValueError(f"{option} is {value}, expected a number of at most 64 bits")
    if (out := params.get("out")) is not None:  # a Path, or a str by older versions of typer
        str(out).encode()  # it will be printed
        check_output(Path(out))


def check_picture(out: Path, *suffixes: str) -> None:
    """Check the name of a picture.

    Raises:
        ValueError: it has none of the suffixes, or its folder does not exist.
    """
    if out.suffix.lower() not in suffixes or not out.parent.is_dir():
        raise ValueError(f"--out is {out}, expected a {' or '.join(suffixes)} file in a folder that exists")


def as_device(name: str) -> torch.device:
    """The device of this name; of several processes each has the GPU of its number.

    Raises:
        ValueError: there is none that can compute.
    """
    try:
        device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if name == "cuda" else name)
        torch.zeros(1, device=device).item()
        return device
    except (AssertionError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device is {name!r}, expected cpu, or cuda or mps where there is one: {reason}") from None
