"""Synthetic streams: what they say about themselves is true."""

import json
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from models.encoder import HashedBagOfWords
from pipeline.synthetic import (
    DAY_MS,
    START_MS,
    Drift,
    Plan,
    _World,
    best_ndcg,
    catalogue,
    changing_users,
    draw_events,
    item_topics,
    zipf,
)
from pipeline.synthetic_messages import encoded_chunks, messages
from schemas.events import CatalogueItem, Interaction, Rejected, parse_interaction, parse_item

SMALL = Plan(users=30, items=40, choices=400, seed=7)


def plan(**changes: object) -> Plan:
    return Plan(**{"users": 30, "items": 40, "choices": 400, "seed": 7, **changes})  # type: ignore[arg-type]  # a table


def test_the_same_plan_gives_the_same_stream_and_another_seed_another() -> None:
    first = [drawn.event for drawn in draw_events(SMALL)]
    assert first == [drawn.event for drawn in draw_events(SMALL)]
    assert first != [drawn.event for drawn in draw_events(plan(seed=8))]
    assert list(catalogue(SMALL)) == list(catalogue(SMALL))


def test_every_truth_is_a_distribution_over_the_items_the_user_has_not_had() -> None:
    had: dict[int, set[int]] = {}
    for drawn in draw_events(SMALL):
        assert drawn.truth is not None
        assert drawn.truth.sum() == pytest.approx(1.0)
        mine = had.setdefault(drawn.user, set())
        if 0 < len(mine) < SMALL.items:
            assert drawn.truth[list(mine)].sum() == 0.0
        assert drawn.truth[drawn.item] > 0
        mine.add(drawn.item)


def test_choices_follow_their_truth() -> None:
    # The mean log-likelihood of the choices must be the mean negative entropy of their truths, up to noise.
    surprise, entropy = [], []
    for drawn in draw_events(plan(users=200, choices=4000)):
        assert drawn.truth is not None
        positive = drawn.truth[drawn.truth > 0]
        surprise.append(-np.log(drawn.truth[drawn.item]))
        entropy.append(-(positive * np.log(positive)).sum())
    gap = np.array(surprise) - np.array(entropy)
    assert abs(gap.mean()) < 4 * gap.std() / np.sqrt(len(gap))
    # And the test could tell: against a uniform choice the gap would be far outside.
    assert np.log(40) - np.mean(entropy) > 10 * gap.std() / np.sqrt(len(gap))


def test_the_best_list_earns_the_stated_ndcg() -> None:
    assert best_ndcg(np.array([0.1, 0.0, 0.7, 0.2])) == pytest.approx(0.7 + 0.2 / np.log2(3) + 0.1 / 2)
    assert best_ndcg(np.array([0.1, 0.0, 0.7, 0.2]), k=1) == pytest.approx(0.7)


def test_repeats_return_to_earlier_items_as_often_as_asked() -> None:
    seen: set[tuple[int, int]] = set()
    users: set[int] = set()
    again, chances = 0, 0
    for drawn in draw_events(plan(items=200, choices=2000, repeats=0.4, activity=0.0)):
        chances += drawn.user in users
        again += (drawn.user, drawn.item) in seen
        users.add(drawn.user)
        seen.add((drawn.user, drawn.item))
    assert again / chances == pytest.approx(0.4, abs=0.05)


def test_a_user_who_has_had_everything_returns_to_it() -> None:
    drawn = list(draw_events(plan(users=1, items=3, choices=10)))
    assert {one.item for one in drawn[:3]} == {0, 1, 2}
    assert all(one.truth is not None and one.truth.sum() == pytest.approx(1.0) for one in drawn)


def test_the_text_tells_the_taste() -> None:
    texts = [item["text"] for item in catalogue(plan(items=200))]
    words = HashedBagOfWords(512).encode(texts).double().numpy()
    topics = item_topics(plan(items=200))
    topics /= np.linalg.norm(topics, axis=1, keepdims=True)
    off_diagonal = ~np.eye(200, dtype=bool)
    correlation = np.corrcoef((words @ words.T)[off_diagonal], (topics @ topics.T)[off_diagonal])[0, 1]
    assert correlation > 0.6


def mean_truths(of: Plan) -> list[np.ndarray[tuple[int], np.dtype[np.float64]]]:
    """The truths of the first event of each user, before anything is excluded."""
    truths, met = [], set()
    for drawn in draw_events(of):
        if drawn.user not in met and drawn.truth is not None:
            truths.append(drawn.truth)
        met.add(drawn.user)
    return truths


def test_tastes_drift_for_the_stated_share_of_users_from_the_stated_event_on() -> None:
    # Nothing is different before the drift; after it, what is compared is each user's own taste.
    still = list(draw_events(plan(choices=600, activity=0.0, items=500)))
    moved = list(draw_events(plan(choices=600, activity=0.0, items=500, drifts=(Drift(at=300, share=0.5),))))
    for before, after in zip(still[:300], moved[:300], strict=True):
        assert before.event == after.event
    assert [one.event for one in still[300:]] != [one.event for one in moved[300:]]

    world_tastes: dict[int, list[float]] = {}
    for one in moved:
        assert one.truth is not None
        # The ratio of two items' probabilities depends on the taste alone while neither has been had.
        if one.truth[0] > 0 and one.truth[1] > 0:
            world_tastes.setdefault(one.user, []).append(round(float(np.log(one.truth[0] / one.truth[1])), 9))
    changes = [sum(a != b for a, b in pairwise(ratios)) for ratios in world_tastes.values() if len(ratios) > 10]
    assert set(changes) == {0, 1}
    assert sum(changes) == pytest.approx(len(changes) / 2, abs=2)


def test_tastes_change_at_the_users_own_choice_and_only_for_the_users_named() -> None:
    drift = Drift(at=12, share=0.5, own=True)
    of = plan(users=20, choices=600, activity=0.0, items=500, drifts=(drift,))
    ratios: dict[int, list[float]] = {}
    for one in draw_events(of):
        assert one.truth is not None
        ratio = np.log(one.truth[0] / one.truth[1]) if min(one.truth[0], one.truth[1]) > 0 else np.nan
        ratios.setdefault(one.user, []).append(float(ratio))
    changing = changing_users(of, drift)
    assert 4 <= changing.sum() <= 16
    for user, values in ratios.items():
        changes = [n for n, (a, b) in enumerate(pairwise(values), 1) if abs(a - b) > 1e-9]
        assert changes == ([12] if changing[user] else []), "the thirteenth choice is the first of the new taste"


def test_habits_return_to_what_was_had_often_and_lately() -> None:
    had: dict[int, list[int]] = {}
    of = plan(items=60, choices=3000, activity=0.0, sharpness=0.0, exposure=0.0, repeats=0.8, habit=2.0, recency=0.9)
    for one in draw_events(of):
        assert one.truth is not None
        mine = had.setdefault(one.user, [])
        if 1 < len(set(mine)) < of.items:
            pull = {i: mine.count(i) ** 2 * 0.9 ** (len(mine) - 1 - max(k for k, j in enumerate(mine) if j == i))
                    for i in set(mine)}  # fmt: skip
            for item, value in pull.items():
                assert one.truth[item] == pytest.approx(0.8 * value / sum(pull.values()))
        mine.append(one.item)


def test_a_basket_is_one_users_and_holds_nothing_twice() -> None:
    drawn = list(draw_events(plan(users=300, choices=3000, activity=0.0, repeats=0.9, basket=4.0)))
    baskets: list[list[int]] = [[]]
    for before, after in pairwise(drawn):
        baskets[-1].append(before.item)
        if before.user != after.user:
            baskets.append([])
    assert np.mean([len(basket) for basket in baskets]) == pytest.approx(4.0, rel=0.15)
    # the same user may be drawn twice in a row by chance, hence not all
    assert np.mean([len(set(basket)) == len(basket) for basket in baskets]) > 0.98


def test_users_arrive_one_after_the_other() -> None:
    drawn = list(draw_events(plan(users=100, choices=2000, activity=0.0, arrivals=0.5)))
    assert {one.user for one in drawn[:200]} <= set(range(20))
    assert max(one.user for one in drawn[:500]) < 50
    assert len({one.user for one in drawn[1000:]}) > 90


def test_users_leave_for_good_after_their_stay() -> None:
    drawn = list(draw_events(plan(users=100, choices=2000, activity=0.0, arrivals=1.0, stay=0.1)))
    for number in (0, 500, 1990):
        users = {one.user for one in drawn[number : number + 10]}
        assert users <= set(range(number // 20 - 9, number // 20 + 2))
    assert len({one.user for one in drawn}) > 95


def test_exposure_drifts_while_tastes_stay() -> None:
    # Without taste the truth is exposure: a permutation of the same numbers, other ones after the drift.
    truths = mean_truths(plan(users=400, sharpness=0.0, activity=0.0, drifts=(Drift(at=200, kind="exposure"),)))
    assert np.allclose(np.sort(truths[0]), np.sort(truths[-1]))
    assert not np.allclose(truths[0], truths[-1])
    assert np.allclose(truths[0], truths[1])


def test_items_come_to_mean_what_others_meant_while_texts_and_exposure_stay() -> None:
    drifts = (Drift(at=300, kind="meaning", share=0.5),)
    of = plan(users=1, choices=320, items=800, exposure=0.0, drifts=drifts)
    assert list(catalogue(of)) == list(catalogue(plan(items=800))), "texts say what items meant"
    drawn = list(draw_events(of))
    had = {one.item for one in drawn}
    first, second = drawn[299].truth, drawn[300].truth
    assert first is not None
    assert second is not None
    before, after = np.delete(first, list(had)), np.delete(second, list(had))
    ratios = np.unique(np.round(np.log(after / before), 9), return_counts=True)
    # Up to the normalisation an item that kept its meaning keeps its probability; the others have another's.
    assert ratios[1].max() == pytest.approx(len(before) / 2, abs=15)
    assert len(ratios[0]) > len(before) / 3
    world = _World(plan(items=500))
    world.drift(Drift(at=1, kind="meaning"))
    kept = item_topics(plan(items=500))
    assert not (world.mixtures == kept).all(1).any(), "none keeps its own"
    assert sorted(map(tuple, world.mixtures.tolist())) == sorted(map(tuple, kept.tolist()))


def test_event_time_follows_the_daily_rate() -> None:
    times = [one.event["ts"] for one in draw_events(plan(choices=4000, choices_per_day=1000.0, daily_rate=0.8))]
    assert times == sorted(times)
    assert times[0] >= START_MS
    assert (times[-1] - START_MS) / DAY_MS == pytest.approx(4.0, abs=0.5)
    morning = sum(t % DAY_MS < DAY_MS // 2 for t in times)
    # 1 + .8 sin integrates to .755 over the first half of a day.
    assert morning / len(times) == pytest.approx(0.755, abs=0.05)


def test_taste_follows_the_hour() -> None:
    truths = mean_truths(plan(users=2000, choices=1000, sharpness=0.0, daily_taste=2.0, choices_per_day=1000.0))
    topic = item_topics(plan(users=2000)).argmax(1) == 0
    by_hour = np.array([truth[topic].sum() for truth in truths])
    noon = len(by_hour) // 2
    assert by_hour[:50].mean() > 3 * by_hour[noon - 25 : noon + 25].mean()


def test_impressions_show_the_chosen_item_before_the_choice() -> None:
    drawn = list(draw_events(plan(choices=50, impressions=5)))
    assert len(drawn) == 300
    for start in range(0, 300, 6):
        slate, choice = drawn[start : start + 5], drawn[start + 5]
        assert all(one.event["type"] == "impression" and one.truth is None for one in slate)
        assert choice.item in {one.item for one in slate}
        assert choice.event["type"] in {"click", "purchase"}


@pytest.mark.parametrize(
    "wrong",
    [
        {"users": 0},
        {"topics": 13},
        {"daily_rate": 1.0},
        {"repeats": 1.5},
        {"drifts": (Drift(at=9), Drift(at=3))},
        {"basket": 0.5},
        {"stay": 0.1},
        {"drifts": (Drift(at=9, kind="exposure", own=True),)},
    ],
)
def test_a_plan_that_means_nothing_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"users|topics|daily_rate|repeats|drifts|basket|tastes|stay"):
        plan(**wrong)


def test_every_message_meets_its_stated_fate_in_the_decoder() -> None:
    seen: set[str] = set()
    fates: Counter[str] = Counter()
    for message in messages(draw_events(plan(choices=2000)), duplicates=0.05, malformed=0.05, seed=1):
        parsed = parse_interaction(message.key, message.value, START_MS + 10 * DAY_MS)
        if message.fate in {"applied", "duplicate"}:
            assert isinstance(parsed, Interaction), parsed
            assert (parsed.event_id in seen) == (message.fate == "duplicate")
            seen.add(parsed.event_id)
            fates[message.fate] += 1
        else:
            assert isinstance(parsed, Rejected), message
            assert parsed.reason == message.fate
            fates["malformed"] += 1
    assert fates["applied"] == 2000
    assert fates["duplicate"] == pytest.approx(100, abs=40)
    assert fates["malformed"] == pytest.approx(100, abs=40)


def test_the_catalogue_is_one_that_the_decoder_accepts() -> None:
    for item in catalogue(SMALL):
        parsed = parse_item(item["item_id"].encode(), json.dumps(item).encode())
        assert isinstance(parsed, CatalogueItem), parsed


def test_encoded_events_are_accepted_and_their_ids_are_unique() -> None:
    chunks = list(encoded_chunks(5000, users=100, item_ids=["plain", 'qu"ote'], chunk=1500))
    assert [len(keys) for keys, _ in chunks] == [1500, 1500, 1500, 500]
    pairs = [pair for keys, values in chunks for pair in zip(keys, values, strict=True)]
    parsed = [parse_interaction(key, value, START_MS) for key, value in pairs]
    assert all(isinstance(one, Interaction) for one in parsed)
    assert len({one.event_id for one in parsed if isinstance(one, Interaction)}) == 5000
    assert {one.item_id for one in parsed if isinstance(one, Interaction)} == {"plain", 'qu"ote'}


def test_encoded_users_follow_zipfs_law_or_come_in_turn() -> None:
    (keys, _), *_ = encoded_chunks(50_000, users=1000, item_ids=["a"])
    share = Counter(keys)[b"user-0"] / len(keys)
    assert share == pytest.approx(zipf(1000, 1.0)[0], rel=0.1)
    (in_turn, _), *_ = encoded_chunks(1000, users=1000, item_ids=["a"], activity=None)
    assert len(set(in_turn)) == 1000
