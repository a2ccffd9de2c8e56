"""What passes is waited out: a step is done again while the database is away."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TypeVar

import structlog

from pipeline.forgotten import UserErased
from pipeline.session import StoreUnavailable

log = structlog.get_logger()
T = TypeVar("T")

RETRY_SECONDS = (0.05, 2.0)  # first and longest pause while the database is away


class Patience:
    """Does steps until they succeed; `stopping` ends the waiting, `alive` is called during it."""

    def __init__(self) -> None:
        self.stopping = False
        self.alive: Callable[[], object] = lambda: None

    def __call__(self, step: Callable[[], T], *, again: Callable[[], object] = lambda: None) -> T:
        """Do a step; `again` goes before each repetition, since a step that failed half-way may have moved things.

        Raises:
            StoreUnavailable: the database is away, and the worker is told to stop.

        """
        pause, longest = RETRY_SECONDS
        failed = said = False
        while True:
            try:
                if failed:
                    again()
                return step()
            except UserErased:
                failed = True
            except StoreUnavailable as away:
                if not said:
                    log.warning("the database is away, waiting", reason=str(away))
                failed = said = True
                self.alive()
                time.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311 - jitter, not a secret
                pause = min(longest, pause * 2)
                if self.stopping:
                    raise
