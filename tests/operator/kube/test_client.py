"""The client against a server that speaks the API's JSON: what is asked, and what answers mean."""

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
from faasmoe_operator.kube.errors import Conflict, Forbidden, Invalid, KubeApiError, Unavailable
from faasmoe_operator.kube.transport import KubeTransport
from faasmoe_operator.kube.types import (
    CONFIG_MAP,
    DEPLOYMENT,
    HTTP_ROUTE,
    MOEMODEL,
    POD,
    SERVICE,
    Kind,
)

Answer = tuple[int, Any, dict[str, str]]


@dataclass
class ApiServer:
    """Gives the answers in their order, the last one again and again, and keeps the requests."""

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
PATIENT_S = 60.0  # a busy machine's answer is no silence
SILENCE_S = 3.0


@asynccontextmanager
async def fake_api_server(
    server: ApiServer, counted: list[tuple[str, str, int]]
) -> AsyncIterator[KubeClient]:
    timeout_s = SILENCE_S if SILENT in server.answers else PATIENT_S
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", server.handle)
    runner = web.AppRunner(app, shutdown_timeout=0.01)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    configuration = Configuration(host=f"http://{host}:{port}", api_key={"BearerToken": "t0k"})

    def count(verb: str, kind: Kind, status: int) -> None:
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
    counted: list[tuple[str, str, int]]

    @property
    def only(self) -> dict[str, Any]:
        (request,) = self.server.requests
        return request


def exchange(call: Callable[[KubeClient], Awaitable[Any]], *answers: Answer) -> Exchange:
    """Make a call against a server that gives these answers; an error is the result."""
    server, counted = ApiServer(list(answers)), list[tuple[str, str, int]]()

    async def run() -> Any:
        async with fake_api_server(server, counted) as client:
            try:
                return await call(client)
            except KubeApiError as error:
                return error

    return Exchange(server, asyncio.run(run()), counted)


def ok(body: Any) -> Answer:
    return 200, body, {}


def refusal(status: int, reason: str, message: str = "no", **headers: str) -> Answer:
    body = {"kind": "Status", "status": "Failure", "reason": reason, "message": message}
    return status, body, {name.replace("_", "-"): value for name, value in headers.items()}


def get(client: KubeClient) -> Awaitable[Any]:
    return client.get(POD, "llm", "a")


def create(client: KubeClient) -> Awaitable[Any]:
    return client.create(POD, make_object(POD, "a"))


def test_reads_an_object_as_who_we_are() -> None:
    pod = make_object(POD, "a")
    story = exchange(get, ok(pod))
    assert story.result == pod
    assert story.only["path"] == "/api/v1/namespaces/llm/pods/a"
    assert story.only["authorization"] == "t0k"
    assert story.counted == [("get", "pods", 200)]


def test_an_object_that_is_not_there_is_none() -> None:
    assert exchange(get, refusal(404, "NotFound")).result is None


def test_lists_page_by_page_and_names_what_it_lists() -> None:
    item = {"metadata": {"name": "a"}}
    story = exchange(
        lambda client: client.list(DEPLOYMENT, None, label_selector="a=b"),
        ok({"metadata": {"continue": "next"}, "items": [item]}),
        ok({"metadata": {}, "items": [item]}),
    )
    assert story.result == [{"apiVersion": "apps/v1", "kind": "Deployment", **item}] * 2
    first, second = story.server.requests
    assert first["path"] == "/apis/apps/v1/deployments"
    assert first["query"] == {"limit": "500", "labelSelector": "a=b"}
    assert second["query"]["continue"] == "next"


def test_applies_by_force_as_one_field_manager_and_strictly() -> None:
    obj = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "a", "namespace": "llm"}}
    story = exchange(lambda client: client.apply(CONFIG_MAP, obj), ok(obj))
    assert story.only == {
        "method": "PATCH",
        "path": "/api/v1/namespaces/llm/configmaps/a",
        "query": {"fieldManager": "faasmoe-operator", "force": "true", "fieldValidation": "Strict"},
        "type": "application/apply-patch+yaml",
        "authorization": "t0k",
        "body": obj,
    }


def test_merges_all_but_metadata_into_just_this_object() -> None:
    metadata = {"name": "a", "namespace": "llm", "uid": "u1", "labels": {"x": "1"}}
    obj = {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": {"ports": []}}
    story = exchange(lambda client: client.merge_patch(SERVICE, obj), ok(obj))
    assert story.only["type"] == "application/merge-patch+json"
    assert story.only["path"] == "/api/v1/namespaces/llm/services/a"
    assert story.only["body"] == {**obj, "metadata": {"uid": "u1"}}


def test_writes_a_status_of_just_this_object_in_just_this_state() -> None:
    story = exchange(
        lambda client: client.patch_status(
            MOEMODEL, "llm", "m", {"url": "u"}, uid="u1", resource_version="7"
        ),
        ok({}),
    )
    assert story.only["path"] == "/apis/faasmoe.dev/v1alpha1/namespaces/llm/moemodels/m/status"
    assert story.only["type"] == "application/apply-patch+yaml"
    assert story.only["body"] == {
        "apiVersion": "faasmoe.dev/v1alpha1",
        "kind": "MoEModel",
        "metadata": {"name": "m", "namespace": "llm", "uid": "u1", "resourceVersion": "7"},
        "status": {"url": "u"},
    }


def test_sets_and_removes_labels_and_touches_no_other_metadata() -> None:
    story = exchange(
        lambda client: client.patch_metadata(POD, "llm", "a", labels={"x": "1", "y": None}), ok({})
    )
    assert story.only["body"] == {"metadata": {"labels": {"x": "1", "y": None}}}
    assert story.only["type"] == "application/merge-patch+json"


def test_deletes_just_the_object_that_is_meant() -> None:
    story = exchange(lambda client: client.delete(POD, "llm", "a", uid="u1", grace_s=0), ok({}))
    assert story.only["method"] == "DELETE"
    assert story.only["body"] == {
        "propagationPolicy": "Background",
        "preconditions": {"uid": "u1"},
        "gracePeriodSeconds": 0,
    }


@pytest.mark.parametrize("answer", [refusal(404, "NotFound"), refusal(409, "Conflict")])
def test_has_nothing_to_delete_if_it_is_gone_or_another(answer: Answer) -> None:
    assert exchange(lambda client: client.delete(POD, "llm", "a", uid="u1"), answer).result is None


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        pytest.param(refusal(400, "BadRequest", "unknown field"), Invalid, id="strict-validation"),
        pytest.param(refusal(403, "Forbidden", "exceeded quota: q"), Forbidden, id="quota"),
        pytest.param(refusal(409, "AlreadyExists", '"a" exists'), Conflict, id="exists"),
        pytest.param(refusal(422, "Invalid", "spec: immutable"), Invalid, id="invalid"),
        pytest.param(refusal(500, "InternalError", "etcd"), Unavailable, id="broken"),
    ],
)
def test_says_what_the_server_said(answer: Answer, kind: type[KubeApiError]) -> None:
    error = exchange(create, answer).result
    assert type(error) is kind
    assert error.status == answer[0]
    assert error.reason == answer[1]["reason"]
    assert str(error) == f"create /api/v1/namespaces/llm/pods: {answer[1]['message']}"


def test_tells_a_taken_name_from_other_conflicts() -> None:
    assert exchange(create, refusal(409, "AlreadyExists")).result.exists
    assert not exchange(create, refusal(409, "Conflict")).result.exists


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(refusal(500, "InternalError"), id="broken"),
        pytest.param(refusal(503, "ServiceUnavailable"), id="away"),
        pytest.param(refusal(429, "TooManyRequests", Retry_After="0"), id="busy"),
        pytest.param(SILENT, id="silent"),
    ],
)
def test_asks_again_what_may_be_asked_twice(answer: Answer) -> None:
    story = exchange(get, answer, ok({"kind": "Pod"}))
    assert story.result == {"kind": "Pod"}
    assert story.counted == [("get", "pods", answer[0]), ("get", "pods", 200)]


@pytest.mark.parametrize("answer", [refusal(500, "InternalError"), SILENT])
def test_does_not_create_twice(answer: Answer) -> None:
    story = exchange(create, answer, ok({}))
    assert isinstance(story.result, Unavailable)
    assert len(story.server.requests) == 1


def test_creates_again_if_the_server_did_not_even_look_at_it() -> None:
    story = exchange(create, refusal(429, "TooManyRequests", Retry_After="0"), ok({"kind": "Pod"}))
    assert story.result == {"kind": "Pod"}


def test_gives_up_after_a_few_times() -> None:
    story = exchange(get, refusal(503, "ServiceUnavailable", "etcd is away"))
    assert isinstance(story.result, Unavailable)
    assert "etcd is away" in str(story.result)
    assert len(story.server.requests) == 3


def test_leaves_a_long_wait_to_its_caller() -> None:
    story = exchange(get, refusal(429, "TooManyRequests", Retry_After="60"))
    assert isinstance(story.result, Unavailable)
    assert story.result.retry_after_s == 60
    assert len(story.server.requests) == 1


def test_a_server_that_is_not_there_is_unavailable() -> None:
    async def run() -> None:
        transport = KubeTransport(Configuration(host="http://127.0.0.1:1"), retry_delays_s=(0.0,))
        async with KubeClient(transport) as client:
            with pytest.raises(Unavailable, match="get /api/v1/namespaces/llm/pods/a: "):
                await get(client)

    asyncio.run(run())


@pytest.mark.parametrize("body", [b"<html>", b"[1]", b""])
def test_an_answer_that_is_no_object_is_an_error(body: bytes) -> None:
    error = exchange(get, (200, body, {})).result
    assert error.reason == "NotJson"


def test_knows_what_the_cluster_serves() -> None:
    served = ok({"resources": [{"name": "httproutes"}, {"name": "httproutes/status"}]})
    story = exchange(lambda client: client.is_served(HTTP_ROUTE), served)
    assert story.result is True
    assert story.only["path"] == "/apis/gateway.networking.k8s.io/v1"
    assert (
        exchange(lambda client: client.is_served(HTTP_ROUTE), ok({"resources": []})).result is False
    )
    assert (
        exchange(lambda client: client.is_served(HTTP_ROUTE), refusal(404, "NotFound")).result
        is False
    )
