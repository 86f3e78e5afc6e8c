"""Mutual TLS between processes of different machines, from a folder that is replaced as it expires.

The folder has the files of a Kubernetes Secret of type `kubernetes.io/tls`: `tls.crt` (a process's
certificate and what leads to its authority), `tls.key` and `ca.crt` (all authorities that are
trusted). A change of the files applies to new connections at once; open ones go on. Certificates
name what a process is, by DNS names that are in no DNS, not where it runs: pods change addresses.
"""

from __future__ import annotations

import logging
import ssl
import threading
from collections.abc import Iterable, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

CERTIFICATE_FILE = "tls.crt"
KEY_FILE = "tls.key"
AUTHORITIES_FILE = "ca.crt"
DOMAIN = "faasmoe.internal"
OPERATOR_NAME = f"operator.{DOMAIN}"
GATEWAY_NAME = f"gateway.{DOMAIN}"
DEFAULT_NAMESPACE = "default"

_Version = tuple[tuple[int, int, int], ...]
"""Time of change in ns, inode and size of each file."""


class TlsError(ValueError):
    """The files of a TLS folder are not usable; the message names the file."""


def models_name(namespace: str) -> str:
    """Return the name of routers, sandboxes and store servers of a namespace's models."""
    return f"{namespace}.models.{DOMAIN}"


def peer_names(connection: ssl.SSLObject | ssl.SSLSocket | None) -> frozenset[str]:
    """Return the DNS names of the verified certificate that the other end has shown.

    None without a certificate, or without TLS.
    """
    certificate: Any = None if connection is None else connection.getpeercert()
    names: Iterable[tuple[str, str]] = (certificate or {}).get("subjectAltName", ())
    return frozenset(value for kind, value in names if kind == "DNS")


def is_named(connection: ssl.SSLObject | ssl.SSLSocket | None, names: Set[str]) -> bool:
    """Return whether the other end has shown a certificate with one of these names."""
    return not names.isdisjoint(peer_names(connection))


@dataclass(frozen=True, slots=True)
class _Contexts:
    client: ssl.SSLContext
    server: ssl.SSLContext


class TlsFolder:
    """Contexts from the files of a folder, as they are now. Safe from any thread.

    While changed files are not usable, as between two of them being replaced, the last usable ones
    stay in force.

    Args:
        path: the folder.

    Raises:
        TlsError: the files are not usable.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()  # guards everything below
        self._version = _read_version(path)
        self._failed_version: _Version | None = None
        self._contexts = _load(path)
        # Servers have one context for ever; it hands each new connection to the current one.
        self._listening = self._contexts.server
        self._listening.sni_callback = self._use_current

    def client_context(self) -> ssl.SSLContext:
        """Return the context of a new connection to a server, whose name is verified."""
        return self._current().client

    def server_context(self) -> ssl.SSLContext:
        """Return the context of a server, once for all its connections.

        A client without a certificate is admitted, as kubelets have none: `peer_names` tells who
        it is. One whose certificate no authority has signed, or that is out of date, is refused.
        """
        return self._listening

    def _current(self) -> _Contexts:
        with self._lock:
            version = _try_read_version(self._path)
            if version not in (None, self._version, self._failed_version):
                self._reload(version)
            return self._contexts

    def _reload(self, version: _Version | None) -> None:
        try:
            self._contexts = _load(self._path)
        except TlsError as error:
            logger.warning("TLS: the last usable certificate stays in force: %s", error)
            self._failed_version = version
            return
        # What was read may be newer than `version`: then it is read once more.
        self._version = version or self._version
        self._failed_version = None
        logger.info("TLS: new connections use the changed files of %s", self._path)

    def _use_current(self, connection: ssl.SSLObject, _: str | None, __: ssl.SSLContext) -> None:
        connection.context = self._current().server


@dataclass(frozen=True, slots=True)
class TlsPeer:
    """Whom a client connects to.

    Attributes:
        folder: the client's own certificate, and whom it trusts.
        name: name that the server's certificate must have.
    """

    folder: TlsFolder
    name: str

    def context(self) -> ssl.SSLContext:
        """Return the context of a new connection."""
        return self.folder.client_context()


def _load(path: Path) -> _Contexts:
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # verifies the server and its name
    client.minimum_version = ssl.TLSVersion.TLSv1_3
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.minimum_version = ssl.TLSVersion.TLSv1_2  # of ingress controllers in front of routers
    server.verify_mode = ssl.CERT_OPTIONAL
    server.options |= ssl.OP_NO_RENEGOTIATION
    server.num_tickets = 0  # our clients keep connections instead of resuming sessions
    for context in (client, server):
        _load_files(context, path)
    return _Contexts(client, server)


def _load_files(context: ssl.SSLContext, path: Path) -> None:
    certificate, key = path / CERTIFICATE_FILE, path / KEY_FILE
    try:
        context.load_cert_chain(certificate, key)
    except (ssl.SSLError, OSError) as error:
        expected = "a certificate in PEM and its key"
        raise TlsError(f"{certificate}, {key.name}: got {error}, expected {expected}") from error
    authorities = path / AUTHORITIES_FILE
    try:
        context.load_verify_locations(authorities)
    except (ssl.SSLError, OSError) as error:
        expected = "certificates of authorities in PEM"
        raise TlsError(f"{authorities}: got {error}, expected {expected}") from error


def _read_version(path: Path) -> _Version:
    try:
        return _stat_files(path)
    except OSError as error:
        expected = f"{CERTIFICATE_FILE}, {KEY_FILE} and {AUTHORITIES_FILE}"
        raise TlsError(f"{path}: got {error}, expected {expected}") from error


def _try_read_version(path: Path) -> _Version | None:
    try:
        return _stat_files(path)
    except OSError:  # a file is being replaced
        return None


def _stat_files(path: Path) -> _Version:
    found = ((path / n).stat() for n in (CERTIFICATE_FILE, KEY_FILE, AUTHORITIES_FILE))
    return tuple((s.st_mtime_ns, s.st_ino, s.st_size) for s in found)
