"""Transport to the Kubernetes API server: credentials, timeouts, retries, error decoding.

The kubernetes library loads the configuration (a kubeconfig or a pod's service account), sets TLS
up and renews tokens. Idempotent requests are retried when no response came or the server failed;
`create` is not, as it may have taken effect. A 429 is retried for every verb: the server has not
processed such a request. When retries are used up, the last error is raised.
"""

from __future__ import annotations

import asyncio
import copy
import json
import logging
import os
from collections.abc import AsyncGenerator, Callable, Mapping
from pathlib import Path
from typing import Any

import aiohttp
from kubernetes.aio import config
from kubernetes.aio.client.api_client import ApiClient
from kubernetes.aio.client.configuration import Configuration
from kubernetes.aio.client.exceptions import ApiException
from kubernetes.aio.client.rest import RESTResponse

from faasmoe_operator.errors import FaasmoeError
from faasmoe_operator.kube.errors import (
    Forbidden,
    KubeApiError,
    NamespaceTerminating,
    NodeTooSmall,
    Unavailable,
    error_from_status,
)
from faasmoe_operator.kube.types import Kind, Object

logger = logging.getLogger(__name__)

IN_CLUSTER_VARIABLE = "KUBERNETES_SERVICE_HOST"
MAX_CONNECTIONS = 32
CONNECT_TIMEOUT_S = 5.0
REQUEST_TIMEOUT_S = 30.0
RETRY_DELAYS_S = (0.2, 1.0, 3.0)
MAX_RETRY_AFTER_S = 10.0
STREAM_CHUNK_BYTES = 1 << 16
IDLE_TIMEOUT = "IdleTimeout"
"""Reason of the error of a stream that was silent for too long."""
JSON_CONTENT_TYPE = "application/json"
AUTH_SETTINGS = ["BearerToken"]
HTTP_METHODS = {
    "get": "GET",
    "list": "GET",
    "watch": "GET",
    "discover": "GET",
    "create": "POST",
    "apply": "PATCH",
    "patch": "PATCH",
    "patch_status": "PATCH",
    "resize": "PATCH",
    "delete": "DELETE",
}

RequestObserver = Callable[[str, Kind, int | str], None]
"""Called for each request with its verb, kind and HTTP status (0 if there was no response)."""


class KubeConfigError(FaasmoeError):
    """There is no kubeconfig or service account, or it is unusable."""


async def load_client_configuration(env: Mapping[str, str] = os.environ) -> Configuration:
    """Return the address and credentials of the API server.

    KUBECONFIG takes precedence over the service account: a pod only has it if it was set on
    purpose.

    Raises:
        KubeConfigError: neither a kubeconfig nor a service account is usable.
    """
    configuration = Configuration(connection_pool_maxsize=MAX_CONNECTIONS)
    try:
        if paths := _kubeconfig_paths(env):
            await config.load_kube_config(
                config_file=paths, client_configuration=configuration, persist_config=False
            )
        else:
            config.load_incluster_config(client_configuration=configuration)
    except (config.ConfigException, OSError) as error:
        raise KubeConfigError(f"no usable kubeconfig or service account: {error}") from error
    return configuration


def _kubeconfig_paths(env: Mapping[str, str]) -> str | None:
    """Return the colon-separated kubeconfig files to read; None for the service account."""
    if paths := env.get("KUBECONFIG"):
        return paths
    if env.get(IN_CLUSTER_VARIABLE):
        return None
    return str(Path.home() / ".kube" / "config")


def ignore_request(verb: str, kind: Kind, code: int | str) -> None:
    """Observe nothing."""


class KubeTransport:
    """Sends requests to the API server.

    Watches use connections of their own: a watch holds one for minutes, and with many namespaces
    watches alone would exhaust the pool of `MAX_CONNECTIONS`.

    Args:
        configuration: the server's address and our credentials.
        on_request: called for each request.
        retry_delays_s: delays before the retries of a request, in seconds.
        request_timeout_s: limit for a request and its response, in seconds; watches have none.
    """

    def __init__(
        self,
        configuration: Configuration,
        *,
        on_request: RequestObserver = ignore_request,
        retry_delays_s: tuple[float, ...] = RETRY_DELAYS_S,
        request_timeout_s: float = REQUEST_TIMEOUT_S,
    ) -> None:
        self._client = ApiClient(configuration)
        self._stream_client = ApiClient(_without_connection_limit(configuration))
        self._on_request = on_request
        self._retry_delays_s = retry_delays_s
        self._timeout = aiohttp.ClientTimeout(total=request_timeout_s, connect=CONNECT_TIMEOUT_S)

    async def close(self) -> None:
        """Close all connections."""
        await self._client.close()
        await self._stream_client.close()

    async def request(self, verb: str, kind: Kind, path: str, **options: Any) -> Object:
        """Send a request, with retries, and return the JSON object of its response.

        Args:
            verb: a key of HTTP_METHODS.
            kind: the kind that the request is about, for `on_request`.
            path: path of the URL.
            options: query, body, and content (the body's content type).

        Raises:
            KubeApiError: the request failed.
        """
        for delay_s in (*self._retry_delays_s, None):
            try:
                return await self._send_once(verb, kind, path, **options)
            except Unavailable as error:
                retry_in_s = _retry_delay_s(error, delay_s, is_idempotent=verb != "create")
                if retry_in_s is None:
                    raise
                logger.info("%s %s: retrying in %.1f s: %s", verb, kind, retry_in_s, error)
                await asyncio.sleep(retry_in_s)
        raise AssertionError("the last attempt raises or returns")

    async def stream_lines(
        self, verb: str, kind: Kind, path: str, *, query: Mapping[str, str], idle_timeout_s: float
    ) -> AsyncGenerator[bytes]:
        """Send a request once and yield the lines of its response as they arrive.

        Lines are split here because aiohttp's `readline` limits their length, which one large
        object can exceed. The event loop gets a turn after each 64 KiB. Close the generator
        (`contextlib.aclosing`) to close the connection.

        Args:
            verb: a key of HTTP_METHODS.
            kind: the kind that the request is about, for `on_request`.
            path: path of the URL.
            query: query parameters.
            idle_timeout_s: longest time without a byte from the server, in seconds.

        Raises:
            KubeApiError: the request failed; Unavailable if the connection broke, or with
                reason IDLE_TIMEOUT if it was silent.
        """
        timeout = aiohttp.ClientTimeout(
            total=None, connect=CONNECT_TIMEOUT_S, sock_read=idle_timeout_s
        )
        status, response = 0, None
        try:
            try:
                response = await self._open(
                    self._stream_client, HTTP_METHODS[verb], path, query=query, timeout=timeout
                )
                status = response.status
            finally:
                self._on_request(verb, kind, status)
            if status != 200:
                body = await response.read()
                _decode_response(f"{verb} {path}", status, body, response.headers)
            buffer = b""
            async for chunk in response.response.content.iter_chunked(STREAM_CHUNK_BYTES):
                *lines, buffer = (buffer + chunk).split(b"\n")
                for line in lines:
                    yield line
                await asyncio.sleep(0)
        except (aiohttp.ClientError, ApiException, OSError, TimeoutError) as error:
            if response is not None and isinstance(error, aiohttp.SocketTimeoutError):
                message = f"{verb} {path}: no data for {idle_timeout_s:g} s"
                raise Unavailable(message, status=0, reason=IDLE_TIMEOUT) from error
            raise _no_response(f"{verb} {path}", error) from error
        finally:
            if response is not None:
                response.response.close()

    async def _send_once(
        self,
        verb: str,
        kind: Kind,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Object | None = None,
        content: str = JSON_CONTENT_TYPE,
    ) -> Object:
        status = 0
        try:
            response = await self._open(
                self._client,
                HTTP_METHODS[verb],
                path,
                query=query or {},
                body=body,
                content=content,
                timeout=self._timeout,
            )
            payload = await response.read()
            status = response.status
        except (aiohttp.ClientError, ApiException, OSError, TimeoutError) as error:
            raise _no_response(f"{verb} {path}", error) from error
        finally:
            if status != 403:
                self._on_request(verb, kind, status)
        try:
            return _decode_response(f"{verb} {path}", status, payload, response.headers)
        except Forbidden as error:
            # Not to be taken for missing permissions, of which an alert tells.
            is_permitted = isinstance(error, NamespaceTerminating | NodeTooSmall)
            self._on_request(verb, kind, error.reason if is_permitted else status)
            raise

    @staticmethod
    async def _open(
        client: ApiClient,
        method: str,
        path: str,
        *,
        query: Mapping[str, str],
        timeout: aiohttp.ClientTimeout,  # noqa: ASYNC109  (aiohttp's own, passed on)
        body: Object | None = None,
        content: str = JSON_CONTENT_TYPE,
    ) -> RESTResponse:
        request = await client.param_serialize(
            method,
            path,
            query_params=list(query.items()),
            header_params={"Accept": JSON_CONTENT_TYPE, "Content-Type": content},
            body=body,
            auth_settings=AUTH_SETTINGS,
        )
        return await client.call_api(*request, _request_timeout=timeout)


def _without_connection_limit(configuration: Configuration) -> Configuration:
    unlimited = copy.deepcopy(configuration)
    unlimited.connection_pool_maxsize = 0
    return unlimited


def _no_response(request: str, error: Exception) -> Unavailable:
    detail = str(error) or type(error).__name__
    return Unavailable(f"{request}: {detail}", status=0, reason="NoResponse")


def _retry_delay_s(
    error: Unavailable, delay_s: float | None, *, is_idempotent: bool
) -> float | None:
    """Return the delay before a retry; None if the error should be raised."""
    if delay_s is None or not (is_idempotent or error.status == 429):
        return None
    if error.retry_after_s is None:
        return delay_s
    return error.retry_after_s if error.retry_after_s <= MAX_RETRY_AFTER_S else None


def _decode_response(request: str, status: int, body: bytes, headers: Mapping[str, str]) -> Object:
    """Return the response's JSON object; raises the KubeApiError of an error status."""
    try:
        payload = json.loads(body)
    except ValueError:
        payload = None
    if 200 <= status < 300:
        if isinstance(payload, dict):
            return payload
        raise KubeApiError(f"{request}: got no JSON object", status=status, reason="NotJson")
    api_status = payload if isinstance(payload, dict) else {}
    message = api_status.get("message") or body[:200].decode(errors="replace") or "no reason given"
    raise error_from_status(
        status,
        reason=api_status.get("reason") or "",
        message=f"{request}: {message}",
        causes=_causes(api_status),
        retry_after_s=_parse_retry_after(headers.get("Retry-After", "")),
    )


def _causes(api_status: Mapping[str, Any]) -> list[str]:
    details = api_status.get("details")
    causes = details.get("causes") if isinstance(details, dict) else None
    return [str(cause.get("reason")) for cause in causes or () if isinstance(cause, dict)]


def _parse_retry_after(text: str) -> float | None:
    return float(text) if text.isascii() and text.isdecimal() else None
