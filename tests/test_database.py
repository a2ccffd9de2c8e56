"""The migrated database: what it refuses by itself, who may do what, and what its views and functions answer."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, Engine, insert, text, update
from sqlalchemy.exc import DBAPIError, IntegrityError, ProgrammingError

from schemas import tables
from schemas.database import ROLES, Role, check_role, check_schema, connect_engine, migrate
from schemas.errors import ConfigurationError, SchemaMismatch, WrongRole
from schemas.event_types import CODES
from tests.conftest import Database, Postgres

USER: dict[str, Any] = {
    "partition": 0, "last_offset": 0, "num_events": 1, "num_applied": 1, "meta_version": 1, "adapter_events": 1,
    "adapter_use": 1,
}  # fmt: skip


@pytest.fixture
def owner(database: Database) -> Iterator[Engine]:
    engine = connect_engine(database.owner_url)
    yield engine
    engine.dispose()


def add_items(connection: Connection, *numbers: int, **values: Any) -> None:
    for number in numbers:
        connection.execute(insert(tables.items).values(item_id=f"i{number}", item_no=number, text="a film", **values))


def add_user(connection: Connection, user_id: str, **values: Any) -> None:
    connection.execute(insert(tables.user_state).values(user_id=user_id, **(USER | values)))


def add_popular(connection: Connection, partition: int, scores: dict[int, float]) -> None:
    row = {"topic": "interactions", "partition": partition, "meta_version": 1}
    connection.execute(insert(tables.popular_items).values(item_nos=[*scores], scores=[*scores.values()], **row))


def withdraw(connection: Connection, *numbers: int) -> None:
    condition = tables.items.c.item_no.in_(numbers)
    connection.execute(update(tables.items).where(condition).values(available=False))


def recommend(engine: Engine, user_id: str, k: int | None) -> list[tuple[str, float, int, str]]:
    with engine.connect() as connection:
        query = text("SELECT item_id, score, rank, source FROM innerloop.recommend(:user_id, :k)")
        return [tuple(row) for row in connection.execute(query, {"user_id": user_id, "k": k})]


def listed(engine: Engine, user_id: str, k: int) -> list[str]:
    return [f"{item_id} {source}" for item_id, _, _, source in recommend(engine, user_id, k)]


# --- migrations ---------------------------------------------------------------------------------------------------


@pytest.fixture
def empty(services: Postgres) -> Iterator[str]:
    """URL, as superuser, of a database that innerloop has never seen."""
    services.execute("CREATE DATABASE never_migrated")
    yield services.url("postgres", "never_migrated")
    services.execute("DROP DATABASE never_migrated WITH (FORCE)")


def test_the_tables_are_what_python_takes_them_for(owner: Engine) -> None:
    options = {
        "include_schemas": True,
        "compare_server_default": True,
        "version_table_schema": tables.SCHEMA,
        "include_name": lambda name, kind, _: kind != "schema" or name == tables.SCHEMA,
    }
    with owner.connect() as connection:
        found = compare_metadata(MigrationContext.configure(connection, opts=options), tables.metadata)
    # Comments are for people who look at the database.
    kinds = [change[0][0] if isinstance(change, list) else change[0] for change in found]
    assert [kind for kind in kinds if kind not in {"modify_comment", "remove_table_comment"}] == []


def test_migrations_at_the_same_time_end_as_one(empty: str) -> None:
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(migrate, [empty] * 4)) == [None] * 4
    engine = connect_engine(empty)
    check_schema(engine)
    engine.dispose()


def test_a_second_migration_changes_nothing(database: Database, writer: Engine) -> None:
    with writer.begin() as connection:
        add_items(connection, 1)
        query = text("SELECT max(oid::bigint) FROM pg_class")
        before = connection.scalar(query)
    migrate(database.owner_url)
    with writer.connect() as connection:
        assert connection.scalar(query) == before
        assert connection.scalar(text("SELECT count(*) FROM innerloop.items")) == 1


def test_everything_belongs_to_the_group_whoever_migrated(empty: str) -> None:
    migrate(empty)
    engine = connect_engine(empty)
    with engine.connect() as connection:
        query = "SELECT DISTINCT relowner::regrole::text FROM pg_class WHERE relnamespace = 'innerloop'::regnamespace"
        assert connection.scalars(text(query)).all() == ["innerloop_owner"]
    engine.dispose()


def test_a_login_without_rights_cannot_migrate(database: Database, empty: str) -> None:
    with pytest.raises(WrongRole, match="permission denied"):
        migrate(database.writer_url.replace(database.name, "never_migrated"))


@pytest.mark.parametrize(
    ("revision", "named"),
    [("0001_from_the_future", "newer than this code.*install"), (None, "run `innerloop migrate`")],
)
def test_a_schema_of_another_revision_is_refused_with_what_to_do(
    owner: Engine, database: Database, revision: str | None, named: str
) -> None:
    check_schema(owner)
    with owner.begin() as connection:
        if revision:
            connection.execute(text("UPDATE innerloop.alembic_version SET version_num = :r"), {"r": revision})
        else:
            connection.execute(text("DROP SCHEMA innerloop CASCADE"))
    with pytest.raises(SchemaMismatch, match=named):
        check_schema(owner)
    if revision:
        with pytest.raises(SchemaMismatch, match="newer"):
            migrate(database.owner_url)


@pytest.mark.parametrize("url", ["", "nonsense", "mysql://host/name", "sqlite:///file"])
def test_a_url_that_is_not_postgresql_is_a_configuration_error(url: str) -> None:
    with pytest.raises(ConfigurationError, match=r"PostgreSQL|postgresql"):
        connect_engine(url)


def test_sessions_think_in_utc(reader: Engine) -> None:
    with reader.connect() as connection:
        assert connection.scalar(text("SHOW timezone")) == "UTC"


# --- rights -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("needed", ROLES)
def test_each_command_gets_only_the_login_that_it_needs(database: Database, needed: Role) -> None:
    urls: dict[Role, str] = {
        "owner": database.owner_url, "writer": database.writer_url, "reader": database.reader_url
    }  # fmt: skip
    for role, url in urls.items():
        engine = connect_engine(url)
        if role == needed:
            check_role(engine, needed)
        else:
            with pytest.raises(WrongRole, match=f"rights of innerloop_{role}.*innerloop_{needed}"):
                check_role(engine, needed)
        engine.dispose()


def test_a_superuser_counts_as_owner(database: Database) -> None:
    engine = connect_engine(database.superuser_url)
    check_role(engine, "owner")
    with pytest.raises(WrongRole, match="innerloop_owner"):
        check_role(engine, "writer")
    engine.dispose()


def test_a_login_without_any_role_is_refused(database: Database, services: Postgres) -> None:
    services.execute("CREATE ROLE stranger LOGIN")
    engine = connect_engine(services.url("stranger", database.name))
    with pytest.raises(WrongRole, match="no innerloop role"):
        check_role(engine, "reader")
    engine.dispose()
    services.execute("DROP ROLE stranger")


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE TABLE innerloop.mine (n int)",
        "DROP VIEW innerloop.scores",
        "ALTER TABLE innerloop.items ADD COLUMN n int",
        "TRUNCATE innerloop.user_state",
        "DELETE FROM innerloop.dead_letters",
        "DELETE FROM innerloop.prequential",
        "UPDATE innerloop.prequential SET meta_version = 2",
        "UPDATE innerloop.audit SET actor = 'nobody'",
        "DELETE FROM innerloop.audit",
        "DELETE FROM innerloop.meta_versions",
        "DELETE FROM innerloop.retrain_requests",
        "UPDATE innerloop.alembic_version SET version_num = '0'",
    ],
)
def test_a_writer_neither_changes_the_schema_nor_rewrites_history(writer: Engine, statement: str) -> None:
    with pytest.raises(ProgrammingError, match=r"permission denied|must be owner"), writer.begin() as connection:
        connection.execute(text(statement))


@pytest.mark.parametrize("table", tables.metadata.sorted_tables, ids=lambda table: table.name)
def test_a_reader_writes_nothing(reader: Engine, table: Any) -> None:
    with pytest.raises(ProgrammingError, match="permission denied"), reader.begin() as connection:
        connection.execute(text(f"DELETE FROM {table.fullname}"))  # noqa: S608  # names of our own tables


@pytest.mark.parametrize("secret", ["payload FROM innerloop.dead_letters", "ids FROM innerloop.event_ids"])
def test_a_reader_does_not_see_what_people_sent(reader: Engine, secret: str) -> None:
    with pytest.raises(ProgrammingError, match="permission denied"), reader.connect() as connection:
        connection.execute(text(f"SELECT {secret}"))
    with reader.connect() as connection:
        connection.execute(text('SELECT topic, partition, "offset", reason, detail FROM innerloop.dead_letters'))


# --- what the tables refuse by themselves ---------------------------------------------------------------------------

POSITION: dict[str, Any] = {"topic": "interactions", "partition": 0, "first_offset": 5, "next_offset": 5}


def test_the_law_is_a_constraint_and_a_view(writer: Engine, reader: Engine) -> None:
    moved = {"applied": 4, "dead_lettered": 3, "duplicates": 2, "dropped": 1}
    with writer.begin() as connection:
        connection.execute(insert(tables.stream_position).values(POSITION))
        connection.execute(update(tables.stream_position).values(next_offset=15, **moved))
    with reader.connect() as connection:
        row = connection.execute(text("SELECT first_offset, next_offset, applied, broken FROM innerloop.law")).one()
    assert tuple(row) == (5, 15, 4, False)


@pytest.mark.parametrize(
    "change", [{"next_offset": 6}, {"applied": 1}, {"applied": 2, "dropped": -2}, {"first_offset": 4}]
)
def test_a_position_that_breaks_the_law_cannot_be_written(writer: Engine, change: dict[str, int]) -> None:
    with writer.begin() as connection:
        connection.execute(insert(tables.stream_position).values(POSITION))
    with pytest.raises(IntegrityError, match="stream_position"), writer.begin() as connection:
        connection.execute(update(tables.stream_position).values(change))


@pytest.mark.parametrize(
    "wrong",
    [
        {"top_items": [1], "top_scores": [1.0000001]},
        {"top_items": [1], "top_scores": [-0.1]},
        {"top_items": [1], "top_scores": [float("nan")]},
        {"top_items": [1], "top_scores": []},
        {"support_items": [1, 2], "support_types": [1]},
        {"recent_ids": [1], "recent_bodies": []},
        {"num_events": 2, "num_applied": 1},
    ],
)
def test_a_user_row_that_readers_could_not_trust_cannot_be_written(writer: Engine, wrong: dict[str, Any]) -> None:
    with pytest.raises(IntegrityError, match="user_state"), writer.begin() as connection:
        add_user(connection, "u", **wrong)


VERSION: dict[str, Any] = {"artefact": "a.safetensors", "sha256": "0" * 64, "encoder": "hashed"}
CANARY: dict[str, Any] = {"status": "canary", "canary_partitions": [0], "canary_since": text("now()")}
REQUEST: dict[str, Any] = {"reason": "drift", "decision": 7, "window_from_ms": 0, "window_to_ms": 1000}


@pytest.mark.parametrize(("kind", "values"), [("live", {"status": "live"}), ("canary", CANARY)])
def test_only_one_version_is_live_and_only_one_a_canary(writer: Engine, kind: str, values: dict[str, Any]) -> None:
    with writer.begin() as connection:
        connection.execute(insert(tables.meta_versions).values(**VERSION | values))
        connection.execute(insert(tables.meta_versions).values(status="challenger", **VERSION))
    with pytest.raises(IntegrityError, match=f"one_{kind}"), writer.begin() as connection:
        connection.execute(update(tables.meta_versions).values(**values))


def test_a_canary_names_its_partitions(writer: Engine) -> None:
    with pytest.raises(IntegrityError, match="meta_versions_canary"), writer.begin() as connection:
        connection.execute(insert(tables.meta_versions).values(**VERSION | CANARY | {"canary_partitions": []}))


def test_a_request_leads_to_one_version_and_a_decision_to_one_request(writer: Engine) -> None:
    with writer.begin() as connection:
        made = connection.scalar(insert(tables.retrain_requests).values(REQUEST).returning(text("request")))
        row = {"status": "challenger", "request": made, **VERSION}
        connection.execute(insert(tables.meta_versions).values(row))
    with pytest.raises(IntegrityError, match="one_per_request"), writer.begin() as connection:
        connection.execute(insert(tables.meta_versions).values(row))
    with pytest.raises(IntegrityError, match="one_per_decision"), writer.begin() as connection:
        connection.execute(insert(tables.retrain_requests).values(REQUEST))


@pytest.mark.parametrize(
    "wrong",
    [
        {"status": "leased"},
        {"status": "leased", "leased_by": "a trainer"},
        {"leased_by": "a trainer", "leased_until": text("now()")},
        {"status": "done", "finished_at": text("now()")},
        {"status": "failed", "finished_at": text("now()")},
        {"status": "failed", "error": "no events"},
        {"window_to_ms": 0},
    ],
)
def test_a_request_that_contradicts_itself_cannot_be_written(writer: Engine, wrong: dict[str, Any]) -> None:
    with pytest.raises(IntegrityError, match="retrain_requests"), writer.begin() as connection:
        connection.execute(insert(tables.retrain_requests).values(**REQUEST | wrong))


def test_a_record_is_dead_lettered_once(writer: Engine) -> None:
    row = {
        "topic": "interactions", "partition": 0, "offset": 7, "reason": "BAD_JSON", "detail": "", "sha256": "0" * 64
    }  # fmt: skip
    with writer.begin() as connection:
        connection.execute(insert(tables.dead_letters).values(payload=b"\0\xff", **row))
    with pytest.raises(IntegrityError, match="dead_letters_pkey"), writer.begin() as connection:
        connection.execute(insert(tables.dead_letters).values(**row))


def test_updates_of_a_user_stay_in_their_page(writer: Engine) -> None:
    wide = {
        "support_items": [1] * 60, "support_types": [1] * 60, "adapter": [0.5] * 66, "top_items": [1] * 50,
        "top_scores": [0.5] * 50, "recent_ids": [2**60] * 32, "recent_bodies": [1] * 32, "recent_seen": [1] * 32,
    }  # fmt: skip
    with writer.begin() as connection:
        for number in range(50):
            add_user(connection, f"u{number}", **wide)
    for offset in range(20):
        with writer.begin() as connection:
            connection.execute(update(tables.user_state).values(last_offset=offset, adapter=[float(offset)] * 66))
            connection.execute(text("SELECT pg_stat_force_next_flush()"))
    query = "SELECT n_tup_upd, n_tup_hot_upd FROM pg_stat_user_tables WHERE relname = 'user_state'"
    with writer.connect() as connection:
        updates, hot = connection.execute(text(query)).one()
    assert updates == 1000
    # A page's first updates may move rows to a new page; from then on every one finds room.
    assert hot >= 900


# --- views --------------------------------------------------------------------------------------------------------


def test_type_codes_mean_the_same_in_sql(reader: Engine) -> None:
    with reader.connect() as connection:
        for name, code in CODES.items():
            found = connection.scalar(text("SELECT innerloop.event_type_name(CAST(:c AS smallint))"), {"c": code})
            assert found == name
        past = {"c": len(CODES)}
        assert connection.scalar(text("SELECT innerloop.event_type_name(CAST(:c AS smallint))"), past) is None


def test_scores_are_one_row_per_item_and_ranks_close_up(writer: Engine, reader: Engine) -> None:
    with writer.begin() as connection:
        add_items(connection, 1, 2, 3)
        add_user(connection, "u", top_items=[3, 1, 2], top_scores=[0.9, 0.5, 0.1], num_events=1)
        withdraw(connection, 1)
    with reader.connect() as connection:
        query = "SELECT user_id, item_id, score, rank, meta_version, num_events FROM innerloop.scores ORDER BY rank"
        rows = [tuple(row) for row in connection.execute(text(query))]
    assert rows == [("u", "i3", 0.9, 1, 1, 1), ("u", "i2", 0.1, 2, 1, 1)]


def test_support_sets_are_readable_oldest_first(writer: Engine, reader: Engine) -> None:
    with writer.begin() as connection:
        add_items(connection, 1, 2)
        add_user(connection, "u", support_items=[2, 1], support_types=[CODES["view"], CODES["purchase"]])
    with reader.connect() as connection:
        query = "SELECT position, item_id, type FROM innerloop.support_sets WHERE user_id = 'u' ORDER BY position"
        assert [tuple(row) for row in connection.execute(text(query))] == [(1, "i2", "view"), (2, "i1", "purchase")]


def test_prequential_events_are_one_row_per_event(writer: Engine, reader: Engine) -> None:
    row = {
        "topic": "interactions", "partition": 0, "first_offset": 5, "next_offset": 8, "meta_version": 1,
        "offsets": [5, 7], "record_times": [0, 1500], "user_ids": ["u", "w"], "item_nos": [2, 1], "types": [2, 5],
        "num_events": [0, 3], "loss_adapted": [1.5, 2.5], "loss_start": [2.0, 3.0], "rank_adapted": [1, 2],
        "rank_start": [3, 4], "rank_popular": [5, 0], "event_times": [0, 1], "new_items": [False, True],
        "scenes": [0, 1], "scene_names": ["home"], "applied_types": [0, 0, 1, 0, 0, 1, 0],
    }  # fmt: skip
    with writer.begin() as connection:
        add_items(connection, 1, 2)
        connection.execute(insert(tables.prequential).values(row))
    query = """
        SELECT "offset", extract(epoch FROM recorded_at)::float8, user_id, item_id, type, loss_adapted, rank_popular
        FROM innerloop.prequential_events ORDER BY "offset"
    """
    with reader.connect() as connection:
        rows = [tuple(found) for found in connection.execute(text(query))]
    assert rows == [(5, 0.0, "u", "i2", "click", 1.5, 5), (7, 1.5, "w", "i1", "dismiss", 2.5, 0)]


# --- recommend ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [0, -1, 1001, None])
def test_k_is_from_1_to_1000(reader: Engine, k: int | None) -> None:
    with pytest.raises(DBAPIError, match="k must be from 1 to 1000"):
        recommend(reader, "u", k)


def test_an_empty_catalogue_recommends_nothing(reader: Engine) -> None:
    assert recommend(reader, "u", 10) == []


def test_a_catalogue_without_any_list_yet_still_answers(writer: Engine, reader: Engine) -> None:
    with writer.begin() as connection:
        add_items(connection, 2, 10, 1)
        add_items(connection, 3, known=False)
        add_items(connection, 4, available=False)
    # By item_id COLLATE "C"; an item that only interactions named is not in the catalogue.
    assert recommend(reader, "u", 10) == [("i1", 0, 1, "popular"), ("i10", 0, 2, "popular"), ("i2", 0, 3, "popular")]
    assert listed(reader, "u", 2) == ["i1 popular", "i10 popular"]


def test_a_user_without_events_is_shown_the_best_of_all_partitions(writer: Engine, reader: Engine) -> None:
    with writer.begin() as connection:
        add_items(connection, 1, 2, 3)
        add_popular(connection, 0, {1: 0.5, 2: 0.4, 3: 0.3})
        add_popular(connection, 1, {3: 0.6, 2: 0.2})
    assert recommend(reader, "u", 3) == [
        ("i3", 0.6, 1, "popular"), ("i1", 0.5, 2, "popular"), ("i2", 0.4, 3, "popular")
    ]  # fmt: skip


@pytest.mark.parametrize(("adapter_use", "source"), [(0, "start"), (1, "adapted"), (2, "start"), (3, "start")])
def test_the_source_tells_whether_the_adapter_was_served(
    writer: Engine, reader: Engine, adapter_use: int, source: str
) -> None:
    with writer.begin() as connection:
        add_items(connection, 1, 2)
        add_user(connection, "u", top_items=[2, 1], top_scores=[0.9, 0.8], adapter_use=adapter_use)
    assert recommend(reader, "u", 2) == [("i2", 0.9, 1, source), ("i1", 0.8, 2, source)]
    assert recommend(reader, "u", 1) == [("i2", 0.9, 1, source)]


def test_users_whose_adapters_are_not_served_are_counted(writer: Engine, reader: Engine) -> None:
    with writer.begin() as connection:
        for number, use in enumerate([0, 1, 1, 2, 3, 3]):
            add_user(connection, f"u{number}", adapter_use=use)
    with reader.connect() as connection:
        assert tuple(connection.execute(text("SELECT users, gated, diverged FROM innerloop.adapters")).one()) == (
            6,
            1,
            2,
        )


def test_a_shortfall_is_filled_without_what_is_listed_seen_dismissed_or_withdrawn(
    writer: Engine, reader: Engine
) -> None:
    with writer.begin() as connection:
        add_items(connection, *range(1, 10))
        add_popular(connection, 0, {number: 1 - number / 10 for number in range(1, 9)})
        add_user(connection, "u", top_items=[2, 3], top_scores=[0.9, 0.8], recent_seen=[4, -5])
        connection.execute(insert(tables.seen_items).values(user_id="u", segment=0, items=[6, -1]))
        withdraw(connection, 3, 7)
    assert listed(reader, "u", 10) == ["i2 adapted", "i8 popular", "i9 popular"]
    assert [rank for _, _, rank, _ in recommend(reader, "u", 10)] == [1, 2, 3]


def test_a_withdrawn_item_leaves_every_list_at_once_and_returns(writer: Engine, reader: Engine) -> None:
    with writer.begin() as connection:
        add_items(connection, 1, 2)
        add_popular(connection, 0, {1: 0.5, 2: 0.4})
        add_user(connection, "u", top_items=[1, 2], top_scores=[0.9, 0.8])
        withdraw(connection, 1)
    assert listed(reader, "u", 2) == ["i2 adapted"]
    assert listed(reader, "nobody", 2) == ["i2 popular"]
    with writer.begin() as connection:
        connection.execute(update(tables.items).values(available=True))
    assert listed(reader, "u", 2) == ["i1 adapted", "i2 adapted"]


def test_a_list_whose_top_is_withdrawn_is_read_to_its_end(writer: Engine, reader: Engine) -> None:
    with writer.begin() as connection:
        add_items(connection, *range(1, 101))
        add_popular(connection, 0, {number: 1 - number / 1000 for number in range(1, 101)})
        withdraw(connection, *range(1, 99))
    assert listed(reader, "u", 3) == ["i99 popular", "i100 popular"]


def test_who_has_seen_everything_sees_it_again_but_not_what_was_dismissed(writer: Engine, reader: Engine) -> None:
    with writer.begin() as connection:
        add_items(connection, 1, 2, 3)
        add_popular(connection, 0, {1: 0.5, 2: 0.4, 3: 0.3})
        add_user(connection, "u", recent_seen=[1, -2, 3])
    assert listed(reader, "u", 5) == ["i1 popular", "i3 popular"]


def test_whoever_looks_at_the_schema_is_told_what_everything_holds(reader: Engine) -> None:
    silent = """
        SELECT 'schema ' || nspname FROM pg_namespace
        WHERE nspname = 'innerloop' AND obj_description(oid, 'pg_namespace') IS NULL
        UNION ALL SELECT 'relation ' || relname FROM pg_class
        WHERE relnamespace = 'innerloop'::regnamespace AND relkind IN ('r', 'v') AND relname <> 'alembic_version'
            AND obj_description(oid, 'pg_class') IS NULL
        UNION ALL SELECT 'function ' || oid::regprocedure FROM pg_proc
        WHERE pronamespace = 'innerloop'::regnamespace AND obj_description(oid, 'pg_proc') IS NULL
    """
    with reader.connect() as connection:
        assert connection.scalars(text(silent)).all() == []


def test_a_list_is_read_by_look_ups_alone(writer: Engine, reader: Engine, owner: Engine) -> None:
    with writer.begin() as connection:
        connection.execute(
            text("INSERT INTO innerloop.items (item_id, item_no) SELECT 'i' || n, n FROM generate_series(1, 3000) AS n")
        )
        rows = [{"user_id": f"u{n}", "top_items": [*range(1, 51)], "top_scores": [0.5] * 50} for n in range(1000)]
        connection.execute(insert(tables.user_state), [USER | row for row in rows])
    with owner.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
        connection.execute(text("ANALYZE innerloop.items, innerloop.user_state"))
    read = "SELECT relname, seq_tup_read FROM pg_stat_xact_user_tables WHERE relname IN ('items', 'user_state')"
    with reader.connect() as connection:
        assert len(connection.execute(text("SELECT * FROM innerloop.recommend('u7', 10)")).all()) == 10
        assert dict(map(tuple, connection.execute(text(read)))) == {"items": 0, "user_state": 0}
        listed = "SELECT * FROM innerloop.scores WHERE user_id = 'u7'"
        assert len(connection.execute(text(listed)).all()) == 50
        assert dict(map(tuple, connection.execute(text(read))))["user_state"] == 0


def test_sql_in_an_id_is_only_an_id(writer: Engine, reader: Engine) -> None:
    user_id = "'; DROP TABLE innerloop.items; --"
    with writer.begin() as connection:
        add_items(connection, 1)
        add_user(connection, user_id, top_items=[1], top_scores=[0.5])
    assert listed(reader, user_id, 1) == ["i1 adapted"]


def test_a_database_that_does_not_store_utf8_is_refused(services: Postgres) -> None:
    services.execute("CREATE DATABASE ascii ENCODING 'SQL_ASCII' TEMPLATE template0 LOCALE_PROVIDER libc LOCALE 'C'")
    try:
        with pytest.raises(ConfigurationError, match="SQL_ASCII"):
            migrate(services.url("postgres", "ascii"))
    finally:
        services.execute("DROP DATABASE ascii")
