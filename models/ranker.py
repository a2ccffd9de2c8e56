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

from models.inner_loop import InnerStep
from models.item_tables import ItemTables
from models.meta_parameters import MetaParameters
from models.popularity import bucket_of
from models.top_items import best_rows

BONUS_SLOTS = 20
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
        adapted, start = self._scores(tasks, priors)
        return _exclude(adapted, tasks.excluded), _exclude(start, tasks.excluded)

    def step(self, tasks: TaskBatch, priors: Tensor, targets: Tensor) -> Step:
        """Predict targets [U] (catalogue rows, -1 = no row) before learning from them.

        A target is ranked among the items that are not excluded, and itself.
        """
        known, rows = targets >= 0, targets.clamp(min=0)
        scores = self._scores(tasks, priors)
        adapted, start = (_exclude(s, tasks.excluded, keep=rows) for s in scores)
        prediction = torch.softmax(self._inner.tau * start, 1)
        factors = self.items.vectors[:, self._dims :]
        learnt = self._inner.learn(tasks.state, self._inner.residual(prediction, factors, rows))
        popular = _exclude(priors[tasks.prior_rows], tasks.excluded, keep=rows)
        return Step(
            state=torch.where(known[:, None], learnt, tasks.state),
            state_events=tasks.state_events + known.long(),
            loss_adapted=self._loss(adapted, rows, known),
            loss_start=self._loss(start, rows, known),
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
        """Build the served form, and what the start gives to all items [U, N + 1] without the bonus list."""
        weights = self._weights[bucket_of(tasks.num_events)]
        rows, gains = self._support(tasks)
        item_in = self.items.item_in[rows].view(*rows.shape, -1, self._dims)
        vectors = torch.einsum("usp,uspd->upd", gains, item_in)
        spread = (gains.square() * self.items.spread[rows]).sum(1)
        deviation = (vectors.square().sum(2) + spread).sqrt()
        # a part that says nothing about a user (no support) has weight zero
        scale = torch.where(deviation > 0, weights[:, 1:] / deviation.clamp(min=1e-12), 0.0)
        start = torch.einsum("up,upd->ud", scale, vectors)
        plain = priors.new_empty(len(rows), self.items.num_items + 1)
        torch.mm(start, self.items.vectors[:, : self._dims].T, out=plain[:, :-1])
        plain[:, :-1] += weights[:, :1] * priors[tasks.prior_rows]
        bonus = self._bonus(rows, gains * scale[:, None], plain, tasks.excluded)
        return Served(start, self._deviation(tasks), weights[:, 0], *bonus), plain

    def _bonus(self, rows: Tensor, gains: Tensor, plain: Tensor, excluded: Tensor) -> tuple[Tensor, Tensor]:
        """Sum what the support's neighbours add beyond D dimensions; keep it for the items that end up highest."""
        values = torch.einsum("usp,usmp->usm", gains, self.items.neighbour_values[rows])
        bonus = torch.zeros_like(plain)
        bonus.scatter_add_(1, self.items.neighbour_items[rows].flatten(1), values.flatten(1))
        bonus[:, -1] = 0.0
        total = torch.where(bonus != 0, plain + bonus, -torch.inf)
        highest = _exclude(total, excluded).topk(min(BONUS_SLOTS, plain.shape[1]))
        kept = highest.values > -torch.inf
        items = torch.where(kept, highest.indices, self.items.num_items)
        return items, bonus.gather(1, items)

    def _deviation(self, tasks: TaskBatch) -> Tensor:
        if not self.parameters.use_inner_step:
            return torch.zeros_like(tasks.state)
        return self._inner.deviation(tasks.state, tasks.state_events, tasks.num_events)

    def _scores(self, tasks: TaskBatch, priors: Tensor) -> tuple[Tensor, Tensor]:
        """Compute adapted and start logits [U, N] from the served form, nothing excluded."""
        served, start = self._serve(tasks, priors)
        start = start.scatter_add_(1, served.bonus_items, served.bonus)[:, :-1]
        return start + served.deviation @ self.items.vectors[:, self._dims :].T, start

    def _loss(self, logits: Tensor, rows: Tensor, known: Tensor) -> Tensor:
        scaled = self._inner.tau * logits
        loss = torch.logsumexp(scaled, 1) - scaled.gather(1, rows[:, None])[:, 0]
        return torch.where(known, loss.clamp(max=LOSS_LIMIT), LOSS_LIMIT)


def _exclude(scores: Tensor, excluded: Tensor, keep: Tensor | None = None) -> Tensor:
    """Set excluded columns to -inf (in place), except the column `keep` [U]."""
    kept = None if keep is None else scores.gather(1, keep[:, None])
    # padding excludes the row's first excluded item again, or nothing at all
    columns = torch.where(excluded >= 0, excluded, excluded.max(1, keepdim=True).values) if excluded.numel() else excluded
    none = columns < 0
    scores.scatter_(1, columns.clamp(min=0), torch.where(none, scores[:, :1].expand_as(columns), -torch.inf))
    if kept is not None and keep is not None:
        scores.scatter_(1, keep[:, None], kept)
    return scores


def _rank(scores: Tensor, rows: Tensor) -> Tensor:
    """1-based rank [U] of the items in rows [U]; equal scores are ordered by row."""
    own = scores.gather(1, rows[:, None])
    ahead = (scores > own).sum(1)
    before = torch.arange(scores.shape[1], device=scores.device) < rows[:, None]
    return 1 + ahead + ((scores == own) & before).sum(1)
