"""The two brokers that tests run against: Tansu in memory, and Apache Kafka as it is run in production."""

import contextlib
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import textwrap
import time
import uuid
from collections.abc import Callable
from typing import Self
from urllib.parse import quote

from kafka import KafkaAdminClient
from kafka.admin import ACL, ACLOperation, ACLPermissionType, ResourcePattern, ResourceType

from pipeline import embedded_broker
from pipeline.broker import MECHANISMS

KAFKA_VERSION = "4.1.0"
SLF4J_VERSION = "1.7.36"
KAFKA_START_SECONDS = 60.0

POM = f"""\
<project xmlns="http://maven.apache.org/POM/4.0.0">
  <modelVersion>4.0.0</modelVersion><groupId>innerloop</groupId><artifactId>broker-for-tests</artifactId><version>1</version>
  <dependencies>
    <dependency><groupId>org.apache.kafka</groupId><artifactId>kafka_2.13</artifactId><version>{KAFKA_VERSION}</version></dependency>
    <dependency><groupId>org.slf4j</groupId><artifactId>slf4j-simple</artifactId><version>{SLF4J_VERSION}</version></dependency>
  </dependencies>
</project>
"""


class Tansu:
    """A fresh broker in memory: `kill` is kill -9, and either way of ending it loses its log."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        self.address = embedded_broker.start(folder)

    def kill(self) -> None:
        pid = embedded_broker.daemon(self.folder).pid()
        if pid is not None:
            os.kill(pid, signal.SIGKILL)
        self.stop()

    def stop(self) -> None:
        embedded_broker.stop(self.folder)


class ApacheKafka:
    """One KRaft node whose data stays in `folder`: `kill9` and `restart` keep the log and the ports."""

    def __init__(self, folder: pathlib.Path, *, scram: tuple[str, ...] = ()) -> None:
        """Format the folder; `scram` are credentials to begin with, as StorageTool writes them."""
        port, controller_port = free_ports(2)
        self.folder = folder
        self.address = f"127.0.0.1:{port}"
        self._properties = folder / "server.properties"
        self._properties.write_text(_server_properties(folder, port, controller_port))
        self._classpath = f"{kafka_jars()}/*"
        self._process: subprocess.Popen[bytes] | None = None
        words = ["format", "-t", str(uuid.uuid4()), "-c", str(self._properties)]
        words += [word for one in scram for word in ("--add-scram", one)]
        _checked([*self._java(), "kafka.tools.StorageTool", *words])

    def start(self) -> Self:
        with (self.folder / "kafka.log").open("ab") as log:
            command = [*self._java(), "kafka.Kafka", str(self._properties)]
            self._process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + KAFKA_START_SECONDS
        while not _accepts(self.address):
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill9()
                raise AssertionError("Kafka did not start:\n" + (self.folder / "kafka.log").read_text()[-3000:])
            time.sleep(0.1)
        return self

    def kill9(self) -> None:
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        self._end(signal.SIGTERM)

    def revoke(self, topic: str) -> None:
        """Let nobody read a topic, nor ask what there is of it."""
        self._change_rights(KafkaAdminClient.create_acls, topic)

    def grant(self, topic: str) -> None:
        """Take a revocation back."""
        self._change_rights(KafkaAdminClient.delete_acls, topic)

    def _change_rights(self, change: Callable[..., object], topic: str) -> None:
        pattern = ResourcePattern(ResourceType.TOPIC, topic)
        denied = ACL("User:*", "*", ACLOperation.READ, ACLPermissionType.DENY, pattern)
        with contextlib.closing(KafkaAdminClient(bootstrap_servers=self.address)) as admin:
            change(admin, [denied])

    def restart(self) -> None:
        self.kill9()
        self.start()

    def _end(self, number: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(number)
        try:
            process.wait(timeout=30)
        finally:
            process.kill()
            process.wait()

    def _java(self) -> list[str]:
        return ["java", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Xmx512m", "-cp", self._classpath]


class SecuredKafka(ApacheKafka):
    """The same with two more doors, for clients that trust its certificate: one asks for a login, one for their own."""

    USER, PASSWORD = "shop", "pass/word@1"

    def __init__(self, folder: pathlib.Path) -> None:
        credentials = f"[name={self.USER},password={self.PASSWORD}]"
        super().__init__(folder, scram=tuple(f"{mechanism}={credentials}" for mechanism in MECHANISMS[1:]))
        self._with_login, self._with_certificate = (f"127.0.0.1:{port}" for port in free_ports(2))
        self._own, self._clients = Certificate(folder, "broker"), Certificate(folder, "client")
        properties = self._properties.read_text()
        doors = [line for line in properties.splitlines() if line.startswith(("listeners=", "advertised.listeners="))]
        modules = "org.apache.kafka.common.security"
        login = "listener.name.sasl_ssl"
        lines = [
            # what is said last counts
            *(f"{line},SASL_SSL://{self._with_login},SSL://{self._with_certificate}" for line in doors),
            "listener.security.protocol.map=CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT,SASL_SSL:SASL_SSL,SSL:SSL",
            f"sasl.enabled.mechanisms={','.join(MECHANISMS)}",
            f"{login}.plain.sasl.jaas.config={modules}.plain.PlainLoginModule required "
            f'user_{self.USER}="{self.PASSWORD}";',
            *(
                f"{login}.{mechanism.lower()}.sasl.jaas.config={modules}.scram.ScramLoginModule required;"
                for mechanism in MECHANISMS[1:]
            ),
            "ssl.keystore.type=PEM",
            f"ssl.keystore.location={self._own.both}",
            "ssl.truststore.type=PEM",
            f"ssl.truststore.location={self._clients.certificate}",
            "listener.name.ssl.ssl.client.auth=required",
        ]
        self._properties.write_text(properties + "\n".join(lines) + "\n")

    def address_with_login(self, password: str, mechanism: str) -> str:
        """As INNERLOOP_BROKER has it."""
        login = f"{self.USER}:{quote(password, safe='')}"
        return f"sasl_ssl://{login}@{self._with_login}?mechanism={mechanism}&ca={self._own.certificate}"

    def address_with_certificate(self) -> str:
        return f"{self.address_without_certificate()}&cert={self._clients.certificate}&key={self._clients.key}"

    def address_without_certificate(self) -> str:
        return f"ssl://{self._with_certificate}?ca={self._own.certificate}"


class Certificate:
    """A certificate that signs itself, its key, and a file of both, as Kafka wants them."""

    def __init__(self, folder: pathlib.Path, name: str) -> None:
        self.key, self.certificate, self.both = (folder / f"{name}-{part}.pem" for part in ("key", "cert", "both"))
        request = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN={name}"]
        request += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(self.key), "-out", str(self.certificate)]
        _checked(request)
        self.both.write_text(self.key.read_text() + self.certificate.read_text())


def why_no_kafka() -> str | None:
    """The reason why Apache Kafka cannot be run on this machine, or None."""
    missing = [program for program in ("java", "mvn") if shutil.which(program) is None]
    return f"Apache Kafka needs {' and '.join(missing)}" if missing else None


def kafka_jars() -> pathlib.Path:
    """The folder of Kafka's jars, fetched once into the user's cache."""
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache", "innerloop")
    jars = cache / f"kafka-{KAFKA_VERSION}-slf4j-{SLF4J_VERSION}"
    if not jars.exists():
        # Fetched beside its place and renamed, so that an interrupted or a parallel run leaves no half of it.
        unfinished = cache / f"unfinished-{uuid.uuid4()}"
        unfinished.mkdir(parents=True)
        pom = unfinished / "pom.xml"
        pom.write_text(POM)
        goal = ["dependency:copy-dependencies", f"-DoutputDirectory={unfinished / 'jars'}"]
        _checked(["mvn", "-q", "-B", "-f", str(pom), *goal])
        if not jars.exists():
            (unfinished / "jars").rename(jars)
        shutil.rmtree(unfinished)
    return jars


def free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def _server_properties(folder: pathlib.Path, port: int, controller_port: int) -> str:
    return textwrap.dedent(f"""\
        process.roles=broker,controller
        node.id=1
        controller.quorum.voters=1@127.0.0.1:{controller_port}
        controller.listener.names=CONTROLLER
        listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller_port}
        advertised.listeners=PLAINTEXT://127.0.0.1:{port}
        log.dirs={folder}/log
        auto.create.topics.enable=false
        offsets.topic.num.partitions=4
        offsets.topic.replication.factor=1
        transaction.state.log.num.partitions=4
        transaction.state.log.replication.factor=1
        transaction.state.log.min.isr=1
        group.initial.rebalance.delay.ms=0
        broker.session.timeout.ms=2000
        broker.heartbeat.interval.ms=500
        authorizer.class.name=org.apache.kafka.metadata.authorizer.StandardAuthorizer
        allow.everyone.if.no.acl.found=true
        """)


def _checked(command: list[str]) -> None:
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    if result.returncode != 0:
        raise AssertionError(f"{' '.join(command)} failed:\n{result.stdout[-2000:]}\n{result.stderr[-2000:]}")


def _accepts(address: str) -> bool:
    host, port = address.rsplit(":", 1)
    try:
        socket.create_connection((host, int(port)), timeout=1).close()
    except OSError:
        return False
    return True
