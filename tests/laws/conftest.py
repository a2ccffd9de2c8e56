"""What the laws stand on besides brokers: a launcher, a deployment, and a second database for the twin."""

from __future__ import annotations

import pathlib
import uuid
from collections.abc import Iterator

import pytest

from tests.conftest import TEMPLATE, Database, Postgres
from tests.laws.harness import Deploy, Deployment, Launcher, fill_catalogue


@pytest.fixture
def twin(services: Postgres) -> Iterator[Database]:
    """A second migrated database."""
    name = f"twin_{uuid.uuid4().hex[:12]}"
    services.execute(f"CREATE DATABASE {name} TEMPLATE {TEMPLATE} OWNER innerloop_owner")
    yield Database(name, *(services.url(user, name) for user in ("owner", "writer", "reader", "postgres")))
    services.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(scope="session")
def launcher() -> Iterator[Launcher]:
    """Starts the worker processes of all tests."""
    started = Launcher()
    try:
        yield started
    finally:
        started.close()


@pytest.fixture
def deploy(launcher: Launcher, database: Database, tmp_path: pathlib.Path) -> Deploy:
    """Everything that workers need at a broker's address, without any worker yet."""

    def deploy(broker: str, *, session_timeout_seconds: int = 2) -> Deployment:
        deployment = Deployment(broker, database, tmp_path, launcher, session_timeout_seconds)
        deployment.make_topics()
        deployment.publish()
        fill_catalogue(database)
        return deployment

    return deploy
