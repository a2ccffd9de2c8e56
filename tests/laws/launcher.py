"""Starts worker processes by fork: importing torch and Faust takes seconds of a core, and lotteries start dozens.

Lines in, lines out: `start {…}` → process id; `poll ID` → exit code (negative: the signal), empty while it runs.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn


def main() -> None:
    import pipeline.cli
    import pipeline.trainer
    import pipeline.worker  # noqa: F401 - imported for the processes to come

    with short_epochs():
        for line in sys.stdin:
            command, _, argument = line.strip().partition(" ")
            print(_start(json.loads(argument)) if command == "start" else _poll(int(argument)), flush=True)


@contextmanager
def short_epochs() -> Iterator[None]:
    """Let item counts and pairs take effect many times in a short lottery: the real ones would see it once."""
    from models import pair_counts, popularity

    usual = popularity.POPULARITY_EPOCH, pair_counts.PAIR_EPOCH
    popularity.POPULARITY_EPOCH, pair_counts.PAIR_EPOCH = 32, 128
    try:
        yield
    finally:
        popularity.POPULARITY_EPOCH, pair_counts.PAIR_EPOCH = usual


def _start(request: dict[str, Any]) -> int:
    sys.stdout.flush()
    process_id = os.fork()
    if process_id == 0:
        _become_worker(request)
    return process_id


def _become_worker(request: dict[str, Any]) -> NoReturn:
    from pipeline import cli

    files = {0: os.open(os.devnull, os.O_RDONLY)}
    files |= {
        number: os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for number, name in ((1, "out"), (2, "log"))
    }
    for number, file in files.items():
        os.dup2(file, number)
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.argv = ["innerloop", *request["words"]]
    try:
        cli.main()
    except SystemExit as end:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code if isinstance(end.code, int) else 0)
    os._exit(1)


def _poll(process_id: int) -> str:
    ended, status = os.waitpid(process_id, os.WNOHANG)
    return str(os.waitstatus_to_exitcode(status)) if ended else ""


if __name__ == "__main__":
    main()
