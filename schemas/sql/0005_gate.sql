-- Revision 0005: whether a user's adapter is served.

-- track: what the adapter has earned lately, nats. adapter_use: what the list was made with, models/gate.py:
-- 0 start (nothing learnt yet), 1 adapter, 2 start, since the adapter lost to it, 3 start, since the adapter diverged.
ALTER TABLE innerloop.user_state
    ADD COLUMN track       real[]   NOT NULL DEFAULT '{}',
    ADD COLUMN adapter_use smallint NOT NULL DEFAULT 0 CHECK (adapter_use BETWEEN 0 AND 3);
UPDATE innerloop.user_state SET adapter_use = 1 WHERE adapter_events > 0;
-- Few rows, so that counting them is cheap however many users there are.
CREATE INDEX user_state_not_served ON innerloop.user_state (adapter_use) WHERE adapter_use > 1;

-- How many users' adapters are not served, and of how many users: an estimate where there are many.
CREATE VIEW innerloop.adapters AS
SELECT CASE WHEN known.estimate > 100000 THEN known.estimate ELSE (SELECT count(*) FROM innerloop.user_state) END AS users,
    (SELECT count(*) FROM innerloop.user_state WHERE adapter_use = 2) AS gated,
    (SELECT count(*) FROM innerloop.user_state WHERE adapter_use = 3) AS diverged
FROM (SELECT reltuples::bigint AS estimate FROM pg_class WHERE oid = 'innerloop.user_state'::regclass) AS known;
GRANT SELECT ON innerloop.adapters TO innerloop_reader, innerloop_writer;

-- The k best items for a user. First the user's own list (source adapted, or start where the adapter has not
-- learnt anything or is not served), then the list for users without events, then any item of the catalogue; never one that is unavailable or
-- dismissed, and past the user's own list never one that was seen, unless there would be nothing at all.
CREATE OR REPLACE FUNCTION innerloop.recommend(user_id text, k integer DEFAULT 10)
RETURNS TABLE (item_id text, score double precision, rank integer, source text)
LANGUAGE plpgsql STABLE
SET search_path = innerloop, pg_catalog, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    own       record;
    num_given integer;
    excluded  integer[];
    seen      integer[];
    fill      integer[];
    scores    double precision[];
    depth     integer;
BEGIN
    IF k IS NULL OR k NOT BETWEEN 1 AND 1000 THEN
        RAISE EXCEPTION 'recommend: k must be from 1 to 1000' USING ERRCODE = 'invalid_parameter_value';
    END IF;

    SELECT u.top_items, u.top_scores, u.recent_seen,
        CASE WHEN u.adapter_use = 1 THEN 'adapted' ELSE 'start' END AS source
    INTO own FROM user_state u WHERE u.user_id = recommend.user_id;
    RETURN QUERY
        SELECT i.item_id, t.score, row_number() OVER (ORDER BY t.place)::integer, own.source
        FROM unnest(own.top_items, own.top_scores) WITH ORDINALITY AS t (item_no, score, place)
        JOIN items i ON i.item_no = t.item_no
        WHERE i.available ORDER BY t.place LIMIT k;
    GET DIAGNOSTICS num_given = ROW_COUNT;
    IF num_given = k THEN RETURN; END IF;

    SELECT coalesce(array_agg(n), '{}') INTO seen FROM (
        SELECT unnest(own.recent_seen) AS n
        UNION ALL
        SELECT unnest(s.items) FROM seen_items s WHERE s.user_id = recommend.user_id) AS noted;
    SELECT coalesce(array_agg(DISTINCT abs(n)), '{}') INTO excluded
    FROM unnest(seen || coalesce(own.top_items, '{}')) AS n;

    depth := k + cardinality(excluded) + 20;
    LOOP
        SELECT array_agg(chosen.item_no), array_agg(chosen.score) INTO fill, scores FROM (
            SELECT p.item_no, p.score FROM popular_merged(depth) AS p
            JOIN items i ON i.item_no = p.item_no
            WHERE i.available AND p.item_no <> ALL (excluded)
            ORDER BY p.score DESC, i.item_id LIMIT k - num_given) AS chosen;
        EXIT WHEN cardinality(fill) = k - num_given OR depth >= 1000000;
        depth := 1000000;  -- many withdrawn items near the top: read the lists whole
    END LOOP;
    RETURN QUERY
        SELECT i.item_id, t.score, (num_given + t.place)::integer, 'popular'
        FROM unnest(fill, scores) WITH ORDINALITY AS t (item_no, score, place)
        JOIN items i ON i.item_no = t.item_no ORDER BY t.place;
    num_given := num_given + coalesce(cardinality(fill), 0);
    IF num_given = k THEN RETURN; END IF;

    excluded := excluded || coalesce(fill, '{}');
    RETURN QUERY
        SELECT i.item_id, 0::double precision, (num_given + row_number() OVER (ORDER BY i.item_id))::integer, 'popular'
        FROM items i WHERE i.available AND i.known AND i.item_no <> ALL (excluded)
        ORDER BY i.item_id LIMIT k - num_given;
    IF FOUND OR num_given > 0 THEN RETURN; END IF;

    RETURN QUERY  -- everything was seen: better again than nothing
        SELECT i.item_id, 0::double precision, row_number() OVER (ORDER BY i.item_id)::integer, 'popular'
        FROM items i WHERE i.available AND i.known AND -i.item_no <> ALL (seen)
        ORDER BY i.item_id LIMIT k;
END
$$;
