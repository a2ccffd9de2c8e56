"""Named places where a test can make the process crash, fail or wait. Off, and one dictionary look-up, by default."""

from __future__ import annotations

import os
import signal
import time

_armed: dict[str, str] = {}


class FailpointReached(Exception):
    """An armed failpoint said `error`."""


def arm(specification: str) -> None:
    """Arm `name=crash|error|sleep:ms,…` (INNERLOOP_FAILPOINTS); replaces what was armed before."""
    _armed.clear()
    for part in filter(None, specification.split(",")):
        name, _, action = part.strip().partition("=")
        _armed[name] = action


def reach(name: str) -> None:
    """Do what is armed at this place, if anything."""
    if name not in _armed:
        return
    action, _, milliseconds = _armed[name].partition(":")
    if action == "crash":
        os.kill(os.getpid(), signal.SIGKILL)
    if action == "error":
        raise FailpointReached(name)
    time.sleep(int(milliseconds) / 1000)
