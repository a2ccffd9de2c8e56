"""Score, predict before learning, learn, and list: the served form of the model for all users of a batch at once.

Everything collapses to `logit_i = q . v_i + w0 * prior_i + bonus_i`: q over the D item-item dimensions and the F inner
factors, one prior row by bucket of K, and a short list of (item, bonus) for what D dimensions cannot hold.
Letters: U users, S support slots, N catalogue items, D item-item dimensions, F inner factors, P parts, L bonus slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from models.inner_loop import InnerStep
from models.item_tables import ItemTables
from models.meta_parameters import MetaParameters
from models.popularity import bucket_of
from models.top_items import best_rows

BONUS_SLOTS = 20
BONUS_SUPPORT = 20  # newest positives whose neighbours are looked up
LOSS_LIMIT = 20.0


@dataclass
class TaskBatch:
    """Users before an event; every row stands alone, padding rows have support -1 and num_events 0.

    Attributes:
        support: [U, S] int64 catalogue rows, newest last, right-aligned, -1 where none.
        weights: [U, S] float32 weight of each positive; not read where support is -1.
        num_events: [U] int64 K, positives so far (may exceed S).
        state: [U, F] float32 inner state.
        state_events: [U] int64 residuals in the state.
        excluded: [U, X] int64 rows not to be listed, -1 where none.
        prior_rows: [U] int64 row of the priors.

    """

    support: Tensor
    weights: Tensor
    num_events: Tensor
    state: Tensor
    state_events: Tensor
    excluded: Tensor
    prior_rows: Tensor


class Served(NamedTuple):
    """The served form: vectors [U, D + F], prior weight [U], bonus items [U, L] (N where none), bonus [U, L]."""

    start: Tensor
    deviation: Tensor
    prior_weight: Tensor
    bonus_items: Tensor
    bonus: Tensor

    @property
    def q(self) -> Tensor:
        """[U, D + F], start and deviation side by side."""
        return torch.cat([self.start, self.deviation], 1)


class Step(NamedTuple):
    """What an event taught [U, …]: losses are capped; a rank of 0 says the item had no row (nothing was learnt)."""

    state: Tensor
    state_events: Tensor
    loss_adapted: Tensor
    loss_start: Tensor
    rank_adapted: Tensor
    rank_start: Tensor
    rank_popular: Tensor


class Top(NamedTuple):
    """Best items [U, k] int64 (-1 past the last) and their calibrated logits [U, k] (-inf past the last)."""

    items: Tensor
    logits: Tensor


class Ranker:
    """Meta-parameters over one catalogue."""

    def __init__(self, parameters: MetaParameters, items: ItemTables) -> None:
        """Keep the learnt constants on the device of `items`."""
        device = items.vectors.device
        self.items = items
        self.parameters = parameters
        self.state_size: int = parameters.item_factors.shape[1]
        self._dims = parameters.item_out.shape[1]
        self._weights = parameters.part_weights.to(device)
        self._calibration = parameters.calibration.to(device)
        ages = torch.arange(parameters.support_size - 1, -1, -1, dtype=torch.float32)
        self._decays = (parameters.part_decays[None] ** ages[:, None]).to(device)
        self._inner = InnerStep(
            metric=parameters.metric.to(device),
            precision=parameters.precision.to(device),
            residual_mean=parameters.residual_mean.to(device),
            tau=parameters.tau,
            discount=parameters.discount,
            trust_radius=parameters.trust_radius,
            step_from=parameters.step_from,
        )

    def served(self, tasks: TaskBatch, priors: Tensor) -> Served:
        """Collapse start and deviation of every user; priors are [R, N]."""
        return self._serve(tasks, priors)[0]

    def logits(self, tasks: TaskBatch, priors: Tensor) -> tuple[Tensor, Tensor]:
        """Adapted and start logits [U, N] from the served form; excluded items are -inf. Priors are [R, N]."""
        served, start = self._start(tasks, priors)
        start = _exclude(start, tasks.excluded)
        return start + served.deviation @ self.items.vectors[:, self._dims :].T, start

    def step(self, tasks: TaskBatch, priors: Tensor, targets: Tensor, previous: Tensor | None = None) -> Step:
        """Predict targets [U] (catalogue rows, -1 = no row) before learning from them.

        A target is ranked among the items that are not excluded, and itself. One call may hold several events of a
        user, oldest first: `previous` [U] then gives the row of the user's event before (-1 = none in this call), whose
        state after is used instead of `tasks.state`. That is possible because honest residuals need the start only.
        """
        known, rows = targets >= 0, targets.clamp(min=0)
        vectors = self.items.vectors[:, self._dims :]
        start = _contested(self._start(tasks, priors)[1], tasks.excluded, rows)
        prediction = torch.softmax(self._inner.tau * start, 1)
        residual = self._inner.residual(prediction, vectors, rows)
        before, after = self._carry(tasks, residual, known, previous)
        adapted = start + self._deviation(*before, tasks.num_events) @ vectors.T
        popular = _contested(priors[tasks.prior_rows], tasks.excluded, rows)
        return Step(
            *after,
            loss_adapted=_loss(torch.softmax(self._inner.tau * adapted, 1), rows, known),
            loss_start=_loss(prediction, rows, known),
            rank_adapted=_rank(adapted, rows) * known,
            rank_start=_rank(start, rows) * known,
            rank_popular=_rank(popular, rows) * known,
        )

    def rank(self, tasks: TaskBatch, priors: Tensor, k: int) -> Top:
        """List the k best items of every user; equal logits are ordered by row."""
        adapted, _ = self.logits(tasks, priors)
        items, values = best_rows(adapted, k)
        scale, offset = self._calibration[bucket_of(tasks.num_events)].unbind(1)
        return Top(items, values * scale[:, None] + offset[:, None])

    def _support(self, tasks: TaskBatch) -> tuple[Tensor, Tensor]:
        """Rows [U, S] (N where padded) and gains [U, S, P]: weight times decay by age."""
        present = tasks.support >= 0
        rows = torch.where(present, tasks.support, self.items.num_items)
        weights = torch.where(present, tasks.weights, 0.0)
        return rows, weights[..., None] * self._decays[-rows.shape[1] :]

    def _serve(self, tasks: TaskBatch, priors: Tensor) -> tuple[Served, Tensor]:
        """Build the served form, and what the start gives to all items without the bonus list: [U, W], W > N.

        Columns from N on are for what names no item. W fills whole cache lines: faster, and rows stay bit-equal
        wherever they stand in the chunk.
        """
        weights = self._weights[bucket_of(tasks.num_events)]
        rows, gains = self._support(tasks)
        parts = [
            functional.embedding_bag(rows, table, per_sample_weights=gains[..., p].contiguous(), mode="sum")
            for p, table in enumerate(self.items.item_in)
        ]
        vectors = torch.stack(parts, 1)
        spread = (gains.square() * self.items.spread[rows]).sum(1)
        deviation = (vectors.square().sum(2) + spread).sqrt()
        # a part that says nothing about a user (no support) has weight zero
        scale = torch.where(deviation > 0, weights[:, 1:] / deviation.clamp(min=1e-12), 0.0)
        start = torch.einsum("up,upd->ud", scale, vectors)
        num_items = self.items.num_items
        plain = priors.new_zeros(len(rows), (num_items // 16 + 1) * 16)
        torch.mm(start, self.items.vectors[:, : self._dims].T, out=plain[:, :num_items])
        plain[:, :num_items] += weights[:, :1] * priors[tasks.prior_rows]
        bonus = self._bonus(rows, gains * scale[:, None], plain, tasks.excluded)
        return Served(
            start, self._deviation(tasks.state, tasks.state_events, tasks.num_events), weights[:, 0], *bonus
        ), plain

    def _bonus(self, rows: Tensor, gains: Tensor, plain: Tensor, excluded: Tensor) -> tuple[Tensor, Tensor]:
        """Sum what the support's neighbours add beyond D dimensions; keep it for the items that end up highest."""
        newest = rows[:, -BONUS_SUPPORT:]
        values = self.items.neighbour_values[newest].view(*newest.shape, gains.shape[2], -1)
        values = (values * gains[:, -BONUS_SUPPORT:, :, None]).sum(2)
        bonus, num_items = torch.zeros_like(plain), self.items.num_items
        bonus.scatter_add_(1, self.items.neighbour_items[newest].flatten(1), values.flatten(1))
        total = _exclude(plain + bonus, excluded)
        total[:, num_items:], bonus[:, num_items:] = -torch.inf, 0.0
        highest = total.topk(min(BONUS_SLOTS, plain.shape[1]))
        items = torch.where(highest.values > -torch.inf, highest.indices, num_items)
        return items, bonus.gather(1, items)

    def _deviation(self, state: Tensor, state_events: Tensor, num_events: Tensor) -> Tensor:
        if not self.parameters.use_inner_step:
            return torch.zeros_like(state)
        return self._inner.deviation(state, state_events, num_events)

    def _start(self, tasks: TaskBatch, priors: Tensor) -> tuple[Served, Tensor]:
        """Compute the start's logits [U, N] from the served form, nothing excluded."""
        served, plain = self._serve(tasks, priors)
        return served, plain.scatter_add_(1, served.bonus_items, served.bonus)[:, : self.items.num_items]

    def _carry(
        self, tasks: TaskBatch, residual: Tensor, known: Tensor, previous: Tensor | None
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """States (vector, count) before and after every event; elementwise, so that cutting a log changes no bit."""
        before, counts = tasks.state, tasks.state_events
        after = torch.where(known[:, None], self._inner.learn(before, residual), before)
        if previous is None:
            return (before, counts), (after, counts + known.long())
        before, counts, counts_after = before.clone(), counts.clone(), counts + known.long()
        for rows in _by_depth(previous):
            before[rows], counts[rows] = after[previous[rows]], counts_after[previous[rows]]
            learnt = self._inner.learn(before[rows], residual[rows])
            after[rows] = torch.where(known[rows, None], learnt, before[rows])
            counts_after[rows] = counts[rows] + known[rows].long()
        return (before, counts), (after, counts_after)


def _loss(prediction: Tensor, rows: Tensor, known: Tensor) -> Tensor:
    """Cross-entropy [U] of a prediction [U, N], capped."""
    mass = prediction.gather(1, rows[:, None])[:, 0]
    return torch.where(known, -torch.log(mass.clamp(min=1e-30)), LOSS_LIMIT).clamp(max=LOSS_LIMIT)


def _contested(scores: Tensor, excluded: Tensor, rows: Tensor) -> Tensor:
    """Exclude in place, but never the item in question."""
    own = scores.gather(1, rows[:, None])
    return _exclude(scores, excluded).scatter_(1, rows[:, None], own)


def _exclude(scores: Tensor, excluded: Tensor) -> Tensor:
    """Set excluded columns to -inf, in place."""
    if excluded.shape[1] == 0:
        return scores
    # padding names the row's largest excluded item once more, or rewrites column 0 where nothing is excluded
    columns = torch.where(excluded >= 0, excluded, excluded.max(1, keepdim=True).values)
    value = torch.where(columns >= 0, -torch.inf, scores[:, :1])
    return scores.scatter_(1, columns.clamp(min=0), value)


def _by_depth(previous: Tensor) -> list[Tensor]:
    """Rows whose previous row is in the chunk, grouped so that every group needs only groups before it."""
    depths: list[int] = []
    for row, earlier in enumerate(previous.tolist()):
        if earlier >= row:
            raise ValueError(f"row {row} follows row {earlier}: a user's events must be oldest first")
        depths.append(0 if earlier < 0 else depths[earlier] + 1)
    depth = torch.tensor(depths)
    return [(depth == d).nonzero()[:, 0].to(previous.device) for d in range(1, max(depths, default=0) + 1)]


def _rank(scores: Tensor, rows: Tensor) -> Tensor:
    """1-based rank [U] of the items in rows [U]; equal scores are ordered by row.

    Comparisons are written as floats: three times faster than summing booleans, and exact up to 16 million items.
    """
    own, columns = scores.gather(1, rows[:, None]), torch.arange(scores.shape[1], device=scores.device)
    flags = torch.empty(scores.shape, dtype=torch.float32, device=scores.device)
    ahead = torch.gt(scores, own, out=flags).sum(1)
    before = torch.lt(columns, rows[:, None], out=torch.empty_like(flags))
    level = torch.eq(scores, own, out=flags).mul_(before).sum(1)
    return 1 + (ahead + level).long()
