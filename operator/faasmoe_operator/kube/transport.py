"""Requests to the API server: timeouts, what is sent again and when, what an answer means.

Only what may be sent twice is sent again when no answer came: all but `create`. A 429 was not
looked at by the server, so that is repeated for all. The last error is raised.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Mapping
from typing import Any

import aiohttp
from kubernetes.aio.client.api_client import ApiClient
from kubernetes.aio.client.configuration import Configuration
from kubernetes.aio.client.exceptions import ApiException

from faasmoe_operator.kube.errors import ApiError, Unavailable, error_of
from faasmoe_operator.kube.kinds import Kind, Object

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 5.0
REQUEST_TIMEOUT_S = 30.0
RETRY_DELAYS_S = (0.2, 1.0, 3.0)
MAX_RETRY_AFTER_S = 10.0
JSON = "application/json"
AUTH = ["BearerToken"]
METHODS = {
    "get": "GET",
    "list": "GET",
    "discover": "GET",
    "create": "POST",
    "apply": "PATCH",
    "patch": "PATCH",
    "patch_status": "PATCH",
    "delete": "DELETE",
}

Count = Callable[[str, Kind, int], None]


def count_nothing(verb: str, kind: Kind, status: int) -> None:
    """Count no requests."""


class Transport:
    """Sends requests to the API server.

    Args:
        configuration: the server and who we are.
        count: told of each request: its verb, kind and HTTP status (0 for no answer).
        retry_delays_s: pauses before an unanswered request is sent again.
        request_timeout_s: for one request and its answer.
    """

    def __init__(
        self,
        configuration: Configuration,
        *,
        count: Count = count_nothing,
        retry_delays_s: tuple[float, ...] = RETRY_DELAYS_S,
        request_timeout_s: float = REQUEST_TIMEOUT_S,
    ) -> None:
        self._client = ApiClient(configuration)
        self._count = count
        self._retry_delays_s = retry_delays_s
        self._timeout = aiohttp.ClientTimeout(total=request_timeout_s, connect=CONNECT_TIMEOUT_S)

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    async def request(self, verb: str, kind: Kind, path: str, **rest: Any) -> Object:
        """Send a request, again if that may help; return its answer or raise ApiError.

        Args:
            verb: one of METHODS.
            kind: what it is about, for the count.
            path: the path.
            rest: query, body, and the body's content type.
        """
        for delay_s in (*self._retry_delays_s, None):
            try:
                return await self._ask(verb, kind, path, **rest)
            except Unavailable as error:
                wait_s = _pause(error, delay_s, repeatable=verb != "create")
                if wait_s is None:
                    raise
                logger.info("%s %s is asked again in %.1f s: %s", verb, kind, wait_s, error)
                await asyncio.sleep(wait_s)
        raise AssertionError("the last attempt raises or returns")

    async def _ask(
        self,
        verb: str,
        kind: Kind,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Object | None = None,
        content: str = JSON,
    ) -> Object:
        """Send one request, count it, and return its answer."""
        status = 0
        try:
            status, text, headers = await self._send(
                METHODS[verb], path, query=query or {}, body=body, content=content
            )
        except (aiohttp.ClientError, ApiException, OSError, TimeoutError) as error:
            detail = str(error) or type(error).__name__
            raise Unavailable(f"{verb} {path}: {detail}", status=0, reason="NoAnswer") from error
        finally:
            self._count(verb, kind, status)
        return _read(f"{verb} {path}", status, text, headers)

    async def _send(
        self, method: str, path: str, *, query: Mapping[str, str], body: Object | None, content: str
    ) -> tuple[int, bytes, Mapping[str, str]]:
        request = await self._client.param_serialize(
            method,
            path,
            query_params=list(query.items()),
            header_params={"Accept": JSON, "Content-Type": content},
            body=body,
            auth_settings=AUTH,
        )
        response = await self._client.call_api(*request, _request_timeout=self._timeout)
        return response.status, await response.read(), response.headers


def _pause(error: Unavailable, delay_s: float | None, *, repeatable: bool) -> float | None:
    """Return how long to wait before asking again; None if the error is to be raised."""
    if delay_s is None or not (repeatable or error.status == 429):
        return None
    if error.retry_after_s is None:
        return delay_s
    return error.retry_after_s if error.retry_after_s <= MAX_RETRY_AFTER_S else None


def _read(what: str, status: int, text: bytes, headers: Mapping[str, str]) -> Object:
    """Return the answer's object; raises the ApiError that it stands for."""
    try:
        answer = json.loads(text)
    except ValueError:
        answer = None
    if 200 <= status < 300:
        if isinstance(answer, dict):
            return answer
        raise ApiError(f"{what}: got no JSON object", status=status, reason="NotJson")
    said = answer if isinstance(answer, dict) else {}
    message = said.get("message") or text[:200].decode(errors="replace") or "no reason given"
    raise error_of(
        status,
        reason=said.get("reason") or "",
        message=f"{what}: {message}",
        retry_after_s=_retry_after(headers.get("Retry-After", "")),
    )


def _retry_after(text: str) -> float | None:
    return float(text) if text.isascii() and text.isdecimal() else None
