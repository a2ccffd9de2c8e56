"""Settings of the inner step on validation users, and whether it pays at all.

Letters: E events, N items, F factors, G settings, U users.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

from models.figures import Interval, interval, judged_by_halves, query_ranks, set_ndcg, surely_gain, user_means
from models.inner_loop import InnerStep
from models.replay import Replay, honest_residuals, prediction_moments, start_losses, states_before

TAUS = (1.0, 1.5, 2.0)
LIKELY_TAUS = (0.3, 0.5, 0.7, *TAUS)
DISCOUNTS = (0.97, 0.99, 1.0)
PRECISIONS = (2.0, 4.0, 8.0, 16.0)
TRUST_RADIUS = 1.0
STEP_FROM = 3
_CANDIDATES = 250
_BLOCK = 256


@dataclass(frozen=True)
class Tuned:
    """The chosen setting; `gain` is judged on users that did not choose it (two halves, each chosen by the other)."""

    tau: float
    discount: float
    precision: float
    gain: Interval
    pays: bool


OFF = Tuned(tau=1.5, discount=0.97, precision=10.0, gain=Interval(0.0, 0.0, 0.0), pays=False)


def tune(replay: Replay, factors: Tensor, *, seed: int, progress: Callable[[int, int], None]) -> Tuned:
    """Choose among TAUS x DISCOUNTS x PRECISIONS by the gain in set nDCG@10 over the start.

    Where no step pays, tau decides the losses only, by which versions are judged: it is then the `likeliest`, and no
    accident of the search.
    """
    settings = list(product(TAUS, DISCOUNTS, PRECISIONS))
    contest = Contest.of(replay)
    base = contest.figure(contest.start)
    gains = []
    for tau in TAUS:
        moments = prediction_moments(replay, tau)
        spread, rotation = torch.linalg.eigh(factors.T @ moments.covariance @ factors)
        rotated = factors @ rotation
        centred = (honest_residuals(replay, factors, tau) - moments.item_bias @ factors) @ rotation
        for discount in DISCOUNTS:
            states = states_before(replay.users, centred, discount)
            for precision in PRECISIONS:
                step = inner_step(spread.clamp(min=0.0), precision, tau, discount)
                change = contest.of_candidates(step.deviation(*states, replay.num_events), rotated)
                gains.append(user_means(contest.figure(contest.start + change) - base, replay.users))
                progress(len(gains), len(settings))
    chosen = _choose(torch.stack(gains), settings, seed)
    return chosen if chosen.pays else replace(chosen, tau=likeliest(replay))


def likeliest(replay: Replay) -> float:
    """The tau under which softmax(tau * start) gives what happened the most likelihood, every user weighing alike."""
    losses = [float(user_means(start_losses(replay, tau), replay.users).mean()) for tau in LIKELY_TAUS]
    return LIKELY_TAUS[losses.index(min(losses))]


@dataclass(frozen=True)
class Contest:
    """The start's best candidates and the query, which is all that decides nDCG@10.

    columns, start: [E, C + Q] items and their start's logits; places [E, Q] of the query in them, -1 where none.
    """

    columns: Tensor
    start: Tensor
    places: Tensor

    @classmethod
    def of(cls, replay: Replay) -> Contest:
        """Keep the start's best _CANDIDATES and the query of every event."""
        best = replay.start.topk(min(_CANDIDATES, replay.start.shape[1]), 1)
        wanted = replay.start.gather(1, replay.query.clamp(min=0))
        # a query item among the candidates would be ahead of itself
        twice = (best.indices[:, :, None] == replay.query[:, None]).any(2)
        absent = replay.query < 0
        logits = [best.values.masked_fill(twice, -torch.inf), wanted.masked_fill(absent, -torch.inf)]
        places = torch.arange(best.values.shape[1], best.values.shape[1] + wanted.shape[1]).expand_as(absent)
        columns = torch.cat([best.indices, replay.query.clamp(min=0)], 1)
        return cls(columns, torch.cat(logits, 1), places.masked_fill(absent, -1))

    def of_candidates(self, deviation: Tensor, factors: Tensor) -> Tensor:
        """Change of the candidates' logits [E, C + Q], in blocks that stay in the processor's cache."""
        blocks = zip(torch.split(deviation, _BLOCK), torch.split(self.columns, _BLOCK), strict=True)
        return torch.cat([(rows @ factors.T).gather(1, columns) for rows, columns in blocks])

    def figure(self, logits: Tensor) -> Tensor:
        """Set nDCG@10 [E]."""
        blocks = zip(torch.split(logits, _BLOCK), torch.split(self.places, _BLOCK), strict=True)
        return torch.cat([set_ndcg(query_ranks(rows, places)) for rows, places in blocks])


def inner_step(metric: Tensor, precision: float, tau: float, discount: float) -> InnerStep:
    """The step of a setting, for residuals whose mean has been taken off already; metric [F]."""
    return InnerStep(
        metric=metric,
        precision=torch.full_like(metric, precision),
        residual_mean=torch.zeros_like(metric),
        tau=tau,
        discount=discount,
        trust_radius=TRUST_RADIUS,
        step_from=STEP_FROM,
    )


def _choose(gains: Tensor, settings: list[tuple[float, float, float]], seed: int) -> Tuned:
    """Choose by the mean over users of gains [G, U]; judge by two-fold cross-validation over users."""
    judged, chosen = judged_by_halves(gains, seed)
    return Tuned(*settings[chosen], gain=interval(judged, seed=seed), pays=surely_gain(judged))
