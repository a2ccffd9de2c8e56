-- Revision 0003: the segments of each prequential loss, and the erasure of a user's.

-- event_times: the events' own, epoch ms, where record_times are Kafka's. new_items: the version never saw the item.
-- scenes: place in scene_names (1-based), 0 without one. applied_types: how many events of each type were applied,
-- by type code; those that are no positives leave nothing else.
ALTER TABLE innerloop.prequential
    ADD COLUMN event_times   bigint[]   NOT NULL DEFAULT '{}',
    ADD COLUMN new_items     boolean[]  NOT NULL DEFAULT '{}',
    ADD COLUMN scenes        smallint[] NOT NULL DEFAULT '{}',
    ADD COLUMN scene_names   text[]     NOT NULL DEFAULT '{}',
    ADD COLUMN applied_types integer[]  NOT NULL DEFAULT '{}';
UPDATE innerloop.prequential SET
    event_times = record_times,
    new_items = array_fill(false, ARRAY[cardinality(offsets)]),
    scenes = array_fill(0::smallint, ARRAY[cardinality(offsets)]);
ALTER TABLE innerloop.prequential
    ADD CONSTRAINT prequential_segments CHECK (
        cardinality(offsets) = ALL (ARRAY[cardinality(event_times), cardinality(new_items), cardinality(scenes)]));

CREATE OR REPLACE VIEW innerloop.prequential_events AS
SELECT p.topic, p.partition, e."offset", to_timestamp(e.record_time / 1000.0) AS recorded_at,
    e.user_id, i.item_id, innerloop.event_type_name(e.type) AS type, e.num_events, p.meta_version,
    e.loss_adapted, e.loss_start, e.rank_adapted, e.rank_start, e.rank_popular,
    to_timestamp(e.event_time / 1000.0) AS event_time, e.new_item, p.scene_names[e.scene] AS scene
FROM innerloop.prequential p
CROSS JOIN LATERAL unnest(
    p.offsets, p.record_times, p.user_ids, p.item_nos, p.types, p.num_events,
    p.loss_adapted, p.loss_start, p.rank_adapted, p.rank_start, p.rank_popular,
    p.event_times, p.new_items, p.scenes
) AS e ("offset", record_time, user_id, item_no, type, num_events,
    loss_adapted, loss_start, rank_adapted, rank_start, rank_popular, event_time, new_item, scene)
JOIN innerloop.items i ON i.item_no = e.item_no;

-- Takes a user's elements out of the record; gives how many there were. What is left are counts without a name.
-- With the owner's rights, so that a worker's login can forget and still not rewrite.
CREATE FUNCTION innerloop.erase_prequential(erased text) RETURNS bigint
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = innerloop, pg_catalog, pg_temp
AS $$
DECLARE
    num_erased bigint;
BEGIN
    WITH kept AS (
        SELECT p.topic, p.partition, p.first_offset, count(*) FILTER (WHERE e.user_id = erased) AS num_erased,
            array_agg(e.place ORDER BY e.place) FILTER (WHERE e.user_id <> erased) AS places
        FROM prequential p CROSS JOIN LATERAL unnest(p.user_ids) WITH ORDINALITY AS e (user_id, place)
        WHERE p.user_ids @> ARRAY[erased]
        GROUP BY p.topic, p.partition, p.first_offset
    ), changed AS (
        UPDATE prequential p SET
            offsets = ARRAY(SELECT p.offsets[n] FROM unnest(k.places) AS n),
            record_times = ARRAY(SELECT p.record_times[n] FROM unnest(k.places) AS n),
            user_ids = ARRAY(SELECT p.user_ids[n] FROM unnest(k.places) AS n),
            item_nos = ARRAY(SELECT p.item_nos[n] FROM unnest(k.places) AS n),
            types = ARRAY(SELECT p.types[n] FROM unnest(k.places) AS n),
            num_events = ARRAY(SELECT p.num_events[n] FROM unnest(k.places) AS n),
            loss_adapted = ARRAY(SELECT p.loss_adapted[n] FROM unnest(k.places) AS n),
            loss_start = ARRAY(SELECT p.loss_start[n] FROM unnest(k.places) AS n),
            rank_adapted = ARRAY(SELECT p.rank_adapted[n] FROM unnest(k.places) AS n),
            rank_start = ARRAY(SELECT p.rank_start[n] FROM unnest(k.places) AS n),
            rank_popular = ARRAY(SELECT p.rank_popular[n] FROM unnest(k.places) AS n),
            event_times = ARRAY(SELECT p.event_times[n] FROM unnest(k.places) AS n),
            new_items = ARRAY(SELECT p.new_items[n] FROM unnest(k.places) AS n),
            scenes = ARRAY(SELECT p.scenes[n] FROM unnest(k.places) AS n)
        FROM kept k
        WHERE p.topic = k.topic AND p.partition = k.partition AND p.first_offset = k.first_offset
        RETURNING k.num_erased
    )
    SELECT coalesce(sum(c.num_erased), 0) INTO num_erased FROM changed c;
    RETURN num_erased;
END
$$;
REVOKE ALL ON FUNCTION innerloop.erase_prequential(text) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION innerloop.erase_prequential(text) TO innerloop_writer;
