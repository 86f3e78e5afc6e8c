"""A router that is killed in mid-stream costs its streams a pause, and nothing of their text."""

from __future__ import annotations

import json
import re
import signal
import threading
from collections import Counter, deque
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from engines import RouterEngine
from faasmoe_up import FaasmoeUp, all_gone, running_up, wait_until
from moemodel_files import write_moemodel, write_tenants

N_TOKENS = 900  # so that no stream ends before the last one has begun
N_EVENTS_BEFORE = 5  # that every stream has got when the router is killed
CHAT: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "the quick brown fox"}],
    "max_tokens": N_TOKENS,
    "temperature": 0,
}
COMPLETION: dict[str, Any] = {
    "model": "tiny",
    "prompt": "the lazy dog",
    "max_tokens": N_TOKENS,
    "temperature": 0,
}
SAMPLED = {"temperature": 0.9, "top_p": 0.95, "seed": 7}
TEXT_SCHEMA = {"type": "string", "minLength": 600, "maxLength": 620}
TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "parameters": {
            "type": "object",
            "properties": {"word": TEXT_SCHEMA},
            "required": ["word"],
            "additionalProperties": False,
        },
    },
}
USAGE = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
STREAMS: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("chat/completions", {**CHAT, **USAGE}),
    "chat sampled": ("chat/completions", {**CHAT, **SAMPLED}),
    "completion": ("completions", COMPLETION),
    "completion n": ("completions", {**COMPLETION, **SAMPLED, **USAGE, "n": 3}),
    "log-probabilities": ("completions", {**COMPLETION, **SAMPLED, "logprobs": 2}),
    "prompt": ("completions", {**COMPLETION, "echo": True}),
    "penalties": ("completions", {**COMPLETION, **SAMPLED, "frequency_penalty": 0.5}),
    "tool call": (
        "chat/completions",
        {**CHAT, **SAMPLED, "tools": [TOOL], "tool_choice": "required", **USAGE},
    ),
    "schema": (
        "chat/completions",
        {
            **CHAT,
            **SAMPLED,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "text", "schema": TEXT_SCHEMA},
            },
        },
    ),
    "response": (
        "responses",
        {"model": "tiny", "input": "the dog", "temperature": 0, "max_output_tokens": N_TOKENS},
    ),
    "message": (
        "messages",
        {
            "model": "tiny",
            "messages": [{"role": "user", "content": "the fox"}],
            "temperature": 0,
            "max_tokens": N_TOKENS,
        },
    ),
}


class Stream(threading.Thread):
    """Reads one stream to its end.

    Attributes:
        events: the events so far.
        has_begun: set once N_EVENTS_BEFORE events are here.
        is_complete: whether it has ended.
    """

    def __init__(self, url: str, path: str, body: dict[str, Any]) -> None:
        super().__init__()
        self.events: list[str] = []
        self.has_begun = threading.Event()
        self.is_complete = False
        self._request = (f"{url}/v1/{path}", {**body, "stream": True})

    def run(self) -> None:
        url, body = self._request
        headers = {"Authorization": "Bearer quiet-key"}
        with httpx.stream("POST", url, json=body, headers=headers, timeout=60) as response:
            assert response.status_code == 200, response.read()
            for line in response.iter_lines():
                if line.startswith("data: "):
                    self.events.append(line.removeprefix("data: "))
                if len(self.events) == N_EVENTS_BEFORE:
                    self.has_begun.set()
        self.is_complete = True


@pytest.fixture(scope="module")
def up(engine: RouterEngine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaasmoeUp]:
    folder = tmp_path_factory.mktemp("death")
    model = engine.save_model(folder / "model", max_model_len=2048)
    spec = {
        "model": {"source": f"file://{model}"},
        "store": {"path": str(folder / "store")},
        "router": engine.router_spec(maxNumSeqs=16),
        "experts": {"device": "cpu", "functionsPerSandbox": 8},
        "tenants": write_tenants(folder, ["quiet"]),
    }
    file = write_moemodel(folder / "model.yaml", spec)
    with running_up(
        file,
        folder / "up.log",
        variables=engine.variables,
        timeout_s=engine.start_timeout_s,
    ) as running:
        yield running


def read_all(up: FaasmoeUp, *, kills_router: bool) -> dict[str, Stream]:
    """Read all streams at once; kill the router when each has begun, if asked."""
    streams = {name: Stream(up.base_url, *request) for name, request in STREAMS.items()}
    for stream in streams.values():
        stream.start()
    if kills_router:
        for name, stream in streams.items():
            assert stream.has_begun.wait(60), name
        kill_router(up)
        assert not any(stream.is_complete for stream in streams.values())
    for stream in streams.values():
        stream.join()
    return streams


def kill_router(up: FaasmoeUp) -> None:
    router = up.router
    assert router is not None
    router.send_signal(signal.SIGKILL)
    wait_until(lambda: all_gone([router]), timeout_s=120, what="the router to end")


def ids_of(events: list[str]) -> set[str]:
    """Return the ids and times of all events."""
    return set(re.findall(r'"(?:id|created|created_at|item_id)":("[^"]*"|\d+)', "".join(events)))


def without_ids(events: list[str]) -> list[str]:
    """Return events without what is random, and log-probabilities to two digits."""
    pattern = r'"(id|created|created_at|item_id|call_id)":("[^"]*"|\d+)'
    pattern += r'|"(cached_tokens|cache_write_tokens|input_tokens)":\d+'
    pattern += r'|"cache_(read|creation)_input_tokens":\d+'
    number = r"-?\d+\.\d+(?:e-\d+)?"
    return [
        re.sub(number, lambda match: f"{float(match[0]):.2f}", re.sub(pattern, "", event))
        for event in events
    ]


def by_choice(events: list[str]) -> dict[str, list[str]]:
    """Group events by choice: how several alternate is free, and running counts follow from it."""
    groups: dict[str, list[str]] = {}
    for event in without_ids(events):
        found = re.search(r'"choices":\[\{"index":(\d+)', event)
        groups.setdefault(found[1] if found else "no choice", []).append(event)
    if len(groups.keys() - {"no choice"}) == 1:
        return groups
    count = r'"(completion|total)_tokens":\d+'
    return {
        choice: [re.sub(count, "", event) if choice != "no choice" else event for event in group]
        for choice, group in groups.items()
    }


def read_usage(up: FaasmoeUp) -> Counter[str]:
    """Return a tenant's requests by outcome and its tokens."""
    headers = {"Authorization": "Bearer quiet-key"}
    usage = httpx.get(f"{up.base_url}/v1/usage", headers=headers, timeout=60).json()
    tokens = {name: usage[name] for name in ("prompt_tokens", "completion_tokens")}
    return Counter({**usage["requests"], **tokens})


def test_streams_of_a_killed_router_go_on_and_count_once(
    engine: RouterEngine, up: FaasmoeUp
) -> None:
    if not engine.resumes_streams:
        pytest.skip("the engine keeps no journal of streams")
    usage_before = read_usage(up)
    calm = read_all(up, kills_router=False)
    usage_calm = read_usage(up)
    disturbed = read_all(up, kills_router=True)
    for name in STREAMS:
        expected, got = calm[name].events, disturbed[name].events
        assert len(expected) > 2 * N_EVENTS_BEFORE, name
        assert by_choice(got) == by_choice(expected), name
        assert len(ids_of(got)) == len(ids_of(expected)), name
    used = usage_calm - usage_before
    assert used["completed"] == len(STREAMS)
    assert read_usage(up) - usage_calm == used


def test_a_stream_that_no_router_goes_on_with_ends_with_an_error(
    engine: RouterEngine, up: FaasmoeUp
) -> None:
    if engine.resumes_streams:
        pytest.skip("the engine keeps a journal of streams")
    stream = Stream(up.base_url, *STREAMS["chat"])
    stream.start()
    assert stream.has_begun.wait(60)
    kill_router(up)
    stream.join()
    assert "error" in json.loads(stream.events[-1]), stream.events[-1]


def test_requests_without_an_answer_are_repeated(up: FaasmoeUp) -> None:
    texts: list[str] = []

    def complete() -> None:
        response = httpx.post(
            f"{up.base_url}/v1/completions",
            json=COMPLETION,
            headers={"Authorization": "Bearer quiet-key"},
            timeout=180,
        )
        texts.append(response.json()["choices"][0]["text"])

    complete()
    threads = [threading.Thread(target=complete) for _ in range(4)]
    for thread in threads:
        thread.start()
    kill_router(up)
    for thread in threads:
        thread.join()
    assert texts == texts[:1] * 5


def test_probes_learn_that_the_router_is_away(up: FaasmoeUp) -> None:
    wait_until(lambda: is_healthy(up), timeout_s=120, what="a router")
    zygote = up.child_running("faasmoe_router.zygote")
    assert zygote is not None
    zygote.send_signal(signal.SIGSTOP)  # forks no router meanwhile
    try:
        kill_router(up)
        response = httpx.get(f"{up.base_url}/health", timeout=60)
    finally:
        zygote.send_signal(signal.SIGCONT)
    assert response.status_code == 503
    assert response.headers["retry-after"] == "1"
    wait_until(lambda: is_healthy(up), timeout_s=120, what="a router")


def test_a_killed_gateway_ends_its_streams_and_nothing_else(up: FaasmoeUp) -> None:
    wait_until(lambda: is_healthy(up), timeout_s=120, what="a router")
    router, gateway = up.router, up.child_running("faasmoe_gateway")
    assert router is not None
    assert gateway is not None
    headers = {"Authorization": "Bearer quiet-key"}
    url, body = f"{up.base_url}/v1/completions", {**COMPLETION, "stream": True}
    with httpx.stream("POST", url, json=body, headers=headers, timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        gateway.kill()
        with pytest.raises(httpx.TransportError):
            deque(lines)
    answer = httpx.post(url, json={**COMPLETION, "max_tokens": 2}, headers=headers, timeout=60)
    assert answer.status_code == 200  # it waited for the next gateway
    assert up.router == router

    def is_idle() -> bool:
        return bool(httpx.get(f"{up.base_url}/load", timeout=60).json()["server_load"] == 0)

    wait_until(is_idle, timeout_s=120, what="the end of the stream in the router")


def is_healthy(up: FaasmoeUp) -> bool:
    return httpx.get(f"{up.base_url}/health", timeout=60).status_code == 200


@pytest.mark.parametrize("header", ["x-faasmoe-front", "x-faasmoe-journal", "x-faasmoe-origin"])
def test_clients_cannot_pose_as_the_gateway(up: FaasmoeUp, header: str) -> None:
    headers = {"Authorization": "Bearer quiet-key", header: "1 1"}
    response = httpx.post(
        f"{up.base_url}/v1/completions",
        json={**COMPLETION, "max_tokens": 2, "stream": True},
        headers=headers,
        timeout=60,
    )
    assert response.status_code == 200
    assert "x-faasmoe-records" not in response.headers
    assert response.text.startswith("data: ")
