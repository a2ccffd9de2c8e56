"""Small things to test with: records, chunks, and random but well-formed meta-parameters."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from models.adapters import adapter_named
from models.encoder import HashedBagOfWords
from models.episodes import Interactions
from models.learners import LEARNERS
from models.meta_parameters import NUM_BUCKETS, MetaParameters
from models.repeats import SHAPE
from pipeline.chunks import Chunk
from pipeline.offline_worker import OfflineRecord
from pipeline.synthetic import Plan, catalogue, draw_events

NOW_MS = 1_760_000_000_000


Record = OfflineRecord  # tests make records as the offline worker does


def event(user_id: str, item_id: str, event_id: str, kind: str = "click", **more: object) -> bytes:
    """The JSON of one interaction."""
    body = {"v": 1, "event_id": event_id, "user_id": user_id, "item_id": item_id, "type": kind, "ts": NOW_MS}
    return json.dumps(body | more).encode()


def record(value: bytes | None, offset: int, *, partition: int = 0, key: bytes | None = None) -> Record:
    """A record of the topic `interactions`, keyed by its user."""
    if key is None and value is not None:
        try:
            key = json.loads(value)["user_id"].encode()
        except (ValueError, TypeError, KeyError, AttributeError):
            key = b"somebody"
    return Record("interactions", partition, offset, NOW_MS + offset, key, value)


def chunk(records: Iterable[Record], start: int | None = None) -> Chunk:
    """The chunk of consecutive records."""
    rows = list(records)
    first = rows[0].offset if start is None else start
    return Chunk(rows[0].topic, rows[0].partition, first, rows[-1].offset + 1, rows)


class Sizes(NamedTuple):
    """Dimensions of meta-parameters: multiples of 16 floats, as in trained versions.

    A row that straddles cache lines may round differently.
    """

    dims: int = 16
    factors: int = 16
    neighbours: int = 8


SMALL = Sizes()


def meta_parameters(
    item_ids: Sequence[str], *, text_dim: int = 16, seed: int = 0, sizes: Sizes = SMALL, **changes: object
) -> MetaParameters:
    """Random parameters over these items, with an inner step that moves the scores visibly."""
    ids = tuple(sorted(item_ids, key=str.encode))
    n, p, (d, f, m) = len(ids), 4, sizes
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw)

    fields: dict[str, object] = {
        "item_ids": ids,
        "encoder": "test",
        "parts": ("one", "two", "three", "four"),
        "support_size": 10,
        "recommend_seen": False,
        "pairs_online": True,
        "use_inner_step": True,
        "learner": "honest",
        "adapter": "vector",
        "residuals": "honest",
        "step_from": 1,
        "tau": 1.5,
        "discount": 0.97,
        "trust_radius": 1.0,
        "gate_discount": 0.9,
        "gate_credit": 1.0,
        "shrinkage": 5.0,
        "half_life": 4000.0,
        "item_out": normal(n, d),
        "item_in": normal(n, p, d),
        "item_spread": normal(n, p).abs(),
        "neighbour_items": torch.randint(0, n, (n, m), generator=draw),
        "neighbour_values": normal(n, m, p),
        "pair_counts": torch.randint(0, 5, (n, m, 3), generator=draw).float(),
        "pair_means": torch.zeros(n, 3),
        "pair_worth": torch.ones(3),
        "pseudo_events": torch.tensor([5.0, 20.0, 5.0]),
        "item_bias": torch.zeros(n),
        "item_users": torch.full((n,), 50.0),
        "item_factors": normal(n, f),
        "item_events": torch.full((n,), 50.0),
        "residual_mean": torch.zeros(f),
        "metric": torch.linspace(1.0, 0.1, f),
        "precision": torch.full((f,), 3.0),
        "adapter_initial": torch.zeros(f),
        "step_rates": torch.zeros(0, f),
        "text_map": normal(text_dim + 1, d + p * d + f) * 0.1,
        "context_map": torch.zeros(0, d),
        "pace_direction": torch.zeros(d),
        "usual_pace": 0.01,
        "part_decays": torch.tensor([0.9, 0.8, 0.9, 0.9]),
        "memory_decays": torch.zeros(0, p),
        "memory_discount": 0.9,
        "memory_rate": 1.0,
        "memory_caution": 0.5,
        "scene_shares": torch.full((NUM_BUCKETS,), 0.25),
        "repeat_profile": torch.zeros(SHAPE),
        "repeat_shares": torch.ones(NUM_BUCKETS),
        "part_weights": torch.full((NUM_BUCKETS, 1 + p), 1 / (1 + p)),
        "calibration": torch.tensor([[1.0, 0.0]]).repeat(NUM_BUCKETS, 1),
        "counts": normal(NUM_BUCKETS, n).abs() * 10,
    }
    return MetaParameters(**(fields | changes))  # type: ignore[arg-type]


def learnt_fields(learner: str, adapter: str, *, num_factors: int = 16, seed: int = 0) -> dict[str, object]:
    """Fields of meta-parameters whose inner loop is this learner's, with random initial parameters and rates."""
    made, draw = adapter_named(adapter, num_factors), torch.Generator().manual_seed(seed)
    steps = 0 if LEARNERS[learner].solves else 3
    return {
        "learner": learner,
        "adapter": adapter,
        "adapter_initial": made.initial(draw) + 0.1 * torch.randn(made.size, generator=draw),
        "step_rates": torch.rand(steps, made.size, generator=draw) * 30,
        "precision": torch.rand(num_factors, generator=draw) + 1.0,
    }


def synthetic_interactions(plan: Plan) -> tuple[Interactions, torch.Tensor, tuple[str, ...]]:
    """A synthetic stream as meta-training takes it: events, text embeddings and ids of the items."""
    listed = sorted(catalogue(plan), key=lambda item: item["item_id"].encode())
    ids = tuple(item["item_id"] for item in listed)
    row_of = {item_id: row for row, item_id in enumerate(ids)}
    events = [(drawn.user, row_of[drawn.event["item_id"]]) for drawn in draw_events(plan)]
    users, items = torch.tensor(events).T
    number = torch.arange(len(events))
    embeddings = HashedBagOfWords(64).encode([item["text"] for item in listed])
    return Interactions(users, items, number, torch.ones(len(events)), plan.items), embeddings, ids
