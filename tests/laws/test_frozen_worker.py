"""A worker stopped by SIGSTOP until its partitions have moved: what it wakes up with is never written."""

from __future__ import annotations

import signal
from collections import defaultdict
from collections.abc import Iterable
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
    Fleet,
    Worker,
    position,
    query,
    stream,
    wait_until,
)
from tests.laws.judgement import assert_as_twin, assert_law

PARTITIONS = [f"interactions[{partition}]" for partition in range(NUM_PARTITIONS)]
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


def announced(workers: Iterable[Worker]) -> set[tuple[int, int]]:
    """Positions at which workers said that they go on, over all their assignments."""
    return {
        (partition, positions[name])
        for worker in workers
        for positions in worker.positions
        for partition, name in enumerate(PARTITIONS)
        if name in positions
    }


@pytest.mark.parametrize(
    "pause_at",
    [
        "before_commit",  # PostgreSQL ends the open transaction, so that its locks do not outlive the freeze
        "before_transaction",  # only the compare-and-set of the position stands between its rows and the heir's
    ],
)
def test_a_frozen_worker_writes_nothing_once_its_partitions_have_moved(
    pause_at: str, broker: Tansu, deploy: Deploy, database: Database, twin: Database
) -> None:
    deployment, sent = deploy(broker.address), stream(1500)
    install_witness(database)

    def login(name: str) -> str:
        return f"{database.writer_url}&application_name={name}"

    # Asleep at this place for most of its time, so that SIGSTOP finds it there.
    frozen = deployment.worker("frozen", database_url=login("frozen"), failpoints=f"{pause_at}=sleep:500")
    with frozen, Feeder(broker.address, sent, rate=250) as feeder:
        wait_until(lambda: position(database) > 100, frozen)
        frozen.signal(signal.SIGSTOP)
        with Fleet(deployment, size=1, settings={"database_url": login("heir")}) as heirs:
            heirs.wait_until(
                lambda: any(set(PARTITIONS) <= positions.keys() for positions in heirs.workers[0].positions)
            )
            taken_over = position(database)
            heirs.wait_until(lambda: position(database) > taken_over + 200)
            frozen.signal(signal.SIGCONT)
            heirs.wait_until(lambda: frozen.code is not None or frozen.num_assignments > 1)
            feeder.finish()
            heirs.wait_until_caught_up()
        assert frozen.code in {None, FENCED}, frozen.log
        # One that comes back into the group may have fenced an heir in turn.
        assert {heir.code for heir in heirs.ended} <= {FENCED}
    runs = starts_of_runs(database)
    assert runs["frozen"] <= announced([frozen])
    assert runs["heir"] <= announced([*heirs.ended, *heirs.workers])
    assert_as_twin(deployment, assert_law(deployment, sent), twin)
