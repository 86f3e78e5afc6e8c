"""What a router takes from a gateway, and from nobody else."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from faasmoe_contracts.stream_records import RecordReader
from faasmoe_router.api.completions import stream_outputs
from faasmoe_router.api.origin import Origin
from faasmoe_router.api.resumption import (
    Resumption,
    ResumptionMiddleware,
    StreamJournal,
    get_front_tenant,
)
from faasmoe_router.engine.generation import CompletionOutput, Generation, NullUsageRecorder
from faasmoe_router.engine.journal import JournalEntry, Progress

ORIGIN = Origin("nonce", 123)
ENTRY = JournalEntry(0, Progress((5, 6)), 2)
JOURNAL = json.dumps([ORIGIN.nonce, ORIGIN.created_s]).encode() + b"\n" + ENTRY.dumps()
BODY = b'{"prompt":"a"}'


class Request:
    """One request through the middleware.

    Attributes:
        status: of the response.
        seen: the scope that the app got, and the body that it read; None if it got nothing.
    """

    def __init__(self, *parts: bytes, front_token: str = "secret", **headers: str) -> None:
        self.status = 0
        self.seen: tuple[dict[str, Any], bytes] | None = None
        fields = {"content-length": str(sum(map(len, parts))), **headers}
        scope = {
            "type": "http",
            "headers": [(n.replace("_", "-").encode(), v.encode()) for n, v in fields.items()],
        }
        self._incoming = [
            {"type": "http.request", "body": part, "more_body": index < len(parts) - 1}
            for index, part in enumerate(parts)
        ]
        middleware = ResumptionMiddleware(self._app, front_token=front_token)
        asyncio.run(middleware(scope, self._receive, self._send))

    async def _receive(self) -> dict[str, Any]:
        return self._incoming.pop(0) if self._incoming else {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        self.status = message.get("status", self.status)

    async def _app(self, scope: Any, receive: Any, send: Any) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        self.seen = (scope, body)


def journal_header(n_frames: int = 3) -> str:
    return f"{len(JOURNAL)} {n_frames}"


def test_other_requests_pass_unchanged() -> None:
    request = Request(BODY)
    assert request.seen is not None
    assert request.seen[1] == BODY
    assert "state" not in request.seen[0]


def test_front_is_recognized_and_its_headers_end_here() -> None:
    request = Request(BODY, x_faasmoe_front="secret")
    assert request.seen is not None
    scope, body = request.seen
    assert body == BODY
    assert scope["state"] == {"has_front": True}
    assert [name for name, _ in scope["headers"]] == [b"content-length"]


def test_front_says_whose_a_request_is() -> None:
    request = Request(BODY, x_faasmoe_front="secret", x_faasmoe_tenant="acme")
    assert request.seen is not None
    assert get_front_tenant(request.seen[0]) == "acme"
    assert [name for name, _ in request.seen[0]["headers"]] == [b"content-length"]


def test_front_says_where_ids_and_seed_come_from() -> None:
    request = Request(BODY, x_faasmoe_front="secret", x_faasmoe_origin="nonce 123")
    assert request.seen is not None
    assert request.seen[0]["state"] == {"has_front": True, "origin": ORIGIN}
    assert [name for name, _ in request.seen[0]["headers"]] == [b"content-length"]


@pytest.mark.parametrize("value", ["", "nonce", "nonce x", " 1", "a/b 1", f"{'n' * 65} 1", "n 1 "])
def test_origin_that_is_none_is_refused(value: str) -> None:
    request = Request(BODY, x_faasmoe_front="secret", x_faasmoe_origin=value)
    assert request.status == 400
    assert request.seen is None


@pytest.mark.parametrize(
    ("token", "headers"),
    [
        ("secret", {"x_faasmoe_front": "guess"}),
        ("secret", {"x_faasmoe_front": ""}),
        ("secret", {"x_faasmoe_journal": "1 1"}),
        ("secret", {"x_faasmoe_tenant": "acme"}),
        ("secret", {"x_faasmoe_origin": "nonce 1"}),
        ("secret", {"x_faasmoe_front": "guess", "x_faasmoe_tenant": "acme"}),
        ("", {"x_faasmoe_front": ""}),
        ("", {"x_faasmoe_front": "secret"}),
    ],
)
def test_nobody_else_is_taken_for_one(token: str, headers: dict[str, str]) -> None:
    request = Request(BODY, front_token=token, **headers)
    assert request.status == 403
    assert request.seen is None


@pytest.mark.parametrize("n", [1, 7, 1000])
def test_journal_is_taken_off_the_body_however_it_arrives(n: int) -> None:
    content = JOURNAL + BODY
    parts = [content[i : i + n] for i in range(0, len(content), n)]
    request = Request(*parts, x_faasmoe_front="secret", x_faasmoe_journal=journal_header())
    assert request.seen is not None
    scope, body = request.seen
    assert body == BODY
    assert dict(scope["headers"])[b"content-length"] == str(len(BODY)).encode()
    assert scope["state"]["origin"] == ORIGIN
    assert scope["state"]["resumption"] == Resumption(ORIGIN, [ENTRY], 3)


@pytest.mark.parametrize(
    ("journal", "header"),
    [
        (b"[1]\n", "4 1"),
        (b"{}\n", "3 1"),
        (b'["a",1]\nx\n', "10 1"),
        (b'["a",1]\n', "100 1"),
        (b'["a",1]\n', "0 1"),
        (b'["a",1]\n', "x"),
        (b'["a",1]\n', f"{1 << 40} 1"),
    ],
)
def test_journal_that_is_none_is_refused(journal: bytes, header: str) -> None:
    request = Request(journal + BODY, x_faasmoe_front="secret", x_faasmoe_journal=header)
    assert request.status == 400
    assert request.seen is None


def test_journal_is_told_with_the_next_frame_and_known_frames_are_left_out() -> None:
    async def outputs() -> Any:
        for token in (5, 6, 7):
            yield 0, CompletionOutput("a", 1, progress=Progress((token,)))

    async def frames(watched: Any) -> Any:
        yield b"first"
        async for _, output in watched:
            if output.progress.token_ids != (6,):  # its text is held back
                yield b"frame"

    async def records(resumption: Resumption | None) -> list[bytes]:
        journal = StreamJournal(ORIGIN, resumption)
        return [record async for record in journal.records(frames(journal.watch(outputs())))]

    whole = asyncio.run(records(None))
    assert len(whole) == 3
    read = [record for data in whole for record in RecordReader().feed(data)]
    assert [record.n_tokens for record in read] == [0, 1, 2]
    assert b"nonce" in whole[0]
    assert whole[1].endswith(b"[0,[5],null,0]\nframe")
    assert whole[2].endswith(b"[0,[6],null,0]\n[0,[7],null,0]\nframe")
    known = Resumption(ORIGIN, [JournalEntry(0, Progress((5,)))], 2)
    assert asyncio.run(records(known)) == whole[2:]


def test_usage_is_recorded_before_the_end_of_a_stream_is_sent() -> None:
    class Recorder(NullUsageRecorder):
        is_finished = False

        def finish(self) -> None:
            self.is_finished = True

    recorder = Recorder()

    async def start() -> Generation:
        generation = Generation(1, lambda: None, recorder)
        generation.put_output(0, CompletionOutput("a", 1, finish_reason="stop"))
        return generation

    async def work() -> None:
        async for _ in stream_outputs(start):
            assert not recorder.is_finished
        assert recorder.is_finished

    asyncio.run(work())


def test_ids_and_draws_follow_from_the_origin() -> None:
    same = Origin(ORIGIN.nonce, 9)
    assert same.hex_id("a", 1) == ORIGIN.hex_id("a", 1)
    assert same.seed == ORIGIN.seed
    assert 0 <= same.seed < 1 << 63
    assert ORIGIN.hex_id("a", 1) != ORIGIN.hex_id("a", 2)
    assert Origin().seed != Origin().seed
    assert ORIGIN.characters("ab", 9, "x") == ORIGIN.characters("ab", 9, "x")
    assert set(ORIGIN.characters("ab", 99, "x")) == {"a", "b"}
    assert ORIGIN.nonce not in repr(ORIGIN)
