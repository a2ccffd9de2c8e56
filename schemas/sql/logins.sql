-- The three logins of a fresh database, for psql and for the official image's /docker-entrypoint-initdb.d.
-- Passwords come from the environment: OWNER_PASSWORD, WRITER_PASSWORD, READER_PASSWORD.
-- `innerloop migrate` with the owner's login does the rest.
\getenv owner_password OWNER_PASSWORD
\getenv writer_password WRITER_PASSWORD
\getenv reader_password READER_PASSWORD

CREATE ROLE innerloop_owner NOLOGIN;
CREATE ROLE innerloop_writer NOLOGIN;
CREATE ROLE innerloop_reader NOLOGIN;
CREATE ROLE owner LOGIN PASSWORD :'owner_password' IN ROLE innerloop_owner;
CREATE ROLE writer LOGIN PASSWORD :'writer_password' IN ROLE innerloop_writer;
CREATE ROLE reader LOGIN PASSWORD :'reader_password' IN ROLE innerloop_reader;
-- A setting of a group role does not reach its members' sessions.
ALTER ROLE reader SET statement_timeout = '30s';

SELECT format('ALTER DATABASE %I OWNER TO innerloop_owner', current_database()) \gexec
