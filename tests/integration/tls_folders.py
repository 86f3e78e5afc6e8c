"""Folders with certificates that the operator's authority has issued, for tests of TLS."""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable
from pathlib import Path

import httpx

from faasmoe_contracts.tls import (
    AUTHORITIES_FILE,
    CERTIFICATE_FILE,
    KEY_FILE,
    TlsFolder,
    TlsPeer,
    models_name,
)
from faasmoe_operator.kube.certificates import issue_certificate

ROOT_KEY = b"r" * 32
OTHER_ROOT_KEY = b"o" * 32
NAMESPACE = "default"
MODELS = models_name(NAMESPACE)


def write_tls_folder(
    folder: Path, *names: str, root_key: bytes = ROOT_KEY, now_s: float | None = None
) -> Path:
    """Write the certificate that is due, as a folder or in place of what is there; return it.

    Args:
        folder: the folder.
        names: names of the certificate.
        root_key: of its authority.
        now_s: Unix time of its issue, in seconds; None for now.
    """
    issued = issue_certificate(root_key, "test", names, time.time() if now_s is None else now_s)
    folder.mkdir(exist_ok=True)
    files = {
        CERTIFICATE_FILE: issued.certificate,
        KEY_FILE: issued.key,
        AUTHORITIES_FILE: issued.authorities,
    }
    for name, content in files.items():
        (folder / f".{name}").write_bytes(content)
        (folder / f".{name}").replace(folder / name)
    return folder


def tls_peer(
    folder: Path, *names: str, server: str = MODELS, root_key: bytes = ROOT_KEY
) -> TlsPeer:
    """Return a client with a new certificate of these names, for a server of that name."""
    return TlsPeer(TlsFolder(write_tls_folder(folder, *names, root_key=root_key)), server)


def kubelet_context() -> ssl.SSLContext:
    """Return the context of a client that has no certificate and verifies none."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def tls_options(tls: TlsPeer | None) -> dict[str, object]:
    """Return the arguments of an httpx client that knows its server by `tls`."""
    if tls is None:
        return {}

    def name_server(request: httpx.Request) -> None:
        assert tls is not None
        request.extensions["sni_hostname"] = tls.name

    hooks: dict[str, list[Callable[[httpx.Request], None]]] = {"request": [name_server]}
    return {"verify": tls.context(), "event_hooks": hooks}
