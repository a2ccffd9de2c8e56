"""A gradient-based learner fitted and judged on validation users, as the honest step is.

Letters: E events of the replay, N items, F inner factors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from models.adapters import adapter_named
from models.episode_sources import ReplayedEpisodes, candidate_episodes, honest_episodes
from models.episodes import Interactions
from models.episodic_training import EpisodeSource, Fitted, Serving, deviations, figures, fit
from models.figures import interval, surely_gain, user_means
from models.inner_tuning import Tuned
from models.learners import HONEST, LEARNERS, RESIDUALS, InnerSteps
from models.ranker import Ranker
from models.replay import Replay, prediction_moments

# The published ones (a shared metric, one step): a learner's own rates and precisions do the rest.
_TAU, _DISCOUNT, _PRECISION = 1.5, 0.99, 3.0


class Method(NamedTuple):
    """How users are adapted: the honest MAP step needs no training, the others are fitted by `fit_learner`."""

    learner: str = HONEST
    adapter: str = "vector"
    residuals: str = "honest"

    def checked(self) -> Method:
        """Return it. Raises ValueError, and says what there is, for a combination that does not exist."""
        names = (HONEST, *LEARNERS)
        if self.learner not in names:
            raise ValueError(f"there is no learner {self.learner!r}, only {', '.join(names)}")
        adapter_named(self.adapter, 1)
        if self.residuals not in RESIDUALS:
            raise ValueError(f"there are no residuals {self.residuals!r}, only {', '.join(RESIDUALS)}")
        if self.learner == HONEST and self.residuals != "honest":
            raise ValueError(f"the honest step learns from honest residuals only, not from {self.residuals!r}")
        if self.adapter != "vector" and (self.learner == HONEST or LEARNERS[self.learner].solves):
            raise ValueError(f"{self.learner} solves for the user's vector itself: it has no adapter {self.adapter!r}")
        return self


@dataclass(frozen=True)
class Learnt:
    """A fitted learner in the basis [N, F] of item factors that it was fitted in, and whether it pays.

    deviation [E, F] is what the replay's users would have been served by the half that did not fit on them.
    """

    method: Method
    steps: InnerSteps
    basis: Tensor
    deviation: Tensor
    tuned: Tuned
    epochs: int


def fit_learner(
    method: Method,
    ranker: Ranker,
    interactions: Interactions,
    replay: Replay,
    *,
    first: int,
    seed: int,
    progress: Callable[[int, int], None],
) -> Learnt:
    """Fit on everybody; judge on each half of the users what the other half has fitted.

    `ranker` made the `replay` of `interactions` from event `first` on. Whoever judges a fit has neither moved it nor
    stopped it.
    """
    ranker = rebased(ranker, replay)
    basis = ranker.items.vectors[:, -ranker.state_size :]
    source, serving = episodes_for(method, ranker, interactions, replay, first), Serving(basis, ranker.inner_step)
    adapter, learner = adapter_named(method.adapter, basis.shape[1]), LEARNERS[method.learner]
    everything, half = torch.arange(len(replay.users)), _half(replay.users, seed)

    def fitted(number: int, numbers: Tensor) -> Fitted:
        def tell(done: int, total: int) -> None:
            progress(number * total + done, 3 * total)

        return fit(learner, adapter, source, serving, seed=seed, numbers=numbers, tell=tell)

    folds, deviation, judged = (everything[half], everything[~half]), torch.zeros(len(half), basis.shape[1]), []
    for number, others in enumerate(reversed(folds)):
        steps = fitted(number, folds[number]).steps
        deviation[others] = deviations(steps, source, others, serving)
        judged.append(_gains(steps, source, others, serving))
    gain = torch.cat(judged)
    final = fitted(2, everything)
    progress(1, 1)
    tuned = Tuned(_TAU, _DISCOUNT, _PRECISION, interval(gain, seed=seed), pays=surely_gain(gain))
    return Learnt(method, final.steps, basis, deviation, tuned, final.epochs)


def episodes_for(
    method: Method, ranker: Ranker, interactions: Interactions, replay: Replay, first: int
) -> ReplayedEpisodes:
    """Make the episodes with the inner losses that the method learns from."""
    if method.residuals == "honest":
        return honest_episodes(ranker, interactions, replay)
    return candidate_episodes(ranker, interactions, replay, first=first, honest=method.residuals == "events")


def rebased(ranker: Ranker, replay: Replay) -> Ranker:
    """Turn the inner factors into the eigenbasis of the shared metric, which the inner step then has."""
    factors = ranker.items.vectors[:, -ranker.state_size :]
    moments = prediction_moments(replay, _TAU)
    metric, rotation = torch.linalg.eigh(factors.T @ moments.covariance @ factors)
    basis = factors @ rotation
    parameters = replace(
        ranker.parameters,
        metric=metric.clamp(min=0.0),
        precision=torch.full_like(metric, _PRECISION),
        residual_mean=moments.item_bias @ basis,
        tau=_TAU,
        discount=_DISCOUNT,
    )
    vectors = torch.cat([ranker.items.vectors[:, : -ranker.state_size], basis], 1)
    return Ranker(parameters, replace(ranker.items, vectors=vectors))


def _half(users: Tensor, seed: int) -> Tensor:
    """Events [E] of a random half of the users."""
    there = torch.unique(users)
    order = torch.randperm(len(there), generator=torch.Generator().manual_seed(seed))
    return torch.isin(users, there[order[: len(there) // 2]])


def _gains(steps: InnerSteps, source: EpisodeSource, numbers: Tensor, serving: Serving) -> Tensor:
    """Gain over the start in set nDCG@10, by user."""
    adapted, start = figures(steps, source, numbers, serving)
    return user_means(adapted - start, source.users[numbers])
