"""Keep what the published judges say of our files, and the files, small enough for the repository.

    python -m tests.benchmarks.judged_files stream --judges FOLDER [--seeds 0,1,2] [--partitions 4]
    python -m tests.benchmarks.judged_files static --judges FOLDER [--seeds 0,1,2] [--query adjacent]

For each seed `innerloop backtest` writes the file that a judge of FOLDER reads (prequential.py, coldstart.py). Of it is
kept in results/judged what decides the figures: ranks behind the tenth count nothing, nor do scores beside their ten
best. Both files are judged and must be told the same, word for word; then the small one, the judge's words and an entry
of index.json (command, sizes, digests) are written. Choices are made elsewhere: every run of it is a look at *test*.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.backtest_data import load_log
from pipeline.backtest_static import TOP
from pipeline.interaction_log import InteractionLog
from pipeline.protocols import NUM_HEAD, SHOTS, Query, StaticCut, cut_static
from pipeline.settings import Settings

JUDGED = Path(__file__).parent / "results" / "judged"
BEYOND = TOP + 1
Columns = Mapping[str, NDArray[Any]]


def small_stream(columns: Columns) -> dict[str, NDArray[Any]]:
    """Set every rank behind the tenth to one number, except the next item's own, which its reciprocal needs."""
    kept = {name: columns[name] for name in ("user", "K", "rank", "unseen")}
    for name in ("ranks10", "ranks10_start"):
        kept[name] = np.minimum(columns[name], BEYOND).astype(np.float16)
    kept["ranks10_start"] = np.concatenate([columns["ranks10_start"][:, :1], kept["ranks10_start"][:, 1:]], 1)
    return kept


def small_static(columns: Columns, masks: Mapping[int, Iterable[NDArray[np.int64]]]) -> dict[str, NDArray[Any]]:
    """Give the ten best of what is ranked 10 … 1, everything else 0; masks: rows not to be ranked, by K and case."""
    kept = {}
    for shots, masked in masks.items():
        drawn = columns[f"k{shots}"].astype(np.float64)
        drawn += 1e-9 * np.random.default_rng(0).random(drawn.shape)  # the judge's own draw for ties
        for scores, rows in zip(drawn, masked, strict=True):
            scores[rows] = -np.inf
        best = np.argsort(-drawn, axis=1, kind="stable")[:, :TOP]
        places = np.zeros(drawn.shape, np.int8)
        np.put_along_axis(places, best, np.arange(TOP, 0, -1, dtype=np.int8)[None].repeat(len(best), 0), 1)
        kept[f"k{shots}"] = places
    return kept


def masks_of(log: InteractionLog, cut: StaticCut, query: Query) -> dict[int, list[NDArray[np.int64]]]:
    """Columns of the judged file that are not ranked, by K and case; the file numbers items ascending by id."""
    place = np.argsort(np.argsort([int(item_id) for item_id in log.item_ids]))
    known = {shots: shots if query == "adjacent" else NUM_HEAD for shots in SHOTS}
    return {shots: [place[log.items[history[:num]]] for history in cut.histories] for shots, num in known.items()}


def movielens(home: Path) -> InteractionLog:
    """Read the log that both protocols are cut from."""
    from pipeline.adaptation import Types

    found = Types.of(Settings.load().event_types)
    return load_log(
        "ml-100k", items=None, mapping=None, most_users=10_000, types=found, home=home, progress=lambda *_: None
    )[0]


def main() -> None:
    """Write, judge, compare and keep, seed by seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("protocol", choices=["stream", "static"])
    parser.add_argument("--judges", type=Path, required=True)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--partitions", type=int, default=1)
    parser.add_argument("--query", choices=["gap", "adjacent"], default="gap")
    arguments = parser.parse_args()
    JUDGED.mkdir(parents=True, exist_ok=True)
    for seed in map(int, arguments.seeds.split(",")):
        if arguments.protocol == "stream":
            _keep_stream(seed, arguments.partitions, arguments.judges)
        else:
            _keep_static(seed, arguments.query, arguments.judges)


def _keep_stream(seed: int, partitions: int, judges: Path) -> None:
    several = f" --partitions {partitions}" if partitions > 1 else ""
    name = f"stream_test_seed{seed}" + (f"_partitions{partitions}" if partitions > 1 else "")
    with tempfile.TemporaryDirectory() as folder:
        whole = _backtest(f"--phase test --seed {seed}{several}", name, Path(folder))
        small = Path(folder) / "small.npz"
        np.savez_compressed(small, allow_pickle=False, **small_stream(np.load(whole)))
        words = [_judge(judges / "prequential.py", *_with_start(path)) for path in (whole, small)]
        _keep(name, whole, small, words)


def _keep_static(seed: int, query: Query, judges: Path) -> None:
    name, home = f"static_{query}_seed{seed}", Settings.load().home
    with tempfile.TemporaryDirectory() as folder:
        whole = _backtest(f"--protocol static --query {query} --seed {seed}", name, Path(folder))
        log, small = movielens(home), Path(folder) / "small.npz"
        masks = masks_of(log, cut_static(log), query)
        np.savez_compressed(small, allow_pickle=False, **small_static(np.load(whole), masks))
        data = home / "cache" / "datasets" / "ml-100k"
        rest = ("--data", data, "--query", query, "--scores")
        words = [_judge(judges / "coldstart.py", "judge", *rest, path) for path in (whole, small)]
        _keep(name, whole, small, words)


def _backtest(options: str, name: str, folder: Path) -> Path:
    """Run the command that is noted beside the result."""
    path = folder / f"{name}.npz"
    command = f"innerloop backtest ml-100k {options} --peers none --referee-scores {path.name}"
    print(f"$ {command}", flush=True)
    program = Path(sys.executable).with_name("innerloop")
    subprocess.run([program, *command.split()[1:]], check=True, cwd=folder)
    (folder / "command").write_text(command)
    return path


def _with_start(path: Path) -> tuple[Path, Path]:
    """The judged file, and beside it the same stream as the un-adapted start ranks it."""
    columns, start = np.load(path), path.with_name(f"start_{path.name}")
    ranks = columns["ranks10_start"]
    same = {name: columns[name] for name in ("user", "K", "unseen")}
    np.savez_compressed(start, allow_pickle=False, rank=ranks[:, 0], ranks10=ranks, **same)
    return path, start


def _judge(script: Path, *arguments: object) -> str:
    quiet = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=quiet).stdout


def _keep(name: str, whole: Path, small: Path, words: list[str]) -> None:
    if words[0] != words[1]:
        raise SystemExit(f"{name}: the small file is judged otherwise\n{words[0]}\n{words[1]}")
    (JUDGED / f"{name}.npz").write_bytes(small.read_bytes())
    (JUDGED / f"{name}.txt").write_text(words[0])
    index = JUDGED / "index.json"
    entries = json.loads(index.read_text()) if index.exists() else {}
    entries[name] = {
        "command": (whole.parent / "command").read_text(),
        "whole": described(whole),
        "kept": described(JUDGED / f"{name}.npz"),
    }
    index.write_text(json.dumps(dict(sorted(entries.items())), indent=1) + "\n")
    print(words[0], flush=True)


def described(path: Path) -> dict[str, Any]:
    """Size and digest of a file."""
    content = path.read_bytes()
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


if __name__ == "__main__":
    main()
