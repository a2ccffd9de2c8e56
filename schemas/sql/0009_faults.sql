-- Revision 0009: users who send too much, and workers that do not agree.

-- When a user's events so far would be due at the rate that is permitted; epoch µs of Kafka's time.
ALTER TABLE innerloop.user_state ADD COLUMN due_us bigint NOT NULL DEFAULT 0;

ALTER TABLE innerloop.stream_position
    ADD COLUMN rate_limited bigint NOT NULL DEFAULT 0,
    ADD CONSTRAINT stream_position_rate_limited CHECK (rate_limited BETWEEN 0 AND dropped);
COMMENT ON COLUMN innerloop.stream_position.rate_limited IS 'of those dropped: their user had too many within a minute';

CREATE OR REPLACE VIEW innerloop.law AS
SELECT topic, partition, first_offset, next_offset, applied, dead_lettered, duplicates, dropped, skipped,
    next_offset - first_offset <> applied + dead_lettered + duplicates + dropped + skipped AS broken,
    updated_at, rate_limited
FROM innerloop.stream_position;

-- What workers were run with, as far as it decides what is written. A worker holds a shared advisory lock on the
-- fingerprint of its own while it lives; one whose fingerprint differs reads here what differs, and does not start.
CREATE TABLE innerloop.worker_settings (
    fingerprint   integer     PRIMARY KEY,
    settings      jsonb       NOT NULL,
    first_used_at timestamptz NOT NULL DEFAULT now()
);
GRANT SELECT, INSERT ON innerloop.worker_settings TO innerloop_writer;
GRANT SELECT ON innerloop.worker_settings TO innerloop_reader;
