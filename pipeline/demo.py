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
from functools import partial
from pathlib import Path
from typing import Any

from pipeline import demo_drift, drift_picture, meta_training, reading
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
    quantiles,
    write_lines,
)
from pipeline.demo_stage import SETTLE_SECONDS, Stage, embedded, running, until
from pipeline.demo_view import Moment, Summary, live
from pipeline.demo_view import text as summary_text
from pipeline.produce import Pace, Tally, interaction_record
from pipeline.settings import Settings

LIST_LENGTH = 10


def run(*, dataset: str, home: Path | None, rate: float, seed: int, picture: Path | None, as_json: bool) -> int:
    """Play the demo; returns its exit code. What it started is stopped on every way out, Ctrl-C included."""
    started = time.monotonic()
    if picture is not None:
        drift_picture.check(picture)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    lasting = Settings.load().home
    for name in [name for name in os.environ if name.startswith("INNERLOOP_") and name not in KEPT_VARIABLES]:
        del os.environ[name]
    say(f"data: {dataset}")
    data = load_ml100k(lasting)
    play = Play.of(data, seed)
    try:
        with _folder(home, lasting) as folder:
            with embedded(folder) as stage:
                items = write_lines(folder / "demo" / "items.jsonl", data.catalogue())
                stage.send(stage.settings.topic_items, list(data.catalogue()), item_record)
                _train(stage, play, items, seed)
                say("starting a worker")
                with running(stage, "worker") as worker:
                    measured = _stream(stage, play, worker, num_items=len(data.films), rate=rate, seed=seed)
            say("the last act: a drift and its cure")
            cure = demo_drift.play(folder / "shop", seed=seed, picture=picture)
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


def _train(stage: Stage, play: Play, items: Path, seed: int) -> None:
    users = len({event["user_id"] for event in play.fit})
    say(f"meta-training on the {len(play.fit):,} events of the earliest {users} users")
    path = write_lines(stage.settings.home / "demo" / "fit.jsonl", play.fit)
    trained = meta_training.run(stage.settings, interactions_file=str(path), items_file=str(items), seed=seed)
    say(trained.as_text())


def _stream(stage: Stage, play: Play, worker: Process, *, num_items: int, rate: float, seed: int) -> dict[str, Any]:
    topic = stage.settings.topic_interactions
    score = Score(play.unseen)
    watch = Watch(stage.reader, topic, stage.settings.partitions, [score])
    until("the catalogue in use", partial(watch.prepared, num_items), worker)
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
            stage.send(stage.settings.topic_interactions, events, interaction_record, Pace(rate), tally)
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
    stage.send(stage.settings.topic_interactions, first, interaction_record)
    until("the newcomer's events", lambda: watch.applied() >= expected, worker)
    return {
        "user_id": user,
        "lessons": [f"{play.titles[event['item_id']]}, {event['value']:g} of 5" for event in first],
        "titles": play.titles,
        "before": before,
        "after": reading.recommend(stage.reader, user, LIST_LENGTH),
        "later": frozenset(event["item_id"] for event in rest),
    }
