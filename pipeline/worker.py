"""`innerloop worker`: a process that waits for its parts, works until it is told to stop, and ends by an exit code.

What is read goes through the intake to the loop, in one thread. On anything unexpected the process ends: the position
is in the database, and the restart goes on from there.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

import structlog
from sqlalchemy.exc import OperationalError

from pipeline import arithmetic
from pipeline.agreement import Agreement, deciding
from pipeline.failpoints import arm
from pipeline.heartbeat import Heartbeat
from pipeline.logs import quieten_logs
from pipeline.loop import Loop
from pipeline.session import SESSION, Fenced, StoreUnavailable
from pipeline.settings import Settings
from pipeline.store import Store
from pipeline.topics import check_access, check_topics
from pipeline.worker_erasures import AWAY, Granting
from pipeline.worker_intake import Intake
from pipeline.worker_sources import empty_adaptation, version_sources
from schemas.database import check_role, check_schema, connect_engine
from schemas.errors import ConfigurationError
from schemas.events import parse_interaction
from schemas.mapping import load_mapping

if TYPE_CHECKING:
    from sqlalchemy import Engine

log = structlog.get_logger()
T = TypeVar("T")

OK, FAILED, FENCED, CONFIGURATION = 0, 1, 3, 78
DRAIN_SECONDS = 7.0  # then 2.5 for the broker: ten seconds in all
STATS_SECONDS = 1.0
AGREE_SECONDS = 5.0


def run(settings: Settings) -> int:
    """Run a worker until SIGTERM or SIGINT; gives the exit code."""
    quieten_logs()
    arm(settings.failpoints)
    arithmetic.prepare(settings.torch_threads)
    try:
        return asyncio.run(_Worker(settings).run())
    except ConfigurationError as error:
        log.error("stopped: configuration", reason=str(error))  # noqa: TRY400 - the sentence is for an operator
        return CONFIGURATION
    except Fenced as error:
        log.error("stopped: fenced, another worker holds the partition", reason=str(error))  # noqa: TRY400 - as above
        return FENCED
    except StoreUnavailable:
        return OK  # told to stop while the database was away


class _Worker:
    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.thread = ThreadPoolExecutor(1, "innerloop")
        self.stopped = asyncio.Event()
        self.failure: BaseException | None = None
        self.heartbeat = Heartbeat(settings.home)

    async def run(self) -> int:
        event_loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            event_loop.add_signal_handler(number, self._stop)
        self.broker, url = self.settings.connection("writer")
        self.engine = connect_engine(url, options=SESSION)
        self.loop = build_loop(self.settings, self.engine)
        self.loop.patiently.alive = self.heartbeat.beat
        await self._until_there(self._check_database)
        self.agreement = Agreement(self.engine, deciding(self.settings.shown(), self.settings.mapping))
        await self._until_there(self.agreement.hold)
        await self._until_there(self._check_broker)
        self.granting = Granting(self.settings, self.engine, self.broker)
        await self._until_there(self.granting.catch_up)
        await self._in_thread(self.loop.wait_for_version)
        if self.stopped.is_set():
            self.heartbeat.end()
            return OK
        return await self._consume()

    async def _consume(self) -> int:
        self.intake = Intake(self.loop, self.settings, self.broker, in_thread=self._in_thread, fail=self._fail)
        self.app = self.intake.app
        steps = (self.intake.pump(), self._follow(), self._report(), self._watch(), self._agree(), self.granting.run())
        tasks = [asyncio.create_task(step) for step in steps]
        for task in tasks:
            task.add_done_callback(self._ended)
        gc.collect()
        gc.freeze()  # what is there stays: walking through it takes 100 ms and more, amid the stream
        await self.app.start()
        await self.stopped.wait()
        return await self._end(tasks)

    async def _follow(self) -> None:
        """Follow versions and catalogue also while nothing is consumed."""
        while True:
            await asyncio.sleep(0.5)
            await self._in_thread(self.loop.follow)
            self.heartbeat.beat()  # both the event loop and the thread get work done

    async def _report(self) -> None:
        while True:
            await asyncio.sleep(STATS_SECONDS)
            measures = self.loop.measures
            if not measures.num_events:
                continue
            self.loop.measures = type(measures)()
            held = len(self.loop.adaptation.table)
            log.info("stats", **measures.fields(), users_held=held, cpu_seconds=round(time.process_time(), 2))

    async def _agree(self) -> None:
        """Hold on to the agreement: after a restart of the database others may come first."""
        while True:
            await asyncio.sleep(AGREE_SECONDS)
            with contextlib.suppress(StoreUnavailable):
                await asyncio.to_thread(self.agreement.hold)

    async def _watch(self) -> None:
        """End with Faust: a crashed part of it would leave a worker that looks alive and consumes nothing."""
        while not self.app.crashed:
            await asyncio.sleep(0.2)
        raise RuntimeError("Faust crashed") from self.app.crash_reason

    async def _end(self, tasks: list[asyncio.Task[None]]) -> int:
        """Commit the batch in hand, tell Kafka how far we are, leave. Ten seconds at most."""
        self.loop.patiently.stopping = True
        if self.failure is None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.intake.drain(), DRAIN_SECONDS)
        for task in tasks:
            task.cancel()
        code = self._exit_code()
        with contextlib.suppress(Exception):  # the position is durable; what is left is courtesy to the broker
            if code == OK:
                await asyncio.wait_for(self.app.consumer.commit(), 1.0)
            await asyncio.wait_for(self.app.stop(), 1.5)
        log.info("stopped", code=code)
        self.heartbeat.end()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # threads of the consumer may hang on a broker that is away

    def _exit_code(self) -> int:
        # The database being away ends a step only when the worker is told to stop: nothing is lost by going.
        if self.failure is None or isinstance(self.failure, StoreUnavailable):
            return OK
        known = {ConfigurationError: CONFIGURATION, Fenced: FENCED}
        code = next((code for kind, code in known.items() if isinstance(self.failure, kind)), FAILED)
        if code == FAILED:
            log.error("stopped: unexpected", exc_info=self.failure)
        else:
            log.error("stopped", reason=str(self.failure), code=code)
        return code

    def _stop(self) -> None:
        self.loop.patiently.stopping = True
        self.stopped.set()

    def _fail(self, error: BaseException) -> None:
        self.failure = self.failure or error
        self.stopped.set()

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail(error)

    async def _in_thread(self, step: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self.thread, step)

    async def _until_there(self, check: Callable[[], None]) -> None:
        """Wait for the database or the broker, saying so once."""
        said = False
        while not self.stopped.is_set():
            try:
                return await self._in_thread(check)
            except (*AWAY, OSError, OperationalError) as away:
                if not said:
                    log.warning("waiting", reason=str(away).split("\n")[0])
                said = True
                self.heartbeat.beat()
                with contextlib.suppress(TimeoutError):  # never more than one try a second
                    await asyncio.wait_for(self.stopped.wait(), random.uniform(1.0, 2.0))  # noqa: S311 - jitter

    def _check_database(self) -> None:
        check_schema(self.engine)
        check_role(self.engine, "writer")

    def _check_broker(self) -> None:
        names = [self.settings.topic_interactions, self.settings.topic_items, self.settings.topic_erasures]
        check_topics(self.broker, names, self.settings.partitions)
        check_access(self.broker, names[:2], self.settings.group)


def build_loop(settings: Settings, engine: Engine) -> Loop:
    """A loop over empty memory, as the settings say."""
    mapping = load_mapping(settings.mapping) if settings.mapping else None
    return Loop(
        Store(engine, id_horizon=settings.dedup_events, seen_horizon=settings.seen_items),
        empty_adaptation(settings, settings.cache_users),
        version_sources(settings, engine),
        topics=(settings.topic_interactions, settings.topic_items),
        parse=lambda key, value, at: parse_interaction(key, value, at, mapping=mapping),
        dead_letter_limit=(settings.dead_letter_limit, settings.dead_letter_window),
        accept_data_gap=settings.accept_data_gap,
    )
