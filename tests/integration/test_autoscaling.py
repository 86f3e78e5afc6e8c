"""Functions that come and go with the traffic: real processes, real requests, nothing lost."""

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
WINDOW_S = 6  # Knative's least
GRACE_S = 1
TARGET = 4  # calls in flight; 70 % of it is aimed at: 2.8 a replica
SLACK_S = 40.0  # the autoscaler's tick, the reports' interval, the drain, a busy machine
ACTIVATION_TIMEOUT_S = 60.0
REPLACED_TIMEOUT_S = 90.0
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
    """A chat's answer, and for how long it was held if it was."""

    question: str
    text: str
    finish_reason: str
    n_tokens: int
    cold_start_s: float | None
    took_s: float


@dataclass(slots=True)
class Traffic:
    """Chats that are asked one after the other by several clients."""

    answers: list[ChatResult] = field(default_factory=list)
    failures: list[BaseException] = field(default_factory=list)

    def wait_for_more(self, count: int) -> None:
        """Wait until so many more answers are there."""
        wanted = len(self.answers) + count
        what = f"{count} more answers"
        wait_until(lambda: len(self.answers) >= wanted, timeout_s=ACTIVATION_TIMEOUT_S, what=what)


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
            store=folder / "store",
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
    """Ask every question at once; any that fails fails the test.

    From one thread: 32 of them keep each other waiting for seconds on a busy machine, and answers
    that nobody reads look like a pause in the traffic.
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
    """Return the text that each question gets while nothing else runs and all is warm."""
    with connected(up) as client:
        responses = [chat(client, question) for question in PROMPTS]
    assert all(answer.cold_start_s is None for answer in responses)
    return {answer.question: answer.text for answer in responses}


@contextmanager
def traffic(up: FaasmoeUp, *, clients: int = 4) -> Iterator[Traffic]:
    """Ask without a pause as long as the context lasts."""
    seen, finished = Traffic(), threading.Event()

    def ask(client: httpx.Client, first: int) -> None:
        turn = first
        while not finished.is_set():
            try:
                seen.answers.append(chat(client, PROMPTS[turn % BURST]))
            except Exception as error:  # told by the test, in its own thread
                seen.failures.append(error)
            turn += 1

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
    """Tell whether no function is anywhere, and only the pool's sandboxes run."""
    status = up.status()
    functions = [(f["desired"], f["ready"]) for f in status["functions"]]
    attached = [s["functions"] for s in status["sandboxes"]]
    nothing = functions == [(0, 0)] * N_FUNCTIONS and attached == [[]] * pool
    return nothing and status["pool"]["ready"] == pool and len(up.sandboxes) == pool


def wait_idle(up: FaasmoeUp, *, pool: int) -> None:
    timeout_s = WINDOW_S + GRACE_S + SLACK_S
    wait_until(lambda: is_idle(up, pool=pool), timeout_s=timeout_s, what=f"idle, pool of {pool}")


def check_burst_from_zero(up: FaasmoeUp, *, pool: int) -> None:
    """Every answer is right and complete, and each function was started once."""
    wait_idle(up, pool=pool)
    activations = 'activations_total{outcome="ready"}'
    before = up.control_metric(activations), up.router_metric("cold_start_seconds_count")
    responses = burst(up)
    took_s = sorted(answer.took_s for answer in responses)
    details = (up.status()["decisions"], took_s)
    assert up.control_metric(activations) - before[0] == N_FUNCTIONS, details
    queued = [answer.cold_start_s for answer in responses if answer.cold_start_s is not None]
    assert len(queued) == up.router_metric("cold_start_seconds_count") - before[1] > 0
    assert all(0 < waited_s < ACTIVATION_TIMEOUT_S for waited_s in queued)
    assert {(answer.finish_reason, answer.n_tokens) for answer in responses} == {
        ("length", N_TOKENS)
    }
    assert {answer.question: answer.text for answer in responses} == results_alone(up)
    assert replicas(up) == [1] * N_FUNCTIONS
    assert up.router_metric("local_computations_total") == 0


def report_load(up: FaasmoeUp, function: str, *, concurrency: float) -> None:
    """Tell the control of calls in flight, as a second router would."""
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
    wrong = [answer for answer in seen.answers if answer.text != expected[answer.question]]
    assert not wrong


def test_a_burst_from_zero_gets_right_answers_and_all_goes_back_to_two_generic_sandboxes(
    up: FaasmoeUp,
) -> None:
    check_burst_from_zero(up, pool=2)
    wait_idle(up, pool=2)


def test_traffic_and_scaling_go_on_when_the_control_process_is_killed(up: FaasmoeUp) -> None:
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
        assert replicas(up) == [1] * N_FUNCTIONS  # read back: none was dropped
        assert sandbox_pids >= {s["pid"] for s in up.status()["sandboxes"] if s["functions"]}
        seen.wait_for_more(20)
    assert_correct(seen, results_alone(up))
    assert all(answer.cold_start_s is None for answer in seen.answers[8:])
    wait_idle(up, pool=2)
    with connected(up) as client:
        assert chat(client, PROMPTS[0]).cold_start_s is not None
    assert replicas(up) == [1] * N_FUNCTIONS


def test_no_request_fails_when_the_zygote_is_killed(up: FaasmoeUp) -> None:
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
    """Reports load for one function, and watches what becomes of all of them."""

    up: FaasmoeUp
    function: str
    most_desired: int = 0

    def has_replicas(self, expected: int, *, concurrency: float) -> bool:
        """Report so many calls in flight; tell whether there are as many replicas as expected."""
        report_load(self.up, self.function, concurrency=concurrency)
        found = {f["id"]: f for f in self.up.status()["functions"]}
        self.most_desired = max(self.most_desired, found[self.function]["desired"])
        assert all(f["desired"] == 1 for name, f in found.items() if name != self.function)
        return bool(found[self.function]["ready"] == expected)


def wait_for_replicas(
    second: FakeRouter, seen: Traffic, *, concurrency: float, expected: int
) -> None:
    """Report a load until the replicas are those expected, and 20 more answers have come."""
    wanted = len(seen.answers) + 20

    def scaled() -> bool:
        has_replicas = second.has_replicas(expected, concurrency=concurrency)
        return has_replicas and len(seen.answers) >= wanted

    wait_until(scaled, timeout_s=ACTIVATION_TIMEOUT_S, what=f"{expected} replicas, more answers")


def test_replicas_follow_the_load_that_routers_report(up: FaasmoeUp) -> None:
    wait_idle(up, pool=2)
    with traffic(up) as seen:
        seen.wait_for_more(4)
        second = FakeRouter(up, up.status()["functions"][0]["id"])
        # Our own router adds at most 1: it has one step, so one call to a function, at a time.
        for concurrency, expected in (
            (3.5, 2),  # ceil(3.5 / 2.8) = ceil(4.5 / 2.8) = 2
            (10.0, 4),  # ceil(10 / 2.8) = ceil(11 / 2.8) = 4
        ):
            wait_for_replicas(second, seen, concurrency=concurrency, expected=expected)
            assert second.most_desired == expected
        report_load(up, second.function, concurrency=0)
    assert_correct(seen, results_alone(up))


def test_without_a_pool_no_sandbox_process_is_left_when_idle(folder: Path) -> None:
    with running_model(folder, pool=0) as up:
        check_burst_from_zero(up, pool=0)
        wait_idle(up, pool=0)
