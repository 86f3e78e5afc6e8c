"""Tenants of `faasmoe up`, with each engine: fair turns, cached prefixes of their own, hang-ups."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from engines import RouterEngine
from faasmoe_up import running_up, wait_until
from moemodel_files import write_moemodel, write_tenants

TENANTS = ("loud", "quiet", "third")
N_FLOOD = 12
MAX_AHEAD = 4  # two that run, and what ends while the quiet one's request arrives and is computed
LONG, SHORT = 800, 8  # the flood still runs when the quiet tenant asks
PROMPT = [40 + n % 200 for n in range(400)]  # several blocks of the cache
TIMEOUT_S = 300
LIMITS = httpx.Limits(max_connections=None)


@pytest.fixture(scope="module")
def http(engine: RouterEngine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    folder = tmp_path_factory.mktemp("tenants")
    model = engine.save_model(folder / "model", max_model_len=1024)
    spec = {
        "model": {"source": f"file://{model}"},
        "store": {"path": str(folder / "store")},
        "granularity": {"expertsPerFunction": 2},
        "router": engine.router_spec(maxNumSeqs=2),
        "experts": {"device": "cpu", "functionsPerSandbox": 16, "scaling": {"minScale": 1}},
        "tenants": write_tenants(folder, TENANTS),
    }
    file = write_moemodel(folder / "model.yaml", spec)
    with running_up(
        file,
        folder / "up.log",
        variables=engine.variables,
        timeout_s=engine.start_timeout_s,
    ) as up:
        client = httpx.Client(
            base_url=up.base_url, timeout=TIMEOUT_S, trust_env=False, limits=LIMITS
        )
        with client:
            yield client


def complete(http: httpx.Client, tenant: str, **fields: Any) -> dict[str, Any]:
    body = {"model": "tiny", "prompt": "the quick", "temperature": 0, "max_tokens": SHORT}
    response = http.post("/v1/completions", json={**body, **fields}, headers=key_of(tenant))
    assert response.status_code == 200, response.text
    return dict(response.json())


def key_of(tenant: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {tenant}-key"}


def usage_of(http: httpx.Client, tenant: str) -> dict[str, Any]:
    return dict(http.get("/v1/usage", headers=key_of(tenant)).json())


def load_of(http: httpx.Client) -> int:
    return int(http.get("/load").json()["server_load"])


def test_a_quiet_tenant_does_not_wait_for_all_that_a_loud_one_has_queued(
    http: httpx.Client,
) -> None:
    ended: list[str] = []

    def run(tenant: str, n_tokens: int) -> None:
        complete(http, tenant, max_tokens=n_tokens, ignore_eos=True)
        ended.append(tenant)

    complete(http, "quiet")
    flood = [threading.Thread(target=run, args=("loud", LONG)) for _ in range(N_FLOOD)]
    for thread in flood:
        thread.start()
    wait_until(lambda: len(ended) + load_of(http) >= N_FLOOD, timeout_s=120, what="the flood")
    n_ended = len(ended)
    assert N_FLOOD - n_ended >= MAX_AHEAD + 3, "too few are left to wait for"
    run("quiet", SHORT)
    n_ahead = ended.index("quiet") - n_ended
    for thread in flood:
        thread.join()
    assert len(ended) == N_FLOOD + 1
    assert n_ahead <= MAX_AHEAD


def test_cached_prefixes_are_found_by_their_tenant_only(http: httpx.Client) -> None:
    def cached_tokens(tenant: str) -> int:
        usage = complete(http, tenant, prompt=PROMPT)["usage"]
        return int((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0)

    assert cached_tokens("loud") == 0
    assert cached_tokens("loud") > 0
    assert cached_tokens("quiet") == 0
    assert cached_tokens("quiet") > 0


def test_a_client_that_hangs_up_frees_the_engine(http: httpx.Client) -> None:
    body = {"model": "tiny", "prompt": "the quick", "max_tokens": 900, "stream": True}
    fields = {**body, "ignore_eos": True}
    with http.stream("POST", "/v1/completions", json=fields, headers=key_of("third")) as response:
        lines = (line for line in response.iter_lines() if line.startswith("data: {"))
        assert json.loads(next(lines)[6:])["choices"]
        assert load_of(http) == 1
    wait_until(lambda: load_of(http) == 0, timeout_s=120, what="the end of the request")

    def cancelled() -> bool:
        return bool(usage_of(http, "third")["requests"].get("cancelled") == 1)

    wait_until(cancelled, timeout_s=60, what="the account of the request")
    assert usage_of(http, "third")["completion_tokens"] < 900
