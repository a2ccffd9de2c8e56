"""Where the demo takes place: embedded broker and database in a folder, topics, a process, and how records get in."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, text

from pipeline import services, topics
from pipeline.cli_output import say
from pipeline.demo_parts import DemoFailed, Process, lines
from pipeline.outbox import Outbox
from pipeline.produce import Convert, Pace, Tally, produce
from pipeline.settings import Settings
from schemas.database import connect_engine, migrate
from schemas.errors import ConfigurationError
from schemas.events import Rejected

SETTLE_SECONDS = 120.0


class HomeInUse(ConfigurationError):
    """The folder has seen a stream before: name an empty one, or `innerloop services down --delete` in it first."""


@dataclass(frozen=True)
class Stage:
    """Running services, a database that knows the schema, topics."""

    settings: Settings
    endpoints: services.Endpoints
    reader: Engine

    def variables(self) -> dict[str, str]:
        """Return what a command of ours is told by its environment."""
        return {
            "INNERLOOP_HOME": str(self.settings.home),
            "INNERLOOP_BROKER": self.endpoints.broker,
            "INNERLOOP_DATABASE_URL": self.endpoints.writer_url,
            "INNERLOOP_PARTITIONS": str(self.settings.partitions),
            # The embedded broker starts a group after half of this; Apache Kafka would want 6.
            "INNERLOOP_SESSION_TIMEOUT_SECONDS": "2",
        }

    def send(
        self,
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

        with Outbox(self.endpoints.broker, topic) as outbox:
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


@contextmanager
def embedded(folder: Path, **settings: Any) -> Iterator[Stage]:
    """Start broker and database in a folder; what did not run before is stopped at the end. Raises HomeInUse."""
    ran_before = all(part.address for part in services.status(folder))
    say("starting the embedded broker and database")
    try:
        endpoints = services.up(folder)
        migrate(endpoints.owner_url)
        known = Settings.load(home=folder, broker=endpoints.broker, database_url=endpoints.writer_url, **settings)
        topics.ensure_topics(endpoints.broker, topics.topic_configs(known), known.partitions)
        reader = connect_engine(endpoints.reader_url)
        _refuse_used(reader, folder)
        yield Stage(known, endpoints, reader)
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


@contextmanager
def running(stage: Stage, name: str, **variables: str) -> Iterator[Process]:
    """One of our commands, ready, while the block runs. Raises DemoFailed when it ends otherwise than it should."""
    with Process((name,), stage.variables() | variables, stage.settings.home / f"{name}.log") as process:
        process.wait_ready()
        yield process
        process.check()
        if (code := process.stop()) != 0:
            raise DemoFailed(f"the {name} ended with exit code {code} instead of 0")


def until(what: str, condition: Callable[[], bool], *processes: Process) -> None:
    """Wait for something while these processes live. Raises DemoFailed."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while not condition():
        for process in processes:
            process.check()
        if time.monotonic() > deadline:
            raise DemoFailed(f"waited {SETTLE_SECONDS:.0f} s for {what}")
        time.sleep(0.1)
