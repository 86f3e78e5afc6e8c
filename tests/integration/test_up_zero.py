"""`faasmoe up` whose router ends while nobody uses the model, and starts with the next request."""

from __future__ import annotations

from pathlib import Path

import httpx
from engines import RouterEngine
from faasmoe_up import FaasmoeUp, running_up, wait_until
from moemodel_files import write_moemodel

BODY = {"model": "tiny", "prompt": "the quick", "max_tokens": 4, "temperature": 0}
END_TIMEOUT_S = 120.0


def test_router_ends_and_comes_back(engine: RouterEngine, tmp_path: Path) -> None:
    model = engine.save_model(tmp_path / "model")
    spec = {
        "model": {"source": f"file://{model}"},
        "store": {"path": str(tmp_path / "store")},
        "granularity": {"expertsPerFunction": 2},
        "router": engine.router_spec(maxNumSeqs=4, scaling={"idleSeconds": 10}),
        "experts": {"device": "cpu", "functionsPerSandbox": 8},
    }
    file = write_moemodel(tmp_path / "tiny.yaml", spec)
    with running_up(
        file,
        tmp_path / "up.log",
        variables=engine.variables,
        timeout_s=engine.start_timeout_s,
    ) as up:
        warm = complete(up)
        for _ in range(2):
            wait_until(lambda: n_routers(up) == 0, timeout_s=END_TIMEOUT_S, what="no router")
            assert list_models(up) == ["tiny"]  # the gateway knows it without a router
            assert complete(up) == warm
            assert n_routers(up) == 1


def complete(up: FaasmoeUp) -> str:
    response = httpx.post(f"{up.base_url}/v1/completions", json=BODY, timeout=120, trust_env=False)
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["text"])


def list_models(up: FaasmoeUp) -> list[str]:
    response = httpx.get(f"{up.base_url}/v1/models", trust_env=False, timeout=60)
    return [model["id"] for model in response.json()["data"]]


def n_routers(up: FaasmoeUp) -> int:
    return int(up.router is not None)
