import asyncio

from fastapi import Request

from faasmoe_router.api.admission import COLD_START_HEADER, OpenAdmission, admit
from faasmoe_router.engine.generation import GenerationRequest


class Admission(OpenAdmission):
    """Holds what has three tokens or more, and writes down what it held."""

    def __init__(self) -> None:
        self.held: list[tuple[int, int]] = []

    def is_open_for(self, n_tokens: int) -> bool:
        return n_tokens < 3

    async def hold(self, n_tokens: int, *, size_bytes: int) -> float:
        self.held.append((n_tokens, size_bytes))
        return 0.5


def request(body: bytes) -> Request:
    parts = [body]

    async def receive() -> dict[str, object]:
        if not parts:
            await asyncio.Event().wait()
        return {"type": "http.request", "body": parts.pop()}

    return Request({"type": "http", "method": "POST", "headers": []}, receive)


def headers_of(admission: Admission, *prompts: tuple[int, ...]) -> dict[str, str]:
    requests = [GenerationRequest(prompt, 1) for prompt in prompts]
    return asyncio.run(admit(admission, request(b"12345"), requests))


def test_what_need_not_wait_has_no_header() -> None:
    admission = Admission()
    assert headers_of(admission, (1, 2)) == {}
    assert admission.held == []


def test_what_waited_says_for_how_long() -> None:
    admission = Admission()
    assert headers_of(admission, (1, 2, 3)) == {COLD_START_HEADER: "0.500"}
    assert admission.held == [(3, 5)]


def test_choices_of_one_prompt_count_once_and_prompts_together() -> None:
    admission = Admission()
    assert headers_of(admission, (1, 2), (1, 2), (1, 2)) == {}
    headers_of(admission, (1, 2), (3, 4))
    assert admission.held == [(4, 5)]


def test_by_default_nothing_is_held() -> None:
    assert OpenAdmission().is_open_for(10**9)
