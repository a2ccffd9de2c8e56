-- Views of revision 0001: the arrays, one row per element, with text ids.

-- The name of a stored type code; schemas/event_types.py holds the same list.
CREATE FUNCTION innerloop.event_type_name(code smallint) RETURNS text
LANGUAGE sql IMMUTABLE PARALLEL SAFE STRICT AS
$$ SELECT (ARRAY['impression', 'view', 'click', 'cart', 'purchase', 'dismiss', 'rating'])[code + 1] $$;

-- Every user's list; withdrawn items leave it at once, and ranks close up.
CREATE VIEW innerloop.scores AS
SELECT u.user_id, listed.item_id, listed.score, listed.rank, u.meta_version, u.num_events, u.updated_at
FROM innerloop.user_state u
CROSS JOIN LATERAL (
    SELECT i.item_id, t.score, row_number() OVER (ORDER BY t.place)::integer AS rank
    FROM unnest(u.top_items, u.top_scores) WITH ORDINALITY AS t (item_no, score, place)
    JOIN innerloop.items i ON i.item_no = t.item_no
    WHERE i.available
) AS listed;

-- Every user's support set; position 1 is the oldest that is kept.
CREATE VIEW innerloop.support_sets AS
SELECT u.user_id, s.place::integer AS position, i.item_id, innerloop.event_type_name(s.type) AS type
FROM innerloop.user_state u
CROSS JOIN LATERAL unnest(u.support_items, u.support_types) WITH ORDINALITY AS s (item_no, type, place)
JOIN innerloop.items i ON i.item_no = s.item_no;

-- One row per event that was predicted before it was learnt.
CREATE VIEW innerloop.prequential_events AS
SELECT p.topic, p.partition, e."offset", to_timestamp(e.record_time / 1000.0) AS recorded_at,
    e.user_id, i.item_id, innerloop.event_type_name(e.type) AS type, e.num_events, p.meta_version,
    e.loss_adapted, e.loss_start, e.rank_adapted, e.rank_start, e.rank_popular
FROM innerloop.prequential p
CROSS JOIN LATERAL unnest(
    p.offsets, p.record_times, p.user_ids, p.item_nos, p.types, p.num_events,
    p.loss_adapted, p.loss_start, p.rank_adapted, p.rank_start, p.rank_popular
) AS e ("offset", record_time, user_id, item_no, type, num_events,
    loss_adapted, loss_start, rank_adapted, rank_start, rank_popular)
JOIN innerloop.items i ON i.item_no = e.item_no;

-- The law of the stream, per partition; broken is false as long as the table's constraint stands.
CREATE VIEW innerloop.law AS
SELECT topic, partition, first_offset, next_offset, applied, dead_lettered, duplicates, dropped, skipped,
    next_offset - first_offset <> applied + dead_lettered + duplicates + dropped + skipped AS broken,
    updated_at
FROM innerloop.stream_position;
