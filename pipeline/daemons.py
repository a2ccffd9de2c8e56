"""A process that outlives the command which started it and is found again by any later one.

The process inherits an open, locked file. The lock says whether it lives, and cannot lie: the system drops it
when the last process holding it ends, however it ends, and a recycled process id does not bring it back. The
file's lines say where it is: the address that the starter chose, then the process id.
"""

import fcntl
import os
import pathlib
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from schemas.errors import ConfigurationError

POLL_SECONDS = 0.02


class ServiceFailed(ConfigurationError):
    """An embedded part did not start or stop; the message carries the end of its log."""


@dataclass(frozen=True)
class Account:
    """The system account that a daemon runs as; None in its place means the caller's own."""

    uid: int
    gid: int


@dataclass(frozen=True)
class Daemon:
    """One such process, named by its folder and its name; nothing here is kept in memory.

    `folder/NAME.lock` holds its lock, address and process id, `folder/NAME.log` what it printed since its last start.
    """

    folder: pathlib.Path
    name: str

    @property
    def lock_file(self) -> pathlib.Path:
        """The file whose lock the process holds."""
        return self.folder / f"{self.name}.lock"

    @property
    def log_file(self) -> pathlib.Path:
        """The process's standard output and error."""
        return self.folder / f"{self.name}.log"

    def address(self) -> str | None:
        """The address given to `start`, or None while the process does not run."""
        lines = self._lines() if self.running() else []
        return lines[0] if len(lines) == 2 else None

    def pid(self) -> int | None:
        """The process id, or None while the process does not run."""
        lines = self._lines() if self.running() else []
        return int(lines[1]) if len(lines) == 2 else None

    def running(self) -> bool:
        """True while any process that inherited the lock lives."""
        try:
            descriptor = os.open(self.lock_file, os.O_RDWR)
        except FileNotFoundError:
            return False
        try:
            # Shared, so that two who ask at once do not take each other for the daemon.
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
        return False

    def start(
        self,
        command: Sequence[str],
        *,
        address: str,
        account: Account | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Start `command` in a session of its own and return at once; the caller waits for its health.

        Raises ServiceFailed when the process runs already: two starters must not share one folder.
        """
        lock = os.open(self.lock_file, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            if not _acquired(lock):
                raise ServiceFailed(f"{self.name} is already running in {self.folder}")
            os.ftruncate(lock, 0)
            os.write(lock, f"{address}\n".encode())
            with self.log_file.open("wb") as log:
                _run_in_background(command, lock, log.fileno(), account, environment)
        finally:
            os.close(lock)

    def stop(self, signals: Sequence[tuple[signal.Signals, float]]) -> None:
        """Send each signal in turn and wait its seconds, until the process is gone; no process is no error."""
        for number, patience in signals:
            pid = self.pid()
            if pid is None:
                break
            with _gone_is_fine():
                os.kill(pid, number)
            deadline = time.monotonic() + patience
            while self.running() and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)
        if self.running():
            raise ServiceFailed(f"{self.name} (process {self.pid()}) did not end; its log is {self.log_file}")
        self.lock_file.unlink(missing_ok=True)

    def log_tail(self, num_lines: int = 15) -> str:
        """The last lines of the log, for an error message."""
        if not self.log_file.exists():
            return "(no log)"
        return "\n".join(self.log_file.read_text(errors="replace").splitlines()[-num_lines:]) or "(empty log)"

    def _lines(self) -> list[str]:
        return self.lock_file.read_text().splitlines()


def _acquired(lock: int) -> bool:
    # Somebody who only asks whether the daemon runs holds the lock for microseconds.
    deadline = time.monotonic() + 0.5
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_SECONDS)
        else:
            return True


def _run_in_background(
    command: Sequence[str],
    lock: int,
    log: int,
    account: Account | None,
    environment: Mapping[str, str] | None,
) -> None:
    """Run through a shell that leaves at once, so that the process is nobody's unwaited child."""
    # The shell writes the process id through the descriptor, even if the starter is killed meanwhile.
    # It gets the lock as its input and moves it, because not every sh can name a descriptor above 9.
    script = 'exec 9<&0; "$@" </dev/null & echo $! >&9'
    subprocess.run(  # noqa: S603 -- the caller's fixed command, passed as arguments and not through the shell's text
        ["/bin/sh", "-c", script, "sh", *command],
        check=True,
        stdin=lock,
        stdout=log,
        stderr=log,
        start_new_session=True,
        cwd="/",
        env={**os.environ, **(environment or {})},
        user=account.uid if account else None,
        group=account.gid if account else None,
        extra_groups=[] if account else None,
    )


@contextmanager
def _gone_is_fine() -> Iterator[None]:
    try:
        yield
    except ProcessLookupError:
        return


@contextmanager
def exclusive(folder: pathlib.Path) -> Iterator[None]:
    """Hold the folder's own lock, so that concurrent commands start and stop its daemons one after another."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / "command.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
