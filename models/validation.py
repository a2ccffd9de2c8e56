"""What validation users decide: weights, memory, repeats, inner step, gate and calibration of a version to be.

Tables are fitted on the window's earlier part and judged by a prequential replay of the later one, on users that were
not fitted. What does not win there is switched off. Letters: N items, B buckets of K, P parts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models import (
    gate_tuning,
    inner_tuning,
    item_biases,
    memory_tuning,
    pair_judgement,
    popularity_tuning,
    repeat_fitting,
    scene_tuning,
)
from models.calibration import calibrate
from models.episodes import History, earlier
from models.figures import interval, query_ranks, set_ndcg, surely_gain, user_means
from models.item_tables import assemble_items
from models.learner_tuning import Learnt, Method, fit_learner
from models.learners import HONEST
from models.memories import Memories
from models.meta_parameters import MetaParameters
from models.part_weights import Sample, Weighed, sampled, weigh
from models.ranker import Ranker
from models.replay import Moments, Replay, prediction_moments, replay_side_by_side, replay_start
from models.table_fitting import Choices, Window, fit
from models.validation_users import SHARED_LOGITS, limited, split

MEMORIES = (0.0, 0.3, 0.6, 1.6)  # powers of the recipe's decays; 0 never forgets

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Later:
    """A window's later part: its events from number `cut` on, and a mask of those whose users have none before."""

    window: Window
    cut: int
    unseen: Tensor
    tell: Progress

    @classmethod
    def of(cls, window: Window, tell: Progress) -> Later:
        """Split a window, whole users at random as far as their predictions fit into memory."""
        cut, unseen = split(window.interactions)
        return cls(window, cut, limited(window.interactions, unseen, window.seed), tell)

    def ranker(self, parameters: MetaParameters) -> Ranker:
        """A ranker over the window's items."""
        rows = torch.arange(len(self.window.item_ids))
        return Ranker(parameters, assemble_items(parameters, self.window.text_embeddings, rows))

    def replay(self, ranker: Ranker) -> Replay:
        """Predict the unseen users' events."""
        progress = partial(self.tell, "replay the later part")
        return replay_start(ranker, self.window.interactions, self.cut, self.unseen, progress)


def validate(later: Later, neutral: Choices, method: Method) -> tuple[Choices, dict[str, Any]]:
    """Choose everything that validation decides, and report on it; the rest stays as in `neutral`."""
    popular = _popularity(later, neutral)
    neutral = replace(neutral, item_bias=torch.zeros_like(neutral.item_bias), half_life=popular.half_life)
    half = _half(later, neutral)
    pairs = _pairs(later, half)
    neutral = replace(neutral, pairs_online=pairs.pays)
    fitted, weighed, mixed = _start(later, neutral, _earlier_sample(later, half, neutral))
    ranker, again = later.ranker(fitted), repeat_fitting.OFF
    if neutral.recommend_seen:
        again = repeat_fitting.tune(*_returning(later, ranker), seed=later.window.seed)
        weights = fitted.part_weights * again.temperatures[:, None]
        fitted = replace(fitted, part_weights=weights, repeat_profile=again.profile, repeat_shares=again.shares)
        ranker = later.ranker(fitted)
    ranker, replay, adapted, biases = _adaptation(later, ranker, method)
    making_new = partial(later.tell, "try a scene made new")
    shares = scene_tuning.tune(ranker.parameters, later.window, later.cut, progress=making_new)
    choices = replace(
        neutral,
        weights=ranker.parameters.part_weights,
        memories=Memories.of(ranker.parameters),
        repeat_profile=again.profile,
        repeat_shares=again.shares,
        scene_shares=shares.by_bucket,
        tuned=adapted.tuned,
        learnt=adapted.learnt,
        gate=adapted.judged.gate,
        calibration=calibrate(replay, seed=later.window.seed),
        moments=adapted.moments,
        item_bias=biases.by_item,
    )
    gains = {
        "gain_of_half_life": popular.gain,
        "gain_of_online_pairs": pairs.gain,
        "gain_of_memories": mixed.gain,
        "gain_of_repeats": again.gain,
        "gain_of_inner_step": adapted.tuned.gain,
        "gain_of_gate": adapted.judged.gain,
        "gain_of_item_biases": biases.gain,
        "gain_in_new_scenes": shares.gain,
    }
    figures = user_means(set_ndcg(query_ranks(replay.start, replay.query)), replay.users)
    start = {
        "validation_events": len(replay.targets),
        "start_set_ndcg": interval(figures, seed=later.window.seed).as_list(),
        **{name: gain.as_list() for name, gain in gains.items()},
        "parts_off": list(weighed.parts_off),
    }
    return choices, start | _told(choices, adapted.judged, method)


def _told(choices: Choices, judged: gate_tuning.Judged, method: Method) -> dict[str, Any]:
    """Report what was chosen."""
    tuned, memories = choices.tuned, choices.memories
    decays = [[round(decay, 3) for decay in row] for row in memories.decays.tolist()]
    mixture = {"discount": memories.discount, "rate": memories.rate, "caution": memories.caution}
    off = "one: a mixture does not win on validation users"
    return {
        "half_life": choices.half_life,
        "pairs_online": "on" if choices.pairs_online else "off: they do not pay on validation users",
        "part_weights": [[round(w, 3) for w in row] for row in choices.weights.tolist()],
        "part_decays": decays[0],
        "memories": {"other_decays": decays[1:], **mixture} if len(memories) > 1 else off,
        "scene_shares": [round(share, 3) for share in choices.scene_shares.tolist()],
        **method._asdict(),
        "inner_step": "on" if tuned.pays else "off: it does not pay on validation users",
        "inner_settings": {"tau": tuned.tau, "discount": tuned.discount, "precision": tuned.precision},
        "gate": {"discount": judged.gate.discount, "credit": judged.gate.credit},
        "gated_share": judged.gated_share,
    }


def _popularity(later: Later, neutral: Choices) -> popularity_tuning.Tuned:
    """How fast popularity is forgotten: first, for all else is judged beside it."""
    interactions = later.window.interactions
    return popularity_tuning.tune(
        interactions,
        later.cut,
        split(interactions)[1],  # nothing is kept of its predictions, so everybody can be asked
        neutral.half_life,
        recommend_seen=neutral.recommend_seen,
        seed=later.window.seed,
        progress=partial(later.tell, "choose popularity's half-life"),
    )


def _start(
    later: Later, neutral: Choices, earlier_sample: Sample
) -> tuple[MetaParameters, Weighed, memory_tuning.Mixed]:
    """Fit the tables on the earlier part, and choose how parts are weighed and how fast they are forgotten."""
    later.tell("fit tables on the earlier part", 0, 1)
    fitted = fit(later.window.before(later.cut), neutral)
    later.tell("fit tables on the earlier part", 1, 1)
    weighed = _weighed(later, fitted, earlier_sample)
    mixed = _memories(later, replace(fitted, part_weights=weighed.weights))
    if not torch.equal(mixed.memories.decays[0], fitted.part_decays):
        weighed = _weighed(later, replace(fitted, part_decays=mixed.memories.decays[0]), earlier_sample)
    return replace(fitted, part_weights=weighed.weights, **mixed.memories.fields()), weighed, mixed


def _weighed(later: Later, fitted: MetaParameters, earlier_sample: Sample) -> Weighed:
    window, progress = later.window, partial(later.tell, "weigh the parts")
    sample = sampled(later.ranker(fitted), window.interactions, later.cut, later.unseen, seed=window.seed)
    return weigh(fitted.part_weights, fitted.parts, sample, earlier_sample, progress, seed=window.seed)


class _Half(NamedTuple):
    """Tables fitted before the second half of the users begins (event number `cut`), and a mask of their events."""

    cut: int
    unseen: Tensor
    fitted: MetaParameters


def _half(later: Later, neutral: Choices) -> _Half:
    later.tell("fit tables on the first half", 0, 1)
    cut, unseen = split(later.window.interactions, pair_judgement.FIT_SHARE)
    fitted = fit(later.window.before(cut), neutral)
    later.tell("fit tables on the first half", 1, 1)
    return _Half(cut, unseen, fitted)


def _earlier_sample(later: Later, half: _Half, neutral: Choices) -> Sample:
    """Events before the later part of users who begin after the first half has, pairs counted as they will be."""
    ranker = later.ranker(replace(half.fitted, pairs_online=neutral.pairs_online))
    interactions = later.window.before(later.cut).interactions
    mask = limited(interactions, half.unseen[: later.cut], later.window.seed)
    return sampled(ranker, interactions, half.cut, mask, seed=later.window.seed)


def _pairs(later: Later, half: _Half) -> pair_judgement.Judged:
    """Judge whether pairs are counted online."""
    window, progress = later.window, partial(later.tell, "judge pairs counted online")
    ranker = later.ranker(half.fitted)
    return pair_judgement.judge(ranker, window.interactions, half.cut, half.unseen, progress, seed=window.seed)


def _memories(later: Later, parameters: MetaParameters) -> memory_tuning.Mixed:
    """How long the start remembers. One replay serves all lengths: they read the same tables, supports and priors.

    How long is best alone is decided by users who were not fitted. Whether to mix is decided by everybody's later
    events: long histories, in which tastes have had the time to change, are those of users who came early.
    """
    window = later.window
    choices = [parameters.part_decays, *(window.recipe.decays**power for power in MEMORIES)]
    items, none = later.ranker(parameters).items, parameters.memory_decays[:0]
    rankers = [Ranker(replace(parameters, part_decays=decays, memory_decays=none), items) for decays in choices]

    def replays(mask: Tensor, most_logits: int, stage: str) -> list[Replay]:
        mask = limited(window.interactions, mask, window.seed, most_logits)
        return replay_side_by_side(rankers, window.interactions, later.cut, mask, partial(later.tell, stage))

    best = memory_tuning.surest_alone(replays(later.unseen, SHARED_LOGITS // 3, "choose the length of memory"))
    everybody = torch.arange(len(window.interactions)) >= later.cut
    asked = replays(everybody, SHARED_LOGITS // 2, "mix memories")
    return memory_tuning.mix(asked, choices, best=best, seed=window.seed)


def _returning(later: Later, ranker: Ranker) -> tuple[Replay, Tensor]:
    """Predict all events of the later part, with their supports [E, S].

    What users return to depends on nothing that was fitted before.
    """
    window, interactions = later.window, later.window.interactions
    mask = limited(interactions, torch.arange(len(interactions)) >= later.cut, window.seed, SHARED_LOGITS)
    replay = replay_start(ranker, interactions, later.cut, mask, partial(later.tell, "fit repeats"))
    history = History.of(interactions.users)
    return replay, earlier(history, interactions.items, replay.events, window.support_size)


def judge_listing(later: Later, neutral: Choices) -> pair_judgement.Judged:
    """Whether lists may hold what a user has had: by everybody's later events, where few of them take an item again."""
    later.tell("judge lists of what was had", 0, 1)
    ranker = later.ranker(fit(later.window.before(later.cut), replace(neutral, recommend_seen=True)))
    replay, support = _returning(later, ranker)
    found = repeat_fitting.tune(replay, support, seed=later.window.seed)
    interactions = later.window.interactions
    had = earlier(History.of(interactions.users), interactions.items, replay.events, int(replay.num_events.max()))
    gains = repeat_fitting.gains_of_listing(replay, support, had, found)
    later.tell("judge lists of what was had", 1, 1)
    return pair_judgement.Judged(interval(gains, seed=later.window.seed), surely_gain(gains))


class _Adapted(NamedTuple):
    """How users are adapted: the honest step's settings or a fitted learner, its gate, the start's moments."""

    tuned: inner_tuning.Tuned
    learnt: Learnt | None
    judged: gate_tuning.Judged
    moments: Moments


def _adaptation(later: Later, ranker: Ranker, method: Method) -> tuple[Ranker, Replay, _Adapted, item_biases.Biases]:
    """Adapt users, then find the items' biases; with the ranker and its predictions as both leave them.

    In this order: what adapts users is judged by errors, of which biases from the same users would hide too many.
    """
    replay = later.replay(ranker)
    adapted = _adapted(later, ranker, replay, method)
    biases = item_biases.tune(replay, seed=later.window.seed)
    if bool(biases.by_item.any()):
        ranker = later.ranker(replace(ranker.parameters, item_bias=biases.by_item))
        replay = later.replay(ranker)
        adapted = adapted._replace(moments=prediction_moments(replay, adapted.tuned.tau))
    return ranker, replay, adapted, biases


def _adapted(later: Later, ranker: Ranker, replay: Replay, method: Method) -> _Adapted:
    """Tune the honest step, or fit a learner, and then the gate."""
    window, factors = later.window, ranker.items.vectors[:, -ranker.state_size :]
    seed = window.seed
    if method.learner == HONEST:
        tuned = inner_tuning.tune(replay, factors, seed=seed, progress=partial(later.tell, "tune the inner step"))
        moments = prediction_moments(replay, tuned.tau)
        return _Adapted(tuned, None, gate_tuning.tune(replay, factors, tuned, moments, seed=seed), moments)
    progress = partial(later.tell, f"fit the learner ({method.learner})")
    learnt = fit_learner(method, ranker, window.interactions, replay, first=later.cut, seed=seed, progress=progress)
    tuned, judged = learnt.tuned, gate_tuning.UNJUDGED
    if tuned.pays:
        judged = gate_tuning.judge(replay, learnt.deviation, learnt.basis, tau=tuned.tau, seed=seed)
    return _Adapted(tuned, learnt, judged, prediction_moments(replay, tuned.tau))
