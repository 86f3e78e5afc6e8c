"""Autoscaling of functions with real processes: correct responses during scaling and faults."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from faasmoe_up import FaasmoeUp, running_up, wait_until
from tiny_chat import EXPERTS, LAYERS, MAX_MODEL_LEN, save_tiny_chat_model

EXPERTS_PER_FUNCTION = 2
N_FUNCTIONS = LAYERS * EXPERTS // EXPERTS_PER_FUNCTION
N_TOKENS = 12
WINDOW_S = 6  # Knative's minimum
GRACE_S = 1
TARGET = 4  # calls in flight per replica; with 70 % utilization, 2.8
SLACK_S = 110.0  # for autoscaler ticks, report intervals, draining and a busy machine
ACTIVATION_TIMEOUT_S = 120.0
REPLACED_TIMEOUT_S = 120.0
BURST = 32
PROMPTS = tuple(f"the quick fox number {n} jumps over {n * 7} dogs" for n in range(BURST))

MOEMODEL = """
apiVersion: faasmoe.dev/v1alpha1
kind: MoEModel
metadata: {{name: tiny}}
spec:
  model: {{source: "file://{model}"}}
  store: {{path: "{store}"}}
  granularity: {{expertsPerFunction: {experts}}}
  router: {{maxModelLen: {length}, maxNumSeqs: 32, device: cpu}}
  experts:
    device: cpu
    functionsPerSandbox: 2
    warmPool: {pool}
    scaling: {{windowSeconds: {window}, panicWindowPercentage: 20, target: {target},
      scaleToZeroGracePeriodSeconds: {grace}}}
"""


@dataclass(frozen=True, slots=True)
class ChatResult:
    """The response to a chat; `cold_start_s` is None unless the request was queued."""

    question: str
    text: str
    finish_reason: str
    n_tokens: int
    cold_start_s: float | None
    took_s: float


@dataclass(slots=True)
class Traffic:
    """Responses and failures of closed-loop clients."""

    responses: list[ChatResult] = field(default_factory=list)
    failures: list[BaseException] = field(default_factory=list)

    def wait_for_more(self, count: int) -> None:
        """Wait for `count` more responses."""
        wanted = len(self.responses) + count
        what = f"{count} more responses"
        wait_until(lambda: len(self.responses) >= wanted, timeout_s=ACTIVATION_TIMEOUT_S, what=what)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("elastic")
    save_tiny_chat_model(folder / "model")
    return folder


@contextmanager
def running_model(folder: Path, *, pool: int) -> Iterator[FaasmoeUp]:
    file = folder / f"pool-{pool}.yaml"
    file.write_text(
        MOEMODEL.format(
            model=folder / "model",
            store=folder / f"store-{pool}",  # an instance holds its store's state
            experts=EXPERTS_PER_FUNCTION,
            length=MAX_MODEL_LEN,
            pool=pool,
            window=WINDOW_S,
            target=TARGET,
            grace=GRACE_S,
        )
    )
    with running_up(file, file.with_suffix(".log")) as up:
        yield up


@pytest.fixture(scope="module")
def up(folder: Path) -> Iterator[FaasmoeUp]:
    with running_model(folder, pool=2) as up:
        yield up


CHATS = "/v1/chat/completions"


def request_body(question: str) -> dict[str, Any]:
    return {
        "model": "tiny",
        "messages": [{"role": "user", "content": question}],
        "max_tokens": N_TOKENS,
        "temperature": 0,
    }


def chat(client: httpx.Client, question: str) -> ChatResult:
    started_s = time.monotonic()
    return read_result(
        question, client.post(CHATS, json=request_body(question)), started_s=started_s
    )


def read_result(question: str, response: httpx.Response, *, started_s: float) -> ChatResult:
    assert response.status_code == 200, response.text
    queued = response.headers.get("X-FaaSMoE-Cold-Start")
    value = response.json()
    choice = value["choices"][0]
    return ChatResult(
        question,
        choice["message"]["content"],
        choice["finish_reason"],
        value["usage"]["completion_tokens"],
        None if queued is None else float(queued),
        time.monotonic() - started_s,
    )


@contextmanager
def connected(up: FaasmoeUp) -> Iterator[httpx.Client]:
    with httpx.Client(
        base_url=up.base_url, timeout=ACTIVATION_TIMEOUT_S, trust_env=False
    ) as client:
        yield client


def burst(up: FaasmoeUp) -> list[ChatResult]:
    """Send all questions concurrently; any failure fails the test.

    A single thread sends them: 32 threads would block each other for seconds on a busy machine, and
    unread responses would look like a pause in the traffic.
    """

    async def ask(client: httpx.AsyncClient, question: str) -> ChatResult:
        started_s = time.monotonic()
        response = await client.post(CHATS, json=request_body(question))
        return read_result(question, response, started_s=started_s)

    async def ask_all() -> list[ChatResult]:
        async with httpx.AsyncClient(
            base_url=up.base_url, timeout=ACTIVATION_TIMEOUT_S, trust_env=False
        ) as client:
            return await asyncio.gather(*(ask(client, question) for question in PROMPTS))

    return asyncio.run(ask_all())


def results_alone(up: FaasmoeUp) -> dict[str, str]:
    """Return the text for each question when sent alone to warm functions."""
    with connected(up) as client:
        responses = [chat(client, question) for question in PROMPTS]
    assert all(response.cold_start_s is None for response in responses)
    return {response.question: response.text for response in responses}


@contextmanager
def traffic(up: FaasmoeUp, *, clients: int = 4) -> Iterator[Traffic]:
    """Send requests without pauses for the lifetime of the context."""
    seen, finished = Traffic(), threading.Event()

    def ask(client: httpx.Client, first: int) -> None:
        index = first
        while not finished.is_set():
            try:
                seen.responses.append(chat(client, PROMPTS[index % BURST]))
            except Exception as error:  # checked in the thread of the test
                seen.failures.append(error)
            index += 1

    with connected(up) as client:
        threads = [threading.Thread(target=ask, args=(client, n)) for n in range(clients)]
        for thread in threads:
            thread.start()
        try:
            yield seen
        finally:
            finished.set()
            for thread in threads:
                thread.join()


def replicas(up: FaasmoeUp) -> list[int]:
    return [function["ready"] for function in up.status()["functions"]]


def is_idle(up: FaasmoeUp, *, pool: int) -> bool:
    """Return whether all functions are at zero and only the sandboxes of the warm pool run."""
    status = up.status()
    functions = [(f["desired"], f["ready"]) for f in status["functions"]]
    attached = [s["functions"] for s in status["sandboxes"]]
    at_zero = functions == [(0, 0)] * N_FUNCTIONS and attached == [[]] * pool
    return at_zero and status["pool"]["ready"] == pool and len(up.sandboxes) == pool


def wait_idle(up: FaasmoeUp, *, pool: int) -> None:
    timeout_s = WINDOW_S + GRACE_S + SLACK_S
    wait_until(lambda: is_idle(up, pool=pool), timeout_s=timeout_s, what=f"idle, pool of {pool}")


def check_burst_from_zero(up: FaasmoeUp, *, pool: int) -> None:
    """Check that all responses are correct and complete, and each function was activated once."""
    wait_idle(up, pool=pool)
    activations = 'activations_total{outcome="ready"}'
    before = up.control_metric(activations), up.router_metric("cold_start_seconds_count")
    responses = burst(up)
    took_s = sorted(response.took_s for response in responses)
    details = (up.status()["decisions"], took_s[-1])
    assert up.control_metric(activations) - before[0] == N_FUNCTIONS, details
    queued = [response.cold_start_s for response in responses if response.cold_start_s is not None]
    assert len(queued) == up.router_metric("cold_start_seconds_count") - before[1] > 0
    assert all(0 < waited_s < ACTIVATION_TIMEOUT_S for waited_s in queued)
    assert {(response.finish_reason, response.n_tokens) for response in responses} == {
        ("length", N_TOKENS)
    }
    assert {response.question: response.text for response in responses} == results_alone(up)
    assert replicas(up) == [1] * N_FUNCTIONS
    assert up.router_metric("local_computations_total") == 0


def report_load(up: FaasmoeUp, function: str, *, concurrency: float) -> None:
    """Send a load report as a second router would."""
    load = {"concurrency": concurrency, "calls": 1, "rows": 1}
    body = {
        "router": "second",
        "sent_at_s": time.time(),
        "interval_s": 1.0,
        "functions": {function: load},
        "held": 0,
        "local": 0,
    }
    up.request_control("POST", "/v1/load", body)


def assert_correct(seen: Traffic, expected: dict[str, str]) -> None:
    assert not seen.failures
    wrong = [r for r in seen.responses if r.text != expected[r.question]]
    assert not wrong


def test_burst_from_zero_succeeds_and_functions_scale_back_to_zero(
    up: FaasmoeUp,
) -> None:
    check_burst_from_zero(up, pool=2)
    wait_idle(up, pool=2)


def test_requests_and_scaling_continue_after_control_process_is_killed(up: FaasmoeUp) -> None:
    with traffic(up) as seen:
        seen.wait_for_more(4)
        before = up.status()["epoch"]
        sandbox_pids = {process.pid for process in up.sandboxes}
        control = up.child_running("faasmoe_operator.control")
        assert control is not None
        control.kill()
        seen.wait_for_more(20)

        def returned() -> bool:
            try:
                status = up.status()
            except httpx.TransportError:
                return False
            return bool(status["epoch"] != before and status["followers"] == 1)

        wait_until(returned, timeout_s=REPLACED_TIMEOUT_S, what="another control process")
        assert replicas(up) == [1] * N_FUNCTIONS  # adopted: none was dropped
        assert sandbox_pids >= {s["pid"] for s in up.status()["sandboxes"] if s["functions"]}
        seen.wait_for_more(20)
    assert_correct(seen, results_alone(up))
    assert all(response.cold_start_s is None for response in seen.responses[8:])
    wait_idle(up, pool=2)
    with connected(up) as client:
        assert chat(client, PROMPTS[0]).cold_start_s is not None
    assert replicas(up) == [1] * N_FUNCTIONS


def test_requests_succeed_after_zygote_is_killed(up: FaasmoeUp) -> None:
    with traffic(up) as seen:
        seen.wait_for_more(8)
        lost = {process.pid for process in up.sandboxes}
        zygote = up.child_running("faasmoe_expert.zygote")
        assert zygote is not None
        zygote.kill()
        seen.wait_for_more(8)

        def returned() -> bool:
            pids = {s["pid"] for s in up.status()["sandboxes"] if s["functions"]}
            return not pids & lost and all(count > 0 for count in replicas(up))

        wait_until(returned, timeout_s=REPLACED_TIMEOUT_S, what="functions in other sandboxes")
        seen.wait_for_more(8)
    assert_correct(seen, results_alone(up))


@dataclass(slots=True)
class FakeRouter:
    """Reports load of one function and checks the replicas of all functions."""

    up: FaasmoeUp
    function: str
    max_desired: int = 0

    def has_replicas(self, expected: int, *, concurrency: float) -> bool:
        """Report a concurrency; return whether the function has the expected replicas."""
        report_load(self.up, self.function, concurrency=concurrency)
        functions = {f["id"]: f for f in self.up.status()["functions"]}
        self.max_desired = max(self.max_desired, functions[self.function]["desired"])
        assert all(f["desired"] == 1 for name, f in functions.items() if name != self.function)
        return bool(functions[self.function]["ready"] == expected)


def wait_for_replicas(
    second: FakeRouter, seen: Traffic, *, concurrency: float, expected: int
) -> None:
    """Report a load until the function has the expected replicas and 20 more responses arrived."""
    wanted = len(seen.responses) + 20

    def scaled() -> bool:
        has_replicas = second.has_replicas(expected, concurrency=concurrency)
        return has_replicas and len(seen.responses) >= wanted

    wait_until(scaled, timeout_s=ACTIVATION_TIMEOUT_S, what=f"{expected} replicas, more responses")


def test_replicas_follow_reported_load(up: FaasmoeUp) -> None:
    wait_idle(up, pool=2)
    with traffic(up) as seen:
        seen.wait_for_more(4)
        second = FakeRouter(up, up.status()["functions"][0]["id"])
        # The real router adds at most 1, since it runs one step and so one call per function.
        for concurrency, expected in (
            (3.5, 2),  # ceil(3.5 / 2.8) = ceil(4.5 / 2.8) = 2
            (10.0, 4),  # ceil(10 / 2.8) = ceil(11 / 2.8) = 4
        ):
            wait_for_replicas(second, seen, concurrency=concurrency, expected=expected)
            assert second.max_desired == expected
        report_load(up, second.function, concurrency=0)
    assert_correct(seen, results_alone(up))


def test_no_sandbox_remains_when_idle_without_warm_pool(folder: Path) -> None:
    with running_model(folder, pool=0) as up:
        check_burst_from_zero(up, pool=0)
        wait_idle(up, pool=0)
