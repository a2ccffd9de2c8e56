"""(g) Changing versions under load: how fresh scores are while a worker changes over, beside the rest of the run.

The worker is the real one. Versions are registered before; each is made live under way by what `models promote` calls.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline import promotion, registry
from pipeline.artefacts import Artefacts
from pipeline.promotion import Watched
from pipeline.versions import Change
from schemas.database import connect_engine
from tests.benchmarks.end_to_end import QUICK, Plan, running
from tests.benchmarks.keys import TOPIC
from tests.benchmarks.measuring import table
from tests.benchmarks.scene import Options, parameters

SWAP_SECONDS = 2.0  # from the promotion on; a worker looks for versions twice a second
EVENTS = """SELECT t.at, p.meta_version, extract(epoch FROM CASE current_setting('track_commit_timestamp')
        WHEN 'on' THEN pg_xact_commit_timestamp(p.xmin) ELSE p.recorded_at END) * 1000 - t.at
    FROM innerloop.prequential p CROSS JOIN LATERAL unnest(p.record_times) AS t (at) WHERE t.at >= %s"""


def main(options: Options) -> None:
    """Measure at a moderate rate, and print."""
    plan, rate, swaps, pause = (QUICK, 100.0, 1, 3.0) if options.quick else (Plan(), 1000.0, 10, 6.0)
    seconds = pause * (swaps + 1)
    with running(options, plan, "worker") as (consumer, feeder):
        engine = connect_engine(consumer.writer_url)
        on = Watched(engine, Artefacts(consumer.home / "artefacts"), TOPIC)
        for seed in range(1, swaps + 1):
            values = parameters(plan.num_items, seed=seed)
            registry.register(engine, on.artefacts, values, metrics={}, provenance={})
        feeder.prepare(plan.warm_up)
        feeder.begin(rate)
        warm = feeder.finish().num_events
        consumer.wait_for(warm)
        feeder.prepare(int(rate * seconds))
        feeder.begin(rate)
        moments = []
        for version in range(2, swaps + 2):
            time.sleep(pause)
            moments.append(time.time() * 1000)
            promotion.go_live(on, version, Change("benchmark", "a swap"))
        sent = feeder.finish()
        consumer.wait_for(warm + sent.num_events)
        rows = np.array(consumer.query(EVENTS, moments[0] - 1000 * pause / 2), float)
        engine.dispose()
    report(rows, np.array(moments), rate)


def report(rows: NDArray[Any], moments: NDArray[np.float64], rate: float) -> None:
    """Print quantiles of freshness within SWAP_SECONDS of a promotion, and otherwise."""
    since = (rows[:, 0, None] - moments) / 1000
    swapping = ((since >= -0.1) & (since < SWAP_SECONDS)).any(1)
    lines, quantiles = [], {}
    for name, chosen in (("while changing over", swapping), ("otherwise", ~swapping)):
        p50, p99 = np.percentile(rows[chosen, 2], [50, 99])
        quantiles[name] = p99
        lines.append((name, int(chosen.sum()), f"{p50:.0f}", f"{p99:.0f}", f"{rows[chosen, 2].max():.0f}"))
    title = f"{len(moments)} swaps at {rate:.0f} events/s, {len(np.unique(rows[:, 1]))} versions in the record"
    print(table(title, ("", "events", "p50 ms", "p99 ms", "max ms"), lines))
    print(f"p99 while changing over / otherwise: {quantiles['while changing over'] / quantiles['otherwise']:.2f}")
