"""How strict the gate is: by what validation users would have been served, with each setting, in set nDCG@10.

Letters: E events, F factors, G settings, U users.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from models.figures import Interval, interval, surest, user_means
from models.gate import Gate
from models.inner_tuning import Contest, Tuned, inner_step
from models.logit_reading import LOSS_LIMIT
from models.replay import Moments, Replay, honest_residuals, states_before

DISCOUNTS = (0.8, 0.9, 0.95)
CREDITS = (0.25, 0.5, 1.0, 2.0)
DEFAULT = Gate(discount=0.9, credit=1.0)  # closes for one event in fifty on MovieLens-100K, and costs nothing there
OFF = Gate(discount=0.9, credit=1e6)
_BLOCK = 1024


@dataclass(frozen=True)
class Judged:
    """The chosen gate; `gain` in set nDCG@10 over no gate at all, `gated_share` of the events that it closed for."""

    gate: Gate
    gain: Interval
    gated_share: float


UNJUDGED = Judged(DEFAULT, Interval(0.0, 0.0, 0.0), 0.0)


def tune(replay: Replay, factors: Tensor, tuned: Tuned, moments: Moments, *, seed: int) -> Judged:
    """Judge the honest step as it was tuned."""
    if not tuned.pays:
        return UNJUDGED
    spread, rotation = torch.linalg.eigh(factors.T @ moments.covariance @ factors)
    factors = factors @ rotation
    residuals = honest_residuals(replay, factors, tuned.tau) - moments.item_bias @ factors
    step = inner_step(spread.clamp(min=0.0), tuned.precision, tuned.tau, tuned.discount)
    deviation = step.deviation(*states_before(replay.users, residuals, tuned.discount), replay.num_events)
    return judge(replay, deviation, factors, tau=tuned.tau, seed=seed)


def judge(replay: Replay, deviation: Tensor, factors: Tensor, *, tau: float, seed: int) -> Judged:
    """Choose among DISCOUNTS x CREDITS and OFF; DEFAULT where validation users do not tell them apart.

    deviation [E, F] is what an adapter changes before each event, in factors [N, F].
    """
    earned = _earned(replay, deviation, factors, tau)
    contest = Contest.of(replay)
    change = contest.figure(contest.start + contest.of_candidates(deviation, factors)) - contest.figure(contest.start)
    gates = [DEFAULT, OFF, *(Gate(*setting) for setting in product(DISCOUNTS, CREDITS))]
    closed = torch.stack([~gate.is_open(_tracks(replay.users, earned, gate.discount)) for gate in gates])
    # a closed gate gives the start, whose change is none
    served = user_means(torch.where(closed, 0.0, change), replay.users)
    chosen = surest(served)
    gain = interval(served[chosen] - served[1], seed=seed)
    return Judged(gates[chosen], gain, round(float(closed[chosen].float().mean()), 4))


def _earned(replay: Replay, deviation: Tensor, factors: Tensor, tau: float) -> Tensor:
    """The start's loss less the adapter's [E], both capped."""
    earned = []
    for begin in range(0, len(deviation), _BLOCK):
        now = slice(begin, begin + _BLOCK)
        start = tau * replay.start[now]
        both = torch.stack([start, start + tau * (deviation[now] @ factors.T)])
        own = both.gather(2, replay.targets[now].expand(2, -1)[..., None])[..., 0]
        losses = (torch.logsumexp(both, 2) - own).clamp(max=LOSS_LIMIT)
        earned.append(losses[0] - losses[1])
    return torch.cat(earned)


def _tracks(users: Tensor, earned: Tensor, discount: float) -> Tensor:
    """What stood in the gate's track before each event [E]."""
    return states_before(users, earned[:, None], discount)[0][:, 0]
