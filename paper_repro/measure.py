"""Experiments that are run and kept: one, or many side by side."""

import json
import os
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import typer

from paper_repro.catalogue import EXPERIMENTS
from paper_repro.setup import Setup, obtain
from parallel_decode.adapters.tarflow.bench.record import write

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def measure(setup: Setup, name: str, again: bool = False) -> Path:
    """Run an experiment and write its figures; nothing is done where they are there already.

    Raises:
        ValueError: what is there is of another flow, scale or seed.
    """
    path = setup.out / f"{name}.json"
    about = {"data": setup.data, "scale": setup.scale, "seed": setup.seed, "model": setup.flow.fingerprint()}
    if path.exists() and not again:
        try:
            there = json.loads(path.read_bytes())
            there["machine"], there["versions"], there["seconds"]
        except (ValueError, TypeError, KeyError):
            raise ValueError(f"{path} is damaged, or holds no figures: pass --again to replace it") from None
        if other := [
            f"{key} {there.get(key)} in place of {value}" for key, value in about.items() if there.get(key) != value
        ]:
            raise ValueError(f"{path} is of {', '.join(other)}: pass --again to replace it, or another --out")
        typer.echo(f"{setup.data}, {name}: there already")
        return path
    typer.echo(f"{setup.data}, {name} ...")
    began = time.perf_counter()
    setup.out.mkdir(parents=True, exist_ok=True)
    found = EXPERIMENTS[name].run(setup)
    seconds = time.perf_counter() - began
    write(path, {**about, "seconds": round(seconds, 1), **found})
    typer.echo(f"{setup.data}, {name}: {seconds:.1f} s")
    return path


def measure_on(flow: tuple[Any, ...], inception: Path | None, name: str, again: bool) -> None:
    """An experiment; `flow` is what `obtain` is given."""
    measure(replace(obtain(*flow), inception=inception), name, again)


def _train(flow: tuple[Any, ...]) -> None:
    obtain(*flow)


def side_by_side(wanted: dict[tuple[Any, ...], list[tuple[Any, ...]]]) -> None:
    """The jobs of each flow, as soon as it is there, in as many processes as there are flows, which share out the cores.

    Raises:
        ValueError: one of the processes was killed.
    """
    workers = len(wanted)
    with ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (CORES // workers,)) as pool:
        trained = {pool.submit(_train, flow): jobs for flow, jobs in wanted.items()}
        try:
            started = []
            for flow in as_completed(trained):
                flow.result()
                started += [pool.submit(measure_on, *job) for job in trained[flow]]
            for job in started:
                job.result()
        except BrokenProcessPool:
            raise ValueError(
                "a process was killed, perhaps for want of memory: what is done is kept, run it again"
            ) from None
