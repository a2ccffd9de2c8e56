"""The probe: it sees that what items mean has changed, and that nothing has."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from models.episodes import Interactions
from models.outer_loop import meta_train
from models.refit import refit_gain
from models.table_fitting import Window

NUM_ITEMS, NUM_TOPICS = 120, 6
IDS = tuple(sorted((f"i{number:03d}" for number in range(NUM_ITEMS)), key=str.encode))
NO_TEXT = torch.zeros(NUM_ITEMS, 4)


def stream(num_events: int, changed_from: int, seed: int = 0) -> Interactions:
    """Users who stay with one of six topics; from `changed_from` on, other items make up each topic."""
    rng = np.random.default_rng(seed)
    before = np.arange(NUM_ITEMS) % NUM_TOPICS
    after = rng.permutation(before)
    users = np.arange(num_events) // 12 + rng.integers(0, 8, num_events)
    items = np.zeros(num_events, np.int64)
    had: dict[int, set[int]] = {}
    for event, user in enumerate(users.tolist()):
        of_topic = np.flatnonzero((before if event < changed_from else after) == user % NUM_TOPICS)
        fresh = [item for item in of_topic.tolist() if item not in had.setdefault(user, set())]
        items[event] = rng.choice(fresh or of_topic)
        had[user].add(int(items[event]))
    ones = torch.ones(num_events)
    return Interactions(torch.from_numpy(users), torch.from_numpy(items), torch.arange(num_events), ones, NUM_ITEMS)


@pytest.mark.parametrize(("changed_from", "least", "most"), [(3000, 0.2, 10.0), (10**9, -10.0, 0.15)])
def test_a_refit_pays_where_items_have_changed_company_and_not_where_nothing_has(
    changed_from: int, least: float, most: float
) -> None:
    torch.set_num_threads(1)
    events = stream(6000, changed_from)
    parameters, _ = meta_train(Window(events.select(torch.arange(3000)), NO_TEXT, item_ids=IDS, encoder="test"))
    gain = refit_gain(parameters, events, NO_TEXT, IDS, recent=3000)
    assert least < gain < most
