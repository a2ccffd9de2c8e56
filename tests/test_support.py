"""The users' memory: bounded, the idle forgotten first, and segments that depend on nothing but the log's length."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.support import SEGMENT, TAIL, Segments, UserTable, num_segments, tail_length

ONE = np.array([0])


def table(capacity: int = 4) -> UserTable:
    return UserTable(capacity, support_size=3, state_size=2, id_horizon=100, seen_horizon=70)


def test_tail_and_segments_hold_every_entry_once() -> None:
    for length in range(500):
        tail = int(tail_length(np.array([length]))[0])
        assert tail < TAIL
        assert SEGMENT * num_segments(length) + tail == length


def test_a_support_set_keeps_the_newest_positives_newest_last() -> None:
    users = table()
    slots = users.admit(["u"], [0])
    for item in range(1, 6):
        users.append_positive(slots, np.array([item]), np.array([2]))
    assert users.support_items[slots[0]].tolist() == [3, 4, 5]
    assert users.num_events[slots[0]] == 5


def test_event_ids_stay_known_for_their_horizon_and_leave_in_segments() -> None:
    users, segments = table(), Segments()
    slots = users.admit(["u"], [0])
    for number in range(200):
        users.append_ids(slots, np.array([number]), np.array([-number]), segments)
        ids, bodies = users.ids(int(slots[0]))
        assert ids.tolist() == list(range(max(0, number - 99), number + 1))
        assert bodies.tolist() == [-number for number in ids.tolist()]
    assert segments.numbers == [0, 1, 2, 3, 4]
    assert segments.entries[2][0].tolist() == list(range(64, 96))
    # what the horizon left behind may be deleted, never more
    assert [number + 1 for number in segments.expired(100)] == [-3, -2, -1, 0, 1]


def test_a_restored_user_is_the_user_that_was_stored() -> None:
    users, segments = table(), Segments()
    slots = users.admit(["u"], [0])
    for number in range(150):
        users.append_ids(slots, np.array([number]), np.array([number]), segments)
        users.append_seen(slots, np.array([number + 1]), segments)
    slot = int(slots[0])
    tail = int(tail_length(users.num_applied[slots])[0])
    other = table()
    restored = other.admit(["u"], [0])
    row: tuple[object, ...] = (
        "u", 0, 9, 0, 150, [], [], [0.0, 0.0], [0.0], 0, 1,
        users.recent_ids[slot, :tail].tolist(), users.recent_bodies[slot, :tail].tolist(),
        users.recent_seen[slot, :tail].tolist(), 150, 0,
    )  # fmt: skip
    other.restore(restored, [row])
    for entries in segments.entries:
        if len(entries) == 2:
            other.restore_ids(int(restored[0]), entries[0], entries[1])
        else:
            other.restore_seen(int(restored[0]), entries[0])
    assert other.ids(int(restored[0]))[0].tolist() == users.ids(slot)[0].tolist()
    assert other.seen(int(restored[0])).tolist() == users.seen(slot).tolist() == list(range(81, 151))


def test_the_least_recently_touched_user_is_forgotten_first() -> None:
    users = table(capacity=3)
    users.admit(["a", "b", "c"], [0, 0, 0])
    users.slots(["a"])
    users.slots(["c"])
    users.admit(["d"], [0])
    assert users.missing(["a", "b", "c", "d"]) == ["b"]


def test_more_users_at_once_than_slots_name_the_setting() -> None:
    users = table(capacity=3)
    users.admit(["a", "b"], [0, 0])
    users.slots(["a", "b"])
    with pytest.raises(ValueError, match="INNERLOOP_CACHE_USERS"):
        users.admit(["c", "d"], [0, 0])


def test_a_new_user_in_an_old_slot_inherits_nothing() -> None:
    users, segments = table(capacity=1), Segments()
    slots = users.admit(["a"], [0])
    for number in range(100):
        users.append_ids(slots, np.array([number]), np.array([1]), segments)
        users.append_positive(slots, np.array([number + 1]), np.array([2]))
        users.append_seen(slots, np.array([number + 1]), segments)
    users.adapter[slots] = 1.0
    users.slots(["a"])
    users._tick += 1  # the next micro-batch
    again = users.admit(["b"], [1])
    assert users.missing(["a"]) == ["a"]
    assert users.ids(int(again[0]))[0].tolist() == []
    assert users.seen(int(again[0])).tolist() == []
    assert not users.adapter[again].any()
    assert not users.support_items[again].any()


def test_forgetting_a_partition_leaves_the_others() -> None:
    users = table()
    users.admit(["a", "b", "c"], [0, 1, 0])
    users.forget_partition(0)
    assert users.missing(["a", "b", "c"]) == ["a", "c"]
    assert len(users) == 1
