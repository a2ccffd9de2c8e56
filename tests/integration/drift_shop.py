"""A shop on real parts whose articles come to mean something else: broker, database, worker, monitor, trainer.

The stream is `pipeline.synthetic`'s, so what happened when is known; visitors come and go. The first part of it is
history, which the first version learns from as a file; the rest is fed block by block, each waited for.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import islice
from typing import Any, Self

from pipeline import meta_training
from pipeline.demo_parts import write_lines
from pipeline.drift_decision import UNKNOWN_GAIN
from pipeline.outbox import Outbox
from pipeline.settings import Settings
from pipeline.synthetic import DAY_MS, Drawn, Drift, Plan, draw_events, item_id
from pipeline.synthetic_messages import Message
from tests.laws.harness import Deployment, Worker, lag, query, send, wait_until

HISTORY, QUIET = 5000, 5000  # events that the first version learns from; then fed before anything happens
VISITORS = 150  # at any time
EVENTS_EACH, PER_DAY = 13, 2000.0
BLOCK, LARGE_BLOCK = 500, 5000  # events between two looks; of a long feed
# A drift of a few thousand events must be enough for everything; `make test-long` keeps the defaults.
QUICK = {
    "drift_labels": 1000, "drift_users": 100, "drift_new_labels": 3000, "promote_events": 500, "promote_users": 50,
    "canary_events": 300,
}  # fmt: skip

BEHIND = """SELECT coalesce(sum(s.applied - coalesce(d.applied, 0)), 0) FROM innerloop.stream_position s
    LEFT JOIN innerloop.drift_positions d USING (topic, partition) WHERE s.topic = 'interactions'"""
LOSS = """SELECT avg(loss_adapted), count(*) FROM innerloop.prequential_events
    WHERE event_time >= to_timestamp(%s / 1000.0) AND event_time < to_timestamp(%s / 1000.0)"""
REQUESTS = "SELECT status, version FROM innerloop.retrain_requests ORDER BY request"
ALARMS = "SELECT record_time, label, series FROM innerloop.drift_alarms WHERE worse ORDER BY alarm"
DECISIONS = "SELECT verdict, reason, (inputs->>'label')::int FROM innerloop.drift_decisions ORDER BY decision"
VERSIONS = """SELECT version, status, request, changed_by, reason, window_to_ms, judgement
    FROM innerloop.meta_versions ORDER BY version"""


def plan(further: int, **changes: Any) -> Plan:
    """A stream with so many events after its history and its quiet part; users arrive one after the other."""
    choices = HISTORY + QUIET + further
    users = choices // EVENTS_EACH
    made = Plan(
        users=users, items=200, choices=choices, activity=0.3, arrivals=1.0, stay=VISITORS / users,
        choices_per_day=PER_DAY, sharpness=5.0, seed=1,
    )  # fmt: skip
    return replace(made, **changes)


def nothing_to_cure(length: int) -> Iterator[Drawn]:
    """History and quiet, then as long each: one visitor in a hundred takes what she likes least; other kinds of events
    on articles that are shown otherwise; choices that are easier to foresee."""
    first = plan(length)
    for drawn in draw_events(first):
        assert drawn.truth is not None
        inverted = drawn.user % 100 == 0 and _number(drawn) >= HISTORY + QUIET
        yield _taking(drawn, int(drawn.truth.argmin())) if inverted else drawn
    shifted = replace(
        first, choices=length, drifts=(Drift(0, "exposure", 0.3),), types=(("purchase", 0.6), ("click", 0.4)),
        daily_rate=0.8,
    )  # fmt: skip
    yield from _continued(draw_events(shifted), "shifted", first.choices)
    easier = replace(first, choices=length, sharpness=8.0)
    yield from _continued(draw_events(easier), "easier", first.choices + length)


def _number(drawn: Drawn) -> int:
    return int(drawn.event["event_id"].removeprefix("c-"))


def _taking(drawn: Drawn, item: int) -> Drawn:
    return replace(drawn, item=item, event=drawn.event | {"item_id": item_id(item)})


def _continued(stream: Iterator[Drawn], who: str, events_before: int) -> Iterator[Drawn]:
    """A stream of other visitors, on the days after so many events."""
    later = math.ceil(events_before / PER_DAY + 1) * DAY_MS
    for drawn in stream:
        own = {name: f"{who}-{drawn.event[name]}" for name in ("event_id", "user_id")}
        yield replace(drawn, event=drawn.event | own | {"ts": drawn.event["ts"] + later})


def meaning_changes(further: int) -> Plan:
    """Every article comes to stand for what another one did, after the quiet part."""
    return plan(further, drifts=(Drift(HISTORY + QUIET, "meaning"),))


class Shop:
    """The parts, and the stream that is fed to them."""

    def __init__(
        self,
        deployment: Deployment,
        of: Iterator[Drawn],
        items: Sequence[dict[str, Any]],
        settings: Mapping[str, Any],
        *,
        trains: bool = True,
    ) -> None:
        self.deployment, self.reader = deployment, deployment.database.reader_url
        self._stream, self._items, self._trains = of, items, trains
        self._parts = ExitStack()
        self.fed = 0
        self.times: list[int] = []  # event times of what was fed
        self._settings = {"drift_seconds": 0.3, **settings}

    def __enter__(self) -> Self:
        """Learn the first version from the history, and start worker, monitor and trainer."""
        deployment = self.deployment
        deployment.make_topics()
        home = deployment.home
        history = [drawn.event for drawn in islice(self._stream, HISTORY)]
        settings = Settings.load(
            broker=deployment.broker, database_url=deployment.database.writer_url, home=home, encoder="hashed:64",
            partitions=4,
        )  # fmt: skip
        made = meta_training.run(
            settings,
            interactions_file=str(write_lines(home / "history.jsonl", history)),
            items_file=str(write_lines(home / "items.jsonl", self._items)),
        )
        assert made.registered.status == "live"
        with Outbox(deployment.broker, "items") as outbox:
            for number, item in enumerate(self._items):
                outbox.send(number, item["item_id"].encode(), json.dumps(item).encode())
        self._parts.enter_context(self._part("worker")).wait_until_ready()
        self.monitor = self._parts.enter_context(self._part("monitor"))
        self.trainer = self._parts.enter_context(self._part("trainer")) if self._trains else None
        return self

    def __exit__(self, *_: object) -> None:
        self._parts.close()

    def _part(self, name: str) -> Worker:
        return Worker(self.deployment, name, words=(name,), **self._settings, batch_events=2048)

    def feed(self, count: int) -> None:
        """Send so many events, and wait until worker and monitor have read them."""
        while count > 0:
            drawn = list(islice(self._stream, min(count, LARGE_BLOCK if count > 4 * LARGE_BLOCK else BLOCK)))
            assert drawn, "the stream has ended"
            self.times += [int(one.event["ts"]) for one in drawn]
            events = [one.event for one in drawn]
            send(
                self.deployment.broker,
                [Message(event["user_id"].encode(), json.dumps(event).encode(), "applied") for event in events],
            )
            count -= len(drawn)
            self.fed += len(drawn)
            wait_until(lambda: lag(self.deployment) == 0)
            wait_until(lambda: query(self.reader, BEHIND) == [(0,)] and not self._probing(), self.monitor)

    def _probing(self) -> bool:
        """Whether the monitor waits for what a refit would gain."""
        newest = self.rows(DECISIONS)[-1:]
        return bool(newest) and newest[0][:2] == ("wait", UNKNOWN_GAIN)

    def feed_until(self, condition: Callable[[], bool], *, most: int) -> bool:
        """Feed until something is the case, or so many events were fed; whether it is."""
        end = self.fed + most
        while not condition() and self.fed < end:
            self.feed(BLOCK)
        return condition()

    def wait(self, condition: Callable[[], bool]) -> None:
        """Wait, with the feed paused, while the trainer works."""
        wait_until(condition, self.trainer)

    def loss(self, first: int, last: int) -> float:
        """Mean loss under the live adapter of the events fed from number `first` on, up to `last`."""
        end = self.times[last] if last < len(self.times) else self.times[-1] + 1
        ((loss, count),) = query(self.reader, LOSS, self.times[first], end)
        assert count >= 0.99 * (min(last, len(self.times)) - first)
        return float(loss)

    def rows(self, statement: str) -> list[tuple[Any, ...]]:
        return query(self.reader, statement)

    @property
    def live(self) -> int:
        ((version,),) = query(self.reader, "SELECT version FROM innerloop.meta_versions WHERE status = 'live'")
        return int(version)
