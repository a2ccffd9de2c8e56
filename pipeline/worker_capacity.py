"""What one worker's thread manages on this machine, under a version and a catalogue as they are.

Computing alone: decode, fates, support sets, inner loop, lists. Kafka and the transaction come on top; `make bench` of
a checkout measures the whole path.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from models.meta_parameters import MetaParameters
from pipeline.offline_worker import OfflineWorker
from pipeline.synthetic_messages import encoded_chunks
from schemas.events import parse_interaction

NOW_MS = 1_790_000_000_000  # Kafka's time of every record: what is drawn is the same each time
WARM_SHARE = 3  # the first third fills supports and is not timed


@dataclass(frozen=True)
class Capacity:
    """CPU time of an event in micro-batches of one size, microseconds; events per second of one core."""

    batch_events: int
    cpu_us: float
    events_per_second: float


def draw(parameters: MetaParameters, num_events: int, num_users: int, seed: int) -> list[tuple[bytes, bytes]]:
    """Keys and values of clicks: users by Zipf's law, items as often as the version has counted them."""
    counts = parameters.counts.sum(0).double().numpy() + 1.0
    chunks = encoded_chunks(num_events, users=num_users, item_ids=parameters.item_ids, item_shares=counts, seed=seed)
    return [record for keys, values in chunks for record in zip(keys, values, strict=True)]


def measure(
    worker: OfflineWorker,
    records: Sequence[tuple[bytes, bytes]],
    batch_events: int,
    told: Callable[[int, int], None],
) -> Capacity:
    """Let a fresh worker decode and apply the records in micro-batches of one size; told: how far it is, of all."""
    warm, used = len(records) // WARM_SHARE, 0.0
    bounds = [*range(0, warm, batch_events), *range(warm, len(records), batch_events), len(records)]
    for start, end in pairwise(bounds):
        before = time.process_time()
        events = [parse_interaction(key, value, NOW_MS) for key, value in records[start:end]]
        worker.apply(worker.micro_batch(events))
        used += time.process_time() - before if start >= warm else 0.0
        told(end, len(records))
    timed = len(records) - warm
    return Capacity(batch_events, used / timed * 1e6, timed / used)
