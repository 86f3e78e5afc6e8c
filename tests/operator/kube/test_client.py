"""KubeClient against an HTTP server: requests, decoding, errors, retries."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from aiohttp import web
from kube_objects import make_object
from kubernetes.aio.client.configuration import Configuration

from faasmoe_operator.kube.client import KubeClient
from faasmoe_operator.kube.errors import (
    Conflict,
    Expired,
    Forbidden,
    Invalid,
    KubeApiError,
    NamespaceTerminating,
    NodeTooSmall,
    Unavailable,
)
from faasmoe_operator.kube.transport import KubeTransport
from faasmoe_operator.kube.types import (
    CONFIG_MAP,
    DEPLOYMENT,
    HTTP_ROUTE,
    MOEMODEL,
    POD,
    POD_RESIZE,
    SERVICE,
    Kind,
)

Answer = tuple[int, Any, dict[str, str]]


@dataclass
class ApiServer:
    """Gives the answers in order, repeating the last one, and records the requests."""

    answers: list[Answer]
    requests: list[dict[str, Any]] = field(default_factory=list)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        text = await request.text()
        self.requests.append(
            {
                "method": request.method,
                "path": request.path,
                "query": dict(request.query),
                "type": request.headers.get("Content-Type"),
                "authorization": request.headers.get("Authorization"),
                "body": json.loads(text) if text else None,
            }
        )
        status, body, headers = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if status == 0:
            await asyncio.Event().wait()
        if isinstance(body, bytes):
            return web.Response(status=status, body=body, headers=headers)
        return web.json_response(body, status=status, headers=headers)


SILENT: Answer = (0, None, {})
LONG_TIMEOUT_S = 60.0  # a slow response of a busy machine is not silence
SHORT_TIMEOUT_S = 3.0


@asynccontextmanager
async def fake_api_server(
    server: ApiServer, counted: list[tuple[str, str, int | str]]
) -> AsyncIterator[KubeClient]:
    timeout_s = SHORT_TIMEOUT_S if SILENT in server.answers else LONG_TIMEOUT_S
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", server.handle)
    runner = web.AppRunner(app, shutdown_timeout=0.01)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    configuration = Configuration(host=f"http://{host}:{port}", api_key={"BearerToken": "t0k"})

    def count(verb: str, kind: Kind, status: int | str) -> None:
        counted.append((verb, str(kind), status))

    transport = KubeTransport(
        configuration, on_request=count, retry_delays_s=(0.0, 0.0), request_timeout_s=timeout_s
    )
    try:
        async with KubeClient(transport) as client:
            yield client
    finally:
        await runner.cleanup()


@dataclass
class Exchange:
    server: ApiServer
    result: Any
    counted: list[tuple[str, str, int | str]]

    @property
    def only(self) -> dict[str, Any]:
        (request,) = self.server.requests
        return request


def exchange(call: Callable[[KubeClient], Awaitable[Any]], *answers: Answer) -> Exchange:
    """Make a call against a server that gives these answers; a KubeApiError becomes the result."""
    server, counted = ApiServer(list(answers)), list[tuple[str, str, int | str]]()

    async def run() -> Any:
        async with fake_api_server(server, counted) as client:
            try:
                return await call(client)
            except KubeApiError as error:
                return error

    return Exchange(server, asyncio.run(run()), counted)


def ok(body: Any) -> Answer:
    return 200, body, {}


def error_response(status: int, reason: str, message: str = "no", **headers: str) -> Answer:
    body = {"kind": "Status", "status": "Failure", "reason": reason, "message": message}
    return status, body, {name.replace("_", "-"): value for name, value in headers.items()}


def get(client: KubeClient) -> Awaitable[Any]:
    return client.get(POD, "llm", "a")


def create(client: KubeClient) -> Awaitable[Any]:
    return client.create(POD, make_object(POD, "a"))


def test_get_sends_the_token_and_returns_the_object() -> None:
    pod = make_object(POD, "a")
    scenario = exchange(get, ok(pod))
    assert scenario.result == pod
    assert scenario.only["path"] == "/api/v1/namespaces/llm/pods/a"
    assert scenario.only["authorization"] == "t0k"
    assert scenario.counted == [("get", "pods", 200)]


def test_get_returns_none_for_a_missing_object() -> None:
    assert exchange(get, error_response(404, "NotFound")).result is None


def test_list_follows_pages_and_adds_type_metadata() -> None:
    item = {"metadata": {"name": "a"}}
    scenario = exchange(
        lambda client: client.list(DEPLOYMENT, None, label_selector="a=b"),
        ok({"metadata": {"continue": "next", "resourceVersion": "7"}, "items": [item]}),
        ok({"metadata": {"resourceVersion": "7"}, "items": [item]}),
    )
    assert scenario.result.objects == [{"apiVersion": "apps/v1", "kind": "Deployment", **item}] * 2
    assert scenario.result.resource_version == "7"
    first, second = scenario.server.requests
    assert first["path"] == "/apis/apps/v1/deployments"
    assert first["query"] == {"limit": "100", "labelSelector": "a=b"}
    assert second["query"]["continue"] == "next"


def watch(client: KubeClient) -> Awaitable[Any]:
    """Return all events of a watch."""

    async def events() -> list[Any]:
        stream = client.watch(
            POD, "llm", resource_version="7", label_selector="a=b", timeout_s=300, idle_timeout_s=9
        )
        return [event async for event in stream]

    return events()


def lines(*events: Any) -> Answer:
    return 200, b"".join(json.dumps(event).encode() + b"\n" for event in events), {}


def test_watch_streams_events_from_a_version() -> None:
    pod, bookmark = make_object(POD, "a"), {"metadata": {"resourceVersion": "9"}}
    scenario = exchange(
        watch, lines({"type": "ADDED", "object": pod}, {"type": "BOOKMARK", "object": bookmark})
    )
    assert scenario.result == [("ADDED", pod), ("BOOKMARK", bookmark)]
    assert scenario.only["path"] == "/api/v1/namespaces/llm/pods"
    assert scenario.only["authorization"] == "t0k"
    assert scenario.only["query"] == {
        "watch": "true",
        "resourceVersion": "7",
        "allowWatchBookmarks": "true",
        "timeoutSeconds": "300",
        "labelSelector": "a=b",
    }
    assert scenario.counted == [("watch", "pods", 200)]


def test_watch_raises_the_error_of_an_error_event() -> None:
    status = {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old"}
    error = exchange(watch, lines({"type": "ERROR", "object": status})).result
    assert isinstance(error, Expired)
    assert str(error) == "watch /api/v1/namespaces/llm/pods: too old"


@pytest.mark.parametrize("status", [403, 410, 503])
def test_watch_raises_a_refusal_without_a_retry(status: int) -> None:
    scenario = exchange(watch, error_response(status, "Rejected"))
    assert scenario.result.status == status
    assert scenario.counted == [("watch", "pods", status)]


@pytest.mark.parametrize("body", [b"<html>\n", b"[1]\n", b'{"type": "ADDED"}\n'])
def test_watch_rejects_a_line_that_is_no_event(body: bytes) -> None:
    assert exchange(watch, (200, body, {})).result.reason == "NotJson"


def test_apply_is_forced_strict_and_has_a_field_manager() -> None:
    obj = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "a", "namespace": "llm"}}
    scenario = exchange(lambda client: client.apply(CONFIG_MAP, obj), ok(obj))
    assert scenario.only == {
        "method": "PATCH",
        "path": "/api/v1/namespaces/llm/configmaps/a",
        "query": {"fieldManager": "faasmoe-operator", "force": "true", "fieldValidation": "Strict"},
        "type": "application/apply-patch+yaml",
        "authorization": "t0k",
        "body": obj,
    }


def test_merge_patch_sends_only_the_uid_of_the_metadata() -> None:
    metadata = {"name": "a", "namespace": "llm", "uid": "u1", "labels": {"x": "1"}}
    obj = {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": {"ports": []}}
    scenario = exchange(lambda client: client.merge_patch(SERVICE, obj), ok(obj))
    assert scenario.only["type"] == "application/merge-patch+json"
    assert scenario.only["path"] == "/api/v1/namespaces/llm/services/a"
    assert scenario.only["body"] == {**obj, "metadata": {"uid": "u1"}}


def test_patch_status_sends_uid_and_version_as_preconditions() -> None:
    scenario = exchange(
        lambda client: client.patch_status(
            MOEMODEL, "llm", "m", {"url": "u"}, uid="u1", resource_version="7"
        ),
        ok({}),
    )
    assert scenario.only["path"] == "/apis/faasmoe.dev/v1alpha1/namespaces/llm/moemodels/m/status"
    assert scenario.only["type"] == "application/apply-patch+yaml"
    assert scenario.only["body"] == {
        "apiVersion": "faasmoe.dev/v1alpha1",
        "kind": "MoEModel",
        "metadata": {"name": "m", "namespace": "llm", "uid": "u1", "resourceVersion": "7"},
        "status": {"url": "u"},
    }


def test_patch_metadata_sends_only_the_given_labels() -> None:
    scenario = exchange(
        lambda client: client.patch_metadata(POD, "llm", "a", labels={"x": "1", "y": None}), ok({})
    )
    assert scenario.only["body"] == {"metadata": {"labels": {"x": "1", "y": None}}}
    assert scenario.only["type"] == "application/merge-patch+json"


def test_resize_sends_the_requests_of_one_container() -> None:
    scenario = exchange(
        lambda client: client.resize_pod(
            "llm", "a", container="sandbox", requests={"memory": "1Gi"}
        ),
        ok({}),
    )
    assert scenario.only["method"] == "PATCH"
    assert scenario.only["path"] == "/api/v1/namespaces/llm/pods/a/resize"
    assert scenario.only["type"] == "application/strategic-merge-patch+json"
    container = {"name": "sandbox", "resources": {"requests": {"memory": "1Gi"}}}
    assert scenario.only["body"] == {"spec": {"containers": [container]}}


@pytest.mark.parametrize("names", [["pods", "pods/resize"], ["pods", "pods/status"]])
def test_a_subresource_is_discovered_as_a_resource(names: list[str]) -> None:
    resources = [{"name": name} for name in names]
    scenario = exchange(lambda client: client.is_served(POD_RESIZE), ok({"resources": resources}))
    assert scenario.result is ("pods/resize" in names)
    assert scenario.only["path"] == "/api/v1"


def test_delete_sends_the_uid_as_precondition() -> None:
    scenario = exchange(lambda client: client.delete(POD, "llm", "a", uid="u1", grace_s=0), ok({}))
    assert scenario.only["method"] == "DELETE"
    assert scenario.only["body"] == {
        "propagationPolicy": "Background",
        "preconditions": {"uid": "u1"},
        "gracePeriodSeconds": 0,
    }


@pytest.mark.parametrize(
    "answer", [error_response(404, "NotFound"), error_response(409, "Conflict")]
)
def test_delete_accepts_that_the_object_is_gone_or_replaced(answer: Answer) -> None:
    assert exchange(lambda client: client.delete(POD, "llm", "a", uid="u1"), answer).result is None


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        pytest.param(
            error_response(400, "BadRequest", "unknown field"), Invalid, id="strict-validation"
        ),
        pytest.param(error_response(403, "Forbidden", "exceeded quota: q"), Forbidden, id="quota"),
        pytest.param(error_response(409, "AlreadyExists", '"a" exists'), Conflict, id="exists"),
        pytest.param(error_response(422, "Invalid", "spec: immutable"), Invalid, id="invalid"),
        pytest.param(error_response(500, "InternalError", "etcd"), Unavailable, id="broken"),
    ],
)
def test_errors_carry_status_reason_and_message(answer: Answer, kind: type[KubeApiError]) -> None:
    error = exchange(create, answer).result
    assert type(error) is kind
    assert error.status == answer[0]
    assert error.reason == answer[1]["reason"]
    assert str(error) == f"create /api/v1/namespaces/llm/pods: {answer[1]['message']}"


def test_a_namespace_that_is_deleted_is_no_lack_of_permissions() -> None:
    status, body, headers = error_response(403, "Forbidden", "because it is being terminated")
    causes = [{"reason": "NamespaceTerminating", "message": "x", "field": "metadata.namespace"}]
    scenario = exchange(create, (status, {**body, "details": {"causes": causes}}, headers))
    assert type(scenario.result) is NamespaceTerminating
    assert scenario.counted == [("create", "pods", "NamespaceTerminating")]
    other = exchange(create, error_response(403, "Forbidden"))
    assert other.counted == [("create", "pods", 403)]


def test_a_node_that_is_too_small_is_no_lack_of_permissions() -> None:
    text = "node didn't have enough allocatable resources: cpu, requested: 1000, allocatable: 900"
    scenario = exchange(create, error_response(403, "Forbidden", text))
    assert type(scenario.result) is NodeTooSmall
    assert scenario.counted == [("create", "pods", "NodeTooSmall")]


def test_tells_already_exists_from_other_conflicts() -> None:
    assert exchange(create, error_response(409, "AlreadyExists")).result.already_exists
    assert not exchange(create, error_response(409, "Conflict")).result.already_exists


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(error_response(500, "InternalError"), id="broken"),
        pytest.param(error_response(503, "ServiceUnavailable"), id="unavailable"),
        pytest.param(error_response(429, "TooManyRequests", Retry_After="0"), id="busy"),
        pytest.param(SILENT, id="silent"),
    ],
)
def test_retries_idempotent_requests(answer: Answer) -> None:
    scenario = exchange(get, answer, ok({"kind": "Pod"}))
    assert scenario.result == {"kind": "Pod"}
    assert scenario.counted == [("get", "pods", answer[0]), ("get", "pods", 200)]


@pytest.mark.parametrize("answer", [error_response(500, "InternalError"), SILENT])
def test_does_not_retry_create_after_a_failure(answer: Answer) -> None:
    scenario = exchange(create, answer, ok({}))
    assert isinstance(scenario.result, Unavailable)
    assert len(scenario.server.requests) == 1


def test_retries_create_after_a_429() -> None:
    scenario = exchange(
        create, error_response(429, "TooManyRequests", Retry_After="0"), ok({"kind": "Pod"})
    )
    assert scenario.result == {"kind": "Pod"}


def test_gives_up_after_the_last_retry() -> None:
    scenario = exchange(get, error_response(503, "ServiceUnavailable", "etcd is down"))
    assert isinstance(scenario.result, Unavailable)
    assert "etcd is down" in str(scenario.result)
    assert len(scenario.server.requests) == 3


def test_a_long_retry_after_is_left_to_the_caller() -> None:
    scenario = exchange(get, error_response(429, "TooManyRequests", Retry_After="60"))
    assert isinstance(scenario.result, Unavailable)
    assert scenario.result.retry_after_s == 60
    assert len(scenario.server.requests) == 1


def test_an_unreachable_server_is_unavailable() -> None:
    async def run() -> None:
        transport = KubeTransport(Configuration(host="http://127.0.0.1:1"), retry_delays_s=(0.0,))
        async with KubeClient(transport) as client:
            with pytest.raises(Unavailable, match="get /api/v1/namespaces/llm/pods/a: "):
                await get(client)

    asyncio.run(run())


@pytest.mark.parametrize("body", [b"<html>", b"[1]", b""])
def test_a_response_without_a_json_object_is_an_error(body: bytes) -> None:
    error = exchange(get, (200, body, {})).result
    assert error.reason == "NotJson"


def test_is_served_reads_the_resource_list() -> None:
    served = ok({"resources": [{"name": "httproutes"}, {"name": "httproutes/status"}]})
    scenario = exchange(lambda client: client.is_served(HTTP_ROUTE), served)
    assert scenario.result is True
    assert scenario.only["path"] == "/apis/gateway.networking.k8s.io/v1"
    assert (
        exchange(lambda client: client.is_served(HTTP_ROUTE), ok({"resources": []})).result is False
    )
    assert (
        exchange(
            lambda client: client.is_served(HTTP_ROUTE), error_response(404, "NotFound")
        ).result
        is False
    )
