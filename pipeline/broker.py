"""The broker's address: `host:port,…`, or a URL with Kafka's security protocol, a login and certificates.

    sasl_ssl://user:password@kafka-1:9093,kafka-2:9093?mechanism=SCRAM-SHA-512&ca=/etc/kafka/ca.pem

One text, so that there is one secret to keep, and everything that takes an address takes a secured one.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from typing import Any, Self
from urllib.parse import parse_qsl, unquote, urlsplit

from schemas.errors import ConfigurationError

PROTOCOLS = ("plaintext", "ssl", "sasl_plaintext", "sasl_ssl")
MECHANISMS = ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512")


@dataclass(frozen=True, slots=True)
class Broker:
    """Where a cluster is, and how it is spoken to; `username` is None without SASL, `context` without TLS."""

    servers: tuple[str, ...]
    protocol: str = "PLAINTEXT"
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    mechanism: str = MECHANISMS[0]
    context: ssl.SSLContext | None = None

    @classmethod
    def parse(cls, address: str) -> Self:
        """Read `host:port,…` or `protocol://[user:password@]host:port,…[?mechanism=…&ca=…&cert=…&key=…]`.

        Raises ConfigurationError, which never repeats the password.
        """
        protocol, separator, rest = address.partition("://")
        if not separator:
            return cls(_servers(address))
        if protocol not in PROTOCOLS:
            raise _wrong(f"speaks {', '.join(PROTOCOLS)}, not {protocol!r}")
        url = urlsplit(f"//{rest}")  # a scheme with an underscore is none to it
        login, _, servers = url.netloc.rpartition("@")
        username, _, password = login.partition(":")
        if bool(login) != protocol.startswith("sasl_"):
            raise _wrong(f"has {'a' if login else 'no'} login, {protocol} wants {'none' if login else 'one'}")
        options = _options(protocol, url.query)
        mechanism = options.get("mechanism", MECHANISMS[0])
        if mechanism not in MECHANISMS:
            raise _wrong(f"knows the mechanisms {', '.join(MECHANISMS)}, not {mechanism!r}")
        return cls(
            _servers(servers),
            protocol.upper(),
            unquote(username) if login else None,
            unquote(password) if login else None,
            mechanism,
            _context(options) if protocol.endswith("ssl") else None,
        )

    def security(self) -> dict[str, Any]:
        """How kafka-python is told."""
        told: dict[str, Any] = {"security_protocol": self.protocol}
        if self.context is not None:
            told["ssl_context"] = self.context
        if self.username is not None:
            told |= {"sasl_mechanism": self.mechanism}
            told |= {"sasl_plain_username": self.username, "sasl_plain_password": self.password}
        return told


def hosts(address: str) -> str:
    """The address without login and options, for messages."""
    return ",".join(Broker.parse(address).servers)


def _servers(text: str) -> tuple[str, ...]:
    servers = tuple(server.strip() for server in text.split(",") if server.strip())
    if not servers:
        raise _wrong("names no host")
    return servers


def _options(protocol: str, query: str) -> dict[str, str]:
    known = {"mechanism"} if protocol.startswith("sasl_") else set[str]()
    known |= {"ca", "cert", "key"} if protocol.endswith("ssl") else set[str]()
    options = dict(parse_qsl(query, keep_blank_values=True))
    if unknown := options.keys() - known:
        raise _wrong(f"has the option {sorted(unknown)[0]!r}; {protocol} knows {', '.join(sorted(known)) or 'none'}")
    return options


def _context(options: dict[str, str]) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=options.get("ca"))
        if "cert" in options:
            context.load_cert_chain(options["cert"], options.get("key"))
    except OSError as unreadable:  # a file that is missing, and ssl.SSLError for one that holds something else
        raise _wrong(f"names a certificate that cannot be read: {unreadable}") from None
    return context


def _wrong(what: str) -> ConfigurationError:
    return ConfigurationError(f"the broker's address (INNERLOOP_BROKER) {what}")
