"""Sandbox processes without the store compute what those with it compute."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from raw_http import request_frame
from sandbox_processes import PreparedStore, StartSandbox, make_function_spec, sandbox_env

from faasmoe_contracts.store import Store
from faasmoe_expert.blocks.index import BlockIndex

TOKEN = "peer-token"
ELSEWHERE = "/nowhere/store"


def body(store: Store, path: str, **spec: object) -> dict[str, object]:
    return {"store": path, "model_digest": store.manifest.digest, **spec}


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_a_function_of_a_store_that_is_elsewhere_computes_the_same(
    prepared_store: PreparedStore,
    start_server: Callable[..., str],
    sandbox: StartSandbox,
    tmp_path: Path,
    family: str,
) -> None:
    store = prepared_store(family)
    spec = make_function_spec(store, [0], [0, 1, 2])
    url, cache = start_server(BlockIndex(store)), tmp_path / "cache"
    settings = {"capacity": 2, "store_peers": url, "cache_dir": cache}
    with sandbox(token=TOKEN, capacity=1) as local, sandbox(token=TOKEN, **settings) as remote:
        local.attach(store, spec)
        answer = remote.http.put(
            f"/v1/functions/{spec.id}", json=body(store, ELSEWHERE, **spec.to_json())
        )
        assert answer.status_code == 201, answer.text
        frames = [
            s.http.post(f"/v1/functions/{spec.id}", content=request_frame())
            for s in (local, remote)
        ]
        assert frames[0].status_code == frames[1].status_code == 200
        assert frames[0].content == frames[1].content
        assert len(list(cache.iterdir())) == 1
        assert remote.http.delete(f"/v1/functions/{spec.id}").status_code == 204


def test_a_store_at_its_path_is_not_fetched(
    store: Store, sandbox: StartSandbox, tmp_path: Path
) -> None:
    settings = {"store_peers": "http://127.0.0.1:1", "cache_dir": tmp_path / "cache"}
    with sandbox(token=TOKEN, **settings) as local:
        local.attach(store, make_function_spec(store, [0], [0]))


def test_an_attach_without_a_peer_says_so(
    store: Store, start_server: Callable[..., str], sandbox: StartSandbox, tmp_path: Path
) -> None:
    url = start_server(token="another")
    spec = make_function_spec(store, [0], [0])
    with sandbox(token=TOKEN, store_peers=url, cache_dir=tmp_path / "cache") as remote:
        answer = remote.http.put(
            f"/v1/functions/{spec.id}", json=body(store, ELSEWHERE, **spec.to_json())
        )
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "store_unavailable")
    assert "401" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({}, "FAASMOE_STORE: got none"),
        ({"store": "/nowhere"}, "/nowhere/manifest.json: not found"),
        ({"store": "{store}", "port": 70000}, "FAASMOE_PORT: got 70000"),
        ({"store": "{store}", "max_connections": 0}, "FAASMOE_MAX_CONNECTIONS: got 0"),
        ({"store": "{store}", "bytes_per_second": 0}, "FAASMOE_BYTES_PER_SECOND: got 0"),
    ],
)
def test_a_server_that_cannot_serve_says_why(
    store: Store, variables: dict[str, object], message: str
) -> None:
    filled = {
        name: str(value).replace("{store}", str(store.path)) for name, value in variables.items()
    }
    command = [sys.executable, "-m", "faasmoe_expert.blocks"]
    done = subprocess.run(
        command, env=sandbox_env(**filled), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert message in done.stderr


def test_a_server_imports_no_torch() -> None:
    code = "import sys, faasmoe_expert.blocks.__main__; sys.exit('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], env=dict(os.environ), timeout=120).returncode
        == 0
    )
