"""Client of the control API: the table stream, load reports, usage and wakes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from faasmoe_router.control.messages import LineDecoder, TableMessage, TableVersion, parse_message
from faasmoe_router.errors import ControlProtocolError, ControlRejected, ControlUnreachable

MAX_REASON_BYTES = 500
MAX_RESPONSE_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class ControlTimeouts:
    """How long calls to the control plane may take, in seconds.

    Attributes:
        connect_s: until a connection is there.
        call_s: a whole load report or wake.
        silence_s: between two messages of the table stream, which pings every 5 s.
    """

    connect_s: float = 2.0
    request_s: float = 3.0
    stream_idle_s: float = 15.0


class ControlClient:
    """Calls one control process."""

    def __init__(
        self, url: str, *, token: str = "", timeouts: ControlTimeouts | None = None
    ) -> None:
        self._timeouts = timeouts or ControlTimeouts()
        self._http = httpx.AsyncClient(
            base_url=url,
            headers={"authorization": f"Bearer {token}"} if token else {},
            timeout=httpx.Timeout(self._timeouts.stream_idle_s, connect=self._timeouts.connect_s),
            trust_env=False,  # a proxy of the environment is not for calls within the cluster
        )

    async def watch_table(self, resume_from: TableVersion | None) -> AsyncGenerator[TableMessage]:
        """Yield the table's messages, from a place on if the control plane remembers it.

        Raises:
            Unreachable: it is away, or silent for too long.
            Rejected: it does not want to tell.
            Garbage: it sent nonsense.
        """
        params = {"epoch": resume_from.epoch, "version": resume_from.version} if resume_from else {}
        decoder = LineDecoder()
        async with self._request("GET", "/v1/table", params=params) as response:
            async for chunk in response.aiter_bytes():
                for line in decoder.feed(chunk):
                    yield parse_message(line)

    async def report_load(self, body: dict[str, Any]) -> None:
        """Send a load report; raises Unreachable or Rejected."""
        await self._post("/v1/load", body)

    async def request_activation(self, body: dict[str, Any]) -> None:
        """Ask for functions; raises Unreachable or Rejected."""
        await self._post("/v1/wake", body)

    async def report_usage(self, body: dict[str, Any]) -> Any:
        """Tell a book's totals; return those of all books; raises ControlError."""
        content = await self._post("/v1/usage", body)
        try:
            return json.loads(content)
        except (ValueError, RecursionError) as error:
            raise ControlProtocolError(f"/v1/usage: not JSON: {error}") from error

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def _post(self, path: str, body: dict[str, Any]) -> bytes:
        try:
            async with (
                asyncio.timeout(self._timeouts.request_s),
                self._request("POST", path, json=body) as response,
            ):
                return await _read_content(path, response)
        except TimeoutError as error:
            raise ControlUnreachable(
                f"{path}: no answer in {self._timeouts.request_s:g} s"
            ) from error

    @asynccontextmanager
    async def _request(
        self, method: str, path: str, **kwargs: Any
    ) -> AsyncIterator[httpx.Response]:
        try:
            async with self._http.stream(method, path, **kwargs) as response:
                if not response.is_success:
                    raise ControlRejected(response.status_code, await _read_reason(response))
                yield response
        except httpx.HTTPError as error:
            raise ControlUnreachable(f"{path}: {error or type(error).__name__}") from error


async def _read_content(path: str, response: httpx.Response) -> bytes:
    content = b""
    async for chunk in response.aiter_bytes():
        content += chunk
        if len(content) > MAX_RESPONSE_BYTES:
            raise ControlProtocolError(f"{path}: got more than {MAX_RESPONSE_BYTES} bytes")
    return content


async def _read_reason(response: httpx.Response) -> str:
    async for chunk in response.aiter_bytes(MAX_REASON_BYTES):
        return chunk.decode("utf-8", "replace")
    return ""
