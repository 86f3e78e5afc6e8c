"""A block server answers with verified bytes by digest, and with nothing to strangers."""

import socket
import threading
from collections.abc import Callable
from urllib.parse import urlsplit

import httpx
import pytest
from sandbox_processes import PreparedStore

from faasmoe_contracts.store import MANIFEST_NAME, Store
from faasmoe_contracts.store.digests import block_buffers
from faasmoe_expert.blocks.client import TIMEOUT_S
from faasmoe_expert.blocks.index import BlockIndex
from faasmoe_expert.blocks.server import REQUEST_TIMEOUT_S, BlockServer

TOKEN = "peer-token"
HEADERS = {"authorization": f"Bearer {TOKEN}"}


def get(url: str, path: str, **headers: str) -> httpx.Response:
    return httpx.get(url + path, headers=HEADERS | headers, trust_env=False, timeout=60)


def test_serves_each_block_of_each_layer_by_its_digest(
    store: Store, start_server: Callable[..., str]
) -> None:
    url = start_server()
    for layer in store.manifest.layers:
        mapped = store.map_layer(layer.index)
        for block, digest in enumerate(layer.digests[:-1]):
            expected = b"".join(block_buffers(mapped, layer.num_experts, block))
            assert get(url, f"/v1/blocks/{digest}").content == expected


def test_serves_blocks_that_lie_in_the_checkpoint(
    prepared_store: PreparedStore, start_server: Callable[..., str]
) -> None:
    store = prepared_store("mixtral", mode="reference")
    layer = store.manifest.layers[1]
    assert not layer.file
    expected = b"".join(block_buffers(store.map_layer(1), layer.num_experts, 3))
    url = start_server(BlockIndex(store))
    assert get(url, f"/v1/blocks/{layer.digests[3]}").content == expected


def test_serves_files_of_the_manifest_and_ranges_of_them(
    store: Store, start_server: Callable[..., str]
) -> None:
    url, prefix = start_server(), f"/v1/stores/{store.manifest.digest}/files/"
    content = (store.path / MANIFEST_NAME).read_bytes()
    assert get(url, prefix + MANIFEST_NAME).content == content
    name = store.manifest.layers[0].file
    content = (store.path / name).read_bytes()
    answer = get(url, prefix + name, range="bytes=8-99")
    assert (answer.status_code, answer.content) == (206, content[8:100])
    assert get(url, prefix + name, range=f"bytes=0-{10**9}").content == content


@pytest.mark.parametrize(
    "path",
    [
        "/v1/blocks/" + "0" * 32,
        "/v1/blocks/../../etc/passwd",
        "/v1/stores/sha256:0/files/manifest.json",
        "/v1/stores/{digest}/files/../manifest.json",
        "/v1/stores/{digest}/files/",
        "/v1/stores/{digest}/files/%2Fetc%2Fpasswd",
        "/",
    ],
)
def test_what_the_store_does_not_have_is_not_found(
    store: Store, start_server: Callable[..., str], path: str
) -> None:
    url = urlsplit(start_server())
    target = path.replace("{digest}", store.manifest.digest)
    with socket.create_connection((url.hostname, url.port), timeout=60) as connection:
        head = f"GET {target} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n"
        connection.sendall(f"{head}Connection: close\r\n\r\n".encode())
        answer = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    assert answer.startswith(b"HTTP/1.1 404 ")
    assert b"root:" not in answer


@pytest.mark.parametrize("text", ["bytes=9-2", "bytes=-5", "items=0-1", "bytes=0-1,3-4", "x"])
def test_a_range_that_is_not_one_is_refused(
    store: Store, start_server: Callable[..., str], text: str
) -> None:
    path = f"/v1/stores/{store.manifest.digest}/files/{MANIFEST_NAME}"
    answer = get(start_server(), path, range=text)
    assert (answer.status_code, answer.json()["error"]["field"]) == (416, "range")


@pytest.mark.parametrize("headers", [{}, {"authorization": "Bearer other"}])
def test_only_the_token_gives_access(
    store: Store, start_server: Callable[..., str], headers: dict[str, str]
) -> None:
    url = start_server()
    path = f"/v1/blocks/{store.manifest.layers[0].digests[0]}"
    answer = httpx.get(url + path, headers=headers, trust_env=False)
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "unauthorized")
    assert httpx.get(url + "/healthz", trust_env=False).status_code == 200


def test_a_connection_too_many_is_refused_and_a_slot_is_free_again_after(
    store: Store, start_server: Callable[..., str]
) -> None:
    url = start_server(max_connections=1)
    with httpx.Client(base_url=url, headers=HEADERS, trust_env=False, timeout=60) as first:
        assert first.get("/healthz").status_code == 200  # and the connection stays open
        parts = urlsplit(url)
        with socket.create_connection((parts.hostname, parts.port), timeout=60) as second:
            assert second.recv(12) == b"HTTP/1.1 503"
    with httpx.Client(
        base_url=url, transport=httpx.HTTPTransport(retries=20), trust_env=False, timeout=60
    ) as third:
        for _ in range(2000):
            try:
                if third.get("/healthz").status_code == 200:
                    return
            except httpx.TransportError:
                continue  # the first one's thread has not seen its end yet
    pytest.fail(f"no slot within {REQUEST_TIMEOUT_S} s")


def test_a_thread_that_cannot_be_started_takes_no_slot(
    store: Store, start_server: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    url = start_server(max_connections=1)
    with monkeypatch.context() as context:
        context.setattr(threading.Thread, "start", fail)
        with pytest.raises(httpx.TransportError):
            get(url, "/healthz")
    assert get(url, "/healthz").status_code == 200


@pytest.mark.parametrize("bytes_per_s", [1 << 10, 10 << 20, 10 << 30])
@pytest.mark.parametrize("max_connections", [1, 64, 1024])
def test_with_a_rate_limit_each_connection_has_its_turn_before_its_client_gives_up(
    store: Store, bytes_per_s: float, max_connections: int
) -> None:
    with BlockServer(
        ("127.0.0.1", 0),
        BlockIndex(store),
        token="",
        max_connections=max_connections,
        bytes_per_s=bytes_per_s,
    ) as server:
        turn_s = max_connections * server.send_bytes / bytes_per_s
    assert turn_s < TIMEOUT_S / 2
