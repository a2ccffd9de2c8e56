"""The start: what a support set says of the whole catalogue before any adapter, in the form in which it is served.

Every part of the item-item tables sums its rows of the support set into one vector; the parts' vectors collapse to q,
beside them one prior row by bucket of K, and a short list of (item, bonus) for what D dimensions cannot hold.
Letters: U users, S support slots, N catalogue items, D item-item dimensions, P parts, M memories, L bonus slots,
W columns of scores: the N items and at least one more for what names no item, filled up to whole cache lines (faster,
and rows stay bit-equal wherever they stand in the chunk); these more are -inf, their vectors zeros.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from models.item_tables import ItemTables
from models.logit_reading import weighted_sums
from models.memories import Memories
from models.meta_parameters import MetaParameters
from models.popularity import bucket_of
from models.repeats import bonuses, cells
from models.tasks import TaskBatch
from models.top_items import highest

BONUS_SLOTS = 20
BONUS_SUPPORT = 20  # newest positives whose neighbours are looked up


class Support(NamedTuple):
    """What a support set says: vector [U, D], prior weight [U], and the shares of its neighbours.

    bias_weight: [U] how far the items' biases count: 1 with a support, else 0.
    rows: [U, S] rows of the item tables. shares: [U, P, S] the weight of each row's parts in the logits.
    """

    vector: Tensor
    prior_weight: Tensor
    bias_weight: Tensor
    rows: Tensor
    shares: Tensor


class Start:
    """Meta-parameters of the start over one catalogue."""

    def __init__(self, parameters: MetaParameters, items: ItemTables, out: Tensor, memories: Memories) -> None:
        """Keep the learnt constants on the device of `items`; out: [D, W] the items' vectors as columns."""
        device = items.vectors.device
        self._items, self._out, self._memories = items, out, memories
        known = items.trained_index >= 0
        self._weights = parameters.part_weights.to(device)
        # None where no item is new, which is the common case
        self._trained = None if bool(known.all()) else functional.pad(known, (0, 1))
        biases = functional.pad(parameters.item_bias.to(device), (0, 1))[items.trained_index]  # 0 for new items
        biases = functional.pad(biases, (0, out.shape[1] - len(biases)))
        self._biases = biases if bool(biases.any()) else None
        shares = parameters.scene_shares.to(device)
        self._scene_weights = self._weights * shares[:, None]
        self._scene_weights[:, 0] += 1.0 - shares
        profile = parameters.repeat_profile
        self._repeats = (profile.to(device), parameters.repeat_shares.to(device)) if bool(profile.any()) else None
        self._parts = torch.arange(len(parameters.parts), device=device)
        self.gains = memories.gains(parameters.support_size).to(device)  # [M, P, S]

    @property
    def num_parts(self) -> int:
        """P."""
        return len(self._parts)

    def logits(self, tasks: TaskBatch, priors: Tensor) -> Tensor:
        """The start's logits [U, W] in the served form; excluded items are -inf. Priors are [R, N]."""
        support = self.support(tasks)
        plain = self.plain(support, tasks, priors)
        self.finish(plain, support, tasks)
        return plain

    def support(self, tasks: TaskBatch, track: Tensor | None = None) -> Support:
        """Mix what the memories make of the support set, by their tracks [U, M - 1] (those of the tasks if None)."""
        first, *others = (self.memory(tasks, gains) for gains in self.gains)
        if not others:
            return first
        weights = self._memories.weights(tasks.track[:, 1:] if track is None else track).unbind(1)
        vector, shares = first.vector * weights[0][:, None], first.shares * weights[0][:, None, None]
        for other, weight in zip(others, weights[1:], strict=True):
            vector.addcmul_(other.vector, weight[:, None])
            shares.addcmul_(other.shares, weight[:, None, None])
        return first._replace(vector=vector, shares=shares)

    def memory(self, tasks: TaskBatch, left: Tensor, weights: Tensor | None = None) -> Support:
        """Weigh every part's vector of the support set by the bucket of K and one over its deviation; left [P, S]."""
        present = tasks.support >= 0
        rows = torch.where(present, tasks.support, self._items.num_items)
        entries = (rows * len(self._parts))[:, None] + self._parts[:, None]
        gains = torch.where(present, tasks.weights, 0.0)[:, None] * left[:, -rows.shape[1] :]
        vectors = weighted_sums(self._items.item_in, entries, gains)
        spread = self._items.spread.take(entries).mul_(gains).mul_(gains).sum(2)
        deviation = vectors.square().sum(2).add_(spread).sqrt_()
        if weights is None:
            weights = self._part_weights(tasks, rows)
        # a part that says nothing about a user (no support) has weight zero
        scale = torch.where(deviation > 0, weights[:, 1:] / deviation.clamp(min=1e-12), 0.0)[..., None]
        biased = (tasks.num_events > 0).to(gains.dtype)
        return Support((vectors * scale).sum(1), weights[:, 0], biased, rows, gains * scale)

    def _part_weights(self, tasks: TaskBatch, rows: Tensor) -> Tensor:
        """Weights [U, 1 + P] of popularity and parts; less of the parts for users in a scene that is new."""
        bucket = bucket_of(tasks.num_events)
        weights = self._weights.index_select(0, bucket)
        if self._trained is None:
            return weights
        is_new = (rows < self._items.num_items).any(1) & ~self._trained[rows].any(1)
        return torch.where(is_new[:, None], self._scene_weights.index_select(0, bucket), weights)

    def plain(self, support: Support, tasks: TaskBatch, priors: Tensor) -> Tensor:
        """Compute what the start gives to all items without the bonus list [U, W], nothing excluded."""
        num_items = self._items.num_items
        plain = priors.new_empty(len(support.rows), self._out.shape[1])
        torch.mul(priors.index_select(0, tasks.prior_rows), support.prior_weight[:, None], out=plain[:, :num_items])
        plain[:, num_items:] = -torch.inf
        plain.addmm_(support.vector, self._out)
        if self._biases is not None:
            plain.addr_(support.bias_weight, self._biases)
        return tasks.neighbours.move(plain, support.vector) if tasks.neighbours else plain

    def finish(self, plain: Tensor, support: Support, tasks: TaskBatch) -> tuple[Tensor, Tensor]:
        """Exclude, and add the bonus list, in place; gives its items and bonuses [U, L] (not finite where none).

        The bonus sums what the support's neighbours add beyond D dimensions, and what repeats add to the support
        itself; it is kept for the items that end up highest.
        """
        plain[:, : self._items.num_items] += tasks.excluded
        total = self.with_neighbours(plain, support, tasks)
        if self._repeats is not None:
            profile, shares = self._repeats
            had, shares = total.gather(1, support.rows), shares.index_select(0, bucket_of(tasks.num_events))
            total.scatter_add_(1, support.rows, bonuses(profile, shares, cells(tasks.support), had))
        logits, items = highest(total, min(BONUS_SLOTS, total.shape[1]))
        bonus = logits - plain.gather(1, items)
        plain.scatter_(1, items, logits)
        return items, bonus

    def with_neighbours(self, plain: Tensor, support: Support, tasks: TaskBatch) -> Tensor:
        """Scores [U, W] with all that the newest positives' neighbours add."""
        items, values, rows = (
            self._items.neighbour_items,
            self._items.neighbour_values,
            support.rows[:, -BONUS_SUPPORT:],
        )
        if tasks.neighbours is not None:
            items, values, _ = tasks.neighbours.blocks
            rows = rows + tasks.neighbours.first[:, None]
        entries = rows[..., None] * len(self._parts) + self._parts
        bonus = weighted_sums(values, entries, support.shares[..., -BONUS_SUPPORT:].transpose(1, 2))
        neighbours = items.index_select(0, rows.flatten()).view(len(plain), -1)
        return plain.scatter_add(1, neighbours, bonus.view(len(plain), -1))
