"""The rows of one micro-batch, and how they come into the database in one transaction.

They are laid out as memory is when the batch has been computed, so that the next one may change it while they are being
written. Large ones are copied, everything else stands as SQL with a name, here or in `partition_rows`.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass

import psycopg2.extensions

from pipeline.batching import Advance, DeadLetter
from pipeline.forgotten import Forgotten
from pipeline.outcome import Outcome
from pipeline.partition_rows import (
    Statement,
    execute,
    move_positions,
    pair_log_rows,
    pair_rows,
    popular_rows,
    statistics_rows,
    write_dead_letters,
)
from pipeline.session import Fenced
from pipeline.support import UserTable
from pipeline.user_rows import prequential_copy, segments_copy, states_copy

# What is copied comes into tables of the session first: a client that stops amid a COPY cannot be timed out by the
# server, and must not hold a lock on what others write meanwhile. The raised toast target is that of `user_state`: LIKE
# does not copy it, and without it every row of 2 to 4 kB is compressed on its way.
INCOMING = "".join(
    f"CREATE TEMPORARY TABLE IF NOT EXISTS incoming_{name} "
    f"(LIKE innerloop.{name} INCLUDING DEFAULTS) WITH (toast_tuple_target = 8160) ON COMMIT DELETE ROWS;"
    for name in ("user_state", "event_ids", "seen_items", "prequential")
)
STATE_COLUMNS = (
    "user_id", "partition", "last_offset", "num_events", "num_applied", "support_items", "support_types", "adapter",
    "track", "adapter_events", "adapter_use", "meta_version", "top_items", "top_scores", "recent_ids", "recent_bodies",
    "recent_seen", "num_seen", "due_us",
)  # fmt: skip
# Read from the source at once: for every read the thread has to get hold of the interpreter, which is computing.
COPY_BYTES = 2**20
COPY_USERS = f"COPY incoming_user_state ({', '.join(STATE_COLUMNS)}) FROM STDIN (FORMAT binary)"
# In one order of users everywhere, so that two transactions cannot wait for each other.
MERGE_USERS = f"""INSERT INTO innerloop.user_state ({", ".join(STATE_COLUMNS)}, updated_at)
    SELECT {", ".join(STATE_COLUMNS)}, clock_timestamp() FROM incoming_user_state ORDER BY user_id
    ON CONFLICT (user_id) DO UPDATE SET
    {", ".join(f"{name} = excluded.{name}" for name in STATE_COLUMNS[1:])}, updated_at = excluded.updated_at
    WHERE user_state.partition = excluded.partition"""  # noqa: S608 - constant column names
COPY_EVENT_IDS = "COPY incoming_event_ids (user_id, segment, ids, bodies) FROM STDIN (FORMAT binary)"
COPY_SEEN_ITEMS = "COPY incoming_seen_items (user_id, segment, items) FROM STDIN (FORMAT binary)"
TAKE_EVENT_IDS = "INSERT INTO innerloop.event_ids SELECT * FROM incoming_event_ids"
TAKE_SEEN_ITEMS = "INSERT INTO innerloop.seen_items SELECT * FROM incoming_seen_items"
TRIM_EVENT_IDS = """DELETE FROM innerloop.event_ids e USING unnest(%s::text[], %s::int[]) AS t (user_id, segment)
    WHERE e.user_id = t.user_id AND e.segment <= t.segment"""
TRIM_SEEN_ITEMS = """DELETE FROM innerloop.seen_items s USING unnest(%s::text[], %s::int[]) AS t (user_id, segment)
    WHERE s.user_id = t.user_id AND s.segment <= t.segment"""
COPY_PREQUENTIAL = """COPY incoming_prequential
    (topic, partition, first_offset, next_offset, recorded_at, meta_version, offsets, record_times, user_ids, item_nos,
    types, num_events, loss_adapted, loss_start, rank_adapted, rank_start, rank_popular, event_times, new_items, scenes,
    scene_names, applied_types) FROM STDIN (FORMAT binary)"""
TAKE_PREQUENTIAL = "INSERT INTO innerloop.prequential SELECT * FROM incoming_prequential"


@dataclass(frozen=True, slots=True)
class BatchRows:
    """Everything that a micro-batch changes.

    Attributes:
        users: of all its events, also of those that are not applied.
        num_written: rows of `user_state`.
        copies: COPY statements and their bytes.
        statements: what follows once positions have moved and users are written.

    """

    advances: list[Advance]
    dead_letters: list[DeadLetter]
    users: list[str]
    num_written: int
    copies: list[tuple[str, io.BytesIO]]
    statements: list[Statement]

    @classmethod
    def of(cls, outcome: Outcome, table: UserTable, horizons: tuple[int, int], *, recorded_at: float) -> BatchRows:
        """Lay out what a batch has changed. horizons: event ids and seen items kept; recorded_at: Unix seconds."""
        batch = outcome.batch
        topic = batch.advances[0].topic
        statements = [
            *_segment_rows(outcome, horizons),
            *statistics_rows(topic, outcome.statistics),
            *pair_log_rows(topic, outcome.pair_events),
            *pair_rows(topic, outcome.statistics),
            *popular_rows(topic, outcome.popular, outcome.version),
        ]
        if outcome.prequential.applied_types:
            statements.append((TAKE_PREQUENTIAL, ()))
        copies = list(_copies(outcome, table, recorded_at))
        return cls(batch.advances, batch.dead_letters, batch.users, len(outcome.slots), copies, statements)

    def write(self, cursor: psycopg2.extensions.cursor, forgotten: Forgotten) -> None:
        """Bring them in; once.

        Raises Fenced when a position is not where the batch starts, UserErased when one of its users was forgotten
        since `forgotten` looked.
        """
        for copy, source in self.copies:  # into the session's own tables: nothing that others wait for is locked yet
            cursor.copy_expert(copy, source, COPY_BYTES)
        move_positions(cursor, self.advances)
        forgotten.refuse(cursor, self.users)
        write_dead_letters(cursor, self.dead_letters)
        if self.num_written:
            cursor.execute(MERGE_USERS)
            if cursor.rowcount != self.num_written:
                raise Fenced("a user of this batch was written in another partition meanwhile")
        execute(cursor, self.statements)


def _copies(outcome: Outcome, table: UserTable, recorded_at: float) -> Iterator[tuple[str, io.BytesIO]]:
    if len(outcome.slots):
        yield COPY_USERS, states_copy(outcome, table)
    for copy, segments in ((COPY_EVENT_IDS, outcome.id_segments), (COPY_SEEN_ITEMS, outcome.seen_segments)):
        if segments.user_ids:
            yield copy, segments_copy(segments)
    if outcome.prequential.applied_types:
        yield COPY_PREQUENTIAL, prequential_copy(outcome, recorded_at=recorded_at)


def _segment_rows(outcome: Outcome, horizons: tuple[int, int]) -> Iterator[Statement]:
    for segments, take, trim, horizon in (
        (outcome.id_segments, TAKE_EVENT_IDS, TRIM_EVENT_IDS, horizons[0]),
        (outcome.seen_segments, TAKE_SEEN_ITEMS, TRIM_SEEN_ITEMS, horizons[1]),
    ):
        if segments.user_ids:
            yield take, ()
            yield trim, (segments.user_ids, segments.expired(horizon))
