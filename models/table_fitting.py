"""All tables of the meta-parameters from a window of interactions and what validation chose.

Letters: N items, T text dimensions, B buckets, P parts, S support slots, F inner factors.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from models import inner_tuning, item_biases, popularity
from models.episodes import History, Interactions, earlier
from models.factoring import ServedParts, centred, factor
from models.gate import Gate
from models.item_contexts import Motion, fit_motion
from models.item_fitting import COUNTED, PARTS, Matrix, als_factors, part_matrices, similarity_scale, text_factors
from models.learner_tuning import Learnt, Method
from models.learners import HONEST, InnerSteps
from models.memories import Memories
from models.meta_parameters import MetaParameters
from models.pair_counts import Stakes
from models.recipe import DEFAULT, Recipe
from models.replay import Moments

NUM_DIMS = 64
# The inner step moves users in few directions: in more of them it learns the noise of single events (LOG.md, "Few
# directions, and texts among them").
TAKEN_FACTORS, TEXT_FACTORS = 16, 16
NUM_FACTORS = TAKEN_FACTORS + TEXT_FACTORS
_TEXT_VARIANCE = 0.5  # of the factors from texts, beside 1 of those from who took what
NUM_NEIGHBOURS = 48
_TABLE_TASKS = 3000  # sampled tasks whose scores the dimensions have to reproduce


@dataclass(frozen=True)
class Window:
    """What is learnt from: interactions and, by item row in the bytes order of ids, text embeddings [N, T] and ids."""

    interactions: Interactions
    text_embeddings: Tensor
    item_ids: tuple[str, ...]
    encoder: str
    seed: int = 0
    support_size: int = 60
    recipe: Recipe = DEFAULT

    def before(self, event: int) -> Window:
        """The same with the first `event` events only."""
        return replace(self, interactions=self.interactions.select(torch.arange(event)))


@dataclass(frozen=True)
class Choices:
    """What validation decides: part weights [B, 1 + P], memories, inner step, calibration [B, 2],
    moments and biases by item, the half-life of popularity.

    `learnt` is a fitted learner; without one the inner step is the honest one.
    """

    weights: Tensor
    tuned: inner_tuning.Tuned
    gate: Gate
    calibration: Tensor
    moments: Moments
    item_bias: Tensor
    recommend_seen: bool
    memories: Memories
    scene_shares: Tensor
    repeat_profile: Tensor
    repeat_shares: Tensor
    half_life: float
    pairs_online: bool = False
    learnt: Learnt | None = None

    @classmethod
    def of(cls, parameters: MetaParameters, moments: Moments, item_ids: tuple[str, ...]) -> Choices:
        """Those of a version, for a window's moments and items; of its inner step only where that is the honest one."""
        tuned = replace(inner_tuning.OFF, tau=parameters.tau)
        if parameters.learner == HONEST and parameters.use_inner_step:
            precision = float(parameters.precision.mean())
            tuned = replace(tuned, discount=parameters.discount, precision=precision, pays=True)
        return cls(
            weights=parameters.part_weights,
            tuned=tuned,
            gate=Gate(parameters.gate_discount, parameters.gate_credit),
            calibration=parameters.calibration,
            moments=moments,
            item_bias=item_biases.of_items(parameters.item_bias, parameters.item_ids, item_ids),
            recommend_seen=parameters.recommend_seen,
            memories=Memories.of(parameters),
            scene_shares=parameters.scene_shares,
            repeat_profile=parameters.repeat_profile,
            repeat_shares=parameters.repeat_shares,
            half_life=parameters.half_life,
            pairs_online=parameters.pairs_online,
        )


def fit(window: Window, choices: Choices) -> MetaParameters:
    """Fit all tables."""
    interactions, recipe = window.interactions, window.recipe
    history, matrix = History.of(interactions.users), Matrix.of(interactions)
    served = _served_parts(window, choices, history)
    users = torch.bincount(matrix.items, minlength=interactions.num_items).float()
    factors, metric = _inner_factors(window, choices, matrix)
    events = torch.bincount(interactions.items, minlength=interactions.num_items).float()
    vectors = torch.cat([served.item_out, served.item_in.flatten(1), factors], 1)
    return MetaParameters(
        item_ids=window.item_ids,
        encoder=window.encoder,
        parts=PARTS,
        support_size=window.support_size,
        recommend_seen=choices.recommend_seen,
        use_inner_step=choices.tuned.pays,
        **_inner_loop(choices),
        step_from=inner_tuning.STEP_FROM,
        tau=choices.tuned.tau,
        discount=choices.tuned.discount,
        trust_radius=inner_tuning.TRUST_RADIUS,
        gate_discount=choices.gate.discount,
        gate_credit=choices.gate.credit,
        shrinkage=recipe.text_shrinkage,
        half_life=choices.half_life,
        **served._asdict(),
        pairs_online=choices.pairs_online,
        pair_counts=_pair_counts(served, users, recipe.pseudo_events),
        pseudo_events=recipe.pseudo_events,
        item_bias=choices.item_bias,
        item_users=users,
        item_factors=factors,
        item_events=events,
        residual_mean=choices.moments.item_bias @ factors,
        metric=metric,
        text_map=text_ridge(window.text_embeddings, vectors, events),
        **_motion(window, choices, served, factors, events).fields(),
        **choices.memories.fields(),
        part_weights=choices.weights,
        scene_shares=choices.scene_shares,
        repeat_profile=choices.repeat_profile,
        repeat_shares=choices.repeat_shares,
        calibration=choices.calibration,
        counts=_counts(interactions, history, choices.half_life),
    )


def _served_parts(window: Window, choices: Choices, history: History) -> ServedParts:
    """Factor the parts by the supports of sampled events."""
    interactions, sampled = window.interactions, _sample(history, window.seed)
    return factor(
        centred(part_matrices(interactions, window.recipe)),
        earlier(history, interactions.items, sampled, window.support_size),
        support_gains(choices.memories.decays[0], window.support_size).expand(len(sampled), -1, -1),
        choices.weights[popularity.bucket_of(history.position[sampled])][:, 1:],
        num_dims=NUM_DIMS,
        num_neighbours=NUM_NEIGHBOURS,
    )


def _inner_factors(window: Window, choices: Choices, matrix: Matrix) -> tuple[Tensor, Tensor]:
    """Factors [N, F] in the basis that the inner step moves in, and the metric's diagonal [F].

    Half of them say who took the items, half what their texts say: what a user's residuals have in common.
    """
    recipe = window.recipe
    taken = als_factors(
        matrix, num_factors=TAKEN_FACTORS, ridge=recipe.als_ridge, alpha=recipe.als_alpha, seed=window.seed
    )
    texts = text_factors(window.text_embeddings, TEXT_FACTORS)
    factors = torch.cat([taken, texts * _TEXT_VARIANCE**0.5], 1)
    if choices.learnt:
        return _turned(factors, choices.learnt.basis, choices.moments)
    return _rotated(factors, choices.moments)


def popularity_moments(interactions: Interactions) -> Moments:
    """Moments of a prediction by popularity alone, without bias: what stands in where nothing was validated."""
    share = torch.bincount(interactions.items, minlength=interactions.num_items).float() / len(interactions)
    return Moments(torch.zeros_like(share), torch.diag(share) - share[:, None] * share)


def support_gains(decays: Tensor, support_size: int) -> Tensor:
    """Gain of every support slot for every part, newest last: [S, P]."""
    return decays[None] ** torch.arange(support_size - 1, -1, -1.0)[:, None]


def text_ridge(embeddings: Tensor, vectors: Tensor, events: Tensor, *, ridge: float = 10.0) -> Tensor:
    """Map [T + 1, V] from text embedding (and 1) to an item's vectors [N, V], items weighted by their events [N]."""
    inputs = torch.cat([embeddings, embeddings.new_ones(len(embeddings), 1)], 1)
    trust = (events / (events + 5.0))[:, None]
    normal = inputs.T @ (inputs * trust) + ridge * torch.eye(inputs.shape[1])
    solution: Tensor = torch.linalg.solve(normal, inputs.T @ (vectors * trust))
    return solution


def _motion(window: Window, choices: Choices, served: ServedParts, factors: Tensor, events: Tensor) -> Motion:
    """By what texts miss of items that they were not fitted on; nothing moves where pairs stand still."""
    out, embeddings = served.item_out, window.text_embeddings
    if not choices.pairs_online:
        return Motion.none(out.shape[1])
    half = torch.rand(len(out), generator=torch.Generator().manual_seed(window.seed)) < 0.5
    missed, inputs = out.clone(), torch.cat([embeddings, embeddings.new_ones(len(out), 1)], 1)
    for new in (half, ~half):
        missed[new] -= inputs[new] @ text_ridge(embeddings[~new], out[~new], events[~new])
    stakes = Stakes(served.pair_worth, window.recipe.pseudo_events)
    vectors = torch.cat([out, factors], 1)
    return fit_motion(window.interactions, stakes, vectors, missed, num_pairs=NUM_NEIGHBOURS, seed=window.seed)


def _pair_counts(served: ServedParts, users: Tensor, pseudo_events: Tensor) -> Tensor:
    """How often the neighbours were counted [N, M, C]: the exact values times what they had been divided by."""
    others = served.neighbour_items.clamp(min=0)
    scale = similarity_scale(users[:, None], users[others])[..., None] + pseudo_events
    columns = []
    for part in range(COUNTED):
        predicted = torch.einsum("nd,nmd->nm", served.item_in[:, part], served.item_out[others])
        exact = served.neighbour_values[..., part] + predicted + served.pair_means[:, part, None]
        columns.append((exact * scale[..., part]).round().clamp(min=0.0))
    return torch.where(served.neighbour_items[..., None] >= 0, torch.stack(columns, 2), 0.0)


def _rotated(factors: Tensor, moments: Moments) -> tuple[Tensor, Tensor]:
    """Factors [N, F] in the eigenbasis of their mean covariance under the prediction, and its eigenvalues [F]."""
    metric, rotation = torch.linalg.eigh(factors.T @ moments.covariance @ factors)
    return factors @ rotation, metric.clamp(min=0.0)


def _turned(factors: Tensor, basis: Tensor, moments: Moments) -> tuple[Tensor, Tensor]:
    """Factors [N, F] turned towards a basis [N, F] (orthogonal Procrustes, Schönemann 1966), and the metric's diagonal.

    A learner's rates and initial parameters mean something in the basis that it was fitted in only.
    """
    left, _, right = torch.linalg.svd(factors.T @ basis)
    turned = factors @ (left @ right)
    return turned, (turned.T @ moments.covariance @ turned).diagonal().clamp(min=0.0)


def _inner_loop(choices: Choices) -> dict[str, Any]:
    """Give the fields that say how a user is adapted."""
    method, steps = Method(), InnerSteps.solving(torch.full((NUM_FACTORS,), choices.tuned.precision))
    if choices.learnt:
        method, steps = choices.learnt.method, choices.learnt.steps
    fields = {"precision": steps.precision, "adapter_initial": steps.initial, "step_rates": steps.rates}
    return {**method._asdict(), **{name: tensor.contiguous() for name, tensor in fields.items()}}


def _counts(interactions: Interactions, history: History, half_life: float) -> Tensor:
    nothing = torch.zeros(popularity.NUM_BUCKETS, interactions.num_items)
    buckets = popularity.bucket_of(history.position)
    return popularity.advance(nothing, buckets, interactions.items, half_life=half_life)


def _sample(history: History, seed: int) -> Tensor:
    """Pick at most _TABLE_TASKS events, ascending: of those that have a support, where there are any."""
    candidates = (history.position >= min(1, int(history.position.max()))).nonzero()[:, 0]
    generator = torch.Generator().manual_seed(seed)
    return candidates[torch.randperm(len(candidates), generator=generator)[:_TABLE_TASKS]].sort().values
