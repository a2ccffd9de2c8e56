"""A worker stopped by SIGSTOP until its partitions have moved: what it wakes up with is never written."""

from __future__ import annotations

import signal
from collections import defaultdict
from contextlib import closing

import psycopg2
import pytest

from tests.brokers import Tansu
from tests.conftest import Database
from tests.laws.harness import (
    FENCED,
    NUM_PARTITIONS,
    Deploy,
    Feeder,
    Worker,
    assert_as_twin,
    assert_law,
    lag,
    position,
    query,
    stream,
    wait_until,
)

# Who moved a position, in the order of the moves: the application name that a worker's database URL gives it.
WITNESS = """
    CREATE TABLE public.moves (number serial, name text, partition integer, start bigint, next_offset bigint);
    CREATE FUNCTION public.note_move() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$ BEGIN
        INSERT INTO public.moves (name, partition, start, next_offset)
        VALUES (current_setting('application_name'), new.partition, old.next_offset, new.next_offset);
        RETURN new; END $$;
    CREATE TRIGGER witness AFTER UPDATE ON innerloop.stream_position FOR EACH ROW
    WHEN (new.topic = 'interactions' AND new.next_offset > old.next_offset) EXECUTE FUNCTION public.note_move()"""
MOVES = "SELECT partition, name, start FROM public.moves ORDER BY number"


def install_witness(database: Database) -> None:
    with closing(psycopg2.connect(database.superuser_url)) as connection, connection.cursor() as cursor:
        cursor.execute(WITNESS)
        connection.commit()


def starts_of_runs(database: Database) -> dict[str, set[tuple[int, int]]]:
    """(partition, offset) at which each worker began to move a partition that another had moved before."""
    runs, previous = defaultdict[str, set[tuple[int, int]]](set), dict[int, str]()
    for partition, name, start in query(database.superuser_url, MOVES):
        if previous.get(partition) != name:
            runs[name].add((partition, start))
        previous[partition] = name
    return runs


def announced(worker: Worker) -> set[tuple[int, int]]:
    """Positions at which the worker said that it goes on, over all its assignments."""
    return {
        (partition, positions[name])
        for positions in worker.positions
        for partition in range(NUM_PARTITIONS)
        if (name := f"interactions[{partition}]") in positions
    }


@pytest.mark.parametrize("frozen_in", ["a transaction", "any moment"])
def test_a_frozen_worker_writes_nothing_once_its_partitions_have_moved(
    frozen_in: str, broker: Tansu, deploy: Deploy, database: Database, twin: Database
) -> None:
    deployment, sent = deploy(broker.address), stream(2500)
    install_witness(database)

    def worker(name: str, failpoints: str = "") -> Worker:
        url = f"{database.writer_url}&application_name={name}"
        return deployment.worker(name, database_url=url, failpoints=failpoints)

    pause = "before_commit=sleep:500" if frozen_in == "a transaction" else ""
    with worker("frozen", pause) as frozen, Feeder(broker.address, sent, rate=250) as feeder:
        wait_until(lambda: position(database) > 100, frozen)
        frozen.signal(signal.SIGSTOP)
        with worker("heir") as heir:
            everything = [f"interactions[{partition}]" for partition in range(NUM_PARTITIONS)]
            wait_until(lambda: bool(heir.positions) and set(everything) <= heir.positions[-1].keys(), heir)
            taken_over = position(database)
            wait_until(lambda: position(database) > taken_over + 200, heir)
            frozen.signal(signal.SIGCONT)
            wait_until(lambda: frozen.code is not None or frozen.num_assignments > 1)
            feeder.finish()
            wait_until(lambda: lag(deployment) == 0, heir)
        assert frozen.code in {None, FENCED}, frozen.log
        for name, starts in starts_of_runs(database).items():
            assert starts <= announced({"frozen": frozen, "heir": heir}[name]), name
    assert_as_twin(deployment, assert_law(deployment, sent), twin)
