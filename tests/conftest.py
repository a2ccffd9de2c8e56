"""What tests stand on: one PostgreSQL per session, a migrated database per test, and two kinds of broker."""

import logging
import pathlib
import shutil
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass

import psycopg2
import pytest
from sqlalchemy import Engine

from pipeline import embedded_database
from schemas.database import connect_engine, migrate
from tests.brokers import ApacheKafka, Tansu, why_no_kafka

TEMPLATE = "migrated"
# The machine does not lose power during a test; everything else is as in production.
SETTINGS = {"fsync": "off"}


@dataclass(frozen=True)
class Postgres:
    """The session's server: `stop` and `start` keep its data and its address."""

    folder: pathlib.Path
    socket_folder: str

    def url(self, user: str, database: str) -> str:
        return embedded_database.url(self.socket_folder, user, database)

    def execute(self, statement: str) -> None:
        with closing(psycopg2.connect(self.url(embedded_database.SUPERUSER, "postgres"))) as connection:
            connection.autocommit = True
            with connection.cursor() as cursor:
                cursor.execute(statement)

    def stop(self) -> None:
        embedded_database.stop(self.folder)

    def start(self) -> None:
        embedded_database.start(self.folder, SETTINGS)


@dataclass(frozen=True)
class Database:
    """A fresh, migrated database, as each of the four logins sees it."""

    name: str
    owner_url: str
    writer_url: str
    reader_url: str
    superuser_url: str


@contextmanager
def short_lived_folder() -> Iterator[pathlib.Path]:
    """A folder near the root: pytest's own closes its parents to other accounts, and sockets need short paths."""
    folder = pathlib.Path(tempfile.mkdtemp(prefix="innerloop-tests-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@pytest.fixture(autouse=True)
def denormal_numbers() -> Iterator[None]:
    """Give them back to the process after a test that flushed them, as the worker does: Hypothesis draws them."""
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_flush_denormal(False)


@pytest.fixture(scope="session")
def services() -> Iterator[Postgres]:
    """One embedded PostgreSQL for the session, holding a migrated template."""
    with short_lived_folder() as folder:
        try:
            server = Postgres(folder, embedded_database.start(folder, SETTINGS))
            server.execute(f"CREATE DATABASE {TEMPLATE} OWNER innerloop_owner")
            migrate(server.url("owner", TEMPLATE))
            yield server
        finally:
            embedded_database.stop(folder)


@pytest.fixture
def database(services: Postgres) -> Iterator[Database]:
    """A migrated database of this test's own."""
    name = f"test_{uuid.uuid4().hex[:12]}"
    services.execute(f"CREATE DATABASE {name} TEMPLATE {TEMPLATE} OWNER innerloop_owner")
    yield Database(name, *(services.url(user, name) for user in ("owner", "writer", "reader", "postgres")))
    services.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def writer(database: Database) -> Iterator[Engine]:
    """Connections with a worker's rights."""
    engine = connect_engine(database.writer_url)
    yield engine
    engine.dispose()


@pytest.fixture
def reader(database: Database) -> Iterator[Engine]:
    """Connections with the rights of those who read lists."""
    engine = connect_engine(database.reader_url)
    yield engine
    engine.dispose()


@pytest.fixture
def broker() -> Iterator[Tansu]:
    """A fresh Tansu."""
    with short_lived_folder() as folder:
        tansu = Tansu(folder)
        try:
            yield tansu
        finally:
            tansu.stop()


@pytest.fixture
def kafka() -> Iterator[ApacheKafka]:
    """A fresh one-node Apache Kafka; tests using it carry the mark `kafka`."""
    if reason := why_no_kafka():
        pytest.skip(reason)
    with short_lived_folder() as folder:
        node = ApacheKafka(folder).start()
        try:
            yield node
        finally:
            node.kill9()


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """The address of a server that speaks S3's protocol and keeps everything in memory."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture
def bucket(s3: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A new bucket, which this process and those that it starts reach by the environment."""
    import fsspec

    forget_connections = fsspec.get_filesystem_class("s3").clear_instance_cache  # which hold another environment's keys
    forget_connections()

    environment = {
        "ENDPOINT_URL": s3,
        "ACCESS_KEY_ID": "test",
        "SECRET_ACCESS_KEY": "test",
        "DEFAULT_REGION": "us-east-1",
    }
    for name, value in environment.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    name = f"bucket-{uuid.uuid4().hex[:12]}"
    fsspec.filesystem("s3", skip_instance_cache=True).mkdir(name)
    yield name
    forget_connections()
