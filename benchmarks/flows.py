"""`parallel-decode bench` from a checkout: schedules, approximate rules and other samplers on a trained TarFlow.

    python benchmarks/flows.py [--checkpoint FOLDER_OR_FILE] [--batches 1,4,16] [--out benchmarks/results/flows_cpu]

The defaults are those of the command, `parallel-decode bench --help`: the digits that come with the package, on the CPU.
"""

import typer

from parallel_decode.bench.command import bench

if __name__ == "__main__":
    typer.run(bench)
