"""What the last batches of a worker did, for its log."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from models.gate import DIVERGED, GATED, SERVED
from pipeline.batching import MicroBatch
from pipeline.support import Ints


@dataclass(slots=True)
class Measures:
    """Counts, and milliseconds from Kafka's timestamp to the COMMIT."""

    num_events: int = 0
    num_batches: int = 0
    num_adapted: int = 0  # users with an adapter, each time that they were written
    num_gated: int = 0  # of these, whose adapter was not served, since it lost to its start
    num_diverged: int = 0
    num_rate_limited: int = 0
    freshness_ms: list[float] = field(default_factory=list)

    def add(self, batch: MicroBatch, adapter_use: Ints, committed_ms: float) -> None:
        """Count a batch that was committed; `adapter_use` is that of the users written."""
        uses = np.bincount(adapter_use, minlength=DIVERGED + 1)
        self.num_batches += 1
        self.num_adapted += int(uses[SERVED:].sum())
        self.num_gated += int(uses[GATED])
        self.num_diverged += int(uses[DIVERGED])
        self.num_events += sum(move.next_offset - move.start for move in batch.advances)
        self.num_rate_limited += sum(move.rate_limited for move in batch.advances)
        self.freshness_ms += (committed_ms - batch.record_ms).tolist()

    def fields(self) -> dict[str, float]:
        """What a line of the log says of them."""
        p50, p99 = np.percentile(self.freshness_ms, [50, 99]) if self.freshness_ms else (0.0, 0.0)
        return {
            "events": self.num_events,
            "batches": self.num_batches,
            "freshness_p50_ms": round(float(p50), 1),
            "freshness_p99_ms": round(float(p99), 1),
            "gated_share": round(self.num_gated / max(self.num_adapted, 1), 4),
            "diverged": self.num_diverged,
            "rate_limited": self.num_rate_limited,
        }
