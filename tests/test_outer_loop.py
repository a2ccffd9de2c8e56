import dataclasses
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from models import inner_tuning, outer_loop, popularity
from models.checkpoint import from_bytes, to_bytes
from models.episodes import History, Interactions, earlier, following
from models.factoring import centred, factor
from models.figures import interval, query_ranks, set_ndcg, user_means
from models.item_fitting import Matrix, als_factors, directed, ease, part_matrices, text_factors
from models.item_tables import assemble_items
from models.meta_parameters import MetaParameters
from models.outer_loop import meta_train
from models.popularity import priors
from models.ranker import Ranker
from models.replay import Replay, honest_residuals, prediction_moments, replay_start, states_before, tasks_before
from models.table_fitting import Window
from models.validation_users import split

NUM_ITEMS, CLUSTERS, T = 60, 6, 8


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors: a second thread beside a busy neighbour makes them eight times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def clustered(num_users: int = 200, *, events: int = 30, seed: int = 0, repeats: bool = False) -> Interactions:
    """Users who take nine of ten items from their own of six clusters, arriving one after the other."""
    draw = torch.Generator().manual_seed(seed)
    users, items, times = [], [], []
    for user in range(num_users):
        weight = torch.full((NUM_ITEMS,), 0.1) + (torch.arange(NUM_ITEMS) % CLUSTERS == user % CLUSTERS) * 5.0
        weight = weight * torch.linspace(2.0, 0.5, NUM_ITEMS)
        num = min(events, NUM_ITEMS)
        taken = torch.multinomial(weight, num, replacement=repeats, generator=draw)
        users += [user] * num
        items += taken.tolist()
        times += (user * 10 + torch.sort(torch.randint(0, 60, (num,), generator=draw)).values).tolist()
    order = torch.argsort(torch.tensor(times), stable=True)
    numbers, rows, moments = (torch.tensor(column)[order] for column in (users, items, times))
    return Interactions(numbers, rows, moments, torch.ones(len(order)), NUM_ITEMS)


def item_ids(num: int = NUM_ITEMS) -> tuple[str, ...]:
    return tuple(f"item{row:04d}" for row in range(num))


def texts() -> Tensor:
    """Texts that name the cluster."""
    noise = torch.randn(NUM_ITEMS, T, generator=torch.Generator().manual_seed(1)) / 10
    noise[torch.arange(NUM_ITEMS), torch.arange(NUM_ITEMS) % CLUSTERS] += 1.0
    return noise


def trained(interactions: Interactions, *, seed: int = 0) -> tuple[MetaParameters, dict[str, object]]:
    return meta_train(Window(interactions, texts(), item_ids=item_ids(), encoder="test", seed=seed, support_size=20))


def whole_replay(ranker: Ranker, interactions: Interactions) -> Replay:
    everything = torch.ones(len(interactions), dtype=torch.bool)
    return replay_start(ranker, interactions, 0, everything, lambda _done, _total: None)


def figures_of(parameters: MetaParameters, interactions: Interactions) -> tuple[float, float]:
    """Set nDCG@10 of the start and of popularity alone on users that were never fitted."""
    ranker = Ranker(parameters, assemble_items(parameters, texts(), torch.arange(NUM_ITEMS)))
    replay = whole_replay(ranker, interactions)
    had = replay.start == -torch.inf
    popular = priors(parameters.counts)[torch.bucketize(replay.num_events, torch.tensor([1, 3, 6, 11, 21]), right=True)]
    popular = popular.masked_fill(had, -torch.inf)
    both = [set_ndcg(query_ranks(scores, replay.query)) for scores in (replay.start, popular)]
    chosen = replay.num_events >= 3
    start, other = (float(user_means(v[chosen], replay.users[chosen]).mean()) for v in both)
    return start, other


def test_meta_training_on_small_data_beats_popularity_for_new_users_and_can_be_written() -> None:
    stages: list[tuple[str, int, int]] = []
    parameters, report = meta_train(
        Window(clustered(), texts(), item_ids=item_ids(), encoder="test", support_size=20),
        progress=lambda stage, done, total: stages.append((stage, done, total)),
    )
    start, popular = figures_of(parameters, clustered(30, seed=99))
    assert start > popular + 0.1
    assert report["validation_users"] == 50
    assert {"gain_of_inner_step", "start_set_ndcg", "seed", "events"} <= set(report)
    assert all(0 <= done <= total for _, done, total in stages)
    assert stages[-1] == ("fit tables on everything", 1, 1)
    assert {stage for stage, done, total in stages if done < total} == {stage for stage, *_ in stages}, (
        "each is told early"
    )
    again = from_bytes(to_bytes(parameters))
    assert torch.equal(again.item_in, parameters.item_in)


def test_the_same_data_and_seed_give_the_same_parameters() -> None:
    interactions = clustered(80)
    one, other = trained(interactions)[0], trained(interactions)[0]
    assert one.metadata() == other.metadata()
    assert all(torch.equal(tensor, other.tensors()[name]) for name, tensor in one.tensors().items())


def test_with_few_users_nothing_is_chosen_and_the_inner_step_is_off() -> None:
    parameters, report = trained(clustered(12))
    assert not parameters.use_inner_step
    assert "too few" in str(report["inner_step"])


def test_with_few_users_a_warm_start_keeps_what_was_chosen_before_and_fits_the_tables_anew() -> None:
    interactions = clustered(12)
    cold, _ = trained(interactions)
    weights = cold.part_weights * torch.linspace(0.5, 1.5, cold.part_weights.shape[1])
    before = dataclasses.replace(
        cold, part_weights=weights, use_inner_step=True, discount=0.9, calibration=cold.calibration * 2
    )
    warm, report = meta_train(Window(interactions, texts(), item_ids=item_ids(), encoder="test"), beginning=before)
    assert torch.equal(warm.part_weights, weights)
    assert torch.equal(warm.calibration, before.calibration)
    assert (warm.use_inner_step, warm.discount) == (True, 0.9)
    assert str(report["inner_step"]).startswith("as in the version begun from")


def test_one_event_is_enough_and_none_is_refused() -> None:
    interactions = clustered(12)
    parameters, _ = trained(interactions.select(torch.arange(1)))
    assert all(bool(torch.isfinite(tensor).all()) for tensor in parameters.tensors().values())
    with pytest.raises(ValueError, match="nothing to learn"):
        trained(interactions.select(torch.arange(0)))


def test_where_people_take_things_again_seen_items_may_be_listed() -> None:
    assert trained(clustered(12, repeats=True, events=40))[0].recommend_seen
    few, report = trained(clustered(12))
    assert not few.recommend_seen
    assert "gain_of_listing_again" not in report


def returning(to: Callable[[int, Tensor], int]) -> Interactions:
    """`clustered`, but every tenth event of a user takes an item again: `to` says which, of those she has had."""
    interactions = clustered(100)
    history, items = History.of(interactions.users), interactions.items.clone()
    for event in (history.position % 10 == 9).nonzero()[:, 0].tolist():
        had = earlier(history, items, torch.tensor([event]), 30)[0]
        items[event] = to(event, had[had >= 0])
    return dataclasses.replace(interactions, items=items)


def test_where_some_events_take_an_item_again_validation_decides_whether_lists_hold_it() -> None:
    loyal, report = trained(returning(lambda _event, had: int(had[0])))
    assert 0.05 < report["repeat_share"] < outer_loop.MANY_REPEATS  # type: ignore[operator]
    assert loyal.recommend_seen
    assert report["gain_of_listing_again"][1] > 0  # type: ignore[index]
    by_chance, report = trained(returning(lambda event, had: int(had[event % len(had)])))
    assert report["repeat_share"] > outer_loop.FEW_REPEATS  # type: ignore[operator]
    assert not by_chance.recommend_seen, "what is returned to by chance takes the places of what is new"


def test_beyond_the_limit_the_most_popular_items_are_fitted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outer_loop, "MAX_ITEMS", 16)
    interactions = clustered(60)
    events = torch.bincount(interactions.items, minlength=NUM_ITEMS)
    parameters, report = trained(interactions)
    kept = torch.tensor([int(item_id[4:]) for item_id in parameters.item_ids])
    assert sorted(parameters.item_ids) == list(parameters.item_ids)
    dropped = torch.tensor(sorted(set(range(NUM_ITEMS)) - set(kept.tolist())))
    assert int(events[kept].min()) >= int(events[dropped].max())
    assert torch.equal(parameters.item_events, events[kept].float())
    assert report["items"] == 16


def test_validation_users_have_no_event_in_the_part_that_is_fitted() -> None:
    interactions = clustered(40)
    cut, unseen = split(interactions)
    assert not set(interactions.users[unseen].tolist()) & set(interactions.users[:cut].tolist())
    assert not bool(unseen[:cut].any())
    assert len(set(interactions.users[unseen].tolist())) == 10


def test_the_inner_step_is_on_only_where_users_who_did_not_choose_it_gain() -> None:
    settings = [(1.0, 0.97, 3.0), (2.0, 0.97, 3.0)]
    draw = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 200, generator=draw) * 0.01
    better = noise + torch.tensor([[0.0], [0.02]])
    assert inner_tuning._choose(better, settings, 0).pays
    assert inner_tuning._choose(better, settings, 0).tau == 2.0
    assert not inner_tuning._choose(noise - 0.002, settings, 0).pays


def drawn_at(tau: float) -> Replay:
    """A replay whose choices were drawn from softmax(tau * start)."""
    interactions = clustered(25)
    parameters = trained(interactions)[0]
    ranker = Ranker(parameters, assemble_items(parameters, texts(), torch.arange(NUM_ITEMS)))
    replay = whole_replay(ranker, interactions)
    draw = torch.Generator().manual_seed(0)
    start = 4 * torch.randn(replay.start.shape, generator=draw)
    targets = torch.multinomial(torch.softmax(tau * start, 1), 1, generator=draw)[:, 0]
    return dataclasses.replace(replay, start=start, targets=targets)


@pytest.mark.parametrize("tau", [0.3, 0.7, 2.0])
def test_the_likeliest_temperature_is_the_one_that_choices_were_drawn_with(tau: float) -> None:
    assert inner_tuning.likeliest(drawn_at(tau)) == tau


@pytest.mark.parametrize(("pays", "tau"), [(False, 0.7), (True, 2.0)])
def test_where_no_inner_step_pays_losses_are_told_at_the_likeliest_temperature(
    pays: bool, tau: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By chance it was 2 where .7 was right: an overconfident version looked worse than the one it should replace."""
    found = dataclasses.replace(inner_tuning.OFF, tau=2.0, pays=pays)
    monkeypatch.setattr(inner_tuning, "_choose", lambda *_: found)
    tuned = inner_tuning.tune(drawn_at(0.7), torch.eye(NUM_ITEMS)[:, :8], seed=0, progress=lambda _done, _total: None)
    assert tuned == dataclasses.replace(found, tau=tau)


def test_states_by_one_scan_are_those_of_the_ranker_event_by_event(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(popularity, "POPULARITY_EPOCH", 10_000)  # it stands still
    interactions = clustered(25)
    parameters = dataclasses.replace(trained(interactions)[0], use_inner_step=True)
    ranker = Ranker(parameters, assemble_items(parameters, texts(), torch.arange(NUM_ITEMS)))
    replay = whole_replay(ranker, interactions)
    factors = ranker.items.vectors[:, -ranker.state_size :]
    residuals = honest_residuals(replay, factors, parameters.tau) - parameters.residual_mean
    states, counts = states_before(replay.users, residuals, parameters.discount)
    history, state = History.of(interactions.users), torch.zeros(1, ranker.state_size)
    events = (interactions.users == 3).nonzero()[:, 0]
    for number, event in enumerate(events.tolist()):
        torch.testing.assert_close(states[event], state[0], atol=1e-5, rtol=1e-4)
        assert int(counts[event]) == number
        tasks = tasks_before(ranker, interactions, history, events[number : number + 1])
        tasks.state, tasks.state_events = state, counts[event : event + 1]
        state = ranker.step(tasks, priors(parameters.counts), interactions.items[event : event + 1]).state


def test_moments_in_item_space_serve_any_factors() -> None:
    interactions = clustered(25)
    parameters = trained(interactions)[0]
    ranker = Ranker(parameters, assemble_items(parameters, texts(), torch.arange(NUM_ITEMS)))
    replay = whole_replay(ranker, interactions)
    moments = prediction_moments(replay, 1.5)
    factors = torch.randn(NUM_ITEMS, 5, generator=torch.Generator().manual_seed(0))
    prediction = torch.softmax(1.5 * replay.start, 1)
    expected = prediction @ factors
    own = torch.einsum("en,nf,ng->fg", prediction, factors, factors) - expected.T @ expected
    torch.testing.assert_close(factors.T @ moments.covariance @ factors, own / len(prediction), atol=1e-4, rtol=1e-4)
    mean = honest_residuals(replay, factors, 1.5).mean(0)
    torch.testing.assert_close(moments.item_bias @ factors, mean, atol=1e-4, rtol=1e-4)


def test_episodes_are_what_stood_before_and_what_came_after() -> None:
    users, items = torch.tensor([5, 9, 5, 5, 9]), torch.tensor([1, 2, 3, 4, 0])
    history = History.of(users)
    assert history.position.tolist() == [0, 0, 1, 2, 1]
    every = torch.arange(5)
    assert earlier(history, items, every, 2).tolist() == [[-1, -1], [-1, -1], [-1, 1], [1, 3], [-1, 2]]
    assert following(history, items, every, 2).tolist() == [[1, 3], [2, 0], [3, 4], [4, -1], [0, -1]]


def test_directed_counts_look_forward_and_no_further_than_their_horizon() -> None:
    interactions = Interactions(torch.zeros(4).long(), torch.arange(4), torch.arange(4), torch.ones(4), 4)
    counts = directed(interactions, History.of(interactions.users), 2)
    assert counts.tolist() == [[0, 1, 1, 0], [0, 0, 1, 1], [0, 0, 0, 1], [0, 0, 0, 0]]


def test_ease_reconstructs_items_from_others_never_from_themselves() -> None:
    gram = torch.tensor([[10.0, 9.0, 0.0], [9.0, 10.0, 1.0], [0.0, 1.0, 5.0]])
    weights = ease(gram, 1.0)
    assert torch.equal(weights.diagonal(), torch.zeros(3))
    # each column is the ridge regression of that item on the others
    for column in range(3):
        others = [row for row in range(3) if row != column]
        normal = gram[others][:, others] + torch.eye(2)
        torch.testing.assert_close(weights[others, column], torch.linalg.solve(normal, gram[others, column]))


def test_als_factors_of_items_that_are_taken_together_point_the_same_way() -> None:
    factors = als_factors(Matrix.of(clustered(120)), num_factors=16)
    near = torch.nn.functional.normalize(factors, dim=1) @ torch.nn.functional.normalize(factors, dim=1).T
    same = (torch.arange(NUM_ITEMS)[:, None] - torch.arange(NUM_ITEMS)) % CLUSTERS == 0
    off_diagonal = ~torch.eye(NUM_ITEMS, dtype=torch.bool)
    assert float(near[same & off_diagonal].mean()) > float(near[~same].mean()) + 0.3
    torch.testing.assert_close(factors.mean(0), torch.zeros(16), atol=1e-5, rtol=0)


def test_factors_of_texts_are_their_principal_components() -> None:
    draw = torch.Generator().manual_seed(0)
    wide = torch.randn(200, 3, generator=draw) @ torch.randn(3, 20, generator=draw)
    texts = wide + 0.01 * torch.randn(200, 20, generator=draw) + 5.0
    factors = text_factors(texts, 3)
    torch.testing.assert_close(factors.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(factors.square().sum(1).mean(), torch.tensor(1.0))
    # three directions tell all texts but for the noise
    told = torch.linalg.lstsq(factors, texts - texts.mean(0))
    assert float((factors @ told.solution - (texts - texts.mean(0))).abs().max()) < 0.1
    # fewer text dimensions than factors, and texts that say nothing
    assert text_factors(texts[:, :2], 5).shape == (200, 5)
    torch.testing.assert_close(text_factors(torch.ones(4, 6), 3), torch.zeros(4, 3))


def test_the_inner_step_moves_in_what_texts_say_and_in_who_took_what() -> None:
    interactions = clustered(120)
    # texts group the items otherwise than users do
    other = torch.eye(5)[torch.arange(NUM_ITEMS) // 7 % 5]
    parameters, _ = meta_train(Window(interactions, other, item_ids=item_ids(), encoder="test", seed=1))
    factors = parameters.item_factors.double()
    for wanted in (text_factors(other, 4), als_factors(Matrix.of(interactions), num_factors=16, seed=1)):
        found = factors @ torch.linalg.lstsq(factors, wanted.double()).solution
        assert float((found - wanted).square().sum() / wanted.square().sum()) < 1e-3


def test_served_parts_with_all_dimensions_are_the_exact_matrices() -> None:
    interactions = clustered(100)
    parts = centred(part_matrices(interactions))
    matrices = parts.matrices
    history = History.of(interactions.users)
    sampled = (history.position > 0).nonzero()[:, 0]
    support = earlier(history, interactions.items, sampled, 10)
    shape = (len(sampled), len(matrices))
    served = factor(
        parts, support, torch.ones(len(sampled), 10, 4), torch.ones(shape), num_dims=NUM_ITEMS, num_neighbours=4
    )
    for part, matrix in enumerate(matrices):
        torch.testing.assert_close(served.item_in[:, part] @ served.item_out.T, matrix, atol=1e-4, rtol=1e-3)
    few = factor(
        parts, support, torch.ones(len(sampled), 10, 4), torch.ones(shape), num_dims=8, num_neighbours=NUM_ITEMS
    )
    row, slot = 5, 0
    item = int(few.neighbour_items[row, slot])
    left_out = matrices[0][row, item] - few.item_in[row, 0] @ few.item_out[item]
    torch.testing.assert_close(few.neighbour_values[row, slot, 0], left_out)
    covariance = few.item_out.T @ few.item_out / NUM_ITEMS
    torch.testing.assert_close(covariance, torch.eye(8), atol=1e-3, rtol=0)


def test_set_ndcg_of_known_ranks() -> None:
    ranks = torch.tensor([[1.0, 2.0], [11.0, 0.0], [2.0, 0.0]])
    found = set_ndcg(ranks)
    torch.testing.assert_close(found, torch.tensor([1.0, 0.0, 1 / torch.log2(torch.tensor(3.0)).item()]))


def test_ranks_in_blocks_are_those_counted_one_by_one_and_ties_share_their_mean() -> None:
    draw = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 9, (300, 40), generator=draw).float()
    scores[:, 3] = -torch.inf
    query = torch.randint(-1, 40, (300, 5), generator=draw)
    ranks = query_ranks(scores, query)
    for event, slot in ((0, 0), (127, 4), (128, 1), (299, 3)):
        own = scores[event, query[event, slot]]
        ahead, equal = int((scores[event] > own).sum()), int((scores[event] == own).sum())
        expected = 0.0 if query[event, slot] < 0 else ahead + (equal + 1) / 2
        assert float(ranks[event, slot]) == expected
    assert len(query_ranks(scores[:0], query[:0])) == 0


def test_an_interval_holds_its_mean_and_narrows_with_users() -> None:
    values = torch.randn(50, generator=torch.Generator().manual_seed(0))
    few, many = interval(values), interval(values.repeat(100))
    assert few.low < few.mean < few.high
    assert many.high - many.low < 0.3 * (few.high - few.low)
