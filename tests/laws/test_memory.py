"""Memory does not grow with the number of users, but with INNERLOOP_CACHE_USERS."""

from __future__ import annotations

import time

import pytest

from pipeline.synthetic import item_id
from pipeline.synthetic_messages import Message, encoded_chunks
from tests.brokers import Tansu
from tests.laws.harness import NUM_ITEMS, Deploy, lag, memory_kib, position, query, send, wait_until

# Some 3 kB of state a user: half of 100,000 users would be 150 MB.
CACHE_USERS, GROWTH_MIB = 5000, 25


def between_batches_kib(process_id: int) -> int:
    """The least of two seconds' samples: a batch borrows up to 80 MB, which it gives back."""
    samples = []
    for _ in range(40):
        samples.append(memory_kib(process_id))
        time.sleep(0.05)
    return min(samples)


def growth_mib(deployment_of: Deploy, broker: str, num_users: int) -> float:
    """Growth of resident memory over the second half of `num_users` users with one event each."""
    deployment = deployment_of(broker)
    items = [item_id(item) for item in range(NUM_ITEMS)]
    with deployment.worker(cache_users=CACHE_USERS, batch_events=2048) as worker:
        worker.wait_until_ready()
        for keys, values in encoded_chunks(num_users, users=num_users, item_ids=items, activity=None, chunk=20_000):
            send(broker, [Message(key, value, "applied") for key, value in zip(keys, values, strict=True)])
        wait_until(lambda: position(deployment.database) > num_users / 2, worker)
        half = between_batches_kib(worker.process_id)
        wait_until(lambda: lag(deployment) == 0, worker)
        end = between_batches_kib(worker.process_id)
    users = query(deployment.database.reader_url, "SELECT count(*) FROM innerloop.user_state")
    assert users == [(num_users,)]
    return (end - half) / 1024


def test_memory_does_not_grow_with_100_000_users(broker: Tansu, deploy: Deploy) -> None:
    assert growth_mib(deploy, broker.address, 100_000) < GROWTH_MIB


@pytest.mark.long
def test_memory_does_not_grow_with_a_million_users(broker: Tansu, deploy: Deploy) -> None:
    assert growth_mib(deploy, broker.address, 1_000_000) < GROWTH_MIB
