"""`innerloop trainer`: from a request to a challenger, from a challenger to a canary.

A request is held by lease while a thread renews it; whatever kills the trainer, another one takes over, and one
version comes of it. The same process judges challengers, which is as much work; the monitor watches what follows.
What a person made with `meta-train` it leaves alone: which events came after a file nobody knows, so that person
promotes it, at once or with `innerloop models promote N --canary`, and the monitor judges the canary.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
from types import FrameType

import structlog
from sqlalchemy import Engine, text
from sqlalchemy.exc import OperationalError

from pipeline import (
    arithmetic,
    drift_reading,
    meta_training,
    promotion,
    registry,
    requests,
    trainer_window,
    training_data,
    versions,
)
from pipeline.artefacts import Artefacts, ArtefactsUnavailable
from pipeline.failpoints import arm, reach
from pipeline.heartbeat import Heartbeat
from pipeline.judgement import Verdict
from pipeline.logs import quieten_logs
from pipeline.meta_training import Learnt
from pipeline.promotion import Watched
from pipeline.requests import LeaseLost, Request
from pipeline.settings import Settings
from pipeline.stages import Stages, stages
from pipeline.topics import BrokerUnavailable
from pipeline.trainer_judging import Bench, alone, judge
from pipeline.trainer_lease import held
from pipeline.trainer_window import Part, erased_since
from pipeline.training_data import Recorded
from pipeline.versions import Change, NotPossible, Version
from schemas.database import check_role, check_schema, connect_engine
from schemas.errors import ConfigurationError

log = structlog.get_logger()

OK, FAILED = 0, 1
PAUSE_SECONDS = 1.0
EARLIER = 3  # retired versions that are tried before a new one is trained, newest first
TRAINER = "trainer"

_LATER = text("""
    SELECT count(*) FROM innerloop.prequential p, unnest(p.record_times) AS at
    WHERE p.topic = :topic AND p.recorded_at >= to_timestamp(:since_ms / 1000.0) AND at >= :since_ms""")


class _Stopped(Exception):
    """SIGTERM came: give the request back and end."""


def run(settings: Settings, *, once: bool = False) -> int:
    """Work on requests and challengers until SIGTERM, or until nothing is left to do; gives the exit code."""
    quieten_logs()
    arm(settings.failpoints)
    arithmetic.prepare(settings.torch_threads)
    broker, url = settings.connection("writer")
    engine = connect_engine(url, pool_size=4)
    check_schema(engine)
    check_role(engine, "writer")
    with stages() as progress:
        trainer = Trainer(settings, engine, broker, progress)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, trainer.stop)
        print(json.dumps({"event": "ready", "trainer": trainer.name}), flush=True)
        try:
            trainer.work(once=once)
        finally:
            trainer.end()
    engine.dispose()
    return FAILED if once and trainer.num_failed else OK


class Trainer:
    """One trainer and what it holds."""

    def __init__(self, settings: Settings, engine: Engine, broker: str, progress: Stages) -> None:
        self.name = f"{socket.gethostname()}-{os.getpid()}"
        self.num_failed = 0
        self._settings, self._engine, self._broker, self._progress = settings, engine, broker, progress
        self._artefacts = Artefacts(settings.artefacts_place())
        self._on = Watched(engine, self._artefacts, settings.topic_interactions)
        self._bench = Bench(settings, engine, self._artefacts, self._tell)
        self._heartbeat = Heartbeat(settings.home)
        self._stopped = threading.Event()
        self._lost = threading.Event()
        self._frozen: str | None = None
        self._waits: dict[int, int] = {}  # challengers that were judged on too few events: on how many

    def stop(self, *_: int | FrameType | None) -> None:
        """End at the next stage; the request in hand goes back."""
        self._stopped.set()

    def end(self) -> None:
        """Leave no pulse behind."""
        self._heartbeat.end()

    def work(self, *, once: bool) -> None:
        """Take what there is to do, one after the other."""
        self._collect()
        while not self._stopped.is_set():
            self._heartbeat.beat()
            try:
                busy = self.turn()
            except _Stopped:
                return
            except (BrokerUnavailable, OperationalError, ArtefactsUnavailable) as away:
                log.warning("waiting", reason=str(away).split("\n")[0])
                busy = False
                if once:
                    self.num_failed += 1
            if not busy and (once or self._stopped.wait(PAUSE_SECONDS)):
                return

    def turn(self) -> bool:
        """Judge a challenger, or else work on a request; False when there was neither, or operators forbid it."""
        if self._is_frozen():
            return False
        with alone(self._engine) as mine:
            if mine and self._judge_next():
                return True
        request = requests.lease(self._engine, self.name, attempts=self._settings.trainer_attempts)
        if request is None:
            return False
        self._answer(request)
        self._collect()
        return True

    def _is_frozen(self) -> bool:
        reason = drift_reading.frozen(self._engine)
        if reason != self._frozen:
            log.info("frozen" if reason else "not frozen any more", reason=reason or self._frozen)
        self._frozen = reason
        return reason is not None

    def _answer(self, request: Request) -> None:
        log.info("request taken", request=request.request, attempt=request.attempts, reason=request.reason)
        try:
            with held(self._engine, request.request, self.name, self._heartbeat.beat) as self._lost:
                version = self._version_for(request)
                requests.finish(self._engine, request.request, self.name, version)
                log.info("request done", request=request.request, version=version)
        except LeaseLost as lost:
            log.warning("left to another trainer", reason=str(lost))
        except (_Stopped, ArtefactsUnavailable):  # not the request's fault
            requests.release(self._engine, request.request, self.name)
            raise
        except (ConfigurationError, ValueError, registry.ArtefactRefused) as wrong:
            log.error("request failed", request=request.request, reason=str(wrong))  # noqa: TRY400 - for an operator
            self.num_failed += 1
            requests.fail(self._engine, request.request, self.name, str(wrong)[:500])
        finally:
            self._lost = threading.Event()  # what comes next is not held by this lease

    def _version_for(self, request: Request) -> int:
        """An earlier version that fits again, or a new one."""
        erased = training_data.erasures_of_topic(self._broker, self._settings.topic_erasures)
        events = self._events((request.window_from_ms, request.window_to_ms), erased)
        part = trainer_window.cut(events, request, self._settings.trainer_holdout)
        if (earlier := self._earlier_that_fits(part)) is not None:
            return earlier
        return self._train(request, part, erased)

    def _earlier_that_fits(self, part: Part) -> int | None:
        """Recurring drift: what went before may fit again, and is judged on the same later events at once."""
        best: tuple[float, Version, Verdict] | None = None
        retired = sorted(versions.listed(self._engine, ["retired"]), key=lambda one: -one.version)
        for version in retired[:EARLIER]:
            try:
                verdict = judge(self._bench, version.version, part.events, since_ms=part.cut_ms)
            except (*registry.UNREADABLE, ConfigurationError) as unreadable:
                log.info("an earlier version is left out", version=version.version, reason=str(unreadable))
                continue
            log.info("an earlier version was tried", version=version.version, verdict=verdict.reason)
            if verdict.good and (best is None or verdict.figures["gain"][0] > best[0]):
                best = verdict.figures["gain"][0], version, verdict
        if best is None:
            return None
        _, version, verdict = best
        return version.version if self._begin_canary(version, verdict, "fits again, nothing was trained; ") else None

    def _train(self, request: Request, part: Part, erased: dict[str, int]) -> int:
        settings = self._settings
        kept = [one.event for one in part.events if request.window_from_ms <= one.timestamp_ms < part.cut_ms]
        window = training_data.collect(kept, meta_training.weight_of_types(settings), lambda _: self._check())
        parent, beginning = registry.load_live(self._engine, self._artefacts)
        learnt = meta_training.learn(
            settings,
            window,
            training_data.texts_of_topic(self._broker, settings.topic_items),
            method=meta_training.method_of(beginning),
            beginning=beginning,
            progress=self._tell,
        )
        now = training_data.erasures_of_topic(self._broker, settings.topic_erasures)
        made = registry.register(
            self._engine,
            self._artefacts,
            learnt.parameters,
            metrics=learnt.report,
            provenance=self._provenance(request, learnt, parent) | erased_since(set(window.users), erased, now),
            window_ms=(request.window_from_ms, part.cut_ms),
            request=request.request,
        )
        reach("after_publish")
        return made.version

    def _provenance(self, request: Request, learnt: Learnt, parent: int) -> dict[str, object]:
        origin = meta_training.provenance(self._settings, None, learnt.columns, 0)
        return {**origin, "begun_from": parent, "reason": request.reason}

    def _events(self, window_ms: tuple[int, int], erased: dict[str, int]) -> list[Recorded]:
        return trainer_window.read(self._settings, self._broker, window_ms, erased, self._tell)

    def _judge_next(self) -> bool:
        """Judge the oldest challenger that enough later events have come for; False when there is none."""
        waiting = [one for one in versions.listed(self._engine, ["challenger"]) if one.window_to_ms is not None]
        for version in reversed(waiting):
            if self._enough_later(version):
                self._judge(version)
                return True
        return False

    def _enough_later(self, version: Version) -> bool:
        with self._engine.connect() as connection:
            wanted = {"topic": self._settings.topic_interactions, "since_ms": version.window_to_ms}
            num = int(connection.scalar(_LATER, wanted) or 0)
        if versions.listed(self._engine, ["canary"]):
            return False  # one at a time
        # too few users, perhaps: once more when a tenth more events have come
        return num >= max(self._settings.promote_events, 1.1 * self._waits.get(version.version, 0))

    def _judge(self, version: Version) -> None:
        erased = training_data.erasures_of_topic(self._broker, self._settings.topic_erasures)
        events = self._events((version.window_from_ms or 0, version.window_to_ms or 0), erased)
        try:
            verdict = judge(self._bench, version.version, events, since_ms=version.window_to_ms or 0)
        except registry.UNREADABLE as unreadable:
            verdict = Verdict(False, str(unreadable), {})
        log.info("judged", version=version.version, good=verdict.good, reason=verdict.reason)
        if verdict.good is None:
            self._waits[version.version] = verdict.figures["events"]
            versions.note(self._engine, version.version, {"waits": verdict.reason})
        elif verdict.good:
            self._begin_canary(version, verdict)
        else:
            versions.reject(self._engine, version.version, Change(TRAINER, verdict.reason), verdict.figures)

    def _begin_canary(self, version: Version, verdict: Verdict, prefix: str = "") -> bool:
        change = Change(TRAINER, prefix + verdict.reason)
        try:
            promotion.begin_canary(self._on, version.version, self._settings.canary_share, change, verdict.figures)
        except NotPossible as overtaken:
            log.warning("no canary", version=version.version, reason=str(overtaken))
            return False
        return True

    def _collect(self) -> None:
        for sha256 in registry.collect_orphans(self._engine, self._artefacts):
            log.info("an unfinished artefact was deleted", sha256=sha256)

    def _tell(self, stage: str, done: int, total: int | None) -> None:
        self._check()
        self._progress(stage, done, total)

    def _check(self) -> None:
        """Between two steps: end when told to, leave what is no longer held."""
        self._heartbeat.beat()
        if self._stopped.is_set():
            raise _Stopped
        if self._lost.is_set():
            raise LeaseLost("the lease ran out while this trainer stood still")
