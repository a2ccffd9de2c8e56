"""The database as a whole: connections to it, migrations, and whose rights a login has."""

from __future__ import annotations

from typing import Any, Literal

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, create_engine, make_url, text
from sqlalchemy.exc import ArgumentError, DBAPIError, ProgrammingError

from schemas.errors import ConfigurationError, SchemaMismatch, WrongRole
from schemas.tables import SCHEMA

Role = Literal["owner", "writer", "reader"]
ROLES: tuple[Role, ...] = ("owner", "writer", "reader")  # strongest first

# One key for every innerloop migration; advisory locks belong to one database, so databases do not wait for each other.
MIGRATION_LOCK = 0x696E_6E65_726C_6F6F


def connect_engine(url: str, *, pool_size: int = 2, options: str = "") -> Engine:
    """Return an engine for a `postgresql://` URL; sessions think in UTC, stale connections are noticed before use.

    `options` are further server settings, as in `-c lock_timeout=2000`. Nothing is connected yet.
    """
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise ConfigurationError("the database URL is not of the form postgresql://user:password@host/name") from error
    if parsed.get_backend_name() not in {"postgresql", "postgres"}:
        raise ConfigurationError(f"innerloop needs PostgreSQL, the database URL names {parsed.get_backend_name()!r}")
    arguments: dict[str, Any] = {"options": f"-c timezone=UTC {options}".strip(), "client_encoding": "utf8"}
    if "application_name" not in parsed.query:
        arguments["application_name"] = "innerloop"
    return create_engine(
        parsed.set(drivername="postgresql+psycopg2"),
        pool_pre_ping=True,
        pool_size=pool_size,
        connect_args=arguments,
    )


def migrate(owner_url: str) -> None:
    """Bring the database to this code's schema, roles and rights included; a concurrent or second run changes nothing.

    The login must be a superuser, or able to create roles and schemas, or a member of `innerloop_owner` where
    that role and the schema exist already. Everything happens in one transaction.
    """
    engine = connect_engine(owner_url, pool_size=1)
    try:
        with engine.begin() as connection:
            _refuse_other_encodings(connection)
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": MIGRATION_LOCK})
            _upgrade(connection)
    except ProgrammingError as error:
        if getattr(error.orig, "pgcode", None) != "42501":
            raise
        raise WrongRole(f"this login may not migrate the database: {_first_line(error)}") from error
    finally:
        engine.dispose()


def check_schema(engine: Engine) -> None:
    """Raise SchemaMismatch unless the database is at exactly this code's revision."""
    with engine.connect() as connection:
        _refuse_other_encodings(connection)
        found, head = _current_revision(connection), _scripts().get_current_head()
    if found == head:
        return
    if found is None:
        raise SchemaMismatch("this database has no innerloop schema: run `innerloop migrate` with an owner's login")
    if found in _known_revisions():
        raise SchemaMismatch(
            f"the database is at revision {found}, older than this code's {head}: run `innerloop migrate`"
        )
    raise SchemaMismatch(
        f"the database is at revision {found}, newer than this code's {head}: install the innerloop that made it "
        "(`innerloop migrate` of this one cannot go back)"
    )


def check_role(engine: Engine, role: Role) -> None:
    """Raise WrongRole unless the strongest innerloop role of this login is `role`; superusers count as owners."""
    with engine.connect() as connection:
        held = strongest_role(connection)
        login = connection.scalar(text("SELECT current_user"))
    if held != role:
        raise WrongRole(
            f"login {login!r} has {f'the rights of innerloop_{held}' if held else 'no innerloop role'}, "
            f"this command needs a login whose role is innerloop_{role}"
        )


def strongest_role(connection: Connection) -> Role | None:
    """Return the strongest innerloop role that the connected login is a member of."""
    for role in ROLES:
        # A missing role is no error here: its name is looked up, not cast.
        query = text(
            "SELECT coalesce(bool_or(pg_has_role(r.oid, 'MEMBER')), false) FROM pg_roles r WHERE r.rolname = :name"
        )
        if connection.scalar(query, {"name": f"innerloop_{role}"}):
            return role
    return None


def _upgrade(connection: Connection) -> None:
    scripts = _scripts()
    found = _current_revision(connection)
    if found == scripts.get_current_head():
        return
    if found is not None and found not in _known_revisions():
        raise SchemaMismatch(f"the database is at revision {found}, newer than this code: install a newer innerloop")
    _ensure_roles(connection)
    # Whoever migrates, the group owns what is made, so that any other owner can migrate next time.
    _run(connection, "SET LOCAL ROLE innerloop_owner")
    _run(connection, f"CREATE SCHEMA IF NOT EXISTS {SCHEMA}")
    config = _config()
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


def _ensure_roles(connection: Connection) -> None:
    for role in ROLES:
        # Roles belong to the cluster: another database's migration may make the same one at this moment.
        _run(
            connection,
            f"DO $$ BEGIN IF to_regrole('innerloop_{role}') IS NULL THEN CREATE ROLE innerloop_{role} NOLOGIN; END IF; "
            "EXCEPTION WHEN duplicate_object OR unique_violation THEN NULL; END $$",
        )
    # PostgreSQL 16 told being a member apart from being allowed to become the role.
    kind = "CASE WHEN current_setting('server_version_num')::int >= 160000 THEN 'SET' ELSE 'MEMBER' END"
    if not connection.scalar(text(f"SELECT pg_has_role('innerloop_owner', {kind})")):
        _run(connection, "GRANT innerloop_owner TO CURRENT_USER")
    owns = "SELECT pg_has_role(datdba, 'USAGE') FROM pg_database WHERE datname = current_database()"
    if connection.scalar(text(owns)):
        name = connection.scalar(text("SELECT quote_ident(current_database())"))
        _run(connection, f"GRANT CREATE ON DATABASE {name} TO innerloop_owner")
        _run(connection, f"GRANT CONNECT, TEMPORARY ON DATABASE {name} TO innerloop_owner, innerloop_writer")
        _run(connection, f"GRANT CONNECT ON DATABASE {name} TO innerloop_reader")


def _refuse_other_encodings(connection: Connection) -> None:
    encoding = connection.scalar(text("SHOW server_encoding"))
    if encoding != "UTF8":
        raise ConfigurationError(
            f"this database stores text as {encoding}, ids and titles need UTF8: CREATE DATABASE … ENCODING 'UTF8'"
        )


def _current_revision(connection: Connection) -> str | None:
    if connection.scalar(text("SELECT to_regclass('innerloop.alembic_version')")) is None:
        return None
    revision: str | None = connection.scalar(text("SELECT version_num FROM innerloop.alembic_version"))
    return revision


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", "schemas:migrations")
    config.set_main_option("path_separator", "os")
    return config


def _scripts() -> ScriptDirectory:
    return ScriptDirectory.from_config(_config())


def _known_revisions() -> set[str]:
    return {script.revision for script in _scripts().walk_revisions()}


def _run(connection: Connection, statement: str) -> None:
    connection.exec_driver_sql(statement, execution_options={"no_parameters": True})


def _first_line(error: DBAPIError) -> str:
    return str(error.orig).strip().splitlines()[0]
