"""SASRec (Kang and McAuley 2018): self-attention over the sequence, trained on every next item with a full softmax.

Letters: U users, L positions, N items, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.episodes import Interactions
from models.peers.peer import Known

LENGTH = 50
BATCH, STEPS, PATIENCE, EVALUATE_EVERY = 64, 2000, 4, 50
HELD_OUT = 0.1  # of the users, for early stopping


@dataclass(frozen=True)
class Sizes:
    """What a search may choose: width, blocks, dropout, learning rate."""

    width: int = 64
    blocks: int = 2
    dropout: float = 0.2
    learning_rate: float = 3e-3

    @classmethod
    def of(cls, setting: Mapping[str, float]) -> Sizes:
        """From plain numbers."""
        width, blocks = int(setting["width"]), int(setting["blocks"])
        return cls(width, blocks, setting["dropout"], setting["learning_rate"])


class _Network(nn.Module):
    """Item and position embeddings, causal transformer blocks, scores by the item embeddings."""

    def __init__(self, num_items: int, sizes: Sizes) -> None:
        super().__init__()
        width = sizes.width
        self.items = nn.Embedding(num_items + 1, width, padding_idx=num_items)
        self.positions = nn.Parameter(0.02 * torch.randn(LENGTH, width))
        layer = nn.TransformerEncoderLayer(
            width, 1, 2 * width, sizes.dropout, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, sizes.blocks, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.bias = nn.Parameter(torch.zeros(num_items))
        nn.init.normal_(self.items.weight, std=0.05)
        self.dropout = nn.Dropout(sizes.dropout)

    def forward(self, sequences: Tensor, asked: Tensor) -> Tensor:
        """Scores [E, N] of the next item where `asked` [U, L] says so, of left-aligned rows [U, L] (N = padding)."""
        causal = nn.Transformer.generate_square_subsequent_mask(sequences.shape[1])
        inputs = self.dropout(self.items(sequences) + self.positions[: sequences.shape[1]])
        hidden = self.norm(self.blocks(inputs, mask=causal, is_causal=True)[asked])
        scores: Tensor = hidden @ self.items.weight[:-1].T + self.bias
        return scores


class SASRec:
    """Fitted once; new users are read as their sequence grows."""

    def __init__(
        self,
        fitted: Interactions,
        sizes: Sizes = Sizes(),
        *,
        seed: int = 0,
        steps: int = STEPS,
    ) -> None:
        """Train with early stopping on the last item of held-out users."""
        self._num_items = fitted.num_items
        popular = torch.bincount(fitted.items, minlength=fitted.num_items) + 0.5
        self._popular = torch.log(popular / popular.sum())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._network = _Network(fitted.num_items, sizes)
            with torch.no_grad():
                self._network.bias.copy_(self._popular)
            _train(self._network, _windows(fitted), sizes.learning_rate, steps)

    @torch.no_grad()
    def scores(self, known: Known) -> Tensor:
        """What follows the newest items; popularity for users without any."""
        newest = known.history[:, -LENGTH:]
        lengths = (newest >= 0).sum(1)
        if newest.shape[1] == 0:
            return self._popular.expand(len(lengths), -1).clone()
        place = torch.arange(newest.shape[1]) + (newest.shape[1] - lengths)[:, None]
        left = newest.gather(1, place.clamp(max=newest.shape[1] - 1))
        inside = torch.arange(newest.shape[1]) < lengths[:, None]
        newest_place = torch.arange(newest.shape[1]) == (lengths - 1).clamp(min=0)[:, None]
        last = self._network(torch.where(inside, left, self._num_items), newest_place)
        return torch.where((lengths > 0)[:, None], last, self._popular)

    def learn(self, known: Known, items: Tensor) -> None:
        """The network stays as trained; sequences grow by themselves."""


def _windows(fitted: Interactions) -> Tensor:
    """Sequences cut into windows of LENGTH + 1, one overlapping: [W, LENGTH + 1], N = padding, users in order."""
    order = torch.argsort(fitted.users, stable=True)
    _, counts = torch.unique(fitted.users, return_counts=True)
    rows = [
        functional.pad(window, (0, LENGTH + 1 - len(window)), value=fitted.num_items)
        for sequence in torch.split(fitted.items[order], counts.tolist())
        for start in range(0, len(sequence) - 1, LENGTH)
        for window in (sequence[start : start + LENGTH + 1],)
    ]
    return torch.stack(rows) if rows else torch.zeros(0, LENGTH + 1, dtype=torch.int64)


def _train(network: _Network, windows: Tensor, learning_rate: float, steps: int) -> None:
    shuffled = windows[torch.randperm(len(windows))]
    held = max(1, int(HELD_OUT * len(windows)))
    judged, learnt = shuffled[:held], shuffled[held:]
    optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate, weight_decay=0.01)
    best, kept, waited = float("inf"), network.state_dict(), 0
    for step in range(steps if len(learnt) else 0):
        network.train()
        loss = _loss(network, learnt[torch.randint(len(learnt), (BATCH,))])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch's own
        optimizer.step()
        if (step + 1) % EVALUATE_EVERY == 0:
            network.eval()
            with torch.no_grad():
                found = float(_loss(network, judged))
            waited = 0 if found < best else waited + 1
            if found < best:
                best, kept = found, {name: value.clone() for name, value in network.state_dict().items()}
            if waited == PATIENCE:
                break
    network.load_state_dict(kept)
    network.eval()


def _loss(network: _Network, windows: Tensor) -> Tensor:
    """Cross-entropy of every next item of the windows."""
    num_items = len(network.bias)
    longest = max(2, int((windows < num_items).sum(1).max()))
    inputs, targets = windows[:, : longest - 1], windows[:, 1:longest]
    used = targets < num_items
    return functional.cross_entropy(network(inputs, used), targets[used])
