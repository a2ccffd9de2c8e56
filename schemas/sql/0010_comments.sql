-- Revision 0010: what a reader sees in psql's \dn+, \dt+, \dv+, \d+ and \df+.

COMMENT ON SCHEMA innerloop IS
    'Per-user adapted recommendations from a stream of clicks. Begin at recommend(user_id, k) and the view scores.';

-- For readers
COMMENT ON FUNCTION innerloop.recommend(text, integer) IS
    'The k best items (1 to 1000) for a user, known or not, best first; never empty while the catalogue is not. source: adapted, start (conditioned on the user''s events, no adapter served), popular (what people take first).';
COMMENT ON VIEW innerloop.scores IS 'Every user''s list, one row per item; withdrawn items are left out at once. Always with WHERE user_id = …';
COMMENT ON COLUMN innerloop.scores.score IS 'between 0 and 1; comparable within one user and meta_version';
COMMENT ON COLUMN innerloop.scores.rank IS '1 is the best';
COMMENT ON COLUMN innerloop.scores.meta_version IS 'the version that the list was made with, see meta_versions';
COMMENT ON COLUMN innerloop.scores.num_events IS 'positive events of the user so far';
COMMENT ON VIEW innerloop.support_sets IS 'What each user''s adaptation is conditioned on: the newest positive events; position 1 is the oldest kept.';
COMMENT ON VIEW innerloop.law IS
    'One row per partition; next_offset - first_offset = applied + dead_lettered + duplicates + dropped + skipped, by a constraint.';
COMMENT ON COLUMN innerloop.law.next_offset IS 'first offset not yet in the database; the broker''s end offset less this is the lag';
COMMENT ON COLUMN innerloop.law.dropped IS 'from before their user asked to be forgotten, or beyond what one user may send (rate_limited of them)';
COMMENT ON COLUMN innerloop.law.skipped IS 'offsets that hold no record: compacted away, transaction markers, or an accepted gap';
COMMENT ON VIEW innerloop.prequential_events IS
    'Every positive event as it was predicted before it was learnt: losses (nats) and ranks, adapted, un-adapted (start) and by popularity.';
COMMENT ON COLUMN innerloop.prequential_events.recorded_at IS 'Kafka''s time of the record; event_time is the event''s own';
COMMENT ON COLUMN innerloop.prequential_events.rank_adapted IS '1-based place in the whole catalogue; 0: the item had no vector yet';
COMMENT ON COLUMN innerloop.prequential_events.new_item IS 'the version had never seen the item';
COMMENT ON COLUMN innerloop.prequential_events.scene IS 'context.scene of the event, if any';
COMMENT ON VIEW innerloop.prequential_by_hour IS
    'prequential_events as sums by hour and segment, also of those no longer kept: divide by num_labels - num_unknown.';
COMMENT ON VIEW innerloop.adapters IS 'How many users there are (an estimate above 100,000), and whose adapters are not served.';
COMMENT ON TABLE innerloop.items IS 'The catalogue, from the topic of items.';
COMMENT ON COLUMN innerloop.items.item_no IS 'the item''s number in arrays of other tables';
COMMENT ON COLUMN innerloop.items.available IS 'false: withdrawn, never recommended';
COMMENT ON TABLE innerloop.meta_versions IS 'Versions of the meta-learned parameters; one is live. `innerloop models list` shows the same.';
COMMENT ON COLUMN innerloop.meta_versions.status IS 'challenger (not judged yet), canary (on some partitions), live, retired (was live), rejected';
COMMENT ON TABLE innerloop.drift_decisions IS 'Every verdict on an alarm, also "no". `innerloop drift explain` puts it into words.';
COMMENT ON TABLE innerloop.drift_alarms IS 'Changes of the loss that a detector found, improvements too; means in standard deviations of the residual.';
COMMENT ON TABLE innerloop.retrain_requests IS 'Wishes for a new version; a trainer holds one by a lease that it renews.';
COMMENT ON TABLE innerloop.audit IS 'What was done to versions and to people''s data, by whom and why; written once, names nobody.';
COMMENT ON TABLE innerloop.dead_letters IS 'Records that could never be applied, with the reason. What they carried is for writers only.';
COMMENT ON COLUMN innerloop.dead_letters.replayed_at IS 'when it was produced again, at a new offset';
COMMENT ON TABLE innerloop.activations IS 'From which offset of a partition a version, a catalogue snapshot or an erasure holds.';

-- What views and functions are made of
COMMENT ON TABLE innerloop.user_state IS 'One row per user: support set, adapter, list. For reading: scores, support_sets, recommend().';
COMMENT ON COLUMN innerloop.user_state.adapter_use IS 'the list is made with 0 the start, 1 the adapter, 2 the start, since the adapter lost to it, 3 the start, since the adapter diverged';
COMMENT ON TABLE innerloop.seen_items IS 'Older seen (item_no) and dismissed (-item_no) items of a user; the newest are in user_state.';
COMMENT ON TABLE innerloop.event_ids IS 'Hashes of a user''s older event ids, for de-duplication; the newest are in user_state.';
COMMENT ON TABLE innerloop.popular_items IS 'What a user without events is shown, per partition, best first.';
COMMENT ON FUNCTION innerloop.popular_merged(integer) IS 'The list for users without events, of all partitions; recommend() fills up from it.';
COMMENT ON FUNCTION innerloop.event_type_name(smallint) IS 'The name of a stored type code.';
COMMENT ON TABLE innerloop.stream_position IS 'Where each partition is, and the fates of its events; the view law is the same.';
COMMENT ON TABLE innerloop.prequential IS 'One row per micro-batch; for reading: prequential_events.';
COMMENT ON TABLE innerloop.prequential_hours IS 'Sums of what prequential no longer keeps; for reading: prequential_by_hour.';
COMMENT ON FUNCTION innerloop.prequential_sums(innerloop.prequential) IS 'One micro-batch as sums by hour and segment.';
COMMENT ON FUNCTION innerloop.trim_prequential(text, timestamptz, integer) IS 'The monitor''s: adds old rows of the record to their hours and removes them.';
COMMENT ON TABLE innerloop.catalogue_snapshots IS 'Numbers of catalogue snapshots; items.snapshot is the one that brought the item''s newest state.';
COMMENT ON TABLE innerloop.item_statistics IS 'Per partition: how often which item is taken first, second, …, decayed; moves at every 1,024th offset.';
COMMENT ON TABLE innerloop.pair_snapshots IS 'Per partition: which items follow each other, as of epoch_offset.';
COMMENT ON TABLE innerloop.pair_log IS 'What pair_snapshots has to be brought forward by.';
COMMENT ON TABLE innerloop.state_maps IS 'Linear maps that carry users'' adapters from one version to another.';
COMMENT ON TABLE innerloop.worker_settings IS 'What workers were run with, as far as it decides what is written: one that differs does not start.';
COMMENT ON TABLE innerloop.artefact_writes IS 'Artefacts being written, so that what a killed trainer left is known.';
COMMENT ON TABLE innerloop.drift_monitors IS 'Who watches a topic, and whether it sees anything.';
COMMENT ON TABLE innerloop.drift_positions IS 'How far the monitor has read the record.';
COMMENT ON TABLE innerloop.drift_state IS 'What the monitor remembers between two readings.';
COMMENT ON TABLE innerloop.drift_freezes IS 'While a row is open nothing is retrained; `innerloop drift freeze` opens one.';
COMMENT ON TABLE innerloop.erased_users IS 'Keyed hashes of users who asked to be forgotten: they tell late events, and tell nobody a name.';
COMMENT ON TABLE innerloop.erasure_key IS 'The key of these hashes, for writers only.';
COMMENT ON FUNCTION innerloop.forget_user(text, bytea, bigint, text) IS 'Ends a user''s state; `innerloop forget` calls it and the two below.';
COMMENT ON FUNCTION innerloop.erase_prequential(text[]) IS 'Takes users out of the record of predictions.';
COMMENT ON FUNCTION innerloop.erase_prequential(text) IS 'Takes one user out of the record of predictions.';
COMMENT ON FUNCTION innerloop.erase_dead_letters(text[]) IS 'Empties the dead letters of users.';
