"""`faasmoe up` with two models and tenants: one endpoint, and each tenant's own view of it."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml
from faasmoe_up import FaasmoeUp, running_up, wait_until
from tiny_chat import save_tiny_chat_model
from tiny_system import moemodel_yaml

ORIGIN = "https://chat.example.com"
ZYGOTES = ("expert", "router")
TENANTS = """\
apiVersion: faasmoe.dev/v1alpha1
kind: Tenant
metadata: {name: acme}
spec:
  apiKeysPath: keys/acme
  models: [{name: first, alias: mine}, {name: second}]
  limits: {requestsPerMinute: 600}
---
apiVersion: faasmoe.dev/v1alpha1
kind: Tenant
metadata: {name: beta}
spec:
  apiKeysPath: keys/beta
  models: [{name: second}]
  budgets: [{unit: outputTokens, period: day, limit: 3}]
"""


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaasmoeUp]:
    folder = tmp_path_factory.mktemp("models")
    model = save_tiny_chat_model(folder / "model")
    served = folder / "served"
    served.mkdir()
    for name in ("first", "second"):
        text = moemodel_yaml(model, router="cpu", experts="cpu")
        document = yaml.safe_load(text)
        document["metadata"]["name"] = name
        document["spec"]["store"]["path"] = f"stores/{name}"
        (served / f"{name}.yaml").write_text(yaml.safe_dump(document))
    (served / "tenants.yaml").write_text(TENANTS)
    for tenant in ("acme", "beta"):
        (served / "keys" / tenant).mkdir(parents=True)
        (served / "keys" / tenant / "key").write_text(f"sk-{tenant}")
    with running_up(served, folder / "up.log", "--cors-origin", ORIGIN) as running:
        yield running


def complete(up: FaasmoeUp, model: str, *, key: str = "sk-acme", **fields: Any) -> httpx.Response:
    body = {"model": model, "prompt": "the quick", "max_tokens": 2, "temperature": 0, **fields}
    return httpx.post(
        f"{up.base_url}/v1/completions",
        json=body,
        headers={"Authorization": f"Bearer {key}"},
        timeout=60,
        trust_env=False,
    )


def children(up: FaasmoeUp) -> list[psutil.Process]:
    return list(psutil.Process(up.process.pid).children())


def get(up: FaasmoeUp, path: str, key: str) -> Any:
    headers = {"Authorization": f"Bearer {key}"}
    return httpx.get(f"{up.base_url}{path}", headers=headers, trust_env=False, timeout=60).json()


def test_each_model_answers_under_its_names(up: FaasmoeUp) -> None:
    for name in ("first", "mine", "second"):
        response = complete(up, name)
        assert response.status_code == 200, response.text
        assert response.json()["model"] == name
    assert [card["id"] for card in get(up, "/v1/models", "sk-acme")["data"]] == [
        "first",
        "mine",
        "second",
    ]


def test_model_of_others_does_not_exist(up: FaasmoeUp) -> None:
    assert complete(up, "first", key="sk-beta").status_code == 404
    assert complete(up, "nothing", key="sk-beta").status_code == 404
    assert complete(up, "second", key="sk-other").status_code == 401


def test_usage_counts_over_models_whole_and_streamed(up: FaasmoeUp) -> None:
    before = get(up, "/v1/usage", "sk-acme")["day"]
    whole = complete(up, "first").json()["usage"]
    streamed = complete(up, "second", stream=True, stream_options={"include_usage": True})
    events = [line for line in streamed.text.splitlines() if line.startswith("data: {")]
    chunk = json.loads(events[-1].removeprefix("data: "))["usage"]
    after = get(up, "/v1/usage", "sk-acme")["day"]
    used = {name: after[name] - before[name] for name in ("input_tokens", "output_tokens")}
    assert used == {
        "input_tokens": whole["prompt_tokens"] + chunk["prompt_tokens"],
        "output_tokens": whole["completion_tokens"] + chunk["completion_tokens"],
    }


def ask(up: FaasmoeUp, path: str, model: str, key: str, **fields: Any) -> httpx.Response:
    """Ask one of the APIs that are translated onto chats for two tokens."""
    body = {"model": model, "temperature": 0, **fields}
    if path == "/v1/responses":
        body |= {"input": "the quick", "max_output_tokens": 2}
    else:
        body |= {"messages": [{"role": "user", "content": "the quick"}], "max_tokens": 2}
    headers = {"x-api-key": key}
    return httpx.post(up.base_url + path, json=body, headers=headers, timeout=60, trust_env=False)


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages"])
def test_responses_and_messages_are_counted_and_kept_apart(up: FaasmoeUp, path: str) -> None:
    before = get(up, "/v1/usage", "sk-acme")["day"]
    whole = ask(up, path, "mine", "sk-acme").json()
    streamed = ask(up, path, "first", "sk-acme", stream=True)
    events = [line for line in streamed.text.splitlines() if line.startswith("data: {")]
    assert len(events) > 2, streamed.text
    after = get(up, "/v1/usage", "sk-acme")["day"]
    usage = whole["usage"]
    n_input = usage["input_tokens"] + usage.get("cache_read_input_tokens", 0)
    n_input += usage.get("cache_creation_input_tokens", 0)
    assert after["requests"] - before["requests"] == 2
    assert after["input_tokens"] - before["input_tokens"] == 2 * n_input
    assert after["output_tokens"] - before["output_tokens"] == 2 * usage["output_tokens"]
    assert whole["model"] == "mine"
    for model, key, status in (("first", "sk-beta", 404), ("first", "sk-other", 401)):
        refused = ask(up, path, model, key)
        assert refused.status_code == status
        assert ("type" in refused.json()) == (path == "/v1/messages")


def test_head_and_preflight_are_answered(up: FaasmoeUp) -> None:
    headers = {"Authorization": "Bearer sk-acme"}
    for path in ("/health", "/v1/models", "/v1/models/first"):
        head = httpx.head(up.base_url + path, headers=headers, trust_env=False)
        assert (head.status_code, head.content) == (200, b"")
    asked = {"Origin": ORIGIN, "Access-Control-Request-Method": "POST"}
    preflight = httpx.options(f"{up.base_url}/v1/messages", headers=asked, trust_env=False)
    assert preflight.headers["access-control-allow-origin"] == ORIGIN


def test_budget_ends_a_day(up: FaasmoeUp) -> None:
    seen = [complete(up, "second", key="sk-beta", ignore_eos=True) for _ in range(3)]
    assert [response.status_code for response in seen] == [200, 200, 429]
    assert seen[2].json()["error"]["code"] == "budget_exceeded"


def test_models_share_control_process_and_zygotes(up: FaasmoeUp) -> None:
    modules = [word for p in children(up) for word in p.cmdline() if word.startswith("faasmoe_")]
    assert sorted(modules) == [
        "faasmoe_expert.zygote",
        "faasmoe_gateway",
        "faasmoe_operator.control",
        "faasmoe_router.common_zygote",
        "faasmoe_router.zygote",
    ]


def test_killed_control_process_adopts_the_sandboxes_of_all_models(up: FaasmoeUp) -> None:
    assert complete(up, "first").status_code == complete(up, "second").status_code == 200
    before = {process.pid for process in up.sandboxes}
    control = up.child_running("faasmoe_operator.control")
    assert control is not None
    control.send_signal(signal.SIGKILL)
    control.wait(30)

    def has_adopted() -> bool:
        new = up.child_running("faasmoe_operator.control")
        return new is not None and "adopted" in Path(up.log).read_text()

    wait_until(has_adopted, timeout_s=120, what="a new control process")
    assert complete(up, "first").status_code == complete(up, "second").status_code == 200
    assert before & {process.pid for process in up.sandboxes}


def test_zygotes_outlive_their_parent_which_starts_again_for_one_that_dies(up: FaasmoeUp) -> None:
    common = up.child_running("faasmoe_router.common_zygote")
    sandboxes, routers = (up.child_running(f"faasmoe_{kind}.zygote") for kind in ZYGOTES)
    assert common is not None
    assert sandboxes is not None
    assert routers is not None
    common.kill()
    common.wait(30)
    assert complete(up, "first").status_code == 200
    assert (sandboxes.is_running(), routers.is_running()) == (True, True)
    routers.kill()
    assert complete(up, "first").status_code == complete(up, "second").status_code == 200
    again = up.child_running("faasmoe_router.common_zygote")
    assert again is not None
    assert again.pid != common.pid
    assert sandboxes.is_running()


def test_gateway_is_small(up: FaasmoeUp) -> None:
    gateway = up.child_running("faasmoe_gateway")
    assert gateway is not None
    assert gateway.memory_full_info().uss < 60e6


def test_router_that_dies_is_replaced_and_the_other_model_goes_on(up: FaasmoeUp) -> None:
    zygote = up.child_running("faasmoe_router.zygote")
    assert zygote is not None
    routers = zygote.children()
    assert len(routers) == 2  # of one zygote
    routers[0].send_signal(signal.SIGKILL)
    assert complete(up, "second").status_code == 200
    assert complete(up, "first").status_code == 200


def test_metrics_of_functions_are_those_of_all_models(up: FaasmoeUp) -> None:
    match = re.search(r"functions +(http://\S+/metrics)", Path(up.log).read_text())
    assert match is not None
    text = httpx.get(match[1], trust_env=False, timeout=60).text
    for name in ("first", "second"):
        assert f'faasmoe_control_functions{{model="{name}",namespace="local"' in text


def test_log_names_the_models(up: FaasmoeUp) -> None:
    text = Path(up.log).read_text()
    assert "2 models are served" in text
    assert "sk-acme" not in text
