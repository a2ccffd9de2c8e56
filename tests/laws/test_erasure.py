"""A running worker forgets who asks for it, and none begins on a restored database before it has forgotten again."""

from __future__ import annotations

import signal
from contextlib import closing

import psycopg2

from pipeline.erasures import ask
from tests.brokers import Tansu
from tests.laws.harness import OK, TOPIC, Deploy, lag, query, send, stream, wait_until
from tests.laws.judgement import LAW

BUSIEST = "SELECT user_id FROM innerloop.user_state ORDER BY num_applied DESC, user_id LIMIT 1"
STATES = "SELECT count(*) FROM innerloop.user_state WHERE user_id = %s"
DROPPED = 6  # column of LAW
RECORD = "SELECT count(*) FROM innerloop.prequential_events WHERE user_id = %s"


def test_a_worker_forgets_who_asks_and_one_on_a_restored_backup_forgets_before_it_is_ready(
    broker: Tansu, deploy: Deploy
) -> None:
    deployment = deploy(broker.address)
    database = deployment.database
    events = stream(1200, users=30)
    send(broker.address, events)
    with deployment.worker() as worker:
        wait_until(lambda: lag(deployment) == 0, worker)
        ((user,),) = query(database.reader_url, BUSIEST)
        ask(broker.address, "erasures", user)
        wait_until(lambda: query(database.reader_url, RECORD, user) == [(0,)], worker)
        assert query(database.reader_url, STATES, user) == [(0,)]
        send(broker.address, [message for message in events if message.key == user.encode()])  # late: from before
        wait_until(lambda: lag(deployment) == 0, worker)
        assert query(database.reader_url, STATES, user) == [(0,)]
        law = query(database.reader_url, LAW)
        assert sum(row[DROPPED] for row in law) > 10
        assert not any(row[-1] for row in law)

    with closing(psycopg2.connect(database.owner_url)) as connection, connection.cursor() as cursor:  # a backup
        cursor.execute("TRUNCATE innerloop.erased_users")
        cursor.execute("DELETE FROM innerloop.stream_position WHERE topic <> %s", (TOPIC,))
        cursor.execute(
            "INSERT INTO innerloop.user_state (user_id, partition, last_offset, num_events, num_applied, meta_version) "
            "VALUES (%s, 0, 1, 1, 1, 1)",
            (user,),
        )
        connection.commit()
    with deployment.worker("restored") as worker:
        worker.wait_until_ready()
        assert query(database.reader_url, STATES, user) == [(0,)]
        worker.signal(signal.SIGTERM)
        assert worker.wait() == OK
