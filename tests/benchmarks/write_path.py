"""(c) The write path: how `Store` writes batches of distinct users with 50 scores each, and plainer ways beside it.

The peers write the scores alone, one row per user and item, as a table without arrays would hold them; ours writes
support set, adapter, event ids and the prequential record in the same transaction.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import psycopg2
from psycopg2.extras import execute_values

from pipeline.batch_rows import BatchRows
from pipeline.outcome import Outcome
from pipeline.session import SESSION
from pipeline.store import Store
from pipeline.support import UserTable
from schemas.database import connect_engine
from tests.benchmarks.measuring import table
from tests.benchmarks.scene import (
    NUM_ITEMS,
    TOP_N,
    Deployment,
    Options,
    batches,
    make_loop,
    one_thread,
    parameters,
)

SCORES = """CREATE TABLE scores (user_id text COLLATE "C", item_no integer, score double precision, rank integer,
    PRIMARY KEY (user_id, item_no))"""
UPSERT = """ON CONFLICT (user_id, item_no) DO UPDATE SET score = excluded.score, rank = excluded.rank"""
ONE_ROW = f"INSERT INTO scores VALUES (%s, %s, %s, %s) {UPSERT}"  # noqa: S608 - constants
MANY_ROWS = f"INSERT INTO scores VALUES %s {UPSERT}"  # noqa: S608 - constants


class Recorder(Store):
    """Notes how long each batch takes to be written, its rows laid out included, and what it was."""

    seconds: list[float]
    written: list[Outcome]
    began: float

    def rows(self, outcome: Outcome, table: UserTable) -> BatchRows:
        self.began = time.perf_counter()
        self.written.append(outcome)
        return super().rows(outcome, table)

    def settle(self) -> float | None:
        committed_at = super().settle()
        if committed_at is not None:
            self.seconds.append(time.perf_counter() - self.began)
        return committed_at


def measure(
    parts: Deployment, *, num_users: int, rounds: int, num_items: int, peers: bool
) -> tuple[list[float], dict[str, float], int]:
    """Seconds of each batch of `num_users` users, and of each peer; how many scores a user has."""
    recorder = Recorder(connect_engine(parts.writer_url, options=SESSION), id_horizon=1000, seen_horizon=2000)
    recorder.seconds, recorder.written = [], []
    loop = make_loop(recorder, parameters(num_items))
    # each user in turn, so a batch holds every user once
    for chunks in batches(num_users * rounds, size=num_users, users=num_users, activity=None, num_items=num_items):
        loop.advance(chunks)
    recorder.close()
    outcome = recorder.written[-1]
    assert len(outcome.slots) == num_users
    rows = list(_rows(outcome, loop.adaptation.table))
    found = {name: _peer(parts.owner_url, rows, name) for name in PEERS} if peers else {}
    return recorder.seconds, found, int(outcome.lists.lengths[0])


def _rows(outcome: Outcome, users: UserTable) -> Iterator[tuple[Any, ...]]:
    lists = outcome.lists
    for user_id, items, scores in zip(
        users.user_ids(outcome.slots), lists.item_nos.tolist(), lists.scores.tolist(), strict=True
    ):
        yield from (
            (user_id, item, score, rank) for rank, (item, score) in enumerate(zip(items, scores, strict=True), 1)
        )


PEERS = ("execute_values, a row per user and item", "executemany, a row per user and item")


def _peer(owner_url: str, rows: list[tuple[Any, ...]], name: str) -> float:
    """Median seconds to write these rows, the second time on: updates, as for users who have been there before."""
    seconds = []
    few = rows if name == PEERS[0] else rows[: len(rows) // 16]  # one statement per row: a sixteenth says it all
    with closing(psycopg2.connect(owner_url)) as connection, connection.cursor() as cursor:
        cursor.execute(SCORES)
        connection.commit()
        for _ in range(4):
            start = time.perf_counter()
            if name == PEERS[0]:
                execute_values(cursor, MANY_ROWS, few, page_size=1000)
            else:
                cursor.executemany(ONE_ROW, few)
            connection.commit()
            seconds.append(time.perf_counter() - start)
        cursor.execute("DROP TABLE scores")
        connection.commit()
    return statistics.median(seconds[1:]) * len(rows) / len(few)


def main(options: Options) -> None:
    """Print the table."""
    one_thread()
    num_items = 300 if options.quick else NUM_ITEMS
    num_users, rounds = (64, 3) if options.quick else (2048, 24)
    with options.deploy(num_items, False) as parts:
        seconds, peers, width = measure(parts, num_users=num_users, rounds=rounds, num_items=num_items, peers=True)
    assert width == TOP_N
    mine = statistics.median(seconds[1:])
    rows = [["Store, one transaction with everything", f"{num_users / mine:,.0f}", "1.0x"]]
    rows += [[name, f"{num_users / taken:,.0f}", f"{taken / mine:.1f}x"] for name, taken in peers.items()]
    columns = (f"way ({num_users:,} users x {width} scores a transaction)", "users/s", "we are faster by")
    print(table("(c) write path, wall time, median of a stream of batches over the same users", columns, rows))
