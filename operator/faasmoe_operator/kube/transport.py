"""Where the API server is and who we are there: a pod's service account, or KUBECONFIG.

Requests to the API server: timeouts, what is sent again and when, what an answer means.

Only what may be sent twice is sent again when no answer came: all but `create`. A 429 was not
looked at by the server, so that is repeated for all. The last error is raised.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import aiohttp
from kubernetes.aio import config
from kubernetes.aio.client.api_client import ApiClient
from kubernetes.aio.client.configuration import Configuration
from kubernetes.aio.client.exceptions import ApiException

from faasmoe_operator.errors import FaasmoeError
from faasmoe_operator.kube.errors import KubeApiError, Unavailable, error_from_status
from faasmoe_operator.kube.types import Kind, Object

logger = logging.getLogger(__name__)


IN_CLUSTER_VARIABLE = "KUBERNETES_SERVICE_HOST"
MAX_CONNECTIONS = 32


class KubeConfigError(FaasmoeError):
    """No way to the API server is configured, or not one that works."""


async def load_client_configuration(env: Mapping[str, str] = os.environ) -> Configuration:
    """Return how to reach the API server; raises ConnectionConfigError.

    KUBECONFIG goes first, as an operator in a pod has none unless somebody meant it.
    """
    configuration = Configuration(connection_pool_maxsize=MAX_CONNECTIONS)
    try:
        if paths := kubeconfig_paths(env):
            await config.load_kube_config(
                config_file=paths, client_configuration=configuration, persist_config=False
            )
        else:
            config.load_incluster_config(client_configuration=configuration)
    except (config.ConfigException, OSError) as error:
        raise KubeConfigError(f"no usable kubeconfig or service account: {error}") from error
    return configuration


def kubeconfig_paths(env: Mapping[str, str] = os.environ) -> str | None:
    """Return the kubeconfig files to read, joined by colons; None in a pod."""
    if paths := env.get("KUBECONFIG"):
        return paths
    if env.get(IN_CLUSTER_VARIABLE):
        return None
    return str(Path.home() / ".kube" / "config")


CONNECT_TIMEOUT_S = 5.0
REQUEST_TIMEOUT_S = 30.0
RETRY_DELAYS_S = (0.2, 1.0, 3.0)
MAX_RETRY_AFTER_S = 10.0
JSON_CONTENT_TYPE = "application/json"
AUTH_SETTINGS = ["BearerToken"]
HTTP_METHODS = {
    "get": "GET",
    "list": "GET",
    "discover": "GET",
    "create": "POST",
    "apply": "PATCH",
    "patch": "PATCH",
    "patch_status": "PATCH",
    "delete": "DELETE",
}

RequestObserver = Callable[[str, Kind, int], None]


def ignore_request(verb: str, kind: Kind, status: int) -> None:
    """Count no requests."""


class KubeTransport:
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
        on_request: RequestObserver = ignore_request,
        retry_delays_s: tuple[float, ...] = RETRY_DELAYS_S,
        request_timeout_s: float = REQUEST_TIMEOUT_S,
    ) -> None:
        self._client = ApiClient(configuration)
        self._on_request = on_request
        self._retry_delays_s = retry_delays_s
        self._timeout = aiohttp.ClientTimeout(total=request_timeout_s, connect=CONNECT_TIMEOUT_S)

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    async def request(self, verb: str, kind: Kind, path: str, **options: Any) -> Object:
        """Send a request, again if that may help; return its answer or raise ApiError.

        Args:
            verb: one of METHODS.
            kind: what it is about, for the count.
            path: the path.
            rest: query, body, and the body's content type.
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
        """Send one request, count it, and return its answer."""
        status = 0
        try:
            status, text, headers = await self._call_api(
                HTTP_METHODS[verb], path, query=query or {}, body=body, content=content
            )
        except (aiohttp.ClientError, ApiException, OSError, TimeoutError) as error:
            detail = str(error) or type(error).__name__
            raise Unavailable(f"{verb} {path}: {detail}", status=0, reason="NoAnswer") from error
        finally:
            self._on_request(verb, kind, status)
        return _decode_response(f"{verb} {path}", status, text, headers)

    async def _call_api(
        self, method: str, path: str, *, query: Mapping[str, str], body: Object | None, content: str
    ) -> tuple[int, bytes, Mapping[str, str]]:
        request = await self._client.param_serialize(
            method,
            path,
            query_params=list(query.items()),
            header_params={"Accept": JSON_CONTENT_TYPE, "Content-Type": content},
            body=body,
            auth_settings=AUTH_SETTINGS,
        )
        response = await self._client.call_api(*request, _request_timeout=self._timeout)
        return response.status, await response.read(), response.headers


def _retry_delay_s(
    error: Unavailable, delay_s: float | None, *, is_idempotent: bool
) -> float | None:
    """Return how long to wait before asking again; None if the error is to be raised."""
    if delay_s is None or not (is_idempotent or error.status == 429):
        return None
    if error.retry_after_s is None:
        return delay_s
    return error.retry_after_s if error.retry_after_s <= MAX_RETRY_AFTER_S else None


def _decode_response(request: str, status: int, body: bytes, headers: Mapping[str, str]) -> Object:
    """Return the answer's object; raises the ApiError that it stands for."""
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
        retry_after_s=_parse_retry_after(headers.get("Retry-After", "")),
    )


def _parse_retry_after(text: str) -> float | None:
    return float(text) if text.isascii() and text.isdecimal() else None
