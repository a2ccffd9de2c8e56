"""The served form for another question: not the next ten items, but what comes later (a user's events 21 to 40).

What people take next and what they take later pull apart (position popularity most of all), so the stream's weights are
not the best ones there. Nothing but numbers of the meta-parameters changes: the counts of early positions become those
of the asked ones, and weights and decays are chosen on training users, by folds that the tables are not fitted on.
Letters: E examples, S support slots, P item-item parts, N items, B buckets of K.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from models import popularity
from models.episodes import History, Interactions, earlier, following
from models.factoring import centred, standardise, user_scores
from models.item_fitting import part_matrices
from models.meta_parameters import MetaParameters
from models.part_weights import objective, scored_candidates, search
from models.ranker import exclusions

SHOTS = (1, 3, 5, 10, 20)
HEAD, QUERY = 20, 20  # what is asked for begins after HEAD events
ASKED_BUCKET = int(popularity.bucket_of(torch.tensor(HEAD + 1)))
DECAYS = ((0.9, 0.9, 0.8, 0.9), (0.97, 0.97, 0.9, 0.97))
FOLDS = 3
LEAST_EXAMPLES = 60
_STARTS = (
    (1.0, 0.0, 0.0, 0.0, 0.0),
    (0.85, 0.08, 0.02, 0.02, 0.03),
    (0.5, 0.25, 0.1, 0.05, 0.1),
    (0.25, 0.35, 0.15, 0.05, 0.2),
    (0.1, 0.3, 0.2, 0.1, 0.3),
)
_CANDIDATES_BY = _STARTS[3]
_REFINEMENTS = 3  # a search goes half-way back to where it began, so it is repeated


@dataclass(frozen=True)
class _Examples:
    """Training users after K events: heads [E, HEAD] of item rows, K [E], query [E, QUERY], users [E], their priors."""

    head: Tensor
    num_events: Tensor
    query: Tensor
    users: Tensor
    prior: Tensor
    matrices: list[Tensor]

    def scored(self, decays: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
        """Standardised parts of candidates for some examples, as `part_weights.scored_candidates` lays them out."""
        shots = self.num_events[rows]
        # the head is masked whole, but only its first K events are known
        age = shots[:, None] - 1 - torch.arange(HEAD)
        gains = torch.where((age >= 0)[..., None], decays ** age.clamp(min=0)[..., None], 0.0)
        head, prior = self.head[rows], self.prior.expand(len(rows), -1)
        parts = [standardise(user_scores(matrix, head, gains[..., p])) for p, matrix in enumerate(self.matrices)]
        scores = torch.stack([prior, *parts], 1)
        excluded = exclusions(head, prior.shape[1])
        return scored_candidates(scores, excluded, self.query[rows], weights.expand(len(rows), -1))


def for_later_events(
    parameters: MetaParameters, interactions: Interactions, *, seed: int, progress: Callable[[int, int], None]
) -> MetaParameters:
    """The same parameters for what comes after HEAD events; unchanged where too few users have long histories.

    `interactions` are those that the parameters were fitted on, over the same items.
    """
    folds = []
    for number, fold in enumerate(_folds(interactions, seed), 1):
        folds.append(fold)
        progress(number, FOLDS)
    if sum(len(fold.users) for fold in folds) < LEAST_EXAMPLES * len(SHOTS):
        return parameters
    tried = [_chosen(folds, torch.tensor(decays)) for decays in DECAYS]
    _, decays, weights = max(tried, key=lambda one: one[0])
    rows = parameters.part_weights.clone()
    rows[1:ASKED_BUCKET] = weights
    counts = parameters.counts.clone()
    counts[: ASKED_BUCKET + 2] = _asked_counts(interactions)  # a prior looks at the next bucket as well
    none = parameters.memory_decays[:0]
    return replace(parameters, part_weights=rows, part_decays=decays, memory_decays=none, counts=counts)


def _folds(interactions: Interactions, seed: int) -> Iterator[_Examples]:
    """Examples of a third of the users, with tables fitted on the others."""
    users = torch.unique(interactions.users)
    order = users[torch.randperm(len(users), generator=torch.Generator().manual_seed(seed))]
    for held in torch.chunk(order, FOLDS):
        mine = torch.isin(interactions.users, held)
        own, others = interactions.select(mine), interactions.select(~mine)
        yield _examples(own, others)


def _examples(own: Interactions, others: Interactions) -> _Examples:
    history = History.of(own.users)
    events = ((history.position == HEAD) & (history.length >= HEAD + 5)).nonzero()[:, 0]
    head = earlier(history, own.items, events, HEAD)
    query = following(history, own.items, events, QUERY)
    shots = torch.tensor(SHOTS).repeat_interleave(len(events))
    return _Examples(
        head.repeat(len(SHOTS), 1),
        shots,
        query.repeat(len(SHOTS), 1),
        own.users[events].repeat(len(SHOTS)),
        popularity.priors(_asked_counts(others).expand(popularity.NUM_BUCKETS, -1))[:1],
        centred(part_matrices(others)).matrices,
    )


def _asked_counts(interactions: Interactions) -> Tensor:
    """How often each item was taken at the asked positions: [N]; not decayed, for what comes later is not news."""
    asked = popularity.bucket_of(History.of(interactions.users).position) == ASKED_BUCKET
    return torch.bincount(interactions.items[asked], minlength=interactions.num_items).float()


def _chosen(folds: list[_Examples], decays: Tensor) -> tuple[float, Tensor, Tensor]:
    """The figure that decays reach (mean over SHOTS), and the weights [buckets 1 … ASKED_BUCKET - 1, 1 + P]."""
    figures, weights = dict[int, float](), []
    for bucket in range(1, ASKED_BUCKET):
        shots = [k for k in SHOTS if int(popularity.bucket_of(torch.tensor(k))) == bucket]
        best, found = _best(folds, decays, shots)
        figures |= dict.fromkeys(shots, best)
        weights.append(found)
    return sum(figures.values()) / len(SHOTS), decays, torch.stack(weights)


def _best(folds: list[_Examples], decays: Tensor, shots: list[int]) -> tuple[float, Tensor]:
    """Search from each of _STARTS on all folds together."""
    asked = torch.tensor(shots)
    rows = [torch.isin(fold.num_events, asked).nonzero()[:, 0] for fold in folds]
    query, users = (
        torch.cat([getattr(fold, name)[some] for fold, some in zip(folds, rows, strict=True)])
        for name in ("query", "users")
    )
    middle = torch.tensor(_CANDIDATES_BY)
    scored = torch.cat([fold.scored(decays, some, middle) for fold, some in zip(folds, rows, strict=True)])
    found = []
    for start in _STARTS:
        weights = torch.tensor(start)
        for _ in range(_REFINEMENTS):
            weights = search(scored, query, users, weights)
        found.append((objective(scored, query, users, weights), weights))
    return max(found, key=lambda one: one[0])
