"""Which test shows that a fault ends as it must; the numbers are those of the list of faults in the design."""

from __future__ import annotations

import ast
import pathlib

TESTS = pathlib.Path(__file__).parents[1]
MALFORMED = "test_every_malformed_record_is_a_dead_letter_with_its_reason_and_the_next_event_is_applied"
PASSING = "test_a_failure_that_passes_is_waited_out_and_makes_no_dead_letter"
WRONG = "test_a_wrong_configuration_ends_with_78_and_its_remedy"

SHOWN_BY = {
    # malformed: encoding, JSON, fields, types, numbers, versions, keys, ids, times
    1: (MALFORMED,),
    2: (MALFORMED,),
    3: (MALFORMED, "test_a_missing_field_is_named"),
    4: (MALFORMED,),
    5: (MALFORMED,),
    6: (MALFORMED,),
    7: ("test_the_last_of_two_equal_keys_wins_and_unknown_fields_do_not_matter",),
    8: ("test_unknown_fields_are_accepted_and_counted",),
    9: (MALFORMED,),
    10: (MALFORMED,),
    11: (MALFORMED, "test_five_minutes_ahead_and_the_first_moment_of_2000_are_the_limits"),
    # hostile: size, depth, SQL, repeats, replays, floods, paths, unknown items, terminals
    12: ("test_64_kib_and_8_levels_are_the_limits",),
    13: ("test_64_kib_and_8_levels_are_the_limits", MALFORMED),
    14: ("test_hostile_and_unknown_ids_are_stored_letter_by_letter", "test_sql_in_an_id_is_only_an_id"),
    15: ("test_a_repeated_event_has_one_effect_and_a_changed_one_is_a_conflict",),
    16: ("test_a_repeated_event_has_one_effect_and_a_changed_one_is_a_conflict",),
    17: ("test_a_replay_of_the_whole_topic_changes_no_row",),
    18: (
        "test_what_is_over_the_limit_is_dropped_and_counted_however_the_log_is_cut",
        "test_who_floods_costs_the_others_no_more_than_the_limit",
    ),
    19: ("test_inverted_labels_of_one_user_in_a_hundred_are_an_alarm_and_no_retraining",),
    20: ("test_memory_does_not_grow_with_100_000_users", "test_memory_does_not_grow_with_a_million_users"),
    21: ("test_a_stored_hash_that_is_none_never_becomes_a_path",),
    22: ("test_dismissed_and_seen_items_leave_the_list_unknown_ones_stay_in_the_support",),
    23: ("test_escaping_leaves_nothing_that_moves_a_terminal",),
    # broker: away, rebalances, topics, retention, made anew
    24: (
        "test_a_broker_that_is_away_for_a_while_is_waited_for_by_the_same_worker",
        "test_a_worker_started_before_its_broker_waits_and_then_works",
        "test_kills_of_workers_and_of_apache_kafka_leave_the_law_exact",
    ),
    25: ("test_a_rebalance_storm_makes_progress_and_leaves_the_law_exact",),
    26: (WRONG, "test_the_command_itself_ends_with_78_when_the_topics_are_missing"),
    27: ("test_a_topic_that_lost_events_stops_the_worker_until_the_gap_is_accepted",),
    28: ("test_a_worker_without_the_right_to_read_is_not_ready_and_asks_once_a_second_at_most",),
    29: ("test_a_topic_that_was_made_anew_is_refused",),
    # database: away, a lost answer, conflicts, full, failover, locks, schemas
    30: ("test_the_database_away_for_ten_seconds_costs_nothing",),
    31: ("test_a_lost_answer_to_commit_has_one_effect",),
    32: (PASSING,),
    33: (
        "test_a_row_that_violates_a_constraint_costs_its_event_alone",
        "test_an_item_that_violates_a_constraint_costs_its_record_alone",
    ),
    34: (PASSING,),
    35: (PASSING,),
    36: (
        "test_a_lock_that_somebody_holds_is_waited_for_two_seconds_at_a_time",
        "test_a_long_transaction_of_a_reader_holds_nobody_up",
        "test_a_worker_that_stops_amid_copying_keeps_nobody_waiting",
    ),
    37: ("test_a_schema_of_another_revision_is_refused_with_what_to_do",),
    # worker: kills, stops, clocks, lost folders
    38: (
        "test_five_kills_of_two_workers_leave_the_law_exact",
        "test_sigterm_under_load_drains_and_the_next_worker_goes_on",
        "test_a_frozen_worker_writes_nothing_once_its_partitions_have_moved",
    ),
    39: ("test_a_clock_a_day_off_changes_no_row",),
    40: (
        "test_cache_and_heartbeat_that_are_deleted_under_a_worker_or_between_two_are_made_again",
        "test_workers_restarted_amid_an_epoch_write_the_rows_of_one_that_was_not",
    ),
    # model: artefacts, divergence, worse versions, swaps
    41: (
        "test_a_truncated_file_is_refused",
        "test_any_flipped_bit_is_refused",
        "test_a_pickle_in_disguise_is_never_opened",
        "test_a_wrong_shape_is_refused_even_with_a_fitting_hash",
        "test_a_tensor_that_is_not_finite_is_neither_read_nor_written",
        "test_an_absurd_header_length_is_refused_without_allocating_it",
        "test_a_version_that_cannot_be_loaded_is_refused_once_and_the_live_one_stays",
    ),
    42: ("test_an_adapter_that_diverged_is_thrown_away_and_nobody_else_notices",),
    43: (
        "test_a_challenger_that_is_worse_is_rejected_with_its_figures",
        "test_a_live_version_that_does_worse_than_what_it_replaced_is_rolled_back",
    ),
    44: ("test_versions_change_at_a_recorded_offset_and_the_batch_in_hand_ends_on_its_own",),
    # operator: roles, migrations, replays, rollbacks
    45: ("test_each_command_gets_only_the_login_that_it_needs", WRONG),
    46: ("test_a_worker_whose_settings_differ_from_one_that_runs_ends_with_78_and_says_which",),
    47: ("test_migrations_at_the_same_time_end_as_one",),
    48: ("test_a_replayed_letter_is_produced_as_it_was_and_a_second_replay_changes_nothing",),
    49: ("test_a_version_whose_artefact_is_gone_or_damaged_is_neither_promoted_nor_returned_to",),
    # privacy: erasure, late events, training, backups, strangers
    50: (
        "test_of_a_forgotten_user_only_a_keyed_hash_is_left_and_nobody_else_is_touched",
        "test_a_worker_forgets_who_asks_and_one_on_a_restored_backup_forgets_before_it_is_ready",
    ),
    51: ("test_late_events_of_a_forgotten_user_are_dropped_and_counted",),
    52: (
        "test_a_window_holds_the_records_of_its_time_without_what_erased_users_did_before",
        "test_who_asks_to_be_forgotten_is_left_out_and_who_asks_while_it_learns_marks_the_version",
    ),
    53: ("test_a_worker_forgets_who_asks_and_one_on_a_restored_backup_forgets_before_it_is_ready",),
    54: ("test_forgetting_somebody_unknown_is_fine_and_leaves_one_line_of_audit",),
}


def test_every_fault_is_shown_by_tests_that_exist() -> None:
    found = {
        node.name
        for path in TESTS.rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    }
    assert {name for names in SHOWN_BY.values() for name in names} - found == set()
    assert sorted(SHOWN_BY) == list(range(1, 55))
