"""The served form for another question: not the next ten items, but what comes later (a user's events 21 to 40).

What people take next and what they take later pull apart, so the stream's parts and weights are not the best there:
* the prior counts what is taken at later positions; how wide a range of positions is chosen;
* of the parts "next8" gives way to one that is learnt for the question (`models.learnt_part`);
* weights and decays are searched for, and adaptation is off where it does not pay.
All on training users, by folds that the tables are not fitted on.
Letters: E examples, S support slots, P item-item parts, N items, T text dimensions, B buckets of K.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from models import popularity
from models.episodes import History, Interactions, earlier, following
from models.factoring import Centred, centred, factor, standardise, user_scores
from models.figures import query_ranks, set_ndcg, surest, user_means
from models.item_contexts import Motion
from models.item_fitting import COUNTED, PARTS, part_matrices
from models.later_step import adapted_and_start
from models.learnt_part import DECAY, HEAD, LEAST_QUERY, QUERY, learnt_part
from models.meta_parameters import MetaParameters
from models.part_weights import objective, scored_candidates, search
from models.ranker import exclusions
from models.recipe import DEFAULT, Recipe
from models.table_fitting import NUM_DIMS, NUM_NEIGHBOURS, text_ridge

SHOTS = (1, 3, 5, 10, 20)
ASKED_BUCKET = int(popularity.bucket_of(torch.tensor(HEAD + 1)))
REPLACED = PARTS.index("next8")
DECAYS = ((0.9, 0.9, DECAY, 0.9), (0.97, 0.97, DECAY, 0.97))
WINDOWS = ((5, 5), (4, 5), (3, 5), (4, 6), (0, 7))  # first and last bucket of K that the prior counts
FOLDS = 3
LEAST_EXAMPLES = 60
_STARTS = (
    (1.0, 0.0, 0.0, 0.0, 0.0),
    (0.85, 0.08, 0.02, 0.02, 0.03),
    (0.5, 0.25, 0.1, 0.05, 0.1),
    (0.5, 0.15, 0.0, 0.35, 0.0),
    (0.3, 0.2, 0.05, 0.4, 0.05),
    (0.1, 0.3, 0.2, 0.2, 0.2),
)
_CANDIDATES_BY = (0.4, 0.15, 0.1, 0.25, 0.1)
_REFINEMENTS = 3  # a search goes half-way back to where it began, so it is repeated


@dataclass(frozen=True)
class _Examples:
    """Users after K events: heads [E, HEAD] of item rows, K [E], query [E, QUERY], users [E].

    What is known of others: counts [B, N] by bucket of K, P centred parts [N, N], and the prior [1, N].
    """

    head: Tensor
    num_events: Tensor
    query: Tensor
    users: Tensor
    counts: Tensor
    parts: Centred
    prior: Tensor

    def counting(self, window: tuple[int, int]) -> _Examples:
        """The same with a prior that counts the buckets of a window."""
        return replace(self, prior=popularity.priors(_rows(self.counts, window))[:1])

    def gains(self, decays: Tensor, rows: Tensor) -> Tensor:
        """What each event of the head counts for each part: [E, HEAD, P]."""
        # the head is masked whole, but only its first K events are known
        age = self.num_events[rows, None] - 1 - torch.arange(HEAD)
        return torch.where((age >= 0)[..., None], decays ** age.clamp(min=0)[..., None], 0.0)

    def scored(self, decays: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
        """Standardised parts of candidates for some examples, as `part_weights.scored_candidates` lays them out."""
        head, gains = self.head[rows], self.gains(decays, rows)
        matrices = self.parts.matrices
        parts = [standardise(user_scores(matrix, head, gains[..., p])) for p, matrix in enumerate(matrices)]
        scores = torch.stack([self.prior.expand(len(rows), -1), *parts], 1)
        excluded = exclusions(head, self.prior.shape[1])
        return scored_candidates(scores, excluded, self.query[rows], weights.expand(len(rows), -1))


def for_later_events(
    parameters: MetaParameters,
    interactions: Interactions,
    text_embeddings: Tensor,
    *,
    recipe: Recipe = DEFAULT,
    seed: int,
    progress: Callable[[int, int], None],
) -> MetaParameters:
    """The same parameters for what comes after HEAD events; unchanged where too few users have long histories.

    `interactions` and text embeddings [N, T] are those that the parameters were fitted on, over the same items.
    """
    if _num_long(interactions) < LEAST_EXAMPLES:
        return parameters

    def parts(window: Interactions) -> Centred:
        matrices = part_matrices(window, recipe)
        matrices[REPLACED] = learnt_part(window, text_embeddings, seed=seed)
        return centred(matrices)

    folds = []
    for number, (own, others) in enumerate(_folds(interactions, seed), 1):
        folds.append(_examples(own, others, parts(others)))
        progress(number, FOLDS + 1)
    window = max(WINDOWS, key=lambda one: _prior_figure(folds, one))
    folds = [fold.counting(window) for fold in folds]
    _, decays, weights = max((_chosen(folds, torch.tensor(decays)) for decays in DECAYS), key=lambda one: one[0])
    fitted = partial(_with_tables, parameters, text_embeddings, decays=decays, found=weights, window=window)
    pays = parameters.use_inner_step and _step_pays([(fitted(fold), fold) for fold in folds], text_embeddings)
    whole = _examples(interactions, interactions, parts(interactions))
    progress(FOLDS + 1, FOLDS + 1)
    return replace(fitted(whole), use_inner_step=pays)


def _with_tables(
    parameters: MetaParameters,
    text_embeddings: Tensor,
    whole: _Examples,
    *,
    decays: Tensor,
    found: Tensor,
    window: tuple[int, int],
) -> MetaParameters:
    """Factor the parts that the examples come with into served tables."""
    weights, counts, asked = parameters.part_weights.clone(), parameters.counts.clone(), _rows(whole.counts, window)
    weights[1:ASKED_BUCKET] = found
    counts[: ASKED_BUCKET + 2] = asked[: ASKED_BUCKET + 2]  # a prior looks at the next bucket as well
    served = factor(
        whole.parts,
        whole.head,
        whole.gains(decays, torch.arange(len(whole.users))),
        weights[popularity.bucket_of(whole.num_events)][:, 1:],
        num_dims=NUM_DIMS,
        num_neighbours=NUM_NEIGHBOURS,
    )
    vectors = torch.cat([served.item_out, served.item_in.flatten(1), parameters.item_factors], 1)
    return replace(
        parameters,
        parts=(*PARTS[:REPLACED], "later", *PARTS[REPLACED + 1 :]),
        **served._asdict(),
        pairs_online=False,  # what is learnt cannot be counted on
        pair_counts=torch.zeros(*served.neighbour_items.shape, COUNTED),
        memory_decays=parameters.memory_decays[:0],
        text_map=text_ridge(text_embeddings, vectors, parameters.item_events),
        **Motion.none(served.item_out.shape[1]).fields(),
        item_bias=torch.zeros_like(parameters.item_bias),
        part_weights=weights,
        part_decays=decays,
        counts=counts,
    )


def _folds(interactions: Interactions, seed: int) -> Iterator[tuple[Interactions, Interactions]]:
    """A third of the users, and the others."""
    users = torch.unique(interactions.users)
    order = users[torch.randperm(len(users), generator=torch.Generator().manual_seed(seed))]
    for held in torch.chunk(order, FOLDS):
        mine = torch.isin(interactions.users, held)
        yield interactions.select(mine), interactions.select(~mine)


def _num_long(interactions: Interactions) -> int:
    history = History.of(interactions.users)
    return int(((history.position == HEAD) & (history.length >= HEAD + LEAST_QUERY)).sum())


def _examples(own: Interactions, others: Interactions, parts: Centred) -> _Examples:
    history = History.of(own.users)
    events = ((history.position == HEAD) & (history.length >= HEAD + LEAST_QUERY)).nonzero()[:, 0]
    head = earlier(history, own.items, events, HEAD)
    query = following(history, own.items, events, QUERY)
    buckets = popularity.bucket_of(History.of(others.users).position)
    cells = torch.bincount(
        buckets * others.num_items + others.items, minlength=popularity.NUM_BUCKETS * others.num_items
    )
    return _Examples(
        head.repeat(len(SHOTS), 1),
        torch.tensor(SHOTS).repeat_interleave(len(events)),
        query.repeat(len(SHOTS), 1),
        own.users[events].repeat(len(SHOTS)),
        cells.view(popularity.NUM_BUCKETS, -1).float(),  # not decayed, for what comes later is not news
        parts,
        torch.zeros(1, own.num_items),
    )


def _rows(counts: Tensor, window: tuple[int, int]) -> Tensor:
    """Counts [B, N] whose every row is the sum over a window of buckets."""
    first, last = window
    return counts[first : last + 1].sum(0).expand(popularity.NUM_BUCKETS, -1)


def _prior_figure(folds: list[_Examples], window: tuple[int, int]) -> float:
    """nDCG@10 of the prior alone."""
    figures = []
    for fold in (one.counting(window) for one in folds):
        rows = (fold.num_events == SHOTS[-1]).nonzero()[:, 0]  # the prior says the same after any K
        scores = fold.prior.expand(len(rows), -1).scatter(1, fold.head[rows], -torch.inf)
        figures.append(user_means(set_ndcg(query_ranks(scores, fold.query[rows])), fold.users[rows]))
    return float(torch.cat(figures).mean())


def _step_pays(judged: list[tuple[MetaParameters, _Examples]], text_embeddings: Tensor) -> bool:
    """Whether what a user is adapted by ranks these later events surely better than the start does."""
    figures = []
    for parameters, fold in judged:
        rows = (fold.num_events == SHOTS[-1]).nonzero()[:, 0]
        figures.append(adapted_and_start(parameters, text_embeddings, fold.head[rows], fold.query[rows], SHOTS))
    return surest(torch.cat(figures, 1).flip(0)) == 1


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
