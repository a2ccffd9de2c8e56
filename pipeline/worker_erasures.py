"""A worker's part in forgetting: every wish is granted before its first event, and every few seconds from then on."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

import structlog
from kafka.errors import KafkaError
from sqlalchemy import Engine

from pipeline.erasures import Erasures
from pipeline.session import Session, StoreUnavailable
from pipeline.settings import Settings
from pipeline.topics import BrokerUnavailable

log = structlog.get_logger()

EVERY_SECONDS = 10.0
AWAY = (BrokerUnavailable, StoreUnavailable, KafkaError)


class Granting:
    """Grants wishes in a thread of its own: searching the record takes longer than an event may wait."""

    def __init__(self, settings: Settings, engine: Engine, broker: str) -> None:
        self._erasures = Erasures(
            Session(engine), broker, topic=settings.topic_erasures, interactions=settings.topic_interactions
        )
        self._thread = ThreadPoolExecutor(1, "innerloop-erasures")

    def catch_up(self) -> None:
        """Grant what has been asked for. Raises AWAY, WishesLost."""
        done = self._erasures.catch_up()
        if any(vars(done).values()):
            log.info("forgotten", **vars(done))

    async def run(self) -> None:
        """Go on granting; broker and database may be away meanwhile."""
        said = False
        while True:
            await asyncio.sleep(EVERY_SECONDS)
            try:
                await asyncio.get_running_loop().run_in_executor(self._thread, self.catch_up)
                said = False
            except AWAY as away:
                if not said:
                    log.warning("wishes to be forgotten wait", reason=str(away).split("\n")[0])
                said = True
