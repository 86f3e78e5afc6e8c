"""A sandbox with TLS: whom it answers, and what it says to others."""

from __future__ import annotations

import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
import pytest
from raw_http import DEADLINE_S, TOKEN, read_all, request_frame
from sandbox_processes import SandboxProcess, StartSandbox, sandbox_env
from tls_folders import MODELS, OTHER_ROOT_KEY, tls_options, tls_peer, write_tls_folder

from faasmoe_contracts.routing_table import FunctionSpec
from faasmoe_contracts.store import Store
from faasmoe_contracts.tls import OPERATOR_NAME, models_name
from faasmoe_contracts.unix_socket import unix_socket_path

PROBES = ("/healthz", "/readyz")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tls")


@pytest.fixture(scope="module")
def secured(
    sandbox: StartSandbox, store: Store, spec: FunctionSpec, folder: Path
) -> Iterator[SandboxProcess]:
    """A sandbox with one function that only TLS reaches; `http` is the operator."""
    operator = tls_peer(folder / "operator", OPERATOR_NAME)
    files = write_tls_folder(folder / "sandbox", MODELS)
    with sandbox(token=TOKEN, tls=operator, tls_folder=files, capacity=4) as running:
        running.attach(store, spec)
        yield running
        assert "Traceback" not in running.log.read_text()


def kubelet() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def call(sandbox: SandboxProcess, spec: FunctionSpec, **options: object) -> httpx.Response:
    headers = {"authorization": f"Bearer {TOKEN}"}
    with httpx.Client(timeout=DEADLINE_S, trust_env=False, **options) as client:  # type: ignore[arg-type]
        url = f"https://{sandbox.address}/v1/functions/{spec.id}"
        return client.post(url, content=request_frame(), headers=headers)


def test_operator_and_routers_are_answered(
    secured: SandboxProcess, spec: FunctionSpec, folder: Path
) -> None:
    router = tls_peer(folder / "router", MODELS)
    response = call(secured, spec, **tls_options(router))
    assert response.status_code == 200
    assert (
        response.content
        == secured.http.post(f"/v1/functions/{spec.id}", content=request_frame()).content
    )


def test_probes_need_no_certificate_and_all_else_does(
    secured: SandboxProcess, spec: FunctionSpec
) -> None:
    url = f"https://{secured.address}"
    with httpx.Client(verify=kubelet(), timeout=DEADLINE_S, trust_env=False) as client:
        assert [client.get(url + path).status_code for path in PROBES] == [200, 200]
        refused = client.get(f"{url}/v1/functions", headers={"authorization": f"Bearer {TOKEN}"})
        assert client.get(f"{url}/metrics").status_code == 403
    assert refused.status_code == 403
    assert refused.json()["error"]["field"] == "certificate"
    assert call(secured, spec, verify=kubelet()).status_code == 403


@pytest.mark.parametrize("name", [models_name("other"), "gateway.faasmoe.internal"])
def test_certificates_of_others_are_not_enough(
    secured: SandboxProcess, spec: FunctionSpec, folder: Path, name: str
) -> None:
    other = tls_peer(folder / name, name)
    assert call(secured, spec, **tls_options(other)).status_code == 403


def test_a_certificate_of_another_authority_ends_the_connection(
    secured: SandboxProcess, spec: FunctionSpec, folder: Path
) -> None:
    files = write_tls_folder(folder / "stranger", MODELS, root_key=OTHER_ROOT_KEY)
    context = kubelet()
    context.load_cert_chain(files / "tls.crt", files / "tls.key")
    with pytest.raises(httpx.TransportError):
        call(secured, spec, verify=context)


def test_a_client_without_tls_gets_no_answer(secured: SandboxProcess) -> None:
    host, port = secured.address.split(":")
    with socket.create_connection((host, int(port)), timeout=DEADLINE_S) as plain:
        plain.sendall(b"GET /healthz HTTP/1.1\r\nhost: a\r\n\r\n")
        answer = b""
        with suppress(ConnectionError):
            answer = read_all(plain)
    assert b"HTTP" not in answer


def test_the_unix_socket_needs_neither(
    sandbox: StartSandbox, store: Store, spec: FunctionSpec, folder: Path
) -> None:
    files = write_tls_folder(folder / "both", MODELS)
    with (
        TemporaryDirectory(prefix="faasmoe-") as name,
        sandbox(
            token=TOKEN,
            tls=tls_peer(folder / "operator", OPERATOR_NAME),
            tls_folder=files,
            socket_dir=Path(name) / "sockets",
        ) as running,
    ):
        path = unix_socket_path(Path(name) / "sockets", int(running.address.rpartition(":")[2]))
        headers = {"authorization": f"Bearer {TOKEN}"}
        with httpx.Client(
            transport=httpx.HTTPTransport(uds=str(path)), timeout=DEADLINE_S, headers=headers
        ) as client:
            assert client.get("http://sandbox/v1/functions").status_code == 200


def test_an_unusable_folder_ends_the_start(tmp_path: Path) -> None:
    process = subprocess.run(
        [sys.executable, "-m", "faasmoe_expert"],
        env=sandbox_env(port=0, device="cpu", tls_folder=tmp_path),
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert process.returncode == 2
    assert f"FAASMOE_TLS_FOLDER: {tmp_path}: got" in process.stderr
