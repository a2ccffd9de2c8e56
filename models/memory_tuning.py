"""How long the start remembers, and whether several memories are mixed: what validation users rank best with.

Letters: E events, N items, M memories, P parts, U users, G settings.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from models.figures import Interval, interval, judged_by_halves, query_ranks, set_ndcg, surest, user_means
from models.memories import TAU, Memories
from models.replay import Replay, start_losses, states_before

DISCOUNTS = (0.8, 0.9)
RATES = (2.0, 4.0)
CAUTIONS = (1.0, 2.0)


class Mixed(NamedTuple):
    """The chosen memories, and what mixing gains in set nDCG@10 over the best single one, on users who did not choose.

    The gain is judged in two halves, each with the setting that the other has chosen.
    """

    memories: Memories
    gain: Interval


def surest_alone(replays: Sequence[Replay]) -> int:
    """The replay of a single memory that ranks best: the first unless another one surely does."""
    return surest(torch.stack([_figures(replay.start, replay) for replay in replays]))


def mix(replays: Sequence[Replay], decays: Sequence[Tensor], *, best: int, seed: int) -> Mixed:
    """Mix the memory that is best alone with the one, of the replays' decays [P] each, that helps it most.

    A mixture has to win: the paired 95 % interval of its gain must be above zero, else the best one stays alone.
    """
    mine, own = replays[best], _figures(replays[best].start, replays[best])
    losses = [start_losses(replay, TAU) for replay in replays]
    settings, gains = list[Memories](), list[Tensor]()
    for other in (number for number, others in enumerate(decays) if not torch.equal(others, decays[best])):
        pair, earned = torch.stack([decays[best], decays[other]]), (losses[best] - losses[other])[:, None]
        for setting in product(DISCOUNTS, RATES, CAUTIONS):
            memories = Memories(pair, *setting)
            track = states_before(mine.users, earned, memories.discount)[0]
            mixed = _mixed(mine.start, replays[other].start, memories.weights(track)[:, 1:])
            settings.append(memories)
            gains.append(_figures(mixed, mine) - own)
    judged, chosen = judged_by_halves(torch.stack(gains), seed)
    gain = interval(judged, seed=seed)
    return Mixed(settings[chosen] if gain.low > 0 else Memories.single(decays[best]), gain)


def _mixed(first: Tensor, other: Tensor, share: Tensor) -> Tensor:
    """Starts [E, N] of two memories, `share` [E, 1] of the other; what is excluded stays so."""
    return torch.where(first > -torch.inf, torch.lerp(first, other, share), first)


def _figures(start: Tensor, replay: Replay) -> Tensor:
    return user_means(set_ndcg(query_ranks(start, replay.query)), replay.users)
