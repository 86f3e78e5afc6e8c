import asyncio

from fastapi import Request

from faasmoe_router.api.activation import COLD_START_HEADER, AlwaysActivated, queue_until_activated
from faasmoe_router.engine.generation import GenerationRequest


class FakeActivator(AlwaysActivated):
    """Holds what has three tokens or more, and writes down what it held."""

    def __init__(self) -> None:
        self.queued: list[tuple[int, int]] = []

    def is_activated_for(self, n_tokens: int) -> bool:
        return n_tokens < 3

    async def wait_for_activation(self, n_tokens: int, *, size_bytes: int) -> float:
        self.queued.append((n_tokens, size_bytes))
        return 0.5


def request(body: bytes) -> Request:
    parts = [body]

    async def receive() -> dict[str, object]:
        if not parts:
            await asyncio.Event().wait()
        return {"type": "http.request", "body": parts.pop()}

    return Request({"type": "http", "method": "POST", "headers": []}, receive)


def response_headers(activator: FakeActivator, *prompts: tuple[int, ...]) -> dict[str, str]:
    requests = [GenerationRequest(prompt, 1) for prompt in prompts]
    return asyncio.run(queue_until_activated(activator, request(b"12345"), requests))


def test_what_need_not_wait_has_no_header() -> None:
    admission = FakeActivator()
    assert response_headers(admission, (1, 2)) == {}
    assert admission.queued == []


def test_what_waited_says_for_how_long() -> None:
    admission = FakeActivator()
    assert response_headers(admission, (1, 2, 3)) == {COLD_START_HEADER: "0.500"}
    assert admission.queued == [(3, 5)]


def test_choices_of_one_prompt_count_once_and_prompts_together() -> None:
    admission = FakeActivator()
    assert response_headers(admission, (1, 2), (1, 2), (1, 2)) == {}
    response_headers(admission, (1, 2), (3, 4))
    assert admission.queued == [(4, 5)]


def test_by_default_nothing_is_held() -> None:
    assert AlwaysActivated().is_activated_for(10**9)
