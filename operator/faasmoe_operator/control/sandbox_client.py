"""HTTP client of the sandboxes' control API: attach, detach and list functions.

Every failure is a `SandboxClientError` whose `code` is either the sandbox's own error code or one
of `timeout`, `unreachable` and `protocol_error`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlencode

import aiohttp
from yarl import URL

from faasmoe_contracts.routing_table import FunctionSpec, RoutingTableError
from faasmoe_contracts.tls import TlsPeer
from faasmoe_operator.aio import http_scheme
from faasmoe_operator.errors import FaasmoeError

MAX_RESPONSE_BYTES = 8 << 20
CONNECTIONS_PER_SANDBOX = 4  # a sandbox processes one call at a time; more only add latency


class SandboxClientError(FaasmoeError):
    """A sandbox refused a call, did not respond, or sent an invalid response.

    Attributes:
        address: the sandbox's `host:port`.
        code: the error code of the sandbox; else `timeout`, `unreachable` or `protocol_error`.
        status: the HTTP status, or None without a response.
        field: the field of the request that the sandbox refused, or None.
    """

    def __init__(
        self,
        message: str,
        *,
        address: str,
        code: str,
        status: int | None = None,
        field: str | None = None,
    ) -> None:
        super().__init__(f"sandbox {address}: {message}")
        self.address, self.code, self.status, self.field = address, code, status, field


@dataclass(frozen=True, slots=True)
class SandboxClientTimeouts:
    """Timeouts of calls to a sandbox.

    Attributes:
        connect_timeout_s: timeout of a connection attempt.
        list_timeout_s: timeout of listing functions.
        attach_timeout_s: timeout of an attach, which may have to read the weights from a disk; of
            several functions in one call as well.
        detach_timeout_s: timeout of a detach, which waits for calls in progress.
    """

    connect_timeout_s: float = 2.0
    list_timeout_s: float = 5.0
    attach_timeout_s: float = 60.0
    detach_timeout_s: float = 30.0


@dataclass(frozen=True, slots=True)
class ModelStore:
    """The store that functions are attached from.

    Attributes:
        path: the store's folder in the sandboxes.
        model_digest: expected digest of its manifest.
    """

    path: Path
    model_digest: str


@dataclass(frozen=True, slots=True)
class AttachedFunction:
    """A function that a sandbox holds.

    Attributes:
        spec: its id, layers and experts.
        model_digest: digest of the store that it was attached from.
        size_bytes: size of its weights.
        n_frames: number of frames that it has computed in this sandbox.
        store: the store's folder; None if the sandbox does not tell.
    """

    spec: FunctionSpec
    model_digest: str
    size_bytes: int
    n_frames: int = 0
    store: Path | None = None


@dataclass(frozen=True, slots=True)
class SandboxListing:
    """A sandbox's functions and memory limit.

    Attributes:
        functions: the attached functions.
        memory_limit_bytes: current memory limit of all its functions together; None for no limit.
    """

    functions: tuple[AttachedFunction, ...]
    memory_limit_bytes: int | None = None


class SandboxClient:
    """Calls sandboxes; use as an async context manager.

    Args:
        token: bearer token of the sandboxes; empty for none.
        timeouts: timeouts of the calls.
        tls: how the sandboxes are known; None calls them without TLS.
    """

    def __init__(
        self,
        *,
        token: str,
        timeouts: SandboxClientTimeouts | None = None,
        tls: TlsPeer | None = None,
    ) -> None:
        self._tls = tls
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._timeouts = timeouts or SandboxClientTimeouts()

    async def __aenter__(self) -> Self:
        """Open the connection pool."""
        connector = aiohttp.TCPConnector(limit=0, limit_per_host=CONNECTIONS_PER_SANDBOX)
        self._http = aiohttp.ClientSession(headers=self._headers, connector=connector)
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close every connection."""
        await self._http.close()

    async def attach(self, address: str, function: FunctionSpec, *, store: ModelStore) -> None:
        """Attach a function; idempotent. Raises SandboxClientError."""
        body = {"store": str(store.path), "model_digest": store.model_digest, **function.to_json()}
        timeout_s = self._timeouts.attach_timeout_s
        await self._call("PUT", address, f"/{function.id}", timeout_s=timeout_s, body=body)

    async def attach_all(
        self, address: str, functions: Sequence[FunctionSpec], *, store: ModelStore
    ) -> dict[str, SandboxClientError]:
        """Attach functions with one call, in order; idempotent.

        Returns:
            The errors of those that were refused, by id.

        Raises:
            SandboxClientError: the call failed, so that any of them may be attached.
        """
        if len(functions) == 1:
            await self.attach(address, functions[0], store=store)
            return {}
        body = {
            "store": str(store.path),
            "model_digest": store.model_digest,
            "functions": [function.to_json() for function in functions],
        }
        timeout_s = self._timeouts.attach_timeout_s
        response = await self._call("PUT", address, "", timeout_s=timeout_s, body=body)
        return _parse_refusals(address, response, {function.id for function in functions})

    async def detach(self, address: str, function_id: str) -> None:
        """Detach a function; does nothing if it is not attached. Raises SandboxClientError."""
        timeout_s = self._timeouts.detach_timeout_s
        try:
            await self._call("DELETE", address, f"/{function_id}", timeout_s=timeout_s)
        except SandboxClientError as error:
            if error.status != 404:
                raise

    async def detach_all(self, address: str, store: Path) -> None:
        """Detach all functions of a store, those that are being attached from it included.

        Raises:
            SandboxClientError: the call failed.
        """
        timeout_s = self._timeouts.detach_timeout_s
        await self._call("DELETE", address, "", timeout_s=timeout_s, body={"store": str(store)})

    async def list(self, address: str, *, store: Path | None = None) -> SandboxListing:
        """Return a sandbox's functions and its memory limit. Raises SandboxClientError.

        Args:
            address: the sandbox's.
            store: lists only functions that were attached from it; None lists all.
        """
        timeout_s = self._timeouts.list_timeout_s
        query = "" if store is None else "?" + urlencode({"store": str(store)})
        response = await self._call("GET", address, query, timeout_s=timeout_s)
        try:
            functions = tuple(
                _parse_attached_function(function) for function in response["functions"]
            )
            return SandboxListing(functions, _memory_limit(response))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise _protocol_error(address, 200, f"functions: {error}") from error

    async def _call(
        self, method: str, address: str, path: str, *, timeout_s: float, body: Any = None
    ) -> dict[str, Any]:
        timeout = aiohttp.ClientTimeout(
            total=timeout_s, sock_connect=self._timeouts.connect_timeout_s
        )
        scheme, secured = http_scheme(self._tls)
        url = URL(f"{scheme}://{address}/v1/functions{path}", encoded=True)
        try:
            async with self._http.request(
                method, url, json=body, timeout=timeout, **secured
            ) as response:
                content = await response.content.read(MAX_RESPONSE_BYTES)
                return _parse_response(address, response.status, content)
        except TimeoutError as error:
            raise SandboxClientError(
                f"{method} {path}: no response within {timeout_s:g} s",
                address=address,
                code="timeout",
            ) from error
        except aiohttp.ClientError as error:
            raise SandboxClientError(
                f"{method} {path}: {error}", address=address, code="unreachable"
            ) from error


def _parse_response(address: str, status: int, content: bytes) -> dict[str, Any]:
    if status == 204:
        return {}
    try:
        body = json.loads(content)
    except ValueError as error:
        raise _protocol_error(address, status, f"status {status} without JSON") from error
    if not isinstance(body, dict):
        raise _protocol_error(address, status, f"got {type(body).__name__}, expected an object")
    if status < 300:
        return body
    error_body = body.get("error")
    if not isinstance(error_body, dict):
        raise _protocol_error(address, status, f"status {status} without an error object")
    raise _reported_error(address, status, error_body)


def _parse_refusals(
    address: str, response: dict[str, Any], expected: set[str]
) -> dict[str, SandboxClientError]:
    """Return the errors in the response to several attachments, by function."""
    results = response.get("functions")
    if not isinstance(results, list) or not all(isinstance(result, dict) for result in results):
        results = []
    if {str(result.get("id")) for result in results} != expected:
        raise _protocol_error(address, 200, "functions: expected each of those to attach")
    return {
        str(result["id"]): _reported_error(address, 200, result["error"])
        for result in results
        if isinstance(result.get("error"), dict)
    }


def _reported_error(address: str, status: int, body: dict[str, Any]) -> SandboxClientError:
    return SandboxClientError(
        str(body.get("message", f"status {status}")),
        address=address,
        code=str(body.get("code", "refused")),
        status=status,
        field=body.get("field"),
    )


def _protocol_error(address: str, status: int, message: str) -> SandboxClientError:
    return SandboxClientError(message, address=address, code="protocol_error", status=status)


def _memory_limit(response: dict[str, Any]) -> int | None:
    limit_bytes = response.get("sandbox", {}).get("memory", {}).get("limit_bytes")
    return None if limit_bytes is None else int(limit_bytes)


def _parse_attached_function(function: Any) -> AttachedFunction:
    try:
        spec = FunctionSpec.from_json(function)
    except RoutingTableError as error:
        raise ValueError(str(error)) from error
    return AttachedFunction(
        spec,
        str(function["model_digest"]),
        int(function["size_bytes"]),
        int(function.get("frames", 0)),
        Path(function["store"]) if "store" in function else None,
    )
