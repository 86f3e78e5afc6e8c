"""What a route answers, before it becomes bytes of HTTP."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from faasmoe_expert.wire.request import Buffer

FRAME = "application/vnd.faasmoe.frame"


@dataclass(frozen=True, slots=True)
class Answer:
    """Status, content type and body buffers of one HTTP answer."""

    status: int
    content_type: str
    body: Sequence[Buffer]
    close: bool = False

    @classmethod
    def of_json(cls, status: int, value: Any) -> Answer:
        """Return a JSON answer."""
        return cls(status, "application/json", [json.dumps(value).encode()])

    @classmethod
    def of_error(cls, status: int, code: str, message: str, *, close: bool = False) -> Answer:
        """Return an error object; `close` ends the connection after it."""
        body = json.dumps({"error": {"code": code, "message": message, "field": None}}).encode()
        return cls(status, "application/json", [body], close)

    def head(self, *, keep_alive: bool) -> bytes:
        """Return the status line and headers."""
        size_bytes = sum(len(memoryview(part).cast("B")) for part in self.body)
        connection = "" if keep_alive else "connection: close\r\n"
        return (
            f"HTTP/1.1 {self.status} {HTTPStatus(self.status).phrase}\r\n"
            f"content-type: {self.content_type}\r\ncontent-length: {size_bytes}\r\n"
            f"{connection}\r\n"
        ).encode()
