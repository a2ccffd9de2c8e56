"""A trainer's hold on its request: renewed from a thread of its own while the trainer works."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import structlog
from sqlalchemy import Engine
from sqlalchemy.exc import OperationalError

from pipeline import requests
from pipeline.requests import LeaseLost

log = structlog.get_logger()

RENEWALS = 5  # within the time that a lease lasts: some may fail


@contextmanager
def held(engine: Engine, request: int, owner: str, beat: Callable[[], None]) -> Iterator[threading.Event]:
    """Renew the lease while the block works; the event says that it was lost, `beat` is called at each renewal."""
    done, lost = threading.Event(), threading.Event()

    def renew() -> None:
        while not done.wait(requests.LEASE_SECONDS / RENEWALS):
            beat()
            try:
                requests.renew(engine, request, owner)
            except LeaseLost:
                return lost.set()
            except OperationalError as away:  # the next renewal may reach it
                log.warning("the lease was not renewed", reason=str(away).split("\n")[0])

    thread = threading.Thread(target=renew, name="lease", daemon=True)
    thread.start()
    try:
        yield lost
    finally:
        done.set()
        thread.join()
