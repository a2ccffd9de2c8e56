"""The outer loop: from a window of interactions to meta-parameters.

The tables are fitted on the window's earlier part; weights, inner step and calibration are chosen by a prequential
replay of the later part, on users that were not fitted; then the tables are fitted again on everything.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from models import gate_tuning, inner_tuning, popularity, repeat_fitting
from models.episodes import Interactions
from models.item_fitting import PARTS
from models.learner_tuning import Method
from models.memories import Memories
from models.meta_parameters import MetaParameters
from models.part_weights import INITIAL_WEIGHTS
from models.table_fitting import Choices, Window, fit, popularity_moments
from models.validation import Later, Progress, judge_listing, validate
from models.validation_users import split

MAX_ITEMS = 10_000  # dense [N, N] matrices: 400 MB each
MIN_VALIDATION_USERS = 20
# Shares of events that take an item again: below the first nothing that was had is listed, from the second on it may
# be; between them validation decides (of a young window's repeats most are still to come).
FEW_REPEATS, MANY_REPEATS = 0.01, 0.2


def meta_train(
    window: Window,
    *,
    method: Method = Method(),  # noqa: B008  # a constant of strings
    beginning: MetaParameters | None = None,
    progress: Progress | None = None,
) -> tuple[MetaParameters, dict[str, Any]]:
    """Fit everything on a window.

    Beyond MAX_ITEMS the most popular are fitted, the others are new items to the ranker; the report says so.
    `progress(stage, done, total)` is called as stages advance. `method` says what adapts a user, and is switched off
    where it does not pay. `beginning` is an earlier version to start warm from: the search for part weights begins at
    its, and where too few users are left to validate on, its weights, calibration and inner settings stay. Tables are
    always fitted anew: that takes seconds, and old ones would hold on to what has changed. Raises ValueError without an
    interaction, and for a method that does not exist.
    """
    if len(window.interactions) == 0:
        raise ValueError("there is nothing to learn from: no positive interaction")
    tell = progress or (lambda _stage, _done, _total: None)
    window = _most_popular(window)
    choices, report = _choices(window, method.checked(), beginning, tell)
    tell("fit tables on everything", 0, 1)
    parameters = fit(window, choices)
    tell("fit tables on everything", 1, 1)
    report["vectors_of_new_items"] = "move with events" if len(parameters.context_map) else "by text alone"
    counted = {"events": len(window.interactions), "items": len(window.item_ids), "seed": window.seed}
    return parameters, counted | report


def _most_popular(window: Window) -> Window:
    """The same with the MAX_ITEMS most popular items at most, and the interactions with them."""
    interactions = window.interactions
    if interactions.num_items <= MAX_ITEMS:
        return window
    events = torch.bincount(interactions.items, minlength=interactions.num_items)
    kept = torch.sort(torch.argsort(events, descending=True, stable=True)[:MAX_ITEMS]).values
    number = torch.full((interactions.num_items,), -1)
    number[kept] = torch.arange(MAX_ITEMS)
    chosen = interactions.select(number[interactions.items] >= 0)
    return replace(
        window,
        interactions=replace(chosen, items=number[chosen.items], num_items=MAX_ITEMS),
        text_embeddings=window.text_embeddings[kept],
        item_ids=tuple(window.item_ids[row] for row in kept.tolist()),
    )


def _choices(
    window: Window, method: Method, beginning: MetaParameters | None, tell: Progress
) -> tuple[Choices, dict[str, Any]]:
    """Validate on users whose first event comes after the earlier part; keep what is neutral where they are too few."""
    repeats = _repeat_share(window.interactions)
    cut, unseen = split(window.interactions)
    num_users = len(torch.unique(window.interactions.users[unseen]))
    report: dict[str, Any] = {"repeat_share": round(repeats, 4), "validation_users": num_users, "fitted_events": cut}
    neutral = _warmed(_neutral(window, recommend_seen=repeats >= MANY_REPEATS), beginning, window.item_ids)
    if num_users < MIN_VALIDATION_USERS:
        inner = "as in the version begun from" if neutral.tuned.pays else "off"
        return neutral, {**report, "inner_step": f"{inner}: too few validation users"}
    later = Later.of(window, tell)
    if FEW_REPEATS <= repeats < MANY_REPEATS:
        listing = judge_listing(later, neutral)
        neutral = replace(neutral, recommend_seen=listing.pays)
        report["gain_of_listing_again"] = listing.gain.as_list()
    choices, found = validate(later, neutral, method)
    return choices, report | found


def _neutral(window: Window, *, recommend_seen: bool) -> Choices:
    """Give the choices where nothing was validated."""
    return Choices(
        weights=torch.tensor(INITIAL_WEIGHTS),
        tuned=inner_tuning.OFF,
        gate=gate_tuning.DEFAULT,
        calibration=torch.tensor([[1.5, -7.0]]).repeat(popularity.NUM_BUCKETS, 1),
        moments=popularity_moments(window.interactions),
        item_bias=torch.zeros(window.interactions.num_items),
        recommend_seen=recommend_seen,
        memories=Memories.single(window.recipe.decays),
        scene_shares=torch.zeros(popularity.NUM_BUCKETS),
        repeat_profile=repeat_fitting.OFF.profile,
        repeat_shares=repeat_fitting.OFF.shares,
        half_life=window.recipe.half_life,
    )


def _warmed(neutral: Choices, beginning: MetaParameters | None, item_ids: tuple[str, ...]) -> Choices:
    """Choices before validation: those of the version begun from, where it has the same parts."""
    if beginning is None or beginning.parts != PARTS:
        return neutral
    return replace(Choices.of(beginning, neutral.moments, item_ids), recommend_seen=neutral.recommend_seen)


def _repeat_share(interactions: Interactions) -> float:
    cells = interactions.users * interactions.num_items + interactions.items
    distinct = len(torch.unique(cells))
    return 1.0 - distinct / len(interactions)
