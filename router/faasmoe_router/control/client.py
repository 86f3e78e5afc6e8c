"""Client of the control API: the table stream, load reports, usage and wakes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from faasmoe_router.control.errors import Garbage, Rejected, Unreachable
from faasmoe_router.control.messages import Lines, Message, Place, read_message

SHOWN_REASON_BYTES = 500
MAX_ANSWER_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class ControlTimeouts:
    """How long calls to the control plane may take, in seconds.

    Attributes:
        connect_s: until a connection is there.
        call_s: a whole load report or wake.
        silence_s: between two messages of the table stream, which pings every 5 s.
    """

    connect_s: float = 2.0
    call_s: float = 3.0
    silence_s: float = 15.0


class ControlClient:
    """Calls one control process."""

    def __init__(
        self, url: str, *, token: str = "", timeouts: ControlTimeouts | None = None
    ) -> None:
        self._timeouts = timeouts or ControlTimeouts()
        self._http = httpx.AsyncClient(
            base_url=url,
            headers={"authorization": f"Bearer {token}"} if token else {},
            timeout=httpx.Timeout(self._timeouts.silence_s, connect=self._timeouts.connect_s),
            trust_env=False,  # a proxy of the environment is not for calls within the cluster
        )

    async def follow(self, place: Place | None) -> AsyncGenerator[Message]:
        """Yield the table's messages, from a place on if the control plane remembers it.

        Raises:
            Unreachable: it is away, or silent for too long.
            Rejected: it does not want to tell.
            Garbage: it sent nonsense.
        """
        params = {"epoch": place.epoch, "version": place.version} if place else {}
        lines = Lines()
        async with self._call("GET", "/v1/table", params=params) as response:
            async for chunk in response.aiter_bytes():
                for line in lines.feed(chunk):
                    yield read_message(line)

    async def report(self, body: dict[str, Any]) -> None:
        """Send a load report; raises Unreachable or Rejected."""
        await self._post("/v1/load", body)

    async def wake(self, body: dict[str, Any]) -> None:
        """Ask for functions; raises Unreachable or Rejected."""
        await self._post("/v1/wake", body)

    async def usage(self, body: dict[str, Any]) -> Any:
        """Tell a book's totals; return those of all books; raises ControlError."""
        content = await self._post("/v1/usage", body)
        try:
            return json.loads(content)
        except (ValueError, RecursionError) as error:
            raise Garbage(f"/v1/usage: not JSON: {error}") from error

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def _post(self, path: str, body: dict[str, Any]) -> bytes:
        try:
            async with (
                asyncio.timeout(self._timeouts.call_s),
                self._call("POST", path, json=body) as response,
            ):
                return await _content(path, response)
        except TimeoutError as error:
            raise Unreachable(f"{path}: no answer in {self._timeouts.call_s:g} s") from error

    @asynccontextmanager
    async def _call(self, method: str, path: str, **given: Any) -> AsyncIterator[httpx.Response]:
        try:
            async with self._http.stream(method, path, **given) as response:
                if not response.is_success:
                    raise Rejected(response.status_code, await _reason(response))
                yield response
        except httpx.HTTPError as error:
            raise Unreachable(f"{path}: {error or type(error).__name__}") from error


async def _content(path: str, response: httpx.Response) -> bytes:
    content = b""
    async for chunk in response.aiter_bytes():
        content += chunk
        if len(content) > MAX_ANSWER_BYTES:
            raise Garbage(f"{path}: got more than {MAX_ANSWER_BYTES} bytes")
    return content


async def _reason(response: httpx.Response) -> str:
    async for chunk in response.aiter_bytes(SHOWN_REASON_BYTES):
        return chunk.decode("utf-8", "replace")
    return ""
