"""The pulse of a worker or trainer: a file that it touches while it gets work done, for health checks beside it."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path

BEAT_SECONDS = 1.0
STALE_SECONDS = 30.0  # a micro-batch takes less than one; waiting for database or broker beats on
_FORGOTTEN_SECONDS = 86_400.0


@dataclass(frozen=True, slots=True)
class Pulse:
    """A worker or trainer of this machine, and how long ago it was last known to work."""

    process_id: int
    seconds: float

    @property
    def stale(self) -> bool:
        """Whether it hangs."""
        return self.seconds > STALE_SECONDS


class Heartbeat:
    """The file of this process, `HOME/workers/HOST-PID`; containers that share a home have names of their own."""

    def __init__(self, home: Path) -> None:
        """Nothing is written before the first beat."""
        self._file = _folder(home) / f"{socket.gethostname()}-{os.getpid()}"
        self._beaten_at = -BEAT_SECONDS

    def beat(self) -> None:
        """Say that work gets done; cheap, to be called often."""
        if time.monotonic() - self._beaten_at < BEAT_SECONDS:
            return
        self._beaten_at = time.monotonic()
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self._file.touch()

    def end(self) -> None:
        """Take the file away, and those that killed workers left long ago."""
        self._file.unlink(missing_ok=True)
        for file in self._file.parent.glob("*"):
            if time.time() - file.stat().st_mtime > _FORGOTTEN_SECONDS:
                file.unlink(missing_ok=True)


def pulses(home: Path) -> list[Pulse]:
    """The running workers and trainers of this machine and home."""
    now, files = time.time(), _folder(home).glob(f"{socket.gethostname()}-*")
    found = [Pulse(int(file.name.rpartition("-")[2]), max(0.0, now - file.stat().st_mtime)) for file in files]
    return sorted((pulse for pulse in found if _runs(pulse.process_id)), key=lambda pulse: pulse.process_id)


def _folder(home: Path) -> Path:
    return home / "workers"


def _runs(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # somebody else's, but it runs
    return True
