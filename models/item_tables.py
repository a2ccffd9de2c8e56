"""The catalogue's vectors: learnt ones, shrunk towards what the item's text predicts; text alone for new items.

Letters: N catalogue items, T text dimensions, D item-item dimensions, P parts, M neighbours, F inner factors.
Tables read by support rows have one more row of zeros at N, so that padding (-1) reads zeros.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from models.item_contexts import Motion
from models.meta_parameters import MetaParameters

LINE = 16  # floats in a cache line
_ROWS = 32  # whose pairs are predicted at once: 1 MB of products


@dataclass(frozen=True)
class ItemTables:
    """N catalogue items on one device, rows ordered by item id in bytes order.

    Attributes:
        vectors: [N, D + F] out-vectors and inner factors side by side.
        item_in: [N + 1, P, D] in-vectors.
        spread: [N + 1, P] variance over the catalogue that the D dimensions leave out.
        neighbour_items: [N + 1, M] int64 catalogue rows; N where there is none (or it has left the catalogue).
        neighbour_values: [N + 1, P, M].
        pair_means: [N + 1, C] mean of the counted parts over the catalogue, 0 for new items.
        pseudo_events: [C] as in the meta-parameters.
        uncounted: [N + 1, M, P - C] neighbour values of the parts that are not counted, as the version brought them.
        motion: how out-vectors of new items move.
        trained_index: [N] row of the meta-parameters, -1 for an item they do not know.

    """

    vectors: Tensor
    item_in: Tensor
    spread: Tensor
    neighbour_items: Tensor
    neighbour_values: Tensor
    pair_means: Tensor
    uncounted: Tensor
    pseudo_events: Tensor
    motion: Motion
    trained_index: Tensor

    @property
    def num_items(self) -> int:
        """N."""
        return self.vectors.shape[0]

    @cached_property
    def predicted(self) -> Tensor:
        """What the dimensions predict for the pairs of `neighbour_items`: [N + 1, M, C]."""
        counts = self.vectors.new_zeros(*self.neighbour_items.shape, self.pair_means.shape[1])
        for first in range(0, self.num_items, _ROWS):  # piece by piece: fresh memory for all at once costs more
            piece = self.neighbour_items[first : first + _ROWS]
            row, slot = (piece < self.num_items).nonzero(as_tuple=True)
            counts[first + row, slot] = self.predict(first + row, piece[row, slot])
        return counts

    def predict(self, had: Tensor, other: Tensor) -> Tensor:
        """What the dimensions predict for pairs of rows [F], by counted part: `mean + in(had) . out(other)` [F, C]."""
        inside = self.item_in[had, : self.pair_means.shape[1]]
        return self.pair_means[had] + (inside * self.vectors[other, None, : self.item_in.shape[2]]).sum(2)


def assemble_items(parameters: MetaParameters, text_embeddings: Tensor, trained_index: Tensor) -> ItemTables:
    """Build the tables from text embeddings [N, T] and trained_index [N] (-1 = not trained), on their device.

    A vector is `n / (n + c)` of the learnt one plus the rest of the text's prediction, n events, c = shrinkage.
    """
    p = _on(parameters, text_embeddings.device)
    known, row = trained_index >= 0, trained_index.clamp(min=0)
    num_items, (_, num_parts, dims) = len(trained_index), p.item_in.shape
    ones = text_embeddings.new_ones(num_items, 1)
    predicted = torch.cat([text_embeddings, ones], 1) @ p.text_map
    learnt = torch.cat([p.item_out, p.item_in.flatten(1), p.item_factors], 1)[row]
    events = p.item_events[row]
    trust = torch.where(known, events / (events + p.shrinkage).clamp(min=1e-9), torch.zeros_like(events))[:, None]
    blended = trust * learnt + (1 - trust) * predicted
    out, item_in, factors = torch.split(blended, [dims, num_parts * dims, p.item_factors.shape[1]], 1)
    neighbours, values = _neighbours(p, trained_index)
    counted = p.pair_means.shape[1]
    return ItemTables(
        vectors=torch.cat([out, factors], 1).contiguous(),
        item_in=_padded(item_in.reshape(num_items, num_parts, dims)),
        spread=_padded(torch.where(known[:, None], p.item_spread[row], 0.0)),
        neighbour_items=neighbours,
        neighbour_values=values,
        pair_means=_padded(torch.where(known[:, None], p.pair_means[row], 0.0)),
        pseudo_events=p.pseudo_events,
        motion=Motion.of(p),
        uncounted=_padded(torch.where(known[:, None, None], p.neighbour_values[row][..., counted:], 0.0)),
        trained_index=trained_index,
    )


def initial_counts(parameters: MetaParameters, trained_index: Tensor) -> Tensor:
    """Position-popularity counts [B, N] of a catalogue at the start of a version: zero for items it does not know."""
    counts = parameters.counts.to(trained_index.device)[:, trained_index.clamp(min=0)]
    return torch.where(trained_index >= 0, counts, torch.zeros_like(counts))


def _on(parameters: MetaParameters, device: torch.device) -> MetaParameters:
    moved = {name: tensor.to(device) for name, tensor in parameters.tensors().items()}
    return MetaParameters.from_parts(moved, parameters.metadata())


def _neighbours(p: MetaParameters, trained_index: Tensor) -> tuple[Tensor, Tensor]:
    num_items, num_trained = len(trained_index), p.item_out.shape[0]
    known, row = trained_index >= 0, trained_index.clamp(min=0)
    catalogue_row = torch.full((num_trained + 1,), num_items, dtype=torch.int64, device=row.device)
    catalogue_row[trained_index[known]] = torch.arange(num_items, device=row.device)[known]
    # index -1 reads the last entry, which stays "none"
    neighbours = torch.where(known[:, None], catalogue_row[p.neighbour_items[row]], num_items)
    values = torch.where((neighbours < num_items)[..., None], p.neighbour_values[row], 0.0)
    none = neighbours.new_full((1, neighbours.shape[1]), num_items)
    return torch.cat([neighbours, none]), _padded(values.transpose(1, 2))


def _padded(table: Tensor) -> Tensor:
    return torch.cat([table, table.new_zeros(1, *table.shape[1:])]).contiguous()
