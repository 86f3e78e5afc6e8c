"""Client of the sandboxes' control calls: attach, detach and list functions."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import aiohttp

from faasmoe_contracts.routing_table import FunctionSpec, RoutingTableError
from faasmoe_operator.errors import FaasmoeError

MAX_RESPONSE_BYTES = 8 << 20
CONNECTIONS_PER_SANDBOX = 4  # it answers one call at a time; more only delay its first answers


class SandboxClientError(FaasmoeError):
    """A sandbox that refused a call, did not answer, or answered nonsense.

    Attributes:
        address: the sandbox.
        code: the sandbox's own code for what it refused; `timeout`, `unreachable` or `protocol_error` otherwise.
        status: the HTTP status, or None if there was no answer.
        field: the field that it refused, or None.
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
    """How long a sandbox may take.

    Attributes:
        connect_timeout_s: to accept a connection.
        list_timeout_s: to list its functions.
        attach_timeout_s: to attach a function: mapped files, but read from a disk if need be.
        detach_timeout_s: to detach a function: calls in progress finish first.
    """

    connect_timeout_s: float = 2.0
    list_timeout_s: float = 5.0
    attach_timeout_s: float = 60.0
    detach_timeout_s: float = 30.0


@dataclass(frozen=True, slots=True)
class ModelStore:
    """The store that functions are attached from.

    Attributes:
        path: its folder, as the sandboxes see it.
        model_digest: digest that its manifest must have.
    """

    path: Path
    model_digest: str


@dataclass(frozen=True, slots=True)
class AttachedFunction:
    """A function that a sandbox holds.

    Attributes:
        spec: which experts it has.
        model_digest: digest of the store that it was attached from.
        size_bytes: size of its weights.
        n_frames: frames that it has computed there.
    """

    spec: FunctionSpec
    model_digest: str
    size_bytes: int
    n_frames: int = 0


@dataclass(frozen=True, slots=True)
class SandboxListing:
    """What a sandbox says of itself.

    Attributes:
        functions: those that it holds.
        memory_limit_bytes: what its functions may take now, all together; None for no limit.
    """

    functions: tuple[AttachedFunction, ...]
    memory_limit_bytes: int | None = None


class SandboxClient:
    """Talks to the sandboxes of one model; use as an async context manager."""

    def __init__(self, *, token: str, timeouts: SandboxClientTimeouts | None = None) -> None:
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._timeouts = timeouts or SandboxClientTimeouts()

    async def __aenter__(self) -> Self:
        """Open the connections' pool."""
        connector = aiohttp.TCPConnector(limit=0, limit_per_host=CONNECTIONS_PER_SANDBOX)
        self._http = aiohttp.ClientSession(headers=self._headers, connector=connector)
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close every connection."""
        await self._http.close()

    async def attach(self, address: str, function: FunctionSpec, *, store: ModelStore) -> None:
        """Attach a function; nothing happens if it is there already. Raises SandboxError."""
        body = {
            "store": str(store.path),
            "model_digest": store.model_digest,
            "layers": list(function.layers),
            "experts": list(function.experts),
        }
        timeout_s = self._timeouts.attach_timeout_s
        await self._call("PUT", address, f"/{function.id}", timeout_s=timeout_s, body=body)

    async def detach(self, address: str, function_id: str) -> None:
        """Detach a function; nothing happens if it is not there. Raises SandboxError."""
        timeout_s = self._timeouts.detach_timeout_s
        try:
            await self._call("DELETE", address, f"/{function_id}", timeout_s=timeout_s)
        except SandboxClientError as error:
            if error.status != 404:
                raise

    async def list(self, address: str) -> SandboxListing:
        """Return the functions that a sandbox holds, and may hold. Raises SandboxError."""
        timeout_s = self._timeouts.list_timeout_s
        response = await self._call("GET", address, "", timeout_s=timeout_s)
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
        url = f"http://{address}/v1/functions{path}"
        try:
            async with self._http.request(method, url, json=body, timeout=timeout) as response:
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
    raise SandboxClientError(
        str(error_body.get("message", f"status {status}")),
        address=address,
        code=str(error_body.get("code", "refused")),
        status=status,
        field=error_body.get("field"),
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
    )
