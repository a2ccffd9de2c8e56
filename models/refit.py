"""A cheap probe of what training again would gain: the linear parts refitted on a recent window, judged after it.

Item-item tables, factors and popularity are closed forms of a window; weights, inner step and calibration, which cost
the most, stay those of the version. Letters: E events, N items, T text dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.episodes import Interactions, drawn_from
from models.item_tables import assemble_items
from models.meta_parameters import MetaParameters
from models.ranker import Ranker
from models.replay import replay_start, start_losses
from models.table_fitting import Choices, Window, fit, popularity_moments

MOST_JUDGED = 1500  # events, at random
_COUNT_LIVES = 4  # half-lives of popularity that are counted before the judged events


def refit_gain(
    parameters: MetaParameters,
    interactions: Interactions,
    text_embeddings: Tensor,
    item_ids: tuple[str, ...],
    *,
    recent: int,
    seed: int = 0,
) -> float:
    """Loss per event that tables fitted on the window's first half save on its second, under the start.

    Both predict the same events from the same supports; negative where the version in use does better.

    Args:
        parameters: the version that serves.
        interactions: all positives, the window's last.
        text_embeddings: [N, T].
        item_ids: N ids, ascending by their bytes.
        recent: how many of the newest events are the window, at least two.
        seed: of the events that are judged, and of the factors.

    """
    start, total = len(interactions) - recent, len(interactions)
    middle = start + recent // 2
    window = Window(
        interactions.select(torch.arange(start, middle)),
        text_embeddings,
        item_ids,
        parameters.encoder,
        seed,
        parameters.support_size,
    )
    counted = max(0, middle - int(_COUNT_LIVES * parameters.half_life))
    judged = drawn_from(torch.arange(total) >= middle, MOST_JUDGED, seed)
    before = _losses(parameters, window, interactions, judged, counted)
    after = _losses(_refitted(parameters, window), window, interactions, judged, middle)
    possible = torch.isfinite(before) & torch.isfinite(after)
    return float((before - after)[possible].mean()) if possible.any() else 0.0


def _refitted(parameters: MetaParameters, window: Window) -> MetaParameters:
    return fit(window, Choices.of(parameters, popularity_moments(window.interactions), window.item_ids))


def _losses(
    parameters: MetaParameters, window: Window, interactions: Interactions, judged: Tensor, first: int
) -> Tensor:
    """Losses of the judged events [E] under the start, popularity counted from event `first` on; inf where excluded."""
    tables = assemble_items(parameters, window.text_embeddings, parameters.rows_of(window.item_ids))
    ranker = Ranker(parameters, tables)
    replay = replay_start(ranker, interactions, first, judged, lambda _done, _total: None)
    listed = torch.isfinite(replay.start.gather(1, replay.targets[:, None])[:, 0])
    return start_losses(replay, parameters.tau).where(listed, torch.inf)
