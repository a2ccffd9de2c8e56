-- Revision 0004: artefacts under way, and the maps that carry users' states from version to version.

-- A row is there from before an artefact is written until its version is registered: what a killed trainer left is known.
CREATE TABLE innerloop.artefact_writes (
    sha256   text PRIMARY KEY,
    begun_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT artefact_writes_sha256 CHECK (sha256 ~ '^[0-9a-f]{64}$')
);

-- Written before the target is first taken into use, and never changed: every worker carries states over alike.
-- matrix: float64 little endian, [rows, cols]; explained: share of the target's variance over shared items.
CREATE TABLE innerloop.state_maps (
    source     integer NOT NULL REFERENCES innerloop.meta_versions (version),
    target     integer NOT NULL REFERENCES innerloop.meta_versions (version),
    rows       integer NOT NULL,
    cols       integer NOT NULL,
    matrix     bytea   NOT NULL,
    explained  real    NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (source, target),
    CONSTRAINT state_maps_size CHECK (rows > 0 AND cols > 0 AND length(matrix) = 8 * rows * cols)
);

GRANT SELECT ON innerloop.state_maps TO innerloop_reader, innerloop_writer;
GRANT INSERT ON innerloop.state_maps TO innerloop_writer;
GRANT SELECT, INSERT, DELETE ON innerloop.artefact_writes TO innerloop_writer;
