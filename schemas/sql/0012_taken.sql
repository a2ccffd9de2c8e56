-- Revision 0012: when items were taken for the first and for the latest time, beside their pairs.

-- Artefacts of earlier versions are refused, and another version begins with its own pairs: these serve nobody again.
DELETE FROM innerloop.pair_log;
DELETE FROM innerloop.pair_snapshots;

-- int64 [n, 2], little endian, by item of item_nos: arrived, latest, on a clock of takers (0 = nobody yet).
ALTER TABLE innerloop.pair_snapshots
    ADD COLUMN taken bytea NOT NULL,
    DROP CONSTRAINT pair_snapshots_lengths,
    ADD CONSTRAINT pair_snapshots_lengths CHECK (length(scales) = 2 * length(others)
        AND length(users) = 4 * cardinality(item_nos) AND length(taken) = 16 * cardinality(item_nos));
