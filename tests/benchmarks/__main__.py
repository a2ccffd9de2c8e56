"""`python -m tests.benchmarks [NAME …] [--quick]`: measure, and print tables for LOG.md."""

from __future__ import annotations

import argparse
import os
import platform

import torch

from tests.benchmarks import breakdown, cuda, end_to_end, inner_step, learners, read_path, swap, write_path
from tests.benchmarks.scene import Options, deployment

BENCHMARKS = {
    "inner-step": inner_step.main,
    "cuda": cuda.main,
    "write-path": write_path.main,
    "read-path": read_path.main,
    "breakdown": breakdown.main,
    "end-to-end": end_to_end.main,
    "learners": learners.main,
    "swap": swap.main,
}


def main() -> None:
    """Run the benchmarks named, or all of them."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes; the figures mean nothing")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each consumer that are compared end to end")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(BENCHMARKS)
    if unknown:
        parser.error(f"no such benchmark: {', '.join(sorted(unknown))}")
    options = Options(arguments.quick, arguments.repeats, deployment)
    load = os.getloadavg()[0]
    print(
        f"{os.cpu_count()} cores, load {load:.1f} before, {platform.machine()}, torch {torch.__version__}", flush=True
    )
    for name in arguments.names or BENCHMARKS:
        BENCHMARKS[name](options)


if __name__ == "__main__":
    main()
