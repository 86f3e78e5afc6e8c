"""Quotas over HTTP: rejections, their headers, and requests that wait."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import httpx
import openai
import pytest

Until = Callable[[Callable[[], bool]], None]


def test_requests_per_minute_are_limited_and_reported_in_headers(open_router: Any) -> None:
    with (
        open_router({"acme": {"limits": {"requestsPerMinute": 2}}, "beta": {}}) as router,
        router.client("acme") as client,
    ):
        started_s = time.monotonic()
        raw = client.completions.with_raw_response
        for remaining in ("1", "0"):
            headers = raw.create(model="tiny", prompt="a", max_tokens=1).headers
            assert headers["x-ratelimit-limit-requests"] == "2"
            assert headers["x-ratelimit-remaining-requests"] == remaining
            assert headers["x-ratelimit-reset-requests"].endswith("s")
            assert "x-ratelimit-limit-tokens" not in headers
        with pytest.raises(openai.RateLimitError) as refused:
            client.completions.create(model="tiny", prompt="a", max_tokens=1)
        assert refused.value.code == "rate_limit_exceeded"
        assert refused.value.type == "rate_limit_error"
        response = refused.value.response
        elapsed_s = time.monotonic() - started_s
        assert 29 - elapsed_s <= int(response.headers["retry-after"]) <= 30
        assert response.headers["x-ratelimit-remaining-requests"] == "0"
        assert "Rate limit reached on requests per minute" in refused.value.message
        assert client.models.list().data  # other endpoints are not limited
        assert router.complete("beta").status_code == 200
        assert "x-ratelimit-limit-requests" not in router.complete("beta").headers


def test_tokens_are_reserved_and_unused_ones_returned(open_router: Any) -> None:
    with open_router({"acme": {"limits": {"tokensPerMinute": 300}}}) as router:
        started_s = time.monotonic()
        answer = router.complete("acme", max_tokens=200)
        usage = answer.json()["usage"]
        remaining = int(
            router.complete("acme", max_tokens=1).headers["x-ratelimit-remaining-tokens"]
        )
        n_prompt = usage["prompt_tokens"]
        expected = 300 - usage["total_tokens"] - n_prompt - 1
        refilled = (time.monotonic() - started_s) * 300 / 60
        assert expected <= remaining <= expected + refilled + 1
        refused = router.complete("acme", max_tokens=200)
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        assert "tokens per minute: limit 300" in refused.json()["error"]["message"]
        assert 1 <= int(refused.headers["retry-after"]) <= 120


def test_a_stop_string_returns_the_tokens_that_were_not_generated(open_router: Any) -> None:
    with open_router({"acme": {"limits": {"tokensPerMinute": 300}}}) as router:
        text = router.complete("acme", max_tokens=20).json()["choices"][0]["text"]
        stop = text[2:4]
        for _ in range(4):  # each reserves 200 and uses a few
            answer = router.complete("acme", max_tokens=200, stop=[stop])
            assert answer.status_code == 200
            assert answer.json()["usage"]["completion_tokens"] < 20


def test_a_request_above_the_limit_is_a_bad_request(open_router: Any) -> None:
    with open_router({"acme": {"limits": {"tokensPerMinute": 100}}}) as router:
        refused = router.complete("acme", max_tokens=150)
        assert refused.status_code == 400
        assert refused.json()["error"]["type"] == "invalid_request_error"
        assert "your limit is 100 tokens per minute" in refused.json()["error"]["message"]
        # A chat without max_tokens gets what fits.
        chat = {"messages": [{"role": "user", "content": "a"}], "max_tokens": None}
        answer = router.post("/v1/chat/completions", key="acme-key", **chat)
        assert answer.json()["usage"]["total_tokens"] == 100


def test_choices_that_can_never_fit_are_a_bad_request(open_router: Any) -> None:
    limits = {"maxConcurrentRequests": 2, "maxQueuedRequests": 1}
    with open_router({"acme": {"limits": limits}}) as router:
        assert router.complete("acme", n=3, max_tokens=1, temperature=1).status_code == 200
        for fields, param in (({"n": 4}, "n"), ({"prompt": ["a"] * 4}, "prompt")):
            refused = router.complete("acme", max_tokens=1, temperature=1, **fields)
            assert refused.status_code == 400
            assert refused.json()["error"]["param"] == param
            assert "at most 3 choices" in refused.json()["error"]["message"]


def test_an_invalid_request_reserves_nothing(open_router: Any) -> None:
    with open_router({"acme": {"limits": {"tokensPerMinute": 100}}}) as router:
        assert router.complete("acme", max_tokens=5, temperature=9).status_code == 400
        headers = router.complete("acme", max_tokens=5).headers
        assert int(headers["x-ratelimit-remaining-tokens"]) >= 100 - 20


def test_two_routers_split_the_limits(open_router: Any) -> None:
    """Ten a minute over two routers: ten if spread evenly, five by one of them."""
    acme = {"acme": {"limits": {"requestsPerMinute": 10, "tokensPerMinute": 100_000}}}
    with open_router(acme, n_routers=2) as first, open_router(acme, n_routers=2) as second:
        started_s = time.monotonic()
        spread = [router.complete("acme").status_code for router in [first, second] * 7]
        refilled = (time.monotonic() - started_s) * 10 / 60
        assert 10 <= spread.count(200) <= 10 + refilled
        assert spread[:10] == [200] * 10
    with open_router(acme, n_routers=2) as first, open_router(acme, n_routers=2) as second:
        started_s = time.monotonic()
        lopsided = [first.complete("acme").status_code for _ in range(8)]
        refilled = (time.monotonic() - started_s) * 5 / 60
        assert 5 <= lopsided.count(200) <= 5 + refilled
        assert second.complete("acme").status_code == 200


def test_the_tenants_file_may_state_the_number_of_routers(open_router: Any, until: Until) -> None:
    acme = {"acme": {"limits": {"requestsPerMinute": 8}}}
    with open_router(acme, n_routers=1, document={"routerReplicas": 4}) as router:
        answers = [router.complete("acme").status_code for _ in range(4)]
        assert answers == [200, 200, 429, 429]
        router.files.write(acme, routerReplicas=2)
        until(lambda: router.tenancy.n_routers == 2)
        assert router.complete("acme").status_code == 200


def pause_batches(router: Any, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Block every batch until the returned event is set."""
    resume, forward = threading.Event(), router.engine._model.forward

    def slow(*args: Any, **kwargs: Any) -> Any:
        resume.wait(120)
        return forward(*args, **kwargs)

    monkeypatch.setattr(router.engine._model, "forward", slow)
    return resume


def test_requests_above_the_concurrency_wait_and_more_are_rejected(
    open_router: Any, until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = {"maxConcurrentRequests": 2, "maxQueuedRequests": 1}
    with (
        open_router({"acme": {"limits": limits}, "beta": {}}, max_num_seqs=8) as router,
        ThreadPoolExecutor(4) as pool,
    ):
        resume = pause_batches(router, monkeypatch)
        answers = [pool.submit(router.complete, "acme") for _ in range(3)]
        until(lambda: router.engine.sequence_counts("acme") == (2, 1))
        assert router.metric("running_sequences", tenant="acme") == 2
        assert router.metric("waiting_sequences", tenant="acme") == 1
        refused = router.complete("acme")
        assert refused.status_code == 429
        assert "1 of your requests are queued already" in refused.json()["error"]["message"]
        assert refused.headers["retry-after"] == "1"
        other = pool.submit(router.complete, "beta")
        until(lambda: router.engine.sequence_counts("beta") == (1, 0))
        resume.set()
        assert {a.result().status_code for a in [*answers, other]} == {200}
        assert router.usage("acme")["requests"]["limited"] == 1


def test_a_flood_fills_only_its_own_share_of_the_queue(
    open_router: Any, until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        open_router({"flood": {}, "quiet": {}}, max_num_seqs=2, max_waiting=8) as router,
        ThreadPoolExecutor(24) as pool,
    ):
        resume = pause_batches(router, monkeypatch)
        flood = [pool.submit(router.complete, "flood") for _ in range(20)]
        until(lambda: router.engine.sequence_counts("flood") == (2, 4))
        until(lambda: router.usage("flood")["requests"]["limited"] == 14)
        quiet = pool.submit(router.complete, "quiet")
        until(lambda: sum(router.engine.sequence_counts("quiet")) == 1)
        resume.set()
        assert quiet.result().status_code == 200
        statuses = [answer.result().status_code for answer in flood]
        assert (statuses.count(200), statuses.count(429)) == (6, 14)


@pytest.mark.parametrize("stream", [False, True])
def test_a_disconnected_client_releases_its_slot_and_its_tokens(
    open_router: Any, until: Until, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    limits = {"maxConcurrentRequests": 1, "tokensPerMinute": 1000}
    with open_router({"acme": {"limits": limits}}) as router:
        resume = pause_batches(router, monkeypatch)
        headers = {"Authorization": "Bearer acme-key"}
        body = {"model": "tiny", "prompt": "a", "max_tokens": 200, "stream": stream}
        with ExitStack() as stack:
            for _ in range(3):
                if stream:
                    url = f"{router.url}/v1/completions"
                    stack.enter_context(
                        httpx.stream("POST", url, json=body, headers=headers, timeout=60)
                    )
                else:
                    with pytest.raises(httpx.ReadTimeout):
                        httpx.post(
                            f"{router.url}/v1/completions", json=body, headers=headers, timeout=1.0
                        )
        until(lambda: router.engine.sequence_counts("acme") == (0, 0))
        resume.set()
        until(lambda: router.usage("acme")["requests"]["cancelled"] == 3)
        answer = router.complete("acme", max_tokens=5)
        assert int(answer.headers["x-ratelimit-remaining-tokens"]) > 900


def test_waiting_requests_fail_when_the_server_shuts_down(
    open_router: Any, until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        open_router({"acme": {}}, max_num_seqs=1) as router,
        ThreadPoolExecutor(3) as pool,
    ):
        resume = pause_batches(router, monkeypatch)
        answers = [pool.submit(router.complete, "acme") for _ in range(3)]
        until(lambda: router.engine.sequence_counts("acme") == (1, 2))
        router.server.should_exit = True
        bodies = [json.loads(answer.result().content) for answer in answers]
        resume.set()
        assert {body["error"]["type"] for body in bodies} == {"server_error"}
