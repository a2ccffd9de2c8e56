"""The command that measures what this machine would manage."""

# ruff: noqa: D301  # \b is click's mark for a paragraph that keeps its lines; a raw string would lose it
from __future__ import annotations

import time
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli_database import opened
from pipeline.cli_output import AsJson, columns, emit_json

if TYPE_CHECKING:
    from sqlalchemy import Engine

NUM_READS = 500
USERS = "SELECT user_id FROM innerloop.user_state LIMIT :num"
READ = "SELECT * FROM innerloop.recommend(:user_id, 10)"


def register(app: typer.Typer) -> None:
    """Add the command of this file."""
    app.command()(bench)


def bench(
    events: Annotated[int, typer.Option(min=100, help="How many events to draw.")] = 20_000,
    users: Annotated[int, typer.Option(min=1, help="Of how many users, by Zipf's law.")] = 5_000,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Size of a micro-batch; may be repeated.")] = None,
    seed: Annotated[int, typer.Option(help="Of what is drawn.")] = 0,
    json: AsJson = False,
) -> None:
    """Measure what one worker would manage here, and how fast lists are read.

    Takes the live version and the catalogue as they are, draws clicks, and lets the worker's own code decode, adapt and
    list in memory: nothing is written. A busy stream has large micro-batches, a quiet one small ones. Postgres and
    Kafka come on top (a fifth of a large batch's time, two fifths of a small one's, measured with all on one machine).
    Reads are timed where users are stored. Needs a reader's login and the artefacts.

    \b
    Examples:
      innerloop bench
      innerloop bench --batch 64 --batch 4096 --users 100000 --events 200000
      INNERLOOP_DEVICE=cuda innerloop bench --json
    """
    from pipeline import arithmetic, registry
    from pipeline.artefacts import Artefacts
    from pipeline.catalogue import listed_rows
    from pipeline.catalogue_store import read_items
    from pipeline.offline_worker import OfflineWorker
    from pipeline.session import Session
    from pipeline.settings import Settings
    from pipeline.stages import stages
    from pipeline.worker_capacity import draw, measure
    from pipeline.worker_sources import version_sources

    settings = Settings.load()
    engine = opened(settings, "reader")
    arithmetic.prepare(settings.torch_threads)
    version, parameters = registry.load_live(engine, Artefacts(settings.artefacts_place()))
    _, items = read_items(Session(engine))
    embeddings = version_sources(settings, engine).embeddings([item.text for item in listed_rows(items)], parameters)
    records = draw(parameters, events, users, seed)
    found = []
    with stages() as tell:
        for size in batch or (128, 512, 2048):
            worker = OfflineWorker(parameters, items, embeddings, capacity=users, top_n=settings.top_n)
            found.append(measure(worker, records, size, partial(tell, f"batches of {size:,}")))
    reads = _reads(engine)
    if json:
        capacities = [asdict(capacity) for capacity in found]
        emit_json({"version": version, "items": len(embeddings), "capacity": capacities, "recommend_ms": reads})
        return
    print(f"version {version}, {len(embeddings):,} items, lists of {settings.top_n}, {settings.device}")
    rows = [(one.batch_events, round(one.cpu_us), round(one.events_per_second)) for one in found]
    print(columns(("events in a micro-batch", "CPU, µs an event", "events/s of a core"), rows))
    megabytes = worker.table.bytes_per_user * settings.cache_users / 1e6
    print(f"memory of INNERLOOP_CACHE_USERS={settings.cache_users:,}: {megabytes:,.0f} MB")
    shown = f"p50 {reads['p50']:.2f} ms, p99 {reads['p99']:.2f} ms" if reads else "nobody is stored yet"
    print(f"recommend(user, 10): {shown}")


def _reads(engine: Engine) -> dict[str, float]:
    """Milliseconds of looking a stored user's list up, one after the other; empty where nobody is stored."""
    import numpy as np
    from sqlalchemy import text

    with engine.connect() as connection:
        users = connection.scalars(text(USERS), {"num": NUM_READS}).all()
        taken = []
        for user in users:
            start = time.perf_counter()
            connection.execute(text(READ), {"user_id": user}).all()
            taken.append((time.perf_counter() - start) * 1000)
    if not taken:
        return {}
    p50, p99 = np.percentile(taken, [50, 99]).tolist()
    return {"p50": p50, "p99": p99}
