"""The embedded broker and database of one home folder: start, stop, find.

Both outlive the command that starts them and are found again by any later one (see `pipeline.daemons`).
For development, demonstrations and tests; in production INNERLOOP_BROKER and INNERLOOP_DATABASE_URL name the real ones.
"""

import pathlib
import shutil
from dataclasses import dataclass

from pipeline import embedded_broker, embedded_database
from pipeline.daemons import ServiceFailed, exclusive
from schemas.errors import ConfigurationError


class ServicesDown(ConfigurationError):
    """The embedded parts are needed and do not run: start them, or set the broker and the database."""


@dataclass(frozen=True)
class Endpoints:
    """Where the running parts are: the broker as host:port, the database as one URL per login."""

    broker: str
    owner_url: str
    writer_url: str
    reader_url: str


@dataclass(frozen=True)
class ServiceStatus:
    """One embedded part: `address` and `pid` are None while it does not run."""

    name: str
    address: str | None
    pid: int | None
    log_file: pathlib.Path


def folder_of(home: pathlib.Path) -> pathlib.Path:
    """The folder below `home` that holds everything of the embedded parts."""
    return home.expanduser().absolute() / "services"


def up(home: pathlib.Path) -> Endpoints:
    """Start whichever part does not run and return where both are; started twice is started once.

    The broker keeps its log in memory. When it starts anew beside a database that has seen an earlier log, a
    worker refuses to go on (its position lies beyond the log): `down(home, delete=True)` begins afresh.
    Raises ServiceFailed (ConfigurationError) with the reason and the end of the part's log.
    """
    folder = folder_of(home)
    try:
        with exclusive(folder):
            if not embedded_database.daemon(folder).running():
                embedded_database.start(folder)
            if not embedded_broker.daemon(folder).running():
                embedded_broker.start(folder)
    except PermissionError as error:
        raise ServiceFailed(
            f"{error.filename} belongs to another user: set INNERLOOP_HOME to a folder of yours"
        ) from error
    return endpoints(home)


def down(home: pathlib.Path, *, delete: bool = False) -> None:
    """Stop both parts, also after a start that was cut short; `delete` removes the database's data as well."""
    folder = folder_of(home)
    if not folder.exists():
        return
    with exclusive(folder):
        embedded_broker.stop(folder)
        embedded_database.stop(folder)
        if delete:
            shutil.rmtree(folder / "postgres", ignore_errors=True)


def status(home: pathlib.Path) -> list[ServiceStatus]:
    """What runs and where, for people; starts nothing."""
    folder = folder_of(home)
    parts = embedded_broker.daemon(folder), embedded_database.daemon(folder)
    return [ServiceStatus(part.name, part.address(), part.pid(), part.log_file) for part in parts]


def endpoints(home: pathlib.Path) -> Endpoints:
    """Where the running parts are; raises ServicesDown naming the command that starts them."""
    folder = folder_of(home)
    broker = embedded_broker.daemon(folder).address()
    socket_folder = embedded_database.daemon(folder).address()
    if broker is None or socket_folder is None:
        away = [name for name, found in (("broker", broker), ("database", socket_folder)) if found is None]
        raise ServicesDown(
            f"the embedded {' and '.join(away)} of {home} {'is' if len(away) == 1 else 'are'} not running: "
            "run `innerloop services up`, "
            "or set INNERLOOP_BROKER and INNERLOOP_DATABASE_URL"
        )
    urls = {login: embedded_database.url(socket_folder, login) for login in embedded_database.LOGINS}
    return Endpoints(broker, urls["owner"], urls["writer"], urls["reader"])
