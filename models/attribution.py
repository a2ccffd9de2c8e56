"""What one item's logit is made of, for one user: shares that add up exactly, and each event left out in turn.

The served form is a sum, so its shares are read off it: `logit = taste + popularity + bonus + adapter`, taste with the
item's own bias. The start is not linear in the support set (its parts are scaled by their deviation), so what an event
is worth is told as what the item would lose without it, by the same code that serves. All of it in calibrated nats:
`score = sigmoid(logit)`.
Letters: N catalogue items, S support slots, V variants of the user.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from models.logit_reading import ranks_of
from models.ranker import Ranker
from models.tasks import TaskBatch

TASTE, POPULARITY, BONUS, ADAPTER = "taste", "popularity", "bonus", "adapter"


@dataclass(frozen=True)
class Share:
    """What something adds to the item's logit (nats), and the rank that the item would have without it."""

    logit: float
    rank_without: int


@dataclass(frozen=True)
class Attribution:
    """An item among those that may be listed for a user, and itself.

    Attributes:
        logit: calibrated, in nats; the shares and the offset add up to it.
        offset: what calibration adds.
        rank: 1-based; of equal logits the lower row stands first.
        shares: by TASTE, POPULARITY, BONUS and ADAPTER.
        events: by support slot, of those that hold an event.

    """

    logit: float
    offset: float
    rank: int
    shares: dict[str, Share]
    events: dict[int, Share]


def attribute(ranker: Ranker, tasks: TaskBatch, priors: Tensor, row: int) -> Attribution:
    """Take one catalogue row's logit apart for the first user of `tasks`; priors are [R, N].

    The item is looked at as if it were not excluded; other excluded items have no rank.
    """
    slots = (tasks.support[0] >= 0).nonzero()[:, 0]
    user = tasks.taken([0] * (1 + len(slots)))
    support, excluded = user.support.clone(), user.excluded.clone()
    support[torch.arange(1, len(support)), slots] = -1
    excluded[:, row] = 0.0
    user = replace(user, support=support, excluded=excluded)
    logits = ranker.calibrated(ranker.logits(user, priors)[0], user.num_events)
    scale, offset = ranker.calibration(user.num_events[:1])[0].tolist()

    listed = torch.isfinite(logits[0]).nonzero()[:, 0]
    place = int((listed == row).nonzero())
    whole = logits[0, listed]
    parts = _parts(ranker, user.taken([0]), priors, listed)
    parts[TASTE] = (whole - offset) / scale - parts[POPULARITY] - parts[BONUS] - parts[ADAPTER]
    names = TASTE, POPULARITY, BONUS, ADAPTER
    without = torch.cat([torch.stack([whole - scale * parts[name] for name in names]), logits[1:, listed]])
    variants = torch.cat([whole[None], without])
    rank, *ranks = ranks_of(variants, torch.full((len(variants),), place, device=variants.device)).tolist()
    worth = [scale * float(parts[name][place]) for name in names] + (whole[place] - logits[1:, row]).tolist()
    shares = dict(zip([*names, *slots.tolist()], map(Share, worth, ranks), strict=True))
    return Attribution(
        float(whole[place]),
        offset,
        rank,
        {name: shares[name] for name in names},
        {slot: shares[slot] for slot in slots.tolist()},
    )


def _parts(ranker: Ranker, user: TaskBatch, priors: Tensor, listed: Tensor) -> dict[str, Tensor]:
    """What popularity, the bonus list and the adapter add to the listed rows [n] of one user, before calibration."""
    served = ranker.served(user, priors)
    bonus = priors.new_zeros(ranker.items.num_items + 1).scatter_(0, served.bonus_items[0], served.bonus[0])
    factors = ranker.items.vectors[listed, -ranker.state_size :]
    return {
        POPULARITY: served.prior_weight[0] * priors[user.prior_rows[0], listed],
        BONUS: bonus[listed],
        ADAPTER: factors @ served.deviation[0],
    }
