"""Versions in an object store that speaks S3: a trainer writes them, is killed amid it, and a worker takes them up."""

from __future__ import annotations

import signal

import pytest

from pipeline import promotion
from pipeline.artefacts import Artefacts
from pipeline.promotion import Watched
from pipeline.versions import Change
from schemas.database import connect_engine
from tests.brokers import Tansu
from tests.laws.harness import OK, TOPIC, Deploy, lag, query, send, stream, wait_until
from tests.laws.test_trainer import REQUESTS, ask, expire, trainer


def test_trainer_and_worker_share_versions_by_s3_and_a_killed_trainer_leaves_no_orphan(
    broker: Tansu, deploy: Deploy, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    deployment = deploy(broker.address)
    place = f"s3://{bucket}/models"
    store, folder = Artefacts(place), Artefacts(deployment.home / "artefacts")
    (name,) = folder.names()
    first = name.partition(".")[0]
    store.write(first, folder.read(first))
    folder.remove(first)  # whoever looks there finds nothing
    send(broker.address, stream(1000, users=80))
    with deployment.worker(artefacts=place) as worker:
        wait_until(lambda: lag(deployment) == 0, worker)
        ask(deployment)
        with monkeypatch.context() as away:
            away.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
            away.setenv("AWS_MAX_ATTEMPTS", "1")
            with trainer(deployment, "away", artefacts=place) as process:
                process.wait_until_says("does not answer")
                process.signal(signal.SIGTERM)
                assert process.wait() == OK, process.log
        assert [row[3] for row in query(deployment.database.reader_url, REQUESTS)] == [0], "not the request's fault"
        for number, point in enumerate(("mid_artifact_write", "after_artifact_before_publish")):
            with trainer(deployment, f"killed-{number}", artefacts=place, failpoints=f"{point}=crash") as process:
                assert process.wait() == -signal.SIGKILL, process.log
            expire(deployment)
        with trainer(deployment, "last", "--once", artefacts=place) as process:
            assert process.wait() == OK, process.log
        rows = query(deployment.database.reader_url, "SELECT version, sha256 FROM innerloop.meta_versions ORDER BY 1")
        assert [version for version, _ in rows] == [1, 2]
        assert store.names() == sorted(f"{sha256}.safetensors" for _, sha256 in rows)
        engine = connect_engine(deployment.database.writer_url)
        promotion.go_live(Watched(engine, store, TOPIC), 2, Change("test", "to be taken up"))
        engine.dispose()
        worker.wait_until_says('"meta_version": 2')
        worker.signal(signal.SIGTERM)
        assert worker.wait() == OK
