"""The outer loop: from a window of interactions to meta-parameters.

The tables are fitted on the window's earlier part; weights, inner step and calibration are chosen by a prequential
replay of the later part, on users that were not fitted; then the tables are fitted again on everything.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from models import gate_tuning, inner_tuning, popularity, repeat_fitting
from models.calibration import calibrate
from models.episodes import History, Interactions, earlier
from models.figures import interval, query_ranks, set_ndcg, surest, user_means
from models.gate import Gate
from models.item_fitting import PARTS
from models.item_tables import assemble_items
from models.learner_tuning import Learnt, Method, fit_learner
from models.learners import HONEST
from models.meta_parameters import MetaParameters
from models.part_weights import INITIAL_WEIGHTS, weigh
from models.ranker import Ranker
from models.recipe import DEFAULT, Recipe
from models.replay import Replay, prediction_moments, replay_start
from models.table_fitting import Choices, Window, fit, popularity_moments

MAX_ITEMS = 10_000  # dense [N, N] matrices: 400 MB each
FIT_SHARE = 0.75  # of the users by first event; the others' first events begin the validation part
MIN_VALIDATION_USERS = 20
MAX_LOGITS = 12_000_000  # validation events x items kept in memory
REPEAT_SHARE = 0.2  # of events that take an item again, from which on seen items may be listed

MEMORIES = (0.0, 0.3, 0.6, 1.6)  # powers of the recipe's decays; 0 never forgets

Progress = Callable[[str, int, int], None]


def meta_train(
    interactions: Interactions,
    text_embeddings: Tensor,
    *,
    item_ids: tuple[str, ...],
    encoder: str,
    seed: int = 0,
    support_size: int = 60,
    method: Method = Method(),  # noqa: B008  # a constant of strings
    recipe: Recipe = DEFAULT,
    beginning: MetaParameters | None = None,
    progress: Progress | None = None,
) -> tuple[MetaParameters, dict[str, Any]]:
    """Fit everything on interactions; rows of `text_embeddings` [N, T] and `item_ids` are the items' rows.

    Item rows must be in the bytes order of their ids. Beyond MAX_ITEMS the most popular are fitted, the others are new
    items to the ranker; the report says so. `progress(stage, done, total)` is called as stages advance.
    `method` says what adapts a user, and is switched off where it does not pay. `beginning` is an earlier version to
    start warm from: the search for part weights begins at its, and where too few users are left to validate on, its
    weights, calibration and inner settings stay. Tables are always fitted anew: that takes seconds, and old ones would
    hold on to what has changed. Raises ValueError without an interaction, and for a method that does not exist.
    """
    if len(interactions) == 0:
        raise ValueError("there is nothing to learn from: no positive interaction")
    tell = progress or (lambda _stage, _done, _total: None)
    interactions, kept = _most_popular(interactions)
    text_embeddings, item_ids = text_embeddings[kept], tuple(item_ids[row] for row in kept.tolist())
    window = Window(interactions, text_embeddings, item_ids, encoder, seed, support_size, recipe)
    choices, report = _validate(window, method.checked(), beginning, tell)
    tell("fit tables on everything", 0, 1)
    parameters = fit(window, choices)
    tell("fit tables on everything", 1, 1)
    return parameters, {"events": len(interactions), "items": len(item_ids), "seed": seed, **report}


def _most_popular(interactions: Interactions) -> tuple[Interactions, Tensor]:
    """Interactions with at most MAX_ITEMS items, renumbered, and the rows of these items, ascending."""
    if interactions.num_items <= MAX_ITEMS:
        return interactions, torch.arange(interactions.num_items)
    events = torch.bincount(interactions.items, minlength=interactions.num_items)
    kept = torch.sort(torch.argsort(events, descending=True, stable=True)[:MAX_ITEMS]).values
    number = torch.full((interactions.num_items,), -1)
    number[kept] = torch.arange(MAX_ITEMS)
    chosen = interactions.select(number[interactions.items] >= 0)
    return replace(chosen, items=number[chosen.items], num_items=MAX_ITEMS), kept


def _validate(
    window: Window, method: Method, beginning: MetaParameters | None, tell: Progress
) -> tuple[Choices, dict[str, Any]]:
    """Choose weights, inner step and calibration on users whose first event comes after the earlier part."""
    interactions, seed = window.interactions, window.seed
    repeats = _repeat_share(interactions)
    cut, unseen = _split(interactions)
    num_users = len(torch.unique(interactions.users[unseen]))
    report: dict[str, Any] = {"repeat_share": round(repeats, 4), "validation_users": num_users, "fitted_events": cut}
    neutral = _warmed(
        Choices(
            weights=torch.tensor(INITIAL_WEIGHTS),
            tuned=inner_tuning.OFF,
            gate=gate_tuning.DEFAULT,
            calibration=torch.tensor([[1.5, -7.0]]).repeat(popularity.NUM_BUCKETS, 1),
            moments=popularity_moments(interactions),
            recommend_seen=repeats >= REPEAT_SHARE,
            decays=window.recipe.decays,
            repeat_profile=repeat_fitting.OFF.profile,
        ),
        beginning,
    )
    if num_users < MIN_VALIDATION_USERS:
        inner = "as in the version begun from" if neutral.tuned.pays else "off"
        return neutral, {**report, "inner_step": f"{inner}: too few validation users"}
    tell("fit tables on the earlier part", 0, 1)
    early = window.before(cut)
    fitted = fit(early, neutral)
    tell("fit tables on the earlier part", 1, 1)
    unseen = _limited(interactions, unseen, seed)
    tell("weigh the parts", 0, 1)
    weighed = weigh(_ranker(window, fitted), interactions, cut, unseen, seed=seed)
    fitted = replace(fitted, pairs_online=weighed.pairs_online)
    decays = _memory(window, replace(fitted, part_weights=weighed.weights), cut, unseen, tell)
    if not torch.equal(decays, fitted.part_decays):
        fitted = replace(fitted, part_decays=decays)
        weighed = weigh(_ranker(window, fitted), interactions, cut, unseen, seed=seed)
    weights, pairs_online = weighed.weights, weighed.pairs_online
    fitted = replace(fitted, pairs_online=pairs_online)
    tell("weigh the parts", 1, 1)
    ranker = _ranker(window, replace(fitted, part_weights=weights))
    replaying = partial(tell, "replay the later part")
    replay, again = replay_start(ranker, interactions, cut, unseen, replaying), repeat_fitting.OFF
    if neutral.recommend_seen:
        again = _repeats(window, ranker, cut)
        weights = weights * again.temperatures[:, None]
        ranker = _ranker(window, replace(fitted, part_weights=weights, repeat_profile=again.profile))
        replay = replay_start(ranker, interactions, cut, unseen, replaying)
    tuned, learnt = _adaptation(method, window, ranker, replay, cut, tell)
    moments = prediction_moments(replay, tuned.tau)
    factors = ranker.items.vectors[:, -ranker.state_size :]
    if learnt and tuned.pays:
        judged = gate_tuning.judge(replay, learnt.deviation, learnt.basis, tau=tuned.tau, seed=seed)
    else:
        judged = gate_tuning.tune(replay, factors, tuned, moments, seed=seed)
    figures = user_means(set_ndcg(query_ranks(replay.start, replay.query)), replay.users)
    report |= {
        "validation_events": len(replay.targets),
        "start_set_ndcg": interval(figures, seed=seed).as_list(),
        "part_decays": [round(decay, 3) for decay in decays.tolist()],
        "gain_of_repeats": again.gain.as_list(),
        "gain_of_inner_step": tuned.gain.as_list(),
        **method._asdict(),
        "inner_step": "on" if tuned.pays else "off: it does not pay on validation users",
        "inner_settings": {"tau": tuned.tau, "discount": tuned.discount, "precision": tuned.precision},
        "gate": {"discount": judged.gate.discount, "credit": judged.gate.credit},
        "gated_share": judged.gated_share,
        "gain_of_gate": judged.gain.as_list(),
        "gain_of_online_pairs": weighed.gain_of_pairs.as_list(),
        "pairs_online": "on" if pairs_online else "off: they hurt on validation users",
        "parts_off": list(weighed.parts_off),
        "part_weights": [[round(w, 3) for w in row] for row in weights.tolist()],
    }
    choices = replace(
        neutral,
        weights=weights,
        pairs_online=pairs_online,
        tuned=tuned,
        learnt=learnt,
        gate=judged.gate,
        calibration=calibrate(replay, seed=seed),
        moments=moments,
        decays=decays,
        repeat_profile=again.profile,
    )
    return choices, report


def _warmed(neutral: Choices, beginning: MetaParameters | None) -> Choices:
    """Choices before validation: those of the version begun from, where it has the same parts."""
    if beginning is None or beginning.parts != PARTS:
        return neutral
    tuned = neutral.tuned
    if beginning.learner == HONEST and beginning.use_inner_step:
        tuned = replace(
            tuned,
            tau=beginning.tau,
            discount=beginning.discount,
            precision=float(beginning.precision.mean()),
            pays=True,
        )
    return replace(
        neutral,
        weights=beginning.part_weights,
        decays=beginning.part_decays,
        repeat_profile=beginning.repeat_profile,
        gate=Gate(beginning.gate_discount, beginning.gate_credit),
        calibration=beginning.calibration,
        tuned=tuned,
    )


def _adaptation(
    method: Method, window: Window, ranker: Ranker, replay: Replay, cut: int, tell: Progress
) -> tuple[inner_tuning.Tuned, Learnt | None]:
    """Tune the honest step, or fit a learner; the replay began at event `cut`."""
    if method.learner == HONEST:
        factors, progress = ranker.items.vectors[:, -ranker.state_size :], partial(tell, "tune the inner step")
        return inner_tuning.tune(replay, factors, seed=window.seed, progress=progress), None
    progress = partial(tell, f"fit the learner ({method.learner})")
    learnt = fit_learner(method, ranker, window.interactions, replay, first=cut, seed=window.seed, progress=progress)
    return learnt.tuned, learnt


def _split(interactions: Interactions) -> tuple[int, Tensor]:
    """Number of the event that begins the later part, and a mask of the later part's events by users unseen before."""
    first = (History.of(interactions.users).position == 0).nonzero()[:, 0]
    cut = int(first[min(int(FIT_SHARE * len(first)), len(first) - 1)])
    number = torch.arange(len(interactions))
    unseen = ~torch.isin(interactions.users, interactions.users[:cut]) & (number >= cut)
    return cut, unseen


def _limited(interactions: Interactions, mask: Tensor, seed: int, most_logits: int = MAX_LOGITS) -> Tensor:
    """Keep whole users, at random, as long as their predictions fit into memory."""
    most = most_logits // interactions.num_items
    users, counts = torch.unique(interactions.users[mask], return_counts=True)
    order = torch.randperm(len(users), generator=torch.Generator().manual_seed(seed))
    kept = users[order][torch.cumsum(counts[order], 0) <= most]
    return mask & torch.isin(interactions.users, kept if len(kept) else users[order[:1]])


def _repeat_share(interactions: Interactions) -> float:
    cells = interactions.users * interactions.num_items + interactions.items
    distinct = len(torch.unique(cells))
    return 1.0 - distinct / len(interactions)


def _memory(window: Window, parameters: MetaParameters, cut: int, unseen: Tensor, tell: Progress) -> Tensor:
    """How long the start remembers: the decays [P] that are surest to rank better than those of the parameters."""
    unseen = _limited(window.interactions, unseen, window.seed, MAX_LOGITS // 3)
    choices = [parameters.part_decays, *(window.recipe.decays**power for power in MEMORIES)]
    figures = []
    for number, decays in enumerate(choices):
        tell("choose the length of memory", number, len(choices))
        ranker = _ranker(window, replace(parameters, part_decays=decays))
        replay = replay_start(ranker, window.interactions, cut, unseen, lambda _done, _total: None)
        figures.append(user_means(set_ndcg(query_ranks(replay.start, replay.query)), replay.users))
    tell("choose the length of memory", len(choices), len(choices))
    return choices[surest(torch.stack(figures))]


def _repeats(window: Window, ranker: Ranker, cut: int) -> repeat_fitting.Repeats:
    """Fit repeats on all events from `cut` on: what a user returns to depends on nothing that was fitted before."""
    interactions = window.interactions
    later = _limited(interactions, torch.arange(len(interactions)) >= cut, window.seed)
    replay = replay_start(ranker, interactions, cut, later, lambda _done, _total: None)
    support = earlier(History.of(interactions.users), interactions.items, replay.events, window.support_size)
    return repeat_fitting.tune(replay, support, seed=window.seed)


def _ranker(window: Window, parameters: MetaParameters) -> Ranker:
    return Ranker(parameters, assemble_items(parameters, window.text_embeddings, torch.arange(len(window.item_ids))))
