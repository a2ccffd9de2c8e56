"""What a trainer learns from and judges on: a request's window of the topic, cut in two, without forgotten users."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from pipeline import training_data
from pipeline.requests import Request
from pipeline.settings import Settings
from pipeline.stages import Stages
from pipeline.training_data import NothingToLearn, Recorded
from schemas.mapping import load_mapping


@dataclass(frozen=True)
class Part:
    """A window cut in two: positives before `cut_ms` are learnt from, the events from there on judge."""

    events: list[Recorded]
    cut_ms: int


def read(
    settings: Settings, broker: str, window_ms: tuple[int, int], erased: dict[str, int], progress: Stages
) -> list[Recorded]:
    """A window's events, all later ones, and its users' histories from before."""
    found = training_data.window_and_history(
        broker,
        settings.topic_interactions,
        load_mapping(settings.mapping) if settings.mapping else None,
        window_ms=window_ms,
        erased=erased,
        progress=lambda done: progress("read the window", done, None),
    )
    progress("read the window", len(found), len(found))
    return found


def cut(events: list[Recorded], request: Request, holdout: float) -> Part:
    """Keep the newest share of a request's window for judging. Raises NothingToLearn."""
    inside = [one.timestamp_ms for one in events if request.window_from_ms <= one.timestamp_ms < request.window_to_ms]
    if not inside:
        raise NothingToLearn("the window of the request holds no event that the broker still has")
    return Part(events, inside[int((1 - holdout) * len(inside))])


def erased_since(users: AbstractSet[str], before: Mapping[str, int], now: Mapping[str, int]) -> dict[str, int]:
    """Mark a version that has learnt from users who asked to be forgotten while it was trained."""
    meanwhile = {user for user, asked_ms in now.items() if asked_ms > before.get(user, -1)}
    return {"erased_before": len(before), "erased_meanwhile": len(meanwhile & users)}
