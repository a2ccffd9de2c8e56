"""What one item's logit is made of, for one user: shares that add up exactly, and each event left out in turn.

The served form is a sum, so its shares are read off it: `logit = taste + popularity + bonus + adapter`. The start is
not linear in the support set (its parts are scaled by their deviation), so what an event is worth is told as what the
item would lose without it, by the same code that serves. All of it in calibrated nats: `score = sigmoid(logit)`.
Letters: N catalogue items, S support slots, V variants of the user.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

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
    return Attribution(
        float(whole[place]),
        offset,
        _rank(whole, place),
        {
            name: Share(scale * float(parts[name][place]), _rank(whole - scale * parts[name], place))
            for name in (TASTE, POPULARITY, BONUS, ADAPTER)
        },
        {
            slot: Share(float(whole[place] - without[place]), _rank(without, place))
            for slot, without in zip(slots.tolist(), logits[1:, listed], strict=True)
        },
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


def _rank(logits: Tensor, place: int) -> int:
    return 1 + int((logits > logits[place]).sum()) + int((logits[:place] == logits[place]).sum())
