-- Revision 0008: users who asked to be forgotten.

-- What stays of them is a hash, under a key that no reader sees: it tells their late events, and tells nobody a name.
CREATE TABLE innerloop.erasure_key (
    number integer PRIMARY KEY DEFAULT 1,
    key    bytea   NOT NULL,
    CONSTRAINT erasure_key_one CHECK (number = 1)
);
INSERT INTO innerloop.erasure_key (key)
    SELECT sha256(uuid_send(gen_random_uuid()) || uuid_send(gen_random_uuid()));

-- erasure numbers them in the order in which they took effect; erased_ms is Kafka's time of the last wish.
CREATE TABLE innerloop.erased_users (
    user_hash bytea       PRIMARY KEY,
    erasure   bigint      NOT NULL UNIQUE,
    erased_ms bigint      NOT NULL,
    erased_at timestamptz NOT NULL DEFAULT clock_timestamp()
);

ALTER TABLE innerloop.activations
    DROP CONSTRAINT activations_kind,
    ADD CONSTRAINT activations_kind CHECK (kind IN ('meta_version', 'catalogue', 'erasure'));
ALTER TABLE innerloop.dead_letters
    DROP CONSTRAINT dead_letters_sha256,
    ADD CONSTRAINT dead_letters_sha256 CHECK (sha256 ~ '^[0-9a-f]{64}$' OR (sha256 = '' AND payload IS NULL));
COMMENT ON COLUMN innerloop.dead_letters.sha256 IS 'empty: of a user who asked to be forgotten, nothing of it is left';

-- Ends a user's state at the position where her partition is now (where every partition is, if she has none yet), so
-- that what is applied later belongs to a new user. Gives whether there was a state; null where
-- this wish, or a later one, was granted already.
-- With the owner's rights, so that a worker's login can forget and still not delete.
CREATE FUNCTION innerloop.forget_user(forgotten text, hash bytea, at_ms bigint, of_topic text) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = innerloop, pg_catalog, pg_temp
AS $$
DECLARE
    home integer;
    number bigint;
    had_rows boolean;
    is_new boolean;
BEGIN
    -- Numbered in the order in which they commit: a worker that knows of one knows of all before it.
    PERFORM pg_advisory_xact_lock(7597131003411064178);
    IF EXISTS (SELECT FROM erased_users e WHERE e.user_hash = hash AND e.erased_ms >= at_ms) THEN
        RETURN NULL;
    END IF;
    SELECT u.partition INTO home FROM user_state u WHERE u.user_id = forgotten;
    -- As every batch does: the position first, users' rows afterwards.
    PERFORM FROM stream_position p WHERE p.topic = of_topic AND (home IS NULL OR p.partition = home)
        ORDER BY p.partition FOR UPDATE;
    DELETE FROM user_state u WHERE u.user_id = forgotten;
    had_rows := FOUND;
    DELETE FROM event_ids e WHERE e.user_id = forgotten;
    DELETE FROM seen_items s WHERE s.user_id = forgotten;
    is_new := NOT EXISTS (SELECT FROM erased_users e WHERE e.user_hash = hash);
    SELECT coalesce(max(e.erasure), 0) + 1 INTO number FROM erased_users e;
    INSERT INTO erased_users AS e (user_hash, erasure, erased_ms) VALUES (hash, number, at_ms)
        ON CONFLICT (user_hash) DO UPDATE SET erasure = number, erased_ms = at_ms, erased_at = clock_timestamp();
    INSERT INTO activations AS a (topic, partition, kind, value, from_offset)
        SELECT p.topic, p.partition, 'erasure', number, p.next_offset FROM stream_position p
        WHERE p.topic = of_topic AND (home IS NULL OR p.partition = home)
        ON CONFLICT (topic, partition, kind, from_offset) DO UPDATE SET value = excluded.value;
    IF is_new OR had_rows THEN
        INSERT INTO audit (actor, action, subject, detail)
        VALUES ('erasure', 'forget', 'user ' || encode(hash, 'hex'), jsonb_build_object('had_state', had_rows));
    END IF;
    RETURN had_rows;
END
$$;

-- Takes users' elements out of the record; gives how many there were. What is left are counts without a name.
CREATE FUNCTION innerloop.erase_prequential(erased text[]) RETURNS bigint
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = innerloop, pg_catalog, pg_temp
AS $$
DECLARE
    num_erased bigint;
BEGIN
    WITH kept AS (
        SELECT p.topic, p.partition, p.first_offset, count(*) FILTER (WHERE e.user_id = ANY (erased)) AS num_erased,
            array_agg(e.place ORDER BY e.place) FILTER (WHERE e.user_id <> ALL (erased)) AS places
        FROM prequential p CROSS JOIN LATERAL unnest(p.user_ids) WITH ORDINALITY AS e (user_id, place)
        WHERE p.user_ids && erased
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

CREATE OR REPLACE FUNCTION innerloop.erase_prequential(erased text) RETURNS bigint
LANGUAGE sql SECURITY DEFINER
SET search_path = innerloop, pg_catalog, pg_temp
AS $$ SELECT erase_prequential(ARRAY[erased]) $$;

-- Empties the dead letters of users; gives how many there were.
CREATE FUNCTION innerloop.erase_dead_letters(erased text[]) RETURNS bigint
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = innerloop, pg_catalog, pg_temp
AS $$
DECLARE
    patterns bytea[];
    num_erased bigint;
BEGIN
    -- A letter may carry the id under another key, in JSON that nobody could read: what holds it quoted, or as a
    -- number after a colon, goes as well. An id that others' letters happen to quote costs their bytes, not a name.
    SELECT array_agg(convert_to(pattern, 'UTF8')) INTO patterns
        FROM unnest(erased) AS id,
            unnest(CASE WHEN id ~ '^-?[0-9]+$'
                THEN ARRAY[to_json(id)::text] || ARRAY(
                    SELECT colon || id || after FROM unnest(ARRAY[':', ': ']) AS colon, unnest(ARRAY[',', '}', ' ']) AS after)
                ELSE ARRAY[to_json(id)::text] END) AS pattern;
    UPDATE dead_letters d SET key = NULL, payload = NULL, sha256 = ''
        WHERE d.key = ANY (SELECT convert_to(id, 'UTF8') FROM unnest(erased) AS id)
        OR EXISTS (SELECT FROM unnest(patterns) AS pattern WHERE position(pattern IN d.payload) > 0);
    GET DIAGNOSTICS num_erased = ROW_COUNT;
    RETURN num_erased;
END
$$;

REVOKE ALL ON FUNCTION innerloop.forget_user(text, bytea, bigint, text), innerloop.erase_prequential(text[]),
    innerloop.erase_dead_letters(text[]) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION innerloop.forget_user(text, bytea, bigint, text), innerloop.erase_prequential(text[]),
    innerloop.erase_dead_letters(text[]) TO innerloop_writer;
GRANT SELECT ON innerloop.erased_users, innerloop.erasure_key TO innerloop_writer;
GRANT SELECT ON innerloop.erased_users TO innerloop_reader;
