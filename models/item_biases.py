"""What items are taken more often for than the start knows: one number per item, from honest residuals.

    bias_i = share * log((taken_i + DOUBT) / (expected_i + DOUBT)),   expected = sum of softmax(tau * start) over events

Both are sums over validation users' events, each predicted before it happened by tables that were not fitted on it. An
item that co-occurs with everything is expected by everybody and taken by few; parts that are each z-scored over the
catalogue cannot say so. It holds from the first positive on: without a support there is position popularity, which is
counted. Letters: E events, N items, C candidates, Q query slots, U users, G settings.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from models.figures import (
    Interval,
    half_of_users,
    interval,
    judged_by_halves,
    query_ranks,
    stream_ndcg,
    surely_gain,
    user_means,
)
from models.inner_tuning import Contest, likeliest
from models.replay import Replay

SHARES = (0.2, 0.3, 0.4)
DOUBT = 20.0  # events
_BLOCK = 1024


class Biases(NamedTuple):
    """By item [N], zeros where they do not pay; the gain in (set + next) / 2 nDCG@10 on users they are not from."""

    by_item: Tensor
    gain: Interval


def tune(replay: Replay, *, seed: int) -> Biases:
    """Fit biases on each half of the users and judge them by the other; on all where that surely pays."""
    tau, contest = likeliest(replay), Contest.of(replay)
    half = half_of_users(replay.users, seed)
    sums = [_sums(replay.select(mask), tau) for mask in (half, ~half)]
    base, gains = stream_ndcg(query_ranks(contest.start, contest.places)), list[Tensor]()
    for share in SHARES:
        of_half = torch.stack([share * _misjudged(*one) for one in sums])
        # users of the first half are judged under the second's
        change = of_half[half.long()[:, None], contest.columns] * (replay.num_events > 0)[:, None]
        figures = stream_ndcg(query_ranks(contest.start + change, contest.places))
        gains.append(user_means(figures - base, replay.users))
    judged, chosen = judged_by_halves(torch.stack(gains), seed)
    taken, expected = (one + other for one, other in zip(*sums, strict=True))
    by_item = SHARES[chosen] * _misjudged(taken, expected)
    return Biases(by_item if surely_gain(judged) else torch.zeros_like(by_item), interval(judged, seed=seed))


def of_items(parameters_bias: Tensor, known_ids: tuple[str, ...], item_ids: tuple[str, ...]) -> Tensor:
    """Biases [n] of known items as those of others [N]: 0 for items that are not among them."""
    by_id = dict(zip(known_ids, parameters_bias.tolist(), strict=True))
    return torch.tensor([by_id.get(item_id, 0.0) for item_id in item_ids])


def _sums(replay: Replay, tau: float) -> tuple[Tensor, Tensor]:
    """How often each item was taken, and was expected to be: [N] each, of events with a support."""
    with_support = replay.select(replay.num_events > 0)
    expected = torch.zeros(replay.start.shape[1])
    for start in torch.split(with_support.start, _BLOCK):
        expected += torch.softmax(tau * start, 1).sum(0)
    return torch.bincount(with_support.targets, minlength=len(expected)).float(), expected


def _misjudged(taken: Tensor, expected: Tensor) -> Tensor:
    return ((taken + DOUBT) / (expected + DOUBT)).log()
