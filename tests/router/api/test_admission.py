import asyncio

from fastapi import Request

from faasmoe_router.api.admission import (
    COLD_START_HEADER,
    TOKEN_OBJECT_BYTES,
    AlwaysActivated,
    queue_until_activated,
)
from faasmoe_router.engine.generation import GenerationRequest
from faasmoe_tracing import NO_SPAN, Span


class FakeActivator(AlwaysActivated):
    """Queues requests of three tokens or more and records them."""

    def __init__(self) -> None:
        self.queued: list[tuple[int, int]] = []

    def is_activated_for(self, n_tokens: int) -> bool:
        return n_tokens < 3

    async def wait_for_activation(
        self, n_tokens: int, *, size_bytes: int, span: Span = NO_SPAN
    ) -> float:
        self.queued.append((n_tokens, size_bytes))
        return 0.5


def http_request(body: bytes) -> Request:
    chunks = [body]

    async def receive() -> dict[str, object]:
        if not chunks:
            await asyncio.Event().wait()
        return {"type": "http.request", "body": chunks.pop()}

    return Request({"type": "http", "method": "POST", "headers": []}, receive)


def response_headers(activator: FakeActivator, *prompts: tuple[int, ...]) -> dict[str, str]:
    requests = [GenerationRequest(prompt, 1) for prompt in prompts]
    return asyncio.run(queue_until_activated(activator, http_request(b"12345"), requests))


def test_request_that_is_not_queued_has_no_cold_start_header() -> None:
    activator = FakeActivator()
    assert response_headers(activator, (1, 2)) == {}
    assert activator.queued == []


def test_queued_request_reports_its_waiting_time() -> None:
    activator = FakeActivator()
    assert response_headers(activator, (1, 2, 3)) == {COLD_START_HEADER: "0.500"}
    assert activator.queued == [(3, 3 * TOKEN_OBJECT_BYTES)]


def test_choices_of_one_prompt_count_once_and_prompts_add_up() -> None:
    activator = FakeActivator()
    assert response_headers(activator, (1, 2), (1, 2), (1, 2)) == {}
    response_headers(activator, (1, 2), (3, 4))
    assert activator.queued == [(4, 4 * TOKEN_OBJECT_BYTES)]


def test_default_activator_queues_nothing() -> None:
    assert AlwaysActivated().is_activated_for(10**9)
