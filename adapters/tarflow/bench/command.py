"""`parallel-decode bench`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.status import Status

from parallel_decode._command_line import Seed, as_device, user_errors
from parallel_decode._outputs import check_files
from parallel_decode.adapters.tarflow import digits
from parallel_decode.adapters.tarflow.base import Flow
from parallel_decode.adapters.tarflow.bench import report, suite
from parallel_decode.adapters.tarflow.bench.measure import Method, precision
from parallel_decode.adapters.tarflow.bench.record import write
from parallel_decode.adapters.tarflow.load import load

MOST = 65_536  # images of a batch, and segments or sweeps of a block
Others = Callable[[Flow, Sequence[int], Sequence[int]], Mapping[str, Method]]


def command(others: Others = lambda flow, segments, caps: {}) -> Callable[..., None]:
    """The command, for typer.

    Args:
        others: makes further methods to time, by name, from the flow and the lists of GS-Jacobi's segments and caps; a ValueError of its
            is shown as an error of the command.
    """

    @user_errors()  # here too, as a script may give the function to typer
    def bench(
        checkpoint: Annotated[
            Path | None,
            typer.Option(help=".pth or .safetensors file, or a folder with config.json; the digits if left out"),
        ] = None,
        batches: Annotated[str, typer.Option(help="batch sizes, as 1,4,16,64,256")] = "1,4,16",
        runs: Annotated[int, typer.Option(help="interleaved rounds; medians count", min=1)] = 7,
        budget: Annotated[
            float | None, typer.Option(help="seconds for each batch size: fewer rounds then, but five", min=0)
        ] = None,
        device: Annotated[str, typer.Option(help="cpu, cuda, mps")] = "cpu",
        dtype: Annotated[str, typer.Option(help="float32; tf32 (CUDA); bfloat16 or float16, by autocast")] = "float32",
        tol: Annotated[float | None, typer.Option(help="see pd.solve; 0 is exact")] = None,
        methods: Annotated[
            str | None, typer.Option(help="parts of names, as auto,sliding,Apple: only these, beside sequential")
        ] = None,
        noise_std: Annotated[float | None, typer.Option(help="the noise level that an iTARFlow draws at")] = None,
        out: Annotated[Path | None, typer.Option(help="folder for bench.json and bench.png", file_okay=False)] = None,
        gs_segments: Annotated[
            str, typer.Option(help="of GS-Jacobi, for each block as it is generated; the last serves all that remain")
        ] = "8,1",
        gs_caps: Annotated[str, typer.Option(help="likewise, the most sweeps of a segment")] = "32,10",
        window: Annotated[int, typer.Option(help="positions of STARFlow's windows", min=1)] = 64,
        blocks: Annotated[bool, typer.Option("--blocks", help="time each block alone, in place of the whole")] = False,
        compiled: Annotated[bool, typer.Option("--compile", help="time each schedule compiled, too")] = False,
        memory: Annotated[
            bool | None,
            typer.Option(help="peak memory: always on CUDA; on the CPU by a profiled run more of each method"),
        ] = None,
        seed: Seed = 0,
    ) -> None:
        """Time schedules, approximate rules and other samplers on one flow: speed-ups beside deviations.

        Each figure is a median over interleaved runs in one process. The baseline is this library's sequential decoding, over a
        key-value cache in fixed storage.
        """
        console = Console()
        console = console if console.width >= 140 else Console(width=140)
        place = as_device(device)
        with precision(dtype, place):
            pass
        sizes = numbers("--batches", batches, 1)
        segments, caps = numbers("--gs-segments", gs_segments, 1), numbers("--gs-caps", gs_caps, 1)
        if out is not None:
            check_files(out / "bench.json", out / "bench.png")
        flow = (digits() if checkpoint is None else load(checkpoint)).to(place)
        flow.noise_std = flow.noise_std if noise_std is None else noise_std
        setting = suite.Setting(sizes[0], dtype, seed, tol, runs, budget)
        setting = replace(setting, memory=place.type == "cuda" if memory is None else memory)
        available = suite.methods(
            flow, setting.tolerance, compiled=compiled, segments=segments, caps=caps, window=window
        ) | dict(others(flow, segments, caps))
        names = suite.block_names(flow, compiled) if blocks else list(available)
        chosen = suite.choose(names, methods)

        measured: dict[str, Any] = {}
        figures = {
            "checkpoint": str(checkpoint or "digits"),
            "noise_std": flow.noise_std,
            "device": place.type,
            "dtype": dtype,
            "tol": setting.tolerance,
            "seed": seed,
            "runs": runs,
            "blocks_alone" if blocks else "batches": measured,
        }
        for size in sizes:
            title = f"batch {size}, {dtype} on {place.type}"
            with console.status(title) as status:
                one = replace(setting, batch=size, notify=partial(_show, status, title))
                if blocks:
                    measured[str(size)] = suite.blocks(flow, chosen, one)
                else:
                    measured[str(size)] = suite.whole(flow, {name: available[name] for name in chosen}, one)
            console.print((report.block_table if blocks else report.table)(title, measured[str(size)]))
            if out is not None:  # after each batch size, so that an end in between loses nothing
                write(out / "bench.json", figures)
                if not blocks:
                    report.plot(out / "bench.png", measured, f"{figures['checkpoint']}, {dtype} on {place.type}")
        console.print(report.BLOCK_LEGEND if blocks else report.LEGEND, style="dim")
        if out is not None:
            typer.echo(f"The figures{'' if blocks else ' and the plot'}: {out}")

    return bench


def numbers(option: str, text: str, least: int) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} is {text!r}, expected whole numbers such as 4 or 1,4,16") from None
    if not least <= min(numbers) <= max(numbers) <= MOST:
        raise ValueError(f"{option} is {text!r}, expected numbers from {least} on, to {MOST} at most")
    return numbers


def _show(status: Status, title: str, text: str) -> None:
    status.update(f"{title}: {text}")
