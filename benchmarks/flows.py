"""`parallel-decode bench`, and other people's samplers beside it: schedules, approximate rules and peers on a trained flow.

    python benchmarks/flows.py [--peer-tarflow DIR | --peer-itarflow DIR | --peer-starflow DIR] [--peer-gs-jacobi DIR] [--gs-guesses 0] [options of parallel-decode bench]

DIR is a checkout of Apple's ml-tarflow, ml-itarflow or ml-starflow (which needs einops and tqdm), or of GS-Jacobi_for_TarFlow; this runs its
Python code. Everything else is as `parallel-decode bench --help` has it: the digits that come with the package, on the CPU, by default.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import peers
import typer

from parallel_decode.adapters.tarflow.base import Flow
from parallel_decode.adapters.tarflow.bench.command import command, numbers
from parallel_decode.adapters.tarflow.bench.measure import Method


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    for name in peers.KINDS:
        parser.add_argument(f"--peer-{name}", type=Path)
    parser.add_argument(
        "--gs-guesses", default="0", help="for GS-Jacobi's code, of each block: start from 0 = z, 1 = zeros"
    )
    options, rest = parser.parse_known_args()

    def others(flow: Flow, segments: Sequence[int], caps: Sequence[int]) -> Mapping[str, Method]:
        guesses = numbers("--gs-guesses", options.gs_guesses, 0)
        folders = {name: getattr(options, f"peer_{name.replace('-', '_')}") for name in peers.KINDS}
        return peers.methods(flow, folders, segments, caps, guesses)

    sys.argv[1:] = rest
    typer.run(command(others))


if __name__ == "__main__":
    main()
