-- Rights of revision 0001. The group roles exist already: schemas.database.migrate makes them.

GRANT USAGE ON SCHEMA innerloop TO innerloop_reader, innerloop_writer;
REVOKE ALL ON ALL FUNCTIONS IN SCHEMA innerloop FROM PUBLIC;
GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA innerloop TO innerloop_reader, innerloop_writer;
GRANT SELECT ON innerloop.alembic_version TO innerloop_reader, innerloop_writer;

-- Readers see what the contract names; not the event ids, nor what a dead letter carried.
GRANT SELECT ON innerloop.scores, innerloop.support_sets, innerloop.prequential_events, innerloop.law,
    innerloop.items, innerloop.catalogue_snapshots, innerloop.stream_position, innerloop.activations,
    innerloop.user_state, innerloop.seen_items, innerloop.popular_items, innerloop.prequential,
    innerloop.meta_versions
    TO innerloop_reader;
GRANT SELECT (topic, partition, "offset", reason, detail, sha256, record_time, first_seen, attempts, replayed_at)
    ON innerloop.dead_letters TO innerloop_reader;

GRANT SELECT ON ALL TABLES IN SCHEMA innerloop TO innerloop_writer;
GRANT INSERT, UPDATE ON innerloop.items, innerloop.catalogue_snapshots, innerloop.stream_position,
    innerloop.item_statistics, innerloop.user_state, innerloop.dead_letters, innerloop.meta_versions,
    innerloop.popular_items
    TO innerloop_writer;
-- What holds from an offset may be replaced there; other history is written once, and segments beyond their horizon go.
GRANT INSERT, UPDATE ON innerloop.activations TO innerloop_writer;
GRANT INSERT ON innerloop.prequential, innerloop.event_ids, innerloop.seen_items
    TO innerloop_writer;
GRANT DELETE ON innerloop.event_ids, innerloop.seen_items TO innerloop_writer;
