"""Blocks over TLS: a sandbox fetches them as without, and nobody else does."""

from __future__ import annotations

import os
import re
import ssl
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from raw_http import wait_until
from sandbox_processes import StartSandbox, make_function_spec, sandbox_env
from tls_folders import MODELS, OTHER_ROOT_KEY, tls_peer, write_tls_folder

from faasmoe_contracts.store import MANIFEST_NAME, Store
from faasmoe_contracts.tls import GATEWAY_NAME, OPERATOR_NAME, TlsFolder, TlsPeer
from faasmoe_expert.blocks.cache import BlockCache
from faasmoe_expert.blocks.client import PeerClient, PeerError

TOKEN = "peer-token"


@pytest.fixture
def url(start_server: Callable[..., str], tmp_path: Path) -> str:
    tls = TlsFolder(write_tls_folder(tmp_path / "server", MODELS))
    return start_server(tls=tls, peers={MODELS}).replace("http:", "https:")


def make_client(url: str, tls: TlsPeer | None) -> PeerClient:
    return PeerClient([url], token=TOKEN, tls=tls, retry_delays_s=(0.0,), sleep=lambda _: None)


def test_a_sandbox_fetches_the_files_and_blocks_of_a_store(
    store: Store, url: str, tmp_path: Path
) -> None:
    client = make_client(url, tls_peer(tmp_path / "sandbox", MODELS))
    content = (store.path / MANIFEST_NAME).read_bytes()
    assert client.read_file(store.manifest.digest, MANIFEST_NAME, bytes) == content
    spec = make_function_spec(store, [0], [1])
    cached = BlockCache(tmp_path / "cache", client).ensure(spec, store.manifest.digest)
    assert cached.fetched_bytes > 0
    client.close_idle()


@pytest.mark.parametrize("name", [GATEWAY_NAME, OPERATOR_NAME])
def test_others_get_no_blocks(store: Store, url: str, tmp_path: Path, name: str) -> None:
    client = make_client(url, tls_peer(tmp_path / "other", name))
    with pytest.raises(PeerError, match=r"status 403: .*certificate"):
        client.read_file(store.manifest.digest, MANIFEST_NAME, bytes)
    kubelet = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    kubelet.check_hostname, kubelet.verify_mode = False, ssl.CERT_NONE
    with httpx.Client(verify=kubelet, trust_env=False, timeout=120) as http:
        assert http.get(f"{url}/healthz").status_code == 200
        headers = {"authorization": f"Bearer {TOKEN}"}
        assert http.get(f"{url}/v1/blocks/x", headers=headers).status_code == 403


def test_a_server_that_is_another_gets_no_token(store: Store, url: str, tmp_path: Path) -> None:
    strange = tls_peer(tmp_path / "strange", MODELS, root_key=OTHER_ROOT_KEY)
    with pytest.raises(PeerError, match="certificate verify failed"):
        make_client(url, strange).read_file(store.manifest.digest, MANIFEST_NAME, bytes)
    plain = make_client(url.replace("https:", "http:"), None)
    with pytest.raises(PeerError):
        plain.read_file(store.manifest.digest, MANIFEST_NAME, bytes)


def test_a_connection_too_many_is_closed(
    store: Store, start_server: Callable[..., str], tmp_path: Path
) -> None:
    tls = TlsFolder(write_tls_folder(tmp_path / "server", MODELS))
    url = start_server(tls=tls, peers={MODELS}, max_connections=1).replace("http:", "https:")
    peer = tls_peer(tmp_path / "sandbox", MODELS)
    first = make_client(url, peer)
    first.read_file(store.manifest.digest, MANIFEST_NAME, bytes)  # and keeps its connection
    with pytest.raises(PeerError):
        make_client(url, peer).read_file(store.manifest.digest, MANIFEST_NAME, bytes)
    first.close_idle()


def test_processes_attach_over_tls(store: Store, sandbox: StartSandbox, tmp_path: Path) -> None:
    """A store server and a sandbox without the store, as on Kubernetes."""
    files = write_tls_folder(tmp_path / "models", MODELS)
    log = tmp_path / "server.log"
    with log.open("wb") as output:
        server = subprocess.Popen(
            [sys.executable, "-m", "faasmoe_expert.blocks"],
            env=sandbox_env(store=store.path, port=0, token=TOKEN, tls_folder=files),
            stderr=output,
        )
    try:
        url = _wait_for_address(server, log)
        operator = tls_peer(tmp_path / "operator", OPERATOR_NAME)
        settings = {"store_peers": url, "cache_dir": tmp_path / "cache", "tls_folder": files}
        with sandbox(token=TOKEN, tls=operator, **settings) as remote:
            spec = make_function_spec(store, [0], [1])
            body = {
                **spec.to_json(),
                "store": os.devnull,
                "model_digest": store.manifest.digest,
            }
            answer = remote.http.put(f"/v1/functions/{spec.id}", json=body)
            assert answer.status_code == 201, answer.text
    finally:
        server.terminate()
        server.wait(120)


def _wait_for_address(server: subprocess.Popen[bytes], log: Path) -> str:
    def found() -> re.Match[str] | None:
        assert server.poll() is None, log.read_text()
        return re.search(r"served on ([\d.]+:\d+)", log.read_text())

    wait_until(lambda: found() is not None)
    match = found()
    assert match is not None
    return f"https://{match[1]}"
