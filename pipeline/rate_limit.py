"""How many events of one user are applied: a burst, regained evenly over a minute of Kafka's time.

One user at a third of the traffic must not hold up the others. The rule is the generic cell rate algorithm (ITU-T
I.371): all that is kept of a user is when her events so far would be due at the permitted rate. It reads Kafka's
timestamps and never the clock, so a replay drops the same events.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

WINDOW_US = 60_000_000


@dataclass(frozen=True, slots=True)
class RateLimit:
    """At most `events` of one user in any burst, and as many a minute from then on; times in epoch µs.

    >>> RateLimit(2).admits(0, 5), RateLimit(2).admits(5 + 2 * 30_000_000, 5), RateLimit(2).after(0, 5)
    (True, False, 30000005)
    """

    events: int

    @property
    def interval_us(self) -> int:
        """Between two events at the permitted rate."""
        return WINDOW_US // self.events

    def admits(self, due_us: int, at_us: int) -> bool:
        """Whether an event at this time may be applied."""
        return due_us - at_us + self.interval_us <= WINDOW_US or self._set_back(due_us, at_us)

    def after(self, due_us: int, at_us: int) -> int:
        """What is due once an event has been applied."""
        return (at_us if self._set_back(due_us, at_us) else max(due_us, at_us)) + self.interval_us

    def spend(self, due_us: Ints, slots: Ints, record_ms: Ints) -> None:
        """Move `due_us` [slots] past applied events [E], each user's in order."""
        for slot, at_ms in zip(slots.tolist(), record_ms.tolist(), strict=True):
            due_us[slot] = self.after(int(due_us[slot]), at_ms * 1000)

    def suspects(self, due_us: Ints, slots: Ints, record_ms: Ints) -> set[int]:
        """Slots [E] of which some event might not be admitted, were all before it applied; nearly always none."""
        if not len(slots):
            return set()
        latest = max(int(due_us[slots].max()), int(record_ms.max()) * 1000)
        if latest - int(record_ms.min()) * 1000 + len(slots) * self.interval_us <= WINDOW_US:
            return set()
        due, found = dict[int, int](), set[int]()
        for slot, at_ms in zip(slots.tolist(), record_ms.tolist(), strict=True):
            now, at_us = due.get(slot, int(due_us[slot])), at_ms * 1000
            if now - at_us + self.interval_us > WINDOW_US:
                found.add(slot)
            due[slot] = self.after(now, at_us)
        return found

    def _set_back(self, due_us: int, at_us: int) -> bool:
        # A record from the future must not hold its user up until then.
        return due_us - at_us > 2 * WINDOW_US
