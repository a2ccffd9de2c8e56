"""What a long-running command logs: its own lines as JSON on stderr, the libraries' warnings seldom."""

from __future__ import annotations

import logging
import sys
import time

import structlog


class _SeldomRepeated(logging.Filter):
    """Lets a message of one kind pass once in ten seconds: a broker that is away would log fifty lines a second."""

    def __init__(self) -> None:
        super().__init__()
        self._passed: dict[tuple[str, str], float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        key, now = (record.name, str(record.msg)), time.monotonic()
        if now - self._passed.get(key, -1e9) < 10.0:
            return False
        self._passed[key] = now
        return True


def quieten_logs() -> None:
    """Send structlog to stderr; the libraries' warnings with it, each kind once in ten seconds."""
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(_SeldomRepeated())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], format="%(levelname)s %(name)s %(message)s")
