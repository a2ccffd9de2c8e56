-- Revision 0007: item pairs counted online.

-- A partition's pairs as of epoch_offset, under the version that brought the first of them. n = cardinality(item_nos),
-- M pairs kept per item: others int32 [n, M] (item_no, -1 none), counts float32 [n, M, parts], scales float32 [n, M, 2]
-- (now, and when the pair entered), users float32 [n]; all little endian.
CREATE TABLE innerloop.pair_snapshots (
    topic        text      NOT NULL,
    partition    integer   NOT NULL,
    meta_version integer   NOT NULL,
    epoch_offset bigint    NOT NULL,
    item_nos     integer[] NOT NULL,
    others       bytea     NOT NULL,
    counts       bytea     NOT NULL,
    scales       bytea     NOT NULL,
    users        bytea     NOT NULL,
    PRIMARY KEY (topic, partition),
    CONSTRAINT pair_snapshots_lengths CHECK (
        length(scales) = 2 * length(others) AND length(users) = 4 * cardinality(item_nos))
) WITH (vacuum_truncate = false);
ALTER TABLE innerloop.pair_snapshots
    ALTER COLUMN item_nos SET STORAGE EXTERNAL, ALTER COLUMN others SET STORAGE EXTERNAL,
    ALTER COLUMN counts SET STORAGE EXTERNAL, ALTER COLUMN scales SET STORAGE EXTERNAL;

-- What was counted since: positives of a micro-batch within one epoch, int32 [items] and what came before each
-- int32 [items, width]. The next snapshot takes the rows of earlier epochs away.
CREATE TABLE innerloop.pair_log (
    topic        text    NOT NULL,
    partition    integer NOT NULL,
    first_offset bigint  NOT NULL,
    items        bytea   NOT NULL,
    before       bytea   NOT NULL,
    PRIMARY KEY (topic, partition, first_offset),
    CONSTRAINT pair_log_lengths CHECK (length(items) > 0 AND length(before) % length(items) = 0)
);

GRANT SELECT, INSERT, UPDATE ON innerloop.pair_snapshots TO innerloop_writer;
GRANT SELECT, INSERT, DELETE ON innerloop.pair_log TO innerloop_writer;
