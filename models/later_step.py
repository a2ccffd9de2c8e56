"""What adaptation is worth for what users take later: their first events one by one, by the served form.

Letters: U users, N items, T text dimensions, H head slots, Q query slots.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from models import popularity
from models.figures import query_ranks, set_ndcg
from models.item_tables import assemble_items
from models.meta_parameters import MetaParameters
from models.ranker import Ranker, TaskBatch, exclusions


def adapted_and_start(
    parameters: MetaParameters, text_embeddings: Tensor, head: Tensor, query: Tensor, shots: Sequence[int]
) -> Tensor:
    """nDCG@10 [2, U] of queries [U, Q], adapted and start, mean over K in shots; heads [U, H] are not ranked."""
    num_items = len(text_embeddings)
    ranker = Ranker(parameters, assemble_items(parameters, text_embeddings, torch.arange(num_items)))
    masked = exclusions(head, num_items)
    figures = [
        torch.stack([set_ndcg(query_ranks(scores + masked, query)) for scores in both])
        for num_events, both in _after_events(ranker, head, popularity.priors(parameters.counts))
        if num_events in shots
    ]
    return torch.stack(figures).mean(0)


def _after_events(ranker: Ranker, head: Tensor, priors: Tensor) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
    """K, and the logits adapted and start [U, N], before each event of heads and after the last."""
    num, longest = head.shape
    state, track = torch.zeros(num, ranker.state_size), torch.zeros(num, ranker.track_size)
    state_events = torch.zeros(num, dtype=torch.int64)
    for num_events in range(longest + 1):
        known = functional.pad(head[:, :num_events], (longest - num_events, 0), value=-1)
        known = known[:, -ranker.parameters.support_size :]
        each = torch.full((num,), num_events)
        tasks = TaskBatch(
            support=known,
            weights=torch.ones(known.shape),
            num_events=each,
            state=state,
            state_events=state_events,
            track=track,
            excluded=exclusions(head[:, :num_events], priors.shape[1]),
            prior_rows=popularity.bucket_of(each),
        )
        yield num_events, ranker.logits(tasks, priors)
        if num_events < longest:
            step = ranker.step(tasks, priors, head[:, num_events])
            state, state_events, track = step.state, step.state_events, step.track
