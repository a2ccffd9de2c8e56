"""Pairs are counted online where users gain by it, and are off by rule where they do not."""

from __future__ import annotations

import pytest
import torch

from models.episodes import Interactions
from models.outer_loop import meta_train
from models.table_fitting import Window

ITEMS, USERS, EVENTS = 60, 600, 12  # several epochs of 1,024


def stream(*, changes: bool) -> Interactions:
    """Users who go from an item to one of its three followers; half-way through these change, or are all there are."""
    draw = torch.Generator().manual_seed(0)
    followers = torch.randint(0, ITEMS, (2, ITEMS, 3), generator=draw)
    rows = []
    for user in range(USERS):
        item = int(torch.randint(ITEMS, (1,), generator=draw))
        for number in range(EVENTS):
            # users overlap in time, and come in the order of their numbers
            rows.append((user * EVENTS // 2 + number * 6, user, item))
            which = int(changes and user >= USERS // 2)
            chosen = int(torch.randint(3, (1,), generator=draw))
            item = int(followers[which, item, chosen]) if changes else int(torch.randint(ITEMS, (1,), generator=draw))
    times, users, items = torch.tensor(sorted(rows)).T
    return Interactions(users, items, times, torch.ones(len(users)), ITEMS)


@pytest.mark.parametrize(("changes", "verdict"), [(True, "on"), (False, "off: they do not pay on validation users")])
def test_pairs_are_counted_online_only_where_users_gain_by_it(changes: bool, verdict: str) -> None:
    torch.set_num_threads(1)
    parameters, report = meta_train(
        Window(
            stream(changes=changes),
            torch.zeros(ITEMS, 4),
            item_ids=tuple(f"i{row:02d}" for row in range(ITEMS)),
            encoder="none",
        )
    )
    assert report["pairs_online"] == verdict
    assert parameters.pairs_online == changes
    assert (report["gain_of_online_pairs"][1] > 0) == changes, "the interval says the same"
