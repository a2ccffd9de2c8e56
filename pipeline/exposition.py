"""The stream's state as Prometheus metrics: what `status` and `drift status` tell, asked anew at every scrape.

One process tells of the whole deployment, because everything it tells is in the database and the broker's offsets.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, generate_latest, start_http_server
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from sqlalchemy import Engine
from sqlalchemy.exc import OperationalError

from pipeline.drift_reading import DriftStatus
from pipeline.reading import Status, status
from schemas.errors import ConfigurationError
from schemas.stream_tables import FATES

PARTITION = ["partition"]


class StreamCollector(Collector):
    """Asks a reader's database, and the broker where there is one."""

    def __init__(self, engine: Engine, broker: str | None, topic: str) -> None:
        """Nothing is asked before the first scrape."""
        self._engine, self._broker, self._topic = engine, broker, topic

    def collect(self) -> Iterator[Metric]:
        """Yield everything that is known; `innerloop_up` alone while the database is away."""
        try:
            found = status(self._engine, self._broker, self._topic)
        except OperationalError:
            found = None
        yield _gauge("up", "Whether the database answers.", found is not None)
        if found:
            yield from _stream(found)
            yield from _partitions(found)
            yield from _monitor(found.watched)


def text_of(collector: StreamCollector) -> str:
    """Everything in Prometheus' text format."""
    return generate_latest(_registry(collector)).decode()


def serve(collector: StreamCollector, host: str, port: int) -> int:
    """Answer scrapes at http://host:port/metrics until SIGTERM or ^C; gives 0.

    Raises ConfigurationError where the port cannot be had.
    """
    stops = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, stops)  # before there are threads, which inherit it
    try:
        server, thread = start_http_server(port, host, _registry(collector))
    except OSError as error:
        raise ConfigurationError(
            f"{host}:{port} cannot be listened on ({error.strerror}); see --host, --port"
        ) from error
    print(f"http://{host}:{server.server_port}/metrics", flush=True)
    signal.sigwait(stops)
    server.shutdown()
    server.server_close()
    thread.join()
    return 0


def _registry(collector: StreamCollector) -> CollectorRegistry:
    registry = CollectorRegistry()
    registry.register(collector)
    return registry


def _stream(found: Status) -> Iterator[Metric]:
    yield _gauge("lag", "Events that no worker has applied yet; absent while the broker is away.", found.lag)
    fresh = GaugeMetricFamily(
        "innerloop_freshness_seconds",
        "From Kafka's timestamp of an event to the transaction of its scores, over the last minute's events.",
        labels=["quantile"],
    )
    if found.freshness:
        fresh.add_metric(["0.5"], found.freshness.p50_ms / 1000)
        fresh.add_metric(["0.99"], found.freshness.p99_ms / 1000)
    yield fresh
    yield _gauge("live_version", "The live meta version; absent while there is none.", found.live_version)
    yield _gauge("users", "Users who have a state.", found.adapters.users)
    yield _gauge("users_gated", "Users served from the start: their adapters lately lost.", found.adapters.gated)
    yield _gauge("users_diverged", "Users whose adapters diverged.", found.adapters.diverged)
    yield _gauge("dead_letters_open", "Dead letters not replayed.", found.dead_letters_open)


def _partitions(found: Status) -> Iterator[Metric]:
    law = "Events by what became of them; together, by the law, the position less the partition's first offset."
    events = CounterMetricFamily("innerloop_events", law, labels=[*PARTITION, "fate"])
    limited = CounterMetricFamily(
        "innerloop_events_rate_limited", "Of those dropped: over their user's limit.", labels=PARTITION
    )
    position = GaugeMetricFamily("innerloop_position", "Offset of the next event to be applied.", labels=PARTITION)
    age = GaugeMetricFamily(
        "innerloop_position_age_seconds", "For how long the position has not moved.", labels=PARTITION
    )
    lag = GaugeMetricFamily("innerloop_partition_lag", "Events that no worker has applied yet.", labels=PARTITION)
    broken = GaugeMetricFamily("innerloop_law_broken", "1 where the law does not hold.", labels=PARTITION)
    now = time.time()
    for one in found.partitions:
        labels = [str(one.partition)]
        for fate in FATES:
            events.add_metric([*labels, fate], getattr(one, fate))
        limited.add_metric(labels, one.rate_limited)
        position.add_metric(labels, one.next_offset)
        age.add_metric(labels, max(0.0, now - one.updated_at.timestamp()))
        if one.lag is not None:
            lag.add_metric(labels, one.lag)
        broken.add_metric(labels, one.broken)
    yield from (events, limited, position, age, lag, broken)


def _monitor(watched: DriftStatus) -> Iterable[Metric]:
    return (
        _gauge("monitor_alive", "1 while a monitor watches.", watched.alive),
        _gauge("monitor_blind", "1 while the monitor cannot tell whether anything drifts.", bool(watched.blind)),
        _gauge("monitor_behind", "Applied events that the monitor has not read.", watched.behind),
        _gauge("drift_case_open", "1 while a case of drift is open.", watched.case_series is not None),
        _gauge("drift_frozen", "1 while operators have frozen retraining.", watched.frozen is not None),
    )


def _gauge(name: str, meaning: str, value: float | None) -> Metric:
    gauge = GaugeMetricFamily(f"innerloop_{name}", meaning)
    if value is not None:
        gauge.add_metric([], value)
    return gauge
