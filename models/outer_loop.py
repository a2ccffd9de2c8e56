"""The outer loop: from a window of interactions to meta-parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from models import popularity
from models.episodes import History, Interactions, earlier
from models.factoring import factor
from models.item_fitting import DECAYS, PARTS, Matrix, als_factors, part_matrices
from models.meta_parameters import MetaParameters

DEFAULT_WEIGHTS = (
    (0.354, 0.165, 0.15, 0.165, 0.165),
    (0.458, 0.313, 0.05, 0.098, 0.081),
    (0.204, 0.68, 0.005, 0.08, 0.03),
    (0.0, 0.748, 0.039, 0.154, 0.059),
    (0.019, 0.431, 0.063, 0.299, 0.188),
    (0.038, 0.178, 0.091, 0.37, 0.322),
    (0.019, 0.152, 0.235, 0.243, 0.35),
    (0.0, 0.145, 0.392, 0.071, 0.392),
)

Progress = Callable[[str, int, int], None]


def meta_train(
    interactions: Interactions,
    text_embeddings: Tensor,
    *,
    item_ids: tuple[str, ...],
    encoder: str,
    seed: int = 0,
    support_size: int = 60,
    progress: Progress | None = None,
) -> tuple[MetaParameters, dict[str, Any]]:
    """Fit everything on interactions; rows of `text_embeddings` [N, T] and `item_ids` are the items' rows.

    Item rows must be in the bytes order of their ids. `progress(stage, done, total)` is called as stages end.
    """
    report = progress or (lambda _stage, _done, _total: None)
    weights = torch.tensor(DEFAULT_WEIGHTS)
    parameters = fit(
        interactions, text_embeddings, weights, item_ids=item_ids, encoder=encoder, seed=seed, support_size=support_size
    )
    report("tables", 1, 1)
    return parameters, {"events": len(interactions), "seed": seed}


def fit(
    interactions: Interactions,
    text_embeddings: Tensor,
    weights: Tensor,
    *,
    item_ids: tuple[str, ...],
    encoder: str,
    seed: int,
    support_size: int,
) -> MetaParameters:
    """Fit the tables for given part weights [B, 1 + P]."""
    history = History.of(interactions.users)
    decays = torch.tensor(DECAYS)
    gains = decays[None] ** torch.arange(support_size - 1, -1, -1.0)[:, None]
    sampled = _sample(history, 3000, seed)
    support = earlier(history, interactions.items, sampled, support_size)
    shares = weights[popularity.bucket_of(history.position[sampled])][:, 1:]
    matrices = [m - m.mean(1, keepdim=True) for m in part_matrices(interactions)]
    served = factor(
        matrices, support, gains.expand(len(sampled), -1, -1), shares, num_dims=64, num_neighbours=64
    )
    factors = als_factors(Matrix.of(interactions), seed=seed)
    events = torch.bincount(interactions.items, minlength=interactions.num_items).float()
    share = events / events.sum()
    mean = share @ factors
    metric, rotation = torch.linalg.eigh(factors.T @ (factors * share[:, None]) - mean[:, None] * mean)
    counts = popularity.advance(
        torch.zeros(popularity.NUM_BUCKETS, interactions.num_items),
        popularity.bucket_of(history.position),
        interactions.items,
    )
    tables = torch.cat([served.item_out, served.item_in.flatten(1), factors @ rotation], 1)
    return MetaParameters(
        item_ids=item_ids,
        encoder=encoder,
        parts=PARTS,
        support_size=support_size,
        recommend_seen=False,
        use_inner_step=True,
        step_from=3,
        tau=1.5,
        discount=0.97,
        trust_radius=1.0,
        shrinkage=0.0,
        half_life=popularity.HALF_LIFE,
        **served._asdict(),
        item_factors=factors @ rotation,
        item_events=events,
        metric=metric.clamp(min=0.0),
        precision=torch.full_like(metric, 3.0),
        text_map=text_ridge(text_embeddings, tables, events),
        part_decays=decays,
        part_weights=weights,
        calibration=torch.tensor([[1.5, -7.0]]).repeat(popularity.NUM_BUCKETS, 1),
        counts=counts,
    )


def text_ridge(embeddings: Tensor, vectors: Tensor, events: Tensor, *, ridge: float = 10.0) -> Tensor:
    """Map [T + 1, V] from text embedding (and 1) to an item's vectors [N, V], items weighted by their events [N]."""
    inputs = torch.cat([embeddings, embeddings.new_ones(len(embeddings), 1)], 1)
    trust = (events / (events + 5.0))[:, None]
    normal = inputs.T @ (inputs * trust) + ridge * torch.eye(inputs.shape[1])
    return torch.linalg.solve(normal, inputs.T @ (vectors * trust))


def _sample(history: History, num: int, seed: int) -> Tensor:
    """Pick at most `num` events that have a support, ascending."""
    candidates = torch.arange(len(history.order))[history.position > 0]
    generator = torch.Generator().manual_seed(seed)
    return candidates[torch.randperm(len(candidates), generator=generator)[:num]].sort().values
