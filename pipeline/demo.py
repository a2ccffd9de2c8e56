"""`innerloop demo`: the whole loop on real data, from an empty folder to a summary, and everything stopped again."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, text

from pipeline import demo_drift, meta_training, reading, services, topics
from pipeline.catalogue_feed import item_record
from pipeline.cli_output import emit_json, say
from pipeline.datasets import load_ml100k
from pipeline.demo_figures import KINDS, Score, gains
from pipeline.demo_parts import (
    KEPT_VARIABLES,
    NEWCOMER_EVENTS,
    DemoFailed,
    Play,
    Process,
    Watch,
    lines,
    quantiles,
    write_lines,
)
from pipeline.demo_view import Moment, Summary, live
from pipeline.demo_view import text as summary_text
from pipeline.outbox import Outbox
from pipeline.produce import Convert, Pace, Tally, interaction_record, produce
from pipeline.settings import Settings
from schemas.database import connect_engine, migrate
from schemas.errors import ConfigurationError
from schemas.events import Rejected

SETTLE_SECONDS = 120.0
LIST_LENGTH = 10
DRIFT_EVENTS, DRIFT_RATE = 17_000, 1000.0  # of the last act, in which nobody watches single events


class HomeInUse(ConfigurationError):
    """The folder has seen a stream before: name an empty one, or `innerloop services down --delete` in it first."""


@dataclass(frozen=True)
class Stage:
    """Where the demo takes place: running services, a database that knows the schema, topics."""

    settings: Settings
    endpoints: services.Endpoints
    reader: Engine


def run(*, dataset: str, home: Path | None, rate: float, seed: int, drift: bool, as_json: bool) -> int:
    """Play the demo; returns its exit code. What it started is stopped on every way out, Ctrl-C included."""
    started = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    lasting = Settings.load().home
    for name in [name for name in os.environ if name.startswith("INNERLOOP_") and name not in KEPT_VARIABLES]:
        del os.environ[name]
    say(f"data: {dataset}")
    data = load_ml100k(lasting)
    play = Play.of(data, seed)
    try:
        with _folder(home, lasting) as folder, _stage(folder) as stage:
            items = write_lines(folder / "demo" / "items.jsonl", data.catalogue())
            _send(stage, stage.settings.topic_items, list(data.catalogue()), item_record)
            _train(stage, play, items, seed)
            with _worker(stage, folder) as worker:
                measured = _stream(stage, play, worker, num_items=len(data.films), rate=rate, seed=seed)
                cure = _drift(stage, play, worker, folder, rate=max(rate, DRIFT_RATE), seed=seed) if drift else None
    except DemoFailed as failed:
        say(f"innerloop: {failed}")
        return 1
    summary = Summary(**measured, cure=cure, seconds=time.monotonic() - started, home=str(home) if home else None)
    if as_json:
        emit_json(summary.as_json())
    else:
        print(summary_text(summary))
    return 1 if any(row.broken for row in summary.law) else 0


@contextmanager
def _folder(home: Path | None, lasting: Path) -> Iterator[Path]:
    """Yield the given folder, or one that is removed; embeddings are cached in the lasting home either way."""
    if home is not None:
        home.mkdir(parents=True, exist_ok=True)
        yield home.resolve()
        return
    folder = Path(tempfile.mkdtemp(prefix="innerloop-demo-"))
    try:
        (lasting / "cache").mkdir(parents=True, exist_ok=True)
        (folder / "cache").symlink_to(lasting / "cache")
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _stage(folder: Path) -> Iterator[Stage]:
    ran_before = all(part.address for part in services.status(folder))
    say("starting the embedded broker and database")
    try:
        endpoints = services.up(folder)
        migrate(endpoints.owner_url)
        settings = Settings.load(home=folder, broker=endpoints.broker, database_url=endpoints.writer_url)
        topics.ensure_topics(endpoints.broker, topics.topic_configs(settings), settings.partitions)
        reader = connect_engine(endpoints.reader_url)
        _refuse_used(reader, folder)
        yield Stage(settings, endpoints, reader)
        reader.dispose()
    finally:
        if not ran_before:
            services.down(folder)


def _refuse_used(reader: Engine, folder: Path) -> None:
    with reader.connect() as connection:
        query = "SELECT EXISTS (SELECT FROM innerloop.stream_position UNION ALL SELECT FROM innerloop.meta_versions)"
        if connection.execute(text(query)).scalar_one():
            raise HomeInUse(
                f"{folder} has seen a stream before: name an empty folder, or run "
                f"`INNERLOOP_HOME={folder} innerloop services down --delete` first"
            )


def _train(stage: Stage, play: Play, items: Path, seed: int) -> None:
    users = len({event["user_id"] for event in play.fit})
    say(f"meta-training on the {len(play.fit):,} events of the earliest {users} users")
    path = write_lines(stage.settings.home / "demo" / "fit.jsonl", play.fit)
    trained = meta_training.run(stage.settings, interactions_file=str(path), items_file=str(items), seed=seed)
    say(trained.as_text())


@contextmanager
def _worker(stage: Stage, folder: Path) -> Iterator[Process]:
    say("starting a worker")
    variables = _variables(stage, folder)
    worker = Process(("worker",), variables, folder / "worker.log")
    try:
        worker.wait_ready()
        yield worker
        worker.check()
    finally:
        code = worker.stop()
    if code != 0:
        raise DemoFailed(f"the worker ended with exit code {code} instead of 0")


def _variables(stage: Stage, folder: Path) -> dict[str, str]:
    return {
        "INNERLOOP_HOME": str(folder),
        "INNERLOOP_BROKER": stage.endpoints.broker,
        "INNERLOOP_DATABASE_URL": stage.endpoints.writer_url,
        # The embedded broker starts a group after half of this; Apache Kafka would want 6.
        "INNERLOOP_SESSION_TIMEOUT_SECONDS": "2",
    }


def _drift(stage: Stage, play: Play, worker: Process, folder: Path, *, rate: float, seed: int) -> demo_drift.Cure:
    topic = stage.settings.topic_interactions
    watch = Watch(stage.reader, topic, stage.settings.partitions, [])

    def feed(events: Sequence[dict[str, Any]], pace: float) -> None:
        expected = watch.applied() + len(events)
        _send(stage, topic, events, interaction_record, Pace(pace))
        _wait("the events of changed tastes", worker, lambda: watch.applied() >= expected)

    scene = demo_drift.Scene(stage.reader, topic, _variables(stage, folder), folder, feed)
    return demo_drift.play(scene, demo_drift.changed(play.fit, DRIFT_EVENTS, seed), rate=rate)


def _stream(stage: Stage, play: Play, worker: Process, *, num_items: int, rate: float, seed: int) -> dict[str, Any]:
    topic = stage.settings.topic_interactions
    score = Score(play.unseen)
    watch = Watch(stage.reader, topic, stage.settings.partitions, [score])
    _wait("the catalogue in use", worker, partial(watch.prepared, num_items))
    say(f"streaming {len(play.stream):,} events of later users at {rate:g} a second")
    _play_stream(stage, play.stream, worker, watch, rate=rate, score=score)
    p50, p99 = quantiles(watch.latencies)
    newcomer = _newcomer(stage, play, worker, watch)
    status = reading.status(stage.reader, stage.endpoints.broker, topic)
    return {
        "num_events": score.num_events,
        "num_users": len(score.by_user),
        "hit_rates": {kind: score.rate(kind) for kind in KINDS},
        "gains": gains(score, seed),
        "law": status.partitions,
        "lag": status.lag or 0,
        "p50_ms": p50,
        "p99_ms": p99,
        **newcomer,
    }


def _play_stream(
    stage: Stage, events: Sequence[dict[str, Any]], worker: Process, watch: Watch, *, rate: float, score: Score
) -> None:
    """Feed in a thread at the given rate, and draw until everything has arrived in the database."""
    tally = Tally()
    failures: list[BaseException] = []

    def feed() -> None:
        try:
            _send(stage, stage.settings.topic_interactions, events, interaction_record, Pace(rate), tally)
        except BaseException as error:  # noqa: BLE001 - handed to the main thread, which raises it
            failures.append(error)

    feeder = threading.Thread(target=feed, daemon=True)
    feeder.start()
    applied, deadline = 0, time.monotonic() + len(events) / rate + SETTLE_SECONDS
    with live() as show:
        while applied < len(events):
            time.sleep(0.5)
            worker.check()
            if failures:
                raise failures[0]
            applied, per_second = watch.update()
            p50, p99 = watch.freshness()
            show(Moment(tally.sent, len(events), applied, per_second, tally.sent - applied, p50, p99, score))
            if time.monotonic() > deadline:
                raise DemoFailed(f"only {applied:,} of {len(events):,} events had arrived in time")
    feeder.join()
    watch.update()


def _newcomer(stage: Stage, play: Play, worker: Process, watch: Watch) -> dict[str, Any]:
    """Show one user who has done nothing yet, then feed five of their events and look again."""
    user = play.newcomer[0]["user_id"]
    before = reading.recommend(stage.reader, user, LIST_LENGTH)
    first, rest = play.newcomer[:NEWCOMER_EVENTS], play.newcomer[NEWCOMER_EVENTS:]
    expected = watch.applied() + len(first)
    _send(stage, stage.settings.topic_interactions, first, interaction_record)
    _wait("the newcomer's events", worker, lambda: watch.applied() >= expected)
    return {
        "user_id": user,
        "lessons": [f"{play.titles[event['item_id']]}, {event['value']:g} of 5" for event in first],
        "titles": play.titles,
        "before": before,
        "after": reading.recommend(stage.reader, user, LIST_LENGTH),
        "later": frozenset(event["item_id"] for event in rest),
    }


def _send(
    stage: Stage,
    topic: str,
    records: Sequence[dict[str, Any]],
    convert: Convert,
    pace: Pace | None = None,
    tally: Tally | None = None,
) -> None:
    """Send records through the same path as `produce` and `items`; every one must arrive."""
    refused: list[Rejected] = []

    def progress(now: Tally) -> None:
        if tally is not None:
            tally.sent = now.sent

    with Outbox(stage.endpoints.broker, topic) as outbox:
        produce(
            lines(records),
            outbox,
            convert,
            pace=pace or Pace(),
            complain=lambda _, rejected: refused.append(rejected),
            progress=progress,
        )
        outbox.flush()
    if refused or outbox.failures:
        reason = refused[0].detail if refused else next(iter(outbox.failures.values()))
        raise DemoFailed(f"{len(refused) + len(outbox.failures)} records could not be sent to {topic}: {reason}")


def _wait(what: str, worker: Process, condition: Any) -> None:
    deadline = time.monotonic() + SETTLE_SECONDS
    while not condition():
        worker.check()
        if time.monotonic() > deadline:
            raise DemoFailed(f"waited {SETTLE_SECONDS:.0f} s for {what}")
        time.sleep(0.1)
