"""HTTP client of the control plane's API: table stream, load and usage reports, activation.

Translates between the messages of `faasmoe_contracts` and HTTP, and every failure to ControlError.
Retries nothing: each caller decides that for itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp

from faasmoe_contracts.control_messages import (
    ActivationRequest,
    LineDecoder,
    LoadReport,
    TableMessage,
    TableVersion,
    parse_table_message,
)
from faasmoe_contracts.json_reader import ContractError, parse_json
from faasmoe_contracts.routing_table import RoutingTableError
from faasmoe_contracts.tls import TlsPeer
from faasmoe_contracts.usage import ClusterTotals, UsageReport
from faasmoe_router.errors import ControlProtocolError, ControlRejected, ControlUnreachable
from faasmoe_tracing import TRACEPARENT

MAX_REASON_BYTES = 500
MAX_RESPONSE_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class ControlTimeouts:
    """Timeouts of calls to the control plane, in seconds.

    Attributes:
        connect_s: for a connection to be established.
        request_s: for a whole call other than the table stream.
        stream_idle_s: between two messages of the table stream, which pings every 5 s.
    """

    connect_s: float = 2.0
    request_s: float = 3.0
    stream_idle_s: float = 15.0


class ControlClient:
    """Client of one control process.

    Args:
        url: base URL of the API.
        token: bearer token; empty sends none.
        timeouts: timeouts of the calls.
        tls: how the control plane is known at an https URL; None trusts the system's authorities.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str = "",
        timeouts: ControlTimeouts | None = None,
        tls: TlsPeer | None = None,
    ) -> None:
        self._tls = tls
        self._timeouts = timeouts or ControlTimeouts()
        self._url = url
        self._headers = {"authorization": f"Bearer {token}"} if token else {}
        self._session: aiohttp.ClientSession | None = None  # opened within the event loop

    async def watch_table(self, resume_from: TableVersion | None) -> AsyncGenerator[TableMessage]:
        """Yield the messages of the table stream.

        Args:
            resume_from: version that the caller has; the stream starts with a snapshot if this is
                None or the control plane no longer knows the changes since.

        Raises:
            ControlUnreachable: the connection failed or was idle for too long.
            ControlRejected: the control plane answered with an error status.
            ControlProtocolError: a message violates the contract.
        """
        params: dict[str, str | int] = {}
        if resume_from:
            params = {"epoch": resume_from.epoch, "version": resume_from.version}
        decoder = LineDecoder()
        async with self._request("GET", "/v1/table", params=params) as response:
            async for chunk in response.content.iter_any():
                for message in _decode_messages(decoder, chunk):
                    yield message

    async def report_load(self, report: LoadReport) -> None:
        """Send a load report; raises ControlUnreachable or ControlRejected."""
        await self._post("/v1/load", report.to_json())

    async def request_activation(
        self, request: ActivationRequest, *, traceparent: str = ""
    ) -> None:
        """Ask for functions to be activated; raises ControlUnreachable or ControlRejected.

        Args:
            request: which functions.
            traceparent: the span that waits for them; empty for none.
        """
        headers = {TRACEPARENT: traceparent} if traceparent else {}
        await self._post("/v1/wake", request.to_json(), headers=headers)

    async def report_usage(self, report: UsageReport) -> ClusterTotals:
        """Report this router's totals and return those of all routers; raises ControlError."""
        content = await self._post("/v1/usage", report.to_json())
        try:
            return ClusterTotals.from_json(parse_json(content, field="/v1/usage"))
        except ContractError as error:
            raise ControlProtocolError(str(error)) from error

    async def close(self) -> None:
        """Close the connections."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def _post(
        self, path: str, body: dict[str, Any], *, headers: Mapping[str, str] | None = None
    ) -> bytes:
        try:
            async with (
                asyncio.timeout(self._timeouts.request_s),
                self._request("POST", path, json=body, headers=headers) as response,
            ):
                return await _read_content(path, response)
        except TimeoutError as error:
            raise ControlUnreachable(
                f"{path}: no response within {self._timeouts.request_s:g} s"
            ) from error

    @asynccontextmanager
    async def _request(
        self, method: str, path: str, **kwargs: Any
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        if self._tls is not None:
            kwargs |= {"ssl": self._tls.context(), "server_hostname": self._tls.name}
        try:
            async with self._open_session().request(
                method, f"{self._url}{path}", allow_redirects=False, **kwargs
            ) as response:
                if response.status // 100 != 2:
                    raise ControlRejected(response.status, await _read_reason(response))
                yield response
        except (aiohttp.ClientError, TimeoutError) as error:
            raise ControlUnreachable(f"{path}: {error or type(error).__name__}") from error

    def _open_session(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                headers=self._headers,
                timeout=aiohttp.ClientTimeout(
                    connect=self._timeouts.connect_s,  # name resolution included
                    sock_read=self._timeouts.stream_idle_s,
                ),
                trust_env=False,  # proxies of the environment do not apply within the cluster
            )
        return self._session


def _decode_messages(decoder: LineDecoder, chunk: bytes) -> Iterator[TableMessage]:
    try:
        for line in decoder.feed(chunk):
            yield parse_table_message(line)
    except (ContractError, RoutingTableError) as error:
        raise ControlProtocolError(str(error)) from error


async def _read_content(path: str, response: aiohttp.ClientResponse) -> bytes:
    content = b""
    async for chunk in response.content.iter_any():
        content += chunk
        if len(content) > MAX_RESPONSE_BYTES:
            raise ControlProtocolError(f"{path}: got more than {MAX_RESPONSE_BYTES} bytes")
    return content


async def _read_reason(response: aiohttp.ClientResponse) -> str:
    return (await response.content.read(MAX_REASON_BYTES)).decode("utf-8", "replace")
