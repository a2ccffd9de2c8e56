"""An item-item part that is learnt by gradient: which items follow a support at the positions that are asked for.

    logit_i = w(K) log p_i + b_i + s(K) / sqrt(K) sum over the support of decay^age <in_h, out_i>

with p the popularity where the query begins; in- and out-vectors are an item's own plus a linear map of its text.
Trained by softmax cross-entropy on the query (AdamW, one cycle: Loshchilov 2019, Smith 2018; averaged weights: Polyak).
The matrix <in_h, out_i> is then one more part among the counted ones. Letters: E tasks, S support slots, Q query slots,
N items, T text dimensions, D dimensions, B buckets of K.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from models import popularity
from models.episodes import History, Interactions, earlier, following

SHOTS = (1, 2, 3, 5, 7, 10, 14, 20)
HEAD, QUERY, LEAST_QUERY = 20, 20, 5
DECAY = 0.95
DIMS = 64
STEPS, BATCH, LEARNING_RATE, KEPT = 400, 256, 3e-3, 0.99
WEIGHT_DECAY = 3.0  # on vectors: hundreds of users decide about thousands of numbers
DROPPED_EVENTS, DROPPED_ITEMS = 0.3, 0.1


@dataclass(frozen=True)
class _Tasks:
    """Supports [E, HEAD] newest last, K [E], queries [E, QUERY], not ranked [E, HEAD], where the query begins [E].

    -1 stands for none everywhere.
    """

    support: Tensor
    num_events: Tensor
    query: Tensor
    masked: Tensor
    position: Tensor

    def select(self, rows: Tensor) -> _Tasks:
        """Keep some tasks."""
        return _Tasks(**{name: column[rows] for name, column in vars(self).items()})


class _Network(nn.Module):
    """In- and out-vectors, and what the head of this file says about them."""

    def __init__(self, num_items: int, texts: Tensor) -> None:
        super().__init__()
        self.items_in, self.items_out = (nn.Parameter(0.02 * torch.randn(num_items, DIMS)) for _ in range(2))
        self.text_in, self.text_out = (nn.Parameter(0.02 * torch.randn(texts.shape[1], DIMS)) for _ in range(2))
        self.bias = nn.Parameter(torch.zeros(num_items))
        self.scale, self.prior_weight = nn.Parameter(torch.zeros(HEAD + 1)), nn.Parameter(torch.ones(HEAD + 1))
        self.texts = texts

    def forward(self, tasks: _Tasks, priors: Tensor) -> Tensor:
        """Logits [E, N] of a training step: events and items are dropped at random."""
        own = self.items_in * (torch.rand(len(self.items_in), 1) > DROPPED_ITEMS)
        inside = own + self.texts @ self.text_in
        present = (tasks.support >= 0) & (torch.rand(tasks.support.shape) > DROPPED_EVENTS)
        gains = torch.where(present, DECAY ** torch.arange(HEAD - 1, -1, -1.0), 0.0)
        pooled = (inside[tasks.support.clamp(min=0)] * gains[..., None]).sum(1)
        shots = tasks.num_events
        pooled = pooled * (torch.exp(self.scale[shots]) / shots.sqrt())[:, None]
        outside = self.items_out + self.texts @ self.text_out
        prior = self.prior_weight[shots][:, None] * priors[popularity.bucket_of(tasks.position)]
        logits: Tensor = pooled @ outside.T + prior + self.bias
        return logits

    @torch.no_grad()
    def matrix(self) -> Tensor:
        """What an item had gives to every item: [N, N]."""
        inside, outside = self.items_in + self.texts @ self.text_in, self.items_out + self.texts @ self.text_out
        return inside @ outside.T


def learnt_part(interactions: Interactions, text_embeddings: Tensor, *, seed: int) -> Tensor:
    """Matrix [N, N], row = item had, column = item scored; text embeddings [N, T] are zeros where there is no text.

    Equal for equal seeds; the global generator is left as it was.
    """
    texts = functional.normalize(text_embeddings, dim=1)
    tasks, priors = _tasks(interactions), _log_popularity(interactions)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _Network(interactions.num_items, texts - texts.mean(0))
        _train(network, tasks, priors)
    return network.matrix()


def _tasks(interactions: Interactions) -> _Tasks:
    """After each of SHOTS: what comes after HEAD events (with the head masked), and what comes next."""
    history, items = History.of(interactions.users), interactions.items
    enough = history.length - history.position >= LEAST_QUERY
    begins = ((history.position == HEAD) & enough).nonzero()[:, 0]
    head, later = earlier(history, items, begins, HEAD), following(history, items, begins, QUERY)
    rows = []
    for shots in SHOTS:
        known = torch.full_like(head, -1)
        known[:, HEAD - shots :] = head[:, :shots]
        rows.append(_Tasks(known, torch.full((len(head),), shots), later, head, history.position[begins]))
        now = ((history.position == shots) & enough).nonzero()[:, 0]
        before = earlier(history, items, now, HEAD)
        rows.append(
            _Tasks(before, history.position[now], following(history, items, now, QUERY), before, history.position[now])
        )
    return _Tasks(**{name: torch.cat([getattr(row, name) for row in rows]) for name in vars(rows[0])})


def _log_popularity(interactions: Interactions) -> Tensor:
    """Smoothed log share of every item by bucket of K, centred: [B, N]."""
    buckets = popularity.bucket_of(History.of(interactions.users).position)
    cells = torch.bincount(
        buckets * interactions.num_items + interactions.items, minlength=popularity.NUM_BUCKETS * interactions.num_items
    )
    logs = torch.log(cells.view(popularity.NUM_BUCKETS, -1) + 0.5)
    return logs - logs.mean(1, keepdim=True)


def _train(network: _Network, tasks: _Tasks, priors: Tensor) -> None:
    vectors = [network.items_in, network.items_out, network.text_in, network.text_out]
    others = [network.bias, network.scale, network.prior_weight]
    groups = [{"params": vectors, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=STEPS)
    averaged = torch.optim.swa_utils.AveragedModel(
        network,
        multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(KEPT),  # type: ignore[no-untyped-call]
    )
    for _ in range(STEPS):
        loss = _loss(network, tasks.select(torch.randint(len(tasks.query), (BATCH,))), priors)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch's own
        optimizer.step()
        schedule.step()
        averaged.update_parameters(network)
    network.load_state_dict(averaged.module.state_dict())


def _loss(network: _Network, tasks: _Tasks, priors: Tensor) -> Tensor:
    """Cross-entropy of the query's items against all that are not masked, every task counting once."""
    logits = functional.pad(network(tasks, priors), (0, 1), value=-torch.inf)  # last: what -1 names
    nothing = logits.shape[1] - 1
    logits = logits.scatter(1, torch.where(tasks.masked >= 0, tasks.masked, nothing), -torch.inf)
    wanted = tasks.query >= 0
    chosen = torch.log_softmax(logits, 1).gather(1, tasks.query.clamp(min=0))
    per_task = -torch.where(wanted, chosen, 0.0).sum(1) / wanted.sum(1)
    return per_task.mean()
