import pytest
import torch

from models.popularity import BUCKET_STARTS, NUM_BUCKETS, advance, bucket_of, priors

N = 6


def random_events(num: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(num)
    return torch.randint(NUM_BUCKETS, (num,), generator=draw), torch.randint(N, (num,), generator=draw)


def test_buckets_begin_where_they_say() -> None:
    assert bucket_of(torch.tensor([0, 1, 2, 3, 5, 6, 10, 11, 20, 21, 50, 51, 100, 101, 10**9])).tolist() == [
        0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7,
    ]  # fmt: skip
    assert len(BUCKET_STARTS) + 1 == NUM_BUCKETS


def test_a_count_halves_after_its_half_life_in_events() -> None:
    one = advance(torch.zeros(NUM_BUCKETS, N), torch.tensor([2]), torch.tensor([4]), half_life=8.0)
    assert one[2, 4] == 1.0
    later = advance(one, torch.zeros(8, dtype=torch.int64), torch.zeros(8, dtype=torch.int64), half_life=8.0)
    assert float(later[2, 4]) == pytest.approx(0.5)
    assert later[0, 0] > 7 * 0.5


def test_advancing_event_by_event_equals_advancing_at_once() -> None:
    buckets, items = random_events(300)
    at_once = advance(torch.zeros(NUM_BUCKETS, N), buckets, items, half_life=50.0)
    counts = torch.zeros(NUM_BUCKETS, N, dtype=torch.float64)
    for bucket, item in zip(buckets.tolist(), items.tolist(), strict=True):
        counts *= 0.5 ** (1 / 50.0)
        counts[bucket, item] += 1
    torch.testing.assert_close(at_once, counts.float(), atol=1e-5, rtol=1e-6)
    halves = advance(torch.zeros(NUM_BUCKETS, N), buckets[:120], items[:120], half_life=50.0)
    torch.testing.assert_close(advance(halves, buckets[120:], items[120:], half_life=50.0), at_once)


def test_counts_do_not_depend_on_the_order_within_floating_point_noise_of_equal_ages() -> None:
    counts = torch.rand(NUM_BUCKETS, N)
    buckets, items = random_events(64)
    again = advance(counts.clone(), buckets.clone(), items.clone(), half_life=50.0)
    assert torch.equal(advance(counts, buckets, items, half_life=50.0), again)


def test_an_event_without_a_row_only_ages_the_counts() -> None:
    counts = torch.ones(NUM_BUCKETS, N)
    aged = advance(counts, torch.tensor([1]), torch.tensor([-1]), half_life=1.0)
    assert torch.equal(aged, torch.full_like(counts, 0.5))


def test_no_events_change_nothing() -> None:
    counts = torch.rand(NUM_BUCKETS, N)
    nothing = torch.zeros(0, dtype=torch.int64)
    assert torch.equal(advance(counts, nothing, nothing, half_life=50.0), counts)


def test_priors_are_standardised_and_prefer_what_is_taken_at_that_position() -> None:
    counts = torch.zeros(NUM_BUCKETS, N)
    counts[0, 1], counts[5, 2] = 30.0, 30.0
    rows = priors(counts)
    torch.testing.assert_close(rows.mean(1), torch.zeros(NUM_BUCKETS), atol=1e-6, rtol=0)
    torch.testing.assert_close(rows.square().mean(1), torch.ones(NUM_BUCKETS))
    assert int(rows[0].argmax()) == 1
    assert int(rows[5].argmax()) == 2


def test_without_counts_no_item_is_preferred() -> None:
    rows = priors(torch.zeros(NUM_BUCKETS, N))
    torch.testing.assert_close(rows, torch.zeros(NUM_BUCKETS, N))
