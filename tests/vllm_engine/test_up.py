"""`faasmoe up` with `router.engine: vllm`: chats, streams, tenants and their usage."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import psutil
import pytest
from faasmoe_up import FaasmoeUp, running_up, wait_until
from metric_samples import parse_sample
from vllm_checkpoints import save_chat_checkpoint
from vllm_runs import NEEDS_VLLM, VLLM_PYTHON

pytestmark = [*NEEDS_VLLM, pytest.mark.timeout(1800)]

KEYS = {"acme": "acme-" + "k" * 32, "globex": "globex-" + "k" * 32}
CHAT = {"messages": [{"role": "user", "content": "the quick"}], "max_tokens": 8, "temperature": 0}


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaasmoeUp]:
    folder = tmp_path_factory.mktemp("up")
    checkpoint = save_chat_checkpoint(folder / "checkpoint")
    for name, key in KEYS.items():
        (folder / name).mkdir()
        (folder / name / "key").write_text(key)
    model = {
        "apiVersion": "faasmoe.dev/v1alpha1",
        "kind": "MoEModel",
        "metadata": {"name": "tiny"},
        "spec": {
            "model": {"source": checkpoint.as_uri()},
            "store": {"path": str(folder / "store")},
            "granularity": {"expertsPerFunction": 4},
            "router": {
                "engine": "vllm",
                "device": "cpu",
                "dtype": "float32",
                "maxModelLen": 128,
                "maxNumSeqs": 4,
                "kvCacheMemory": "64Mi",
            },
            "experts": {"device": "cpu", "functionsPerSandbox": 8},
            "tenants": [
                {
                    "name": "acme",
                    "modelAlias": "acme-chat",
                    "apiKeysPath": str(folder / "acme"),
                },
                {
                    "name": "globex",
                    "apiKeysPath": str(folder / "globex"),
                    "limits": {"maxOutputTokens": 3, "requestsPerMinute": 600},
                },
            ],
        },
    }
    file = folder / "model.yaml"
    file.write_text(json.dumps(model))
    variables = {"FAASMOE_VLLM_PYTHON": VLLM_PYTHON, "FAASMOE_METRICS_MIN_TOKENS": "1"}
    with running_up(file, folder / "log", variables=variables, timeout_s=900) as running:
        yield running


def post(
    up: FaasmoeUp, body: dict[str, Any], *, key: str = "acme", path: str = "/v1/chat/completions"
) -> httpx.Response:
    headers = {"Authorization": f"Bearer {KEYS.get(key, key)}"}
    url = up.base_url + path
    return httpx.post(url, json=body, headers=headers, timeout=120, trust_env=False)


def test_a_tenant_chats_under_its_alias_and_its_tokens_are_counted(up: FaasmoeUp) -> None:
    response = post(up, {"model": "acme-chat", **CHAT})
    assert response.status_code == 200, response.text
    usage = response.json()["usage"]
    assert usage["completion_tokens"] == 8

    def counted() -> dict[str, Any]:
        headers = {"Authorization": f"Bearer {KEYS['acme']}"}
        url = f"{up.base_url}/v1/usage"
        return dict(httpx.get(url, headers=headers, trust_env=False, timeout=60).json())

    wait_until(lambda: counted()["requests"]["completed"] == 1, timeout_s=60, what="the usage")
    assert counted()["completion_tokens"] == 8
    assert counted()["prompt_tokens"] == usage["prompt_tokens"]


def test_a_stream_has_the_same_text_as_a_whole_response(up: FaasmoeUp) -> None:
    whole = post(up, {"model": "tiny", **CHAT}).json()["choices"][0]["message"]["content"]
    lines = post(up, {"model": "tiny", **CHAT, "stream": True}).text.splitlines()
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert "".join(e["choices"][0]["delta"].get("content") or "" for e in events) == whole


@pytest.mark.parametrize(
    ("body", "key", "status"),
    [
        ({"model": "acme-chat", **CHAT}, "globex", 404),
        ({"model": "tiny", **CHAT}, "wrong", 401),
        ({"model": "tiny", **CHAT, "max_tokens": -1}, "acme", 400),
        ({"model": "tiny", "messages": "x"}, "acme", 400),
        ({"model": "tiny", **CHAT}, "globex", 400),
    ],
)
def test_what_a_tenant_may_not_do_is_refused(
    up: FaasmoeUp, body: dict[str, Any], key: str, status: int
) -> None:
    response = post(up, body, key=key)
    assert response.status_code == status, response.text
    assert "error" in response.json()


def test_a_tenants_output_limit_holds(up: FaasmoeUp) -> None:
    body = {name: value for name, value in CHAT.items() if name != "max_tokens"}
    response = post(up, {"model": "tiny", **body}, key="globex")
    assert response.status_code == 200, response.text
    assert response.json()["usage"]["completion_tokens"] == 3


def test_routes_that_administer_vllm_are_not_passed_on(up: FaasmoeUp) -> None:
    for path in ("/v1/load_lora_adapter", "/pause", "/scale_elastic_ep"):
        assert post(up, {}, path=path).status_code == 404


def engine_of(router: psutil.Process) -> psutil.Process:
    (engine,) = router.children()
    return engine


def test_the_engine_is_a_fork_of_the_router_which_has_imported_vllm(up: FaasmoeUp) -> None:
    assert up.router is not None
    assert engine_of(up.router).cmdline() == up.router.cmdline()


def test_a_killed_engine_is_replaced_together_with_its_router(up: FaasmoeUp) -> None:
    killed = up.router
    assert killed is not None
    engine_of(killed).kill()

    def is_replaced() -> bool:
        router = up.router
        return router is not None and router.pid != killed.pid and is_healthy(up)

    wait_until(is_replaced, timeout_s=300, what="another router")
    assert post(up, {"model": "tiny", **CHAT}).status_code == 200


def is_healthy(up: FaasmoeUp) -> bool:
    try:
        url = f"{up.base_url}/health"
        return httpx.get(url, trust_env=False, timeout=60).status_code == 200
    except httpx.TransportError:
        return False


def test_functions_are_called_and_not_computed_in_vllm(up: FaasmoeUp) -> None:
    post(up, {"model": "tiny", **CHAT})
    headers = {"Authorization": f"Bearer {KEYS['acme']}"}

    def metrics() -> str:
        return httpx.get(
            f"{up.base_url}/metrics", headers=headers, trust_env=False, timeout=60
        ).text

    wait_until(lambda: "function_calls_total" in metrics(), timeout_s=60, what="metrics")
    assert parse_sample(metrics(), "faasmoe_router_function_calls_total") > 0
    assert parse_sample(metrics(), "faasmoe_router_local_computations_total") == 0
