"""Taking an item again: what it is worth that a user has had an item, by how long ago and how often.

A start's parts say which items belong to a user's others; none says that a user returns to the item itself, and codes
of few dimensions cannot. So an item of the support set gets a bonus, read from a table of bounded values in nats:

    logit_i = share[bucket of K] * start_i + profile[age of its newest occurrence, number of its occurrences]

with |profile| <= LIMIT. What the start says counts by a share of its own, since it means something else of what was
had: who took a popular item once took it by chance, who took a rare one returns to it. A share may be negative.
Letters: U users, S support slots, A ages, C counts, B buckets of K.
"""

from __future__ import annotations

import torch
from torch import Tensor

AGE_STARTS = (1, 2, 5, 10, 20, 40)  # events since the item was last had
COUNT_STARTS = (2, 3, 4, 5, 7, 10)
SHAPE = (len(AGE_STARTS) + 1, len(COUNT_STARTS) + 1)
LIMIT = 8.0


def cells(support: Tensor) -> Tensor:
    """Cell of the flattened profile for every slot of [U, S] supports (-1 = none): -1 but for an item's newest slot."""
    num_slots = support.shape[1]
    same = support[:, :, None] == support[:, None, :]
    later = (same & torch.ones(num_slots, num_slots, dtype=torch.bool, device=support.device).triu(1)).any(2)
    age = torch.arange(num_slots - 1, -1, -1, device=support.device)
    ages = torch.bucketize(age, torch.tensor(AGE_STARTS, device=support.device), right=True)
    counts = torch.bucketize(same.sum(2), torch.tensor(COUNT_STARTS, device=support.device), right=True)
    return torch.where((support >= 0) & ~later, ages * SHAPE[1] + counts, -1)


def bonuses(profile: Tensor, shares: Tensor, cell: Tensor, scores: Tensor) -> Tensor:
    """What is added to the start's scores of the items in the slots: [U, S]; nothing where there is no cell.

    cell [U, S] from `cells`, shares [U] of the users, scores [U, S] (of what may not be listed not finite).
    """
    kept = torch.where((cell >= 0) & torch.isfinite(scores), scores, 0.0)
    return torch.where(cell >= 0, profile.flatten()[cell.clamp(min=0)], 0.0) + (shares[:, None] - 1.0) * kept
