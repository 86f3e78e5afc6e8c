"""TLS between processes: who is admitted, and how certificates are replaced while they run."""

from __future__ import annotations

import logging
import ssl
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tls_folders import OTHER_ROOT_KEY, write_tls_folder

from faasmoe_contracts.tls import TlsError, TlsFolder, TlsPeer, is_named, models_name, peer_names
from faasmoe_operator.kube.certificates import AUTHORITY_PERIOD_S, CERTIFICATE_PERIOD_S

SERVER, CLIENT = models_name("llm"), "operator.faasmoe.internal"
LONG_AGO_S = -13 * CERTIFICATE_PERIOD_S
"""Certificates from then have run out; the authority that has signed them is still trusted."""


class Ends:
    """Both ends of a connection in memory.

    Args:
        server: context of the server.
        client: context of the client.
        name: name that the server must have; None for a client that verifies none.
    """

    def __init__(
        self, server: ssl.SSLContext, client: ssl.SSLContext, name: str | None = SERVER
    ) -> None:
        to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.server = server.wrap_bio(to_server, to_client, server_side=True)
        self.client = client.wrap_bio(to_client, to_server, server_hostname=name)

    def shake_hands(self) -> None:
        """Complete the handshake; raises what either end raises."""
        waiting = [self.client, self.server]
        for _ in range(10):
            for end in list(waiting):
                if _runs(end.do_handshake):
                    waiting.remove(end)
        assert not waiting

    def say(self, text: bytes) -> bytes:
        """Send from the client; return what the server reads."""
        self.client.write(text)
        return self.server.read(len(text))


def _runs(step: Callable[[], object]) -> bool:
    try:
        step()
    except ssl.SSLWantReadError:
        return False
    return True


def connect(server: TlsFolder, client: TlsPeer) -> Ends:
    ends = Ends(server.server_context(), client.context(), client.name)
    ends.shake_hands()
    return ends


@pytest.fixture
def server(tmp_path: Path) -> TlsFolder:
    return TlsFolder(write_tls_folder(tmp_path / "server", SERVER))


@pytest.fixture
def client(tmp_path: Path) -> TlsPeer:
    return TlsPeer(TlsFolder(write_tls_folder(tmp_path / "client", CLIENT)), SERVER)


def test_each_end_knows_the_other_by_name(server: TlsFolder, client: TlsPeer) -> None:
    ends = connect(server, client)
    assert ends.say(b"frame") == b"frame"
    assert peer_names(ends.server) == {CLIENT}
    assert peer_names(ends.client) == {SERVER}
    assert is_named(ends.server, {CLIENT, "another"})
    assert not is_named(ends.server, {SERVER})
    assert ends.client.version() == "TLSv1.3"


def test_nobody_is_known_without_tls() -> None:
    assert peer_names(None) == set()
    assert not is_named(None, {CLIENT})


def test_a_client_without_a_certificate_is_admitted_as_nobody(server: TlsFolder) -> None:
    kubelet = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    kubelet.check_hostname, kubelet.verify_mode = False, ssl.CERT_NONE
    ends = Ends(server.server_context(), kubelet, None)
    ends.shake_hands()
    assert peer_names(ends.server) == set()


def test_a_client_of_another_authority_is_refused(server: TlsFolder, tmp_path: Path) -> None:
    write_tls_folder(tmp_path / "other", CLIENT, root_key=OTHER_ROOT_KEY)
    stranger = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    stranger.check_hostname, stranger.verify_mode = False, ssl.CERT_NONE
    stranger.load_cert_chain(tmp_path / "other" / "tls.crt", tmp_path / "other" / "tls.key")
    with pytest.raises(ssl.SSLCertVerificationError):
        Ends(server.server_context(), stranger).shake_hands()


def test_a_server_of_another_authority_is_refused(client: TlsPeer, tmp_path: Path) -> None:
    other = TlsFolder(write_tls_folder(tmp_path / "other", SERVER, root_key=OTHER_ROOT_KEY))
    with pytest.raises(ssl.SSLCertVerificationError, match="self-signed certificate"):
        connect(other, client)


def test_a_server_of_another_name_is_refused(client: TlsPeer, tmp_path: Path) -> None:
    other = TlsFolder(write_tls_folder(tmp_path / "other", models_name("other")))
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        connect(other, client)


def test_a_certificate_that_has_run_out_is_refused_on_either_end(tmp_path: Path) -> None:
    now_s = time.time()
    old_s = now_s + LONG_AGO_S
    current = write_tls_folder(tmp_path / "current", SERVER, CLIENT)
    old = write_tls_folder(tmp_path / "old", SERVER, CLIENT, now_s=old_s)
    # Both trust the authorities of then and now: only the dates differ.
    authorities = (current / "ca.crt").read_bytes() + (old / "ca.crt").read_bytes()
    for folder in (current, old):
        (folder / "ca.crt").write_bytes(authorities)
    with pytest.raises(ssl.SSLCertVerificationError, match="certificate has expired"):
        connect(TlsFolder(old), TlsPeer(TlsFolder(current), SERVER))
    with pytest.raises(ssl.SSLCertVerificationError, match="certificate has expired"):
        connect(TlsFolder(current), TlsPeer(TlsFolder(old), SERVER))


def test_what_replaces_the_files_is_for_new_connections(
    server: TlsFolder, client: TlsPeer, tmp_path: Path
) -> None:
    first = connect(server, client)
    # Of another name, so that the new certificate is told from the old one.
    write_tls_folder(tmp_path / "server", "new.faasmoe.internal")
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        connect(server, client)
    connect(server, TlsPeer(client.folder, "new.faasmoe.internal"))
    assert first.say(b"goes on") == b"goes on"


def test_a_client_that_names_no_server_gets_the_new_certificate(
    server: TlsFolder, tmp_path: Path
) -> None:
    write_tls_folder(tmp_path / "server", "new.faasmoe.internal")
    kubelet = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    kubelet.check_hostname = False
    kubelet.load_verify_locations(tmp_path / "server" / "ca.crt")
    ends = Ends(server.server_context(), kubelet, None)
    ends.shake_hands()
    assert peer_names(ends.client) == {"new.faasmoe.internal"}


def test_an_authority_that_is_no_more_trusted_is_refused(
    server: TlsFolder, client: TlsPeer, tmp_path: Path
) -> None:
    connect(server, client)
    write_tls_folder(tmp_path / "server", SERVER, root_key=OTHER_ROOT_KEY)
    trusting = (tmp_path / "server" / "ca.crt").read_bytes()
    with (tmp_path / "client" / "ca.crt").open("ab") as authorities:
        authorities.write(trusting)
    with pytest.raises(ssl.SSLCertVerificationError):
        connect(server, client)


@pytest.mark.parametrize("n_years", [-1, 1])
def test_certificates_of_adjacent_years_know_each_other(tmp_path: Path, n_years: int) -> None:
    now_s = time.time()
    for owner, issued_s in (("server", now_s), ("client", now_s + n_years * AUTHORITY_PERIOD_S)):
        write_tls_folder(tmp_path / owner, SERVER, CLIENT, now_s=issued_s)
    authorities = (tmp_path / "client" / "ca.crt").read_bytes()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=authorities.decode())
    ends = Ends(TlsFolder(tmp_path / "server").server_context(), context)
    ends.shake_hands()


def test_files_of_two_certificates_leave_the_last_one_in_force(
    server: TlsFolder, client: TlsPeer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = write_tls_folder(tmp_path / "other", "new.faasmoe.internal")
    (tmp_path / "server" / "tls.crt").write_bytes((other / "tls.crt").read_bytes())
    with caplog.at_level(logging.WARNING):
        connect(server, client)
        connect(server, client)
    [record] = caplog.records
    assert "KEY_VALUES_MISMATCH" in record.getMessage()
    (tmp_path / "server" / "tls.key").write_bytes((other / "tls.key").read_bytes())
    connect(server, TlsPeer(client.folder, "new.faasmoe.internal"))


def test_files_that_are_gone_leave_the_last_one_in_force(
    server: TlsFolder, client: TlsPeer, tmp_path: Path
) -> None:
    (tmp_path / "server" / "tls.crt").unlink()
    connect(server, client)


@pytest.mark.parametrize("name", ["tls.crt", "tls.key", "ca.crt"])
@pytest.mark.parametrize("content", [None, b"", b"no certificate"])
def test_unusable_files_are_named(tmp_path: Path, name: str, content: bytes | None) -> None:
    folder = write_tls_folder(tmp_path / "tls", SERVER)
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(TlsError, match=name.replace(".", r"\.")):
        TlsFolder(folder)
