"""What a route answers, before it becomes bytes of HTTP."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from faasmoe_expert.wire.checksum import Buffer

FRAME = "application/vnd.faasmoe.frame"


@dataclass(frozen=True, slots=True)
class Answer:
    """Status, content type and body buffers of one HTTP answer; `headers` are further lines."""

    status: int
    content_type: str
    body: Sequence[Buffer]
    close: bool = False
    headers: str = ""

    @classmethod
    def of_json(cls, status: int, value: Any) -> Answer:
        """Return a JSON answer."""
        return cls(status, "application/json", [json.dumps(value).encode()])

    @classmethod
    def of_error(
        cls, status: int, code: str, message: str, *, field: str | None = None, close: bool = False
    ) -> Answer:
        """Return an error object; `close` ends the connection after it."""
        value = {"error": {"code": code, "message": message, "field": field}}
        return cls(status, "application/json", [json.dumps(value).encode()], close)

    def head(self, *, keep_alive: bool) -> bytes:
        """Return the status line and headers."""
        status_line = f"HTTP/1.1 {self.status} {HTTPStatus(self.status).phrase}\r\n"
        connection = "" if keep_alive else "connection: close\r\n"
        if self.status == HTTPStatus.NO_CONTENT:  # which has neither content nor its length
            return f"{status_line}{connection}\r\n".encode()
        size_bytes = sum(memoryview(part).nbytes for part in self.body)
        return (
            f"{status_line}content-type: {self.content_type}\r\n"
            f"content-length: {size_bytes}\r\n{self.headers}{connection}\r\n"
        ).encode()
