"""People who take the same things again: the bonus of what they have had, its fit, and its bounds."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from models import repeat_fitting
from models.episodes import History, Interactions, earlier, following
from models.figures import interval, query_ranks, set_ndcg, user_means
from models.item_tables import assemble_items
from models.meta_parameters import MetaParameters
from models.outer_loop import meta_train
from models.popularity import NUM_BUCKETS, bucket_of
from models.ranker import Ranker, TaskBatch
from models.repeats import LIMIT, SHAPE, bonuses, cells
from models.replay import Replay, replay_start
from models.table_fitting import Window
from pipeline.synthetic import Plan
from tests.factories import meta_parameters, synthetic_interactions

ITEMS = [f"item-{number:02d}" for number in range(40)]
GROCERIES = Plan(
    users=200, items=50, choices=7000, activity=0.3, arrivals=0.8, basket=4.0, repeats=0.7, habit=1.0, recency=0.97
)


def ranker_with(profile: Tensor, shares: Tensor = torch.ones(NUM_BUCKETS)) -> Ranker:  # noqa: B008  # a constant
    parameters = meta_parameters(
        ITEMS, text_dim=8, seed=3, repeat_profile=profile, repeat_shares=shares, recommend_seen=True
    )
    return Ranker(parameters, assemble_items(parameters, torch.zeros(len(ITEMS), 8), torch.arange(len(ITEMS))))


def tasks_of(support: Tensor) -> TaskBatch:
    num = len(support)
    return TaskBatch(
        support=support,
        weights=torch.ones_like(support, dtype=torch.float32),
        num_events=torch.full((num,), 7),
        state=torch.zeros(num, 16),
        state_events=torch.zeros(num, dtype=torch.int64),
        track=torch.zeros(num, 1),
        excluded=torch.zeros(num, len(ITEMS)),
        prior_rows=torch.zeros(num, dtype=torch.int64),
    )


def test_an_items_newest_slot_knows_how_long_ago_and_how_often() -> None:
    support = torch.tensor([[-1, -1, 5, 3, 5, 9, 5, 3, 8], [-1, -1, -1, -1, -1, -1, -1, -1, -1]])
    found = cells(support)
    # item 5: had 3 times, 2 events ago (ages 2..4 are the third row); item 3: twice, one event ago; 9 once, 3 ago
    expected = torch.full_like(found, -1)
    expected[0, 6], expected[0, 7], expected[0, 8], expected[0, 5] = 2 * SHAPE[1] + 2, SHAPE[1] + 1, 0, 2 * SHAPE[1]
    assert torch.equal(found, expected)
    profile = torch.arange(float(SHAPE[0] * SHAPE[1])).view(SHAPE)
    scores, ones = torch.full((2, 9), 4.0), torch.ones(2)
    scores[0, 7] = -torch.inf  # no longer to be had
    assert bonuses(profile, ones, found, scores)[0].tolist() == [0, 0, 0, 0, 0, 14, 16, 8, 0]
    assert bonuses(profile, 0.5 * ones, found, scores)[0].tolist() == [0, 0, 0, 0, 0, 12, 14, 8, -2]


def test_what_was_had_is_listed_by_its_bonus() -> None:
    support = torch.tensor([[-1, 5, 3, 5, 9, 5, 3, 8]]).expand(8, -1).clone()
    support[4:] = torch.tensor([-1, -1, -1, -1, -1, -1, -1, -1])
    profile = torch.zeros(SHAPE)
    profile[:, 2] = 6.0  # had three times
    profile[0] = -6.0  # had just now
    plain, again = (
        ranker_with(each).logits(tasks_of(support), torch.zeros(8, len(ITEMS)))[1] for each in (profile * 0, profile)
    )
    assert int(again[0].argmax()) == 5
    torch.testing.assert_close(again[0, 5], plain[0, 5] + 6.0)
    assert int(again[0].argsort(descending=True)[:20].eq(8).sum()) == 0
    assert torch.equal(again[4:], plain[4:]), "nothing was had, nothing is returned to"


def test_the_start_counts_by_its_share_for_what_was_had_and_whole_for_the_rest() -> None:
    support = torch.tensor([[-1, 5, 3, 5, 9, 5, 3, 8]])
    tasks, priors = tasks_of(support), torch.linspace(-2, 2, len(ITEMS))[None]
    shares = torch.ones(NUM_BUCKETS)
    shares[int(bucket_of(tasks.num_events)[0])] = -0.5
    profile = torch.full(SHAPE, 2.0)
    tasks.excluded[0, 3] = -torch.inf  # no longer to be had
    whole, part = (ranker_with(profile, each).logits(tasks, priors)[1][0] for each in (torch.ones(8), shares))
    had = torch.tensor([5, 8, 9])
    torch.testing.assert_close(part[had], -0.5 * (whole[had] - 2.0) + 2.0)
    assert float(part[3]) == -torch.inf
    others = torch.isin(torch.arange(len(ITEMS)), support[0], invert=True)
    assert torch.equal(part[others], whole[others])


def test_a_query_is_a_set() -> None:
    items = torch.tensor([4, 4, 7, 4, 9, 7])
    history = History.of(torch.zeros(6, dtype=torch.int64))
    assert following(history, items, torch.tensor([0, 2]), 5).tolist() == [[4, -1, 7, -1, 9], [7, 4, 9, -1, -1]]


def replay_of(targets: Tensor, support: Tensor, users: Tensor) -> Replay:
    num = len(targets)
    start = 0.1 * torch.randn(num, 30, generator=torch.Generator().manual_seed(1))
    return Replay(start, targets, targets[:, None], users, torch.full((num,), 8), torch.arange(num))


def test_the_bonus_is_bounded_however_clear_the_data_is() -> None:
    draw = torch.Generator().manual_seed(0)
    support = torch.stack([torch.randperm(30, generator=draw)[:6] for _ in range(400)])
    found = repeat_fitting.tune(replay_of(support[:, -1], support, torch.arange(400) % 40), support, seed=0)
    assert found.gain.low > 0.5
    assert float(found.profile.abs().max()) <= LIMIT
    assert float(found.profile[0, 0]) > 4.0, "everybody takes the newest again"


def test_where_nobody_returns_the_bonus_says_not_again() -> None:
    draw = torch.Generator().manual_seed(0)
    orders = torch.stack([torch.randperm(30, generator=draw) for _ in range(400)])
    found = repeat_fitting.tune(replay_of(orders[:, 10], orders[:, :6], torch.arange(400) % 40), orders[:, :6], seed=0)
    assert float(found.profile[:3, 0].max()) < -2.0
    assert float(found.profile.abs().max()) <= LIMIT


def test_lists_gain_by_what_was_had_only_where_people_return_to_it() -> None:
    draw, users = torch.Generator().manual_seed(0), torch.arange(400) % 40
    orders = torch.stack([torch.randperm(30, generator=draw) for _ in range(400)])
    support = orders[:, :6]
    pays, costs = (
        repeat_fitting.gains_of_listing(replay_of(targets, support, users), support, support, repeat_fitting.OFF)
        for targets in (support[:, -1], orders[:, 10])
    )
    assert len(pays) == 40
    assert float(pays.mean()) > 0.05
    assert float(costs.mean()) < 0
    long_ago = orders[:, 10:11]
    had = torch.cat([long_ago, support], 1)
    again = replay_of(long_ago[:, 0], support, users)
    some = repeat_fitting.gains_of_listing(again, support, had, repeat_fitting.OFF)
    assert float(some.mean()) > 0, "what has left the support is left out of lists as well"


def test_of_items_taken_once_the_rare_ones_are_returned_to() -> None:
    """Half of the choices are of three favourites, else by popularity: a popular item was taken by chance."""
    draw, popular = torch.Generator().manual_seed(0), torch.arange(1, 31).float() ** -1.0
    favourites = torch.stack([torch.randperm(30, generator=draw)[:3] for _ in range(600)])
    own = torch.zeros(600, 30).scatter_(1, favourites, 1 / 3)
    taken = (0.5 * own + 0.5 * popular / popular.sum()).multinomial(7, replacement=True, generator=draw)
    replay = replay_of(taken[:, 6], taken[:, :6], torch.arange(600))
    found = repeat_fitting.tune(replace(replay, start=popular.log().expand(600, -1)), taken[:, :6], seed=0)
    bucket = int(bucket_of(torch.tensor(8)))
    assert float(found.shares[bucket]) < 0.5
    assert float(found.temperatures[bucket]) > 0.5, "of what was never had the popular ones are taken"


def test_the_bonus_is_off_where_it_does_not_pay() -> None:
    draw = torch.Generator().manual_seed(0)
    support = torch.stack([torch.randperm(30, generator=draw)[:6] for _ in range(400)])
    targets = torch.randint(0, 30, (400,), generator=draw)
    found = repeat_fitting.tune(replay_of(targets, support, torch.arange(400) % 40), support, seed=0)
    assert not bool(found.profile.any())
    assert torch.equal(found.temperatures, torch.ones(8))
    assert torch.equal(found.shares, torch.ones(8))


def judged(
    parameters: MetaParameters, embeddings: Tensor, everything: Interactions, first: int
) -> tuple[Tensor, Tensor]:
    """Set nDCG@10 of users whom training never saw, by user: served, and for repeating the support."""
    ranker = Ranker(parameters, assemble_items(parameters, embeddings, torch.arange(everything.num_items)))
    number = torch.arange(len(everything))
    unseen = ~torch.isin(everything.users, everything.users[:first]) & (number >= first)
    replay = replay_start(ranker, everything, first, unseen, lambda *_: None)
    support = earlier(History.of(everything.users), everything.items, replay.events, 60)
    had = torch.zeros(len(support), everything.num_items + 1)
    had.scatter_add_(1, support % (everything.num_items + 1), (support >= 0).float())
    popular = torch.bincount(everything.items[:first], minlength=everything.num_items) / first
    figures = [set_ndcg(query_ranks(scores, replay.query)) for scores in (replay.start, had[:, :-1] + popular)]
    served, repeated = (user_means(figure, replay.users) for figure in figures)
    return served, repeated


def test_on_groceries_the_served_list_is_not_below_repeating_the_support() -> None:
    everything, embeddings, ids = synthetic_interactions(GROCERIES)
    first = int((everything.users == 120).nonzero()[0])
    parameters, report = meta_train(
        Window(everything.select(torch.arange(first)), embeddings, item_ids=ids, encoder="hashed", seed=0)
    )
    assert parameters.recommend_seen
    assert report["gain_of_repeats"][1] > 0
    assert float(parameters.repeat_profile.abs().max()) <= LIMIT
    served, repeated = judged(parameters, embeddings, everything, first)
    without = judged(replace(parameters, repeat_profile=torch.zeros(SHAPE)), embeddings, everything, first)[0]
    assert interval(served - repeated).high > 0
    assert interval(served - without).low > 0
