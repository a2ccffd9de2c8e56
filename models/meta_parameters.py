"""What meta-training learns and a worker serves: one frozen value of tensors and plain metadata.

Letters: n trained items, T text dimensions, D item-item dimensions, F inner factors, P item-item parts,
M neighbours kept per item, C counted parts (the first of the P), A parameters of a user's adapter, K gradient steps,
B buckets of K (`models.popularity.BUCKET_STARTS`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from models import repeats
from models.adapters import adapter_named
from models.learners import HONEST, LEARNERS, RESIDUALS

FORMAT = 1
NUM_BUCKETS = 8


@dataclass(frozen=True)
class MetaParameters:
    """Everything the ranker needs; item rows are in the bytes order of `item_ids`.

    Attributes:
        item_ids: n ids of the trained items, ascending by UTF-8 bytes.
        encoder: name of the text encoder that `text_map` was fitted on.
        parts: names of the P item-item parts.
        support_size: number of newest positives the start looks at.
        recommend_seen: whether items a user has had may be listed again (learnt from repeats).
        pairs_online: whether counts of pairs move online (False where validation users were ranked no better by it).
        use_inner_step: False where the inner loop did not pay on validation users.
        learner: what computes a user's deviation: `honest` (one MAP step) or a name in `models.learners.LEARNERS`.
        residuals: what the learner learns from, one of `models.learners.RESIDUALS`.
        adapter: what the learner adapts, a name in `models.adapters.ADAPTERS`; it collapses to [F].
        step_from: smallest K at which the inner step moves the scores.
        tau: inverse temperature of the start's softmax.
        discount: what remains of the inner state (honest residuals and their metric) per event.
        trust_radius: largest change by the inner step, in standard deviations of the start's logits.
        gate_discount: what remains of an adapter's gain over its start per event, see `models.gate`.
        gate_credit: nats an adapter may lately have lost and still be served.
        memory_discount: what remains per event of what a memory has earned, see `models.memories`.
        memory_rate: how fast a memory that earns comes to count, per nat.
        memory_caution: nats that another than the first memory has to have earned to count as much.
        shrinkage: c in n / (n + c), the trust in learnt item vectors against those read from the text.
        half_life: events of a partition after which a position-popularity count has halved.
        item_out: [n, D] out-vectors shared by all parts.
        item_in: [n, P, D] in-vectors: part p of item h scores item i by `item_in[h, p] @ item_out[i]`.
        item_spread: [n, P] variance over the catalogue of what the D dimensions leave out.
        neighbour_items: [n, M] int64 rows of the items whose left-out score matters most, -1 where none.
        neighbour_values: [n, M, P] that left-out score.
        pair_counts: [n, M, C] how often the first C parts counted the neighbours, as `models.pair_counts` counts on.
        pair_means: [n, C] mean over the catalogue of the counted parts, which the D dimensions leave out.
        pair_worth: [C] what a unit of each counted part is worth where pairs compete.
        pseudo_events: [C] observations of the prediction that a counted pair is shrunk by.
        item_bias: [n] what each item's logits need beside the start, see `models.item_biases`; zeros where off.
        item_users: [n] number of users who took each item.
        item_factors: [n, F] features of the inner step, in the eigenbasis of its shared metric.
        item_events: [n] number of events each item was fitted on.
        residual_mean: [F] mean of honest residuals over users: what no single user has to learn.
        metric: [F] the shared metric: mean variance of each factor under the start's prediction.
        precision: [F] prior precision of the inner step.
        adapter_initial: [A] parameters of the adapter at which every user begins.
        step_rates: [K, A] rates of the learner's K gradient steps; K = 0 for what is solved in one step.
        text_map: [T + 1, D + P * D + F] ridge map from text embedding (and 1) to the item's vectors.
        context_map: [D + F + 1, D] from the company that a new item is met in to what its text misses of its
            out-vector, see `models.item_contexts`; no rows where that was not seen to come nearer.
        pace_direction: [D] what each e-fold of a new item's pace adds to its out-vector.
        usual_pace: takers of an item for each taker of any item, where its pace is the usual one.
        part_decays: [P] weight kept per event of age: the first memory.
        memory_decays: [M - 1, P] those of further memories, see `models.memories`; none where they did not win.
        part_weights: [B, 1 + P] weight of position popularity, then of each part, by bucket of K.
        scene_shares: [B] how much of the parts counts, by bucket of K, for users none of whose items is trained, see
            `models.scene_tuning`; the rest is popularity.
        repeat_profile: [A, C] what it is worth to have had an item, see `models.repeats`; zeros where nobody repeats.
        repeat_shares: [B] how much of the start counts for an item that was had, by bucket of K.
        calibration: [B, 2] positive scale and offset from score to logit, by bucket of K.
        counts: [B, n] position-popularity counts at the end of the window.

    """

    item_ids: tuple[str, ...]
    encoder: str
    parts: tuple[str, ...]
    support_size: int
    recommend_seen: bool
    pairs_online: bool
    use_inner_step: bool
    learner: str
    adapter: str
    residuals: str
    step_from: int
    tau: float
    discount: float
    trust_radius: float
    gate_discount: float
    gate_credit: float
    memory_discount: float
    memory_rate: float
    memory_caution: float
    shrinkage: float
    half_life: float
    usual_pace: float
    item_out: Tensor
    item_in: Tensor
    item_spread: Tensor
    neighbour_items: Tensor
    neighbour_values: Tensor
    pair_counts: Tensor
    pair_means: Tensor
    pair_worth: Tensor
    pseudo_events: Tensor
    item_bias: Tensor
    item_users: Tensor
    item_factors: Tensor
    item_events: Tensor
    residual_mean: Tensor
    metric: Tensor
    precision: Tensor
    adapter_initial: Tensor
    step_rates: Tensor
    text_map: Tensor
    context_map: Tensor
    pace_direction: Tensor
    part_decays: Tensor
    memory_decays: Tensor
    part_weights: Tensor
    scene_shares: Tensor
    repeat_profile: Tensor
    repeat_shares: Tensor
    calibration: Tensor
    counts: Tensor

    def __post_init__(self) -> None:
        """Refuse tensors whose shapes do not belong together, and unknown learners (ValueError names the first)."""
        if self.learner not in (HONEST, *LEARNERS):
            raise ValueError(f"there is no learner {self.learner!r}")
        if self.residuals not in RESIDUALS:
            raise ValueError(f"there are no residuals {self.residuals!r}")
        for name, shape in self._shapes().items():
            found = tuple(getattr(self, name).shape)
            if found != shape:
                raise ValueError(f"{name} has shape {found}, expected {shape}")

    @property
    def text_dim(self) -> int:
        """T, the dimension of the text embeddings that `text_map` expects."""
        return self.text_map.shape[0] - 1

    def tensors(self) -> dict[str, Tensor]:
        """Give the named tensors: float32, except `neighbour_items` (int64)."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name in TENSOR_NAMES}

    def metadata(self) -> dict[str, Any]:
        """Give the rest, as plain JSON values (str, int, float, bool, list of str), with `format`."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in TENSOR_NAMES}
        return {"format": FORMAT, **plain, "item_ids": list(self.item_ids), "parts": list(self.parts)}

    def rows_of(self, item_ids: Iterable[str]) -> Tensor:
        """Give the row of each item [N] int64, -1 where it is none of ours."""
        row_of = {item_id: row for row, item_id in enumerate(self.item_ids)}
        return torch.tensor([row_of.get(item_id, -1) for item_id in item_ids], dtype=torch.int64)

    @classmethod
    def from_parts(cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> MetaParameters:
        """Put `tensors()` and `metadata()` together again.

        Raises ValueError when a name is missing or unknown, or a format, dtype or shape is not the expected one.
        """
        plain = dict(metadata)
        if plain.pop("format", None) != FORMAT:
            raise ValueError(f"format {metadata.get('format')!r} is not {FORMAT}")
        expected = {f.name for f in fields(cls)}
        if set(tensors) != TENSOR_NAMES or set(plain) != expected - TENSOR_NAMES:
            raise ValueError(f"names differ: {sorted((set(tensors) | set(plain)) ^ expected)}")
        for name, tensor in tensors.items():
            wanted = torch.int64 if name == "neighbour_items" else torch.float32
            if tensor.dtype != wanted:
                raise ValueError(f"{name} is {tensor.dtype}, expected {wanted}")
        plain |= {"item_ids": tuple(plain["item_ids"]), "parts": tuple(plain["parts"]), **tensors}
        return cls(**plain)

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        n, p = len(self.item_ids), len(self.parts)
        d, f, m = self.item_out.shape[-1], self.item_factors.shape[-1], self.neighbour_items.shape[-1]
        c = self.pair_worth.shape[0]
        a = adapter_named(self.adapter, f).size
        return {
            "item_out": (n, d),
            "item_in": (n, p, d),
            "item_spread": (n, p),
            "neighbour_items": (n, m),
            "neighbour_values": (n, m, p),
            "pair_counts": (n, m, c),
            "pair_means": (n, c),
            "pair_worth": (c,),
            "pseudo_events": (c,),
            "item_bias": (n,),
            "item_users": (n,),
            "item_factors": (n, f),
            "item_events": (n,),
            "residual_mean": (f,),
            "metric": (f,),
            "precision": (f,),
            "adapter_initial": (a,),
            "step_rates": (self.step_rates.shape[0], a),
            "text_map": (self.text_map.shape[0], d + p * d + f),
            "context_map": (d + f + 1 if len(self.context_map) else 0, d),
            "pace_direction": (d,),
            "part_decays": (p,),
            "memory_decays": (self.memory_decays.shape[0], p),
            "part_weights": (NUM_BUCKETS, 1 + p),
            "scene_shares": (NUM_BUCKETS,),
            "repeat_profile": repeats.SHAPE,
            "repeat_shares": (NUM_BUCKETS,),
            "calibration": (NUM_BUCKETS, 2),
            "counts": (NUM_BUCKETS, n),
        }


TENSOR_NAMES = frozenset(f.name for f in fields(MetaParameters) if f.type == "Tensor")
