"""The Kubernetes platform over pods that are created, deleted, and answer over real HTTP."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from faasmoe_up import free_port
from fake_cluster import (
    NAMESPACE,
    FakeCluster,
    FakeKubeApiWithPods,
    ServerPodRunner,
    running_cluster,
)
from fake_kube_api import FakeKubeApi
from fake_platform import SandboxServer, eventually
from model_contexts import make_context

from faasmoe_operator.errors import PlatformError
from faasmoe_operator.kube.cache import ObjectCache, OwnedPods
from faasmoe_operator.kube.errors import Conflict, Forbidden, KubeApiError, Unavailable
from faasmoe_operator.kube.manifests.names import COMPONENT_LABEL
from faasmoe_operator.kube.platform import KubernetesPlatform, PodPlatformTiming
from faasmoe_operator.kube.sandbox_template import SandboxPodTemplate
from faasmoe_operator.kube.types import POD, Kind, Object
from faasmoe_operator.platforms import Sandbox

CTX = make_context()
TEMPLATE = SandboxPodTemplate.from_context(CTX)
TIMING = PodPlatformTiming(probe_interval_s=0.01, grace_s=1, retry_delays_s=(0.01, 0.02))
DEADLINE_S = 120.0


@asynccontextmanager
async def running_platform(
    api: FakeKubeApi, cache: ObjectCache, port: int
) -> AsyncIterator[KubernetesPlatform]:
    pods = OwnedPods(cache, CTX.uid)
    async with (
        asyncio.timeout(DEADLINE_S),
        KubernetesPlatform(api, pods, timing=TIMING, port=port) as platform,
    ):
        following = asyncio.create_task(platform.run())
        try:
            yield platform
        finally:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)


@asynccontextmanager
async def kubernetes_cluster(
    prepare: Callable[[SandboxServer], None] = lambda _: None,
) -> AsyncIterator[tuple[KubernetesPlatform, FakeCluster]]:
    async with (
        running_cluster(prepare=prepare) as made,
        running_platform(made.api, made.cache, made.port) as platform,
    ):
        yield platform, made


async def next_state(
    platform: KubernetesPlatform, wanted: Callable[[tuple[Sandbox, ...]], bool]
) -> tuple[Sandbox, ...]:
    async for _ in platform.watch():
        if wanted(found := await platform.list()):
            return found
    raise AssertionError("a watch does not end")


async def all_gone(platform: KubernetesPlatform) -> None:
    events = platform.watch()
    while await platform.list():
        await anext(events)


def is_ready(found: tuple[Sandbox, ...]) -> bool:
    return any(sandbox.ready for sandbox in found)


def test_a_sandbox_is_ready_when_it_answers_its_probe() -> None:
    async def scenario() -> None:
        async with kubernetes_cluster() as (platform, made):
            created = await platform.create(TEMPLATE)
            assert (created.ready, created.template_hash) == (False, TEMPLATE.digest)
            assert created.id.startswith("qwen-sandbox-")
            (found,) = await next_state(platform, is_ready)
            pod = made.api.pods()[created.id]
            assert found.id == created.id
            assert found.address == f"{pod['status']['podIP']}:{made.port}"
            assert "conditions" not in pod["status"]  # the kubelet has reported nothing
            assert pod["metadata"]["ownerReferences"][0]["uid"] == CTX.uid

    asyncio.run(scenario())


def test_an_unready_sandbox_is_probed_again() -> None:
    answers = iter([503, 503, 503])

    async def loading(request: web.Request) -> web.Response | None:
        status = next(answers, None)
        return None if status is None else web.Response(status=status)

    def prepare(box: SandboxServer) -> None:
        box.fault_handler = loading

    async def scenario() -> None:
        async with kubernetes_cluster(prepare) as (platform, _):
            await platform.create(TEMPLATE)
            await next_state(platform, is_ready)
            assert next(answers, None) is None

    asyncio.run(scenario())


def test_a_created_pod_is_listed_before_its_watch_event() -> None:
    async def scenario() -> None:
        silent, cache = (
            FakeKubeApiWithPods(None, ServerPodRunner(), port=free_port()),
            ObjectCache(),
        )
        silent.is_unschedulable = True
        async with running_platform(silent, cache, 1) as platform:
            created = await platform.create(TEMPLATE)
            assert [sandbox.id for sandbox in await platform.list()] == [created.id]
            assert OwnedPods(cache, CTX.uid).get(NAMESPACE, created.id) is not None

    asyncio.run(scenario())


def test_a_deleted_sandbox_is_unready_at_once_and_stays_so() -> None:
    async def scenario() -> None:
        async with kubernetes_cluster() as (platform, made):
            name = (await platform.create(TEMPLATE)).id
            await next_state(platform, is_ready)
            before = made.cache.get(POD, NAMESPACE, name)
            assert before is not None
            await platform.delete(name)
            assert not is_ready(await platform.list())
            await eventually(lambda: not made.api.pods())
            await all_gone(platform)
            made.cache.update(POD, before)  # a late event of an earlier state
            await platform.delete(name)
            assert await platform.list() == ()

    asyncio.run(scenario())


def test_a_pod_deleted_by_others_is_unready_while_it_terminates() -> None:
    async def scenario() -> None:
        async with kubernetes_cluster() as (platform, made):
            name = (await platform.create(TEMPLATE)).id
            await next_state(platform, is_ready)
            pod = made.api.pods()[name]
            metadata = {**pod["metadata"], "deletionTimestamp": "2026-09-01T12:00:00Z"}
            made.api.write({**pod, "metadata": metadata})
            found = await next_state(platform, lambda found: not is_ready(found))
            assert [(sandbox.id, sandbox.terminating) for sandbox in found] == [(name, True)]
            made.api.remove(POD, NAMESPACE, name)
            await all_gone(platform)
            assert ("delete", "Pod", name) not in made.api.requests
            assert platform.last_start_failure == ""  # it had been ready: nothing failed to start

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        ({"reason": "Evicted", "message": "The node was low on disk."}, "Evicted: The node was"),
        ({"phase": "Succeeded"}, "its pod is Succeeded"),
        ({"phase": "Unknown"}, "its node is unreachable"),
    ],
)
def test_a_finished_pod_is_lost_with_a_reason_and_deleted(
    status: dict[str, str], reason: str
) -> None:
    async def scenario() -> None:
        async with kubernetes_cluster() as (platform, made):
            name = (await platform.create(TEMPLATE)).id
            events = platform.watch()
            while not (await anext(events)).sandbox.ready:
                pass
            await made.api.kill(name, **status)
            event = await anext(events)
            assert (event.kind, event.sandbox.id) == ("deleted", name)
            assert event.reason.startswith(reason)
            await eventually(lambda: not made.api.pods(), "deleted")
            assert platform.last_start_failure == ""  # the sandbox had been ready

    asyncio.run(scenario())


def test_a_start_failure_is_reported_until_a_sandbox_is_ready() -> None:
    async def scenario() -> None:
        async with kubernetes_cluster() as (platform, made):
            made.api.is_unschedulable = True
            name = (await platform.create(TEMPLATE)).id
            ended = {"terminated": {"exitCode": 2, "reason": "Error", "message": "no store\n"}}
            await made.api.kill(name, containerStatuses=[{"state": ended}])
            await eventually(lambda: bool(platform.last_start_failure))
            assert platform.last_start_failure == (
                f"sandbox {name} was lost before it was ready: it ended with status 2: no store"
            )
            made.api.is_unschedulable = False
            await platform.create(TEMPLATE)
            await next_state(platform, is_ready)
            assert platform.last_start_failure == ""

    asyncio.run(scenario())


QUOTA = (
    'pods "x" is forbidden: exceeded quota: compute, requested: pods=1, used: pods=9, limited: 9'
)


@pytest.mark.parametrize(
    "error",
    [
        Forbidden(QUOTA, status=403, reason="Forbidden"),
        Forbidden('admission webhook "policy" denied the request', status=403),
        Unavailable("the API server did not answer", status=0),
    ],
)
def test_a_rejected_pod_raises_with_the_reason(error: KubeApiError) -> None:
    async def scenario() -> None:
        async with kubernetes_cluster() as (platform, made):
            made.api.errors["create", POD] = error
            with pytest.raises(PlatformError, match="could not be created: ") as caught:
                await platform.create(TEMPLATE)
            assert str(error) in str(caught.value)
            assert await platform.list() == ()

    asyncio.run(scenario())


class NameConflictApi(FakeKubeApiWithPods):
    """Rejects the first names as already existing."""

    n_left = 2

    async def create(self, kind: Kind, obj: Object) -> Object:
        self.n_left -= 1
        if self.n_left >= 0:
            raise Conflict("exists", status=409, reason="AlreadyExists")
        return await super().create(kind, obj)


def test_retries_creation_with_another_name() -> None:
    async def scenario() -> None:
        cache, port = ObjectCache(), free_port()
        api = NameConflictApi(cache, ServerPodRunner(), port=port)
        try:
            async with running_platform(api, cache, port) as platform:
                await platform.create(TEMPLATE)
                await next_state(platform, is_ready)
                api.n_left = 99
                with pytest.raises(PlatformError, match="3 names already existed"):
                    await platform.create(TEMPLATE)
        finally:
            await api.close()

    asyncio.run(scenario())


def test_retries_a_rejected_deletion() -> None:
    async def scenario() -> None:
        async with kubernetes_cluster() as (platform, made):
            name = (await platform.create(TEMPLATE)).id
            await next_state(platform, is_ready)
            made.api.errors["delete", POD] = Unavailable("unavailable", status=503)
            await platform.delete(name)
            await platform.delete(name)
            deletes = ("delete", "Pod", name)
            await eventually(lambda: made.api.requests.count(deletes) > 3)
            assert not is_ready(await platform.list())
            del made.api.errors["delete", POD]
            await all_gone(platform)

    asyncio.run(scenario())


def test_a_new_platform_lists_existing_pods() -> None:
    async def scenario() -> None:
        async with kubernetes_cluster() as (platform, made):
            name = (await platform.create(TEMPLATE)).id
            await next_state(platform, is_ready)
            async with running_platform(made.api, made.cache, made.port) as second:
                assert [sandbox.id for sandbox in await second.list()] == [name]
                assert await next_state(second, is_ready) == await platform.list()

    asyncio.run(scenario())


def test_a_new_platform_ignores_pods_that_terminate() -> None:
    async def scenario() -> None:
        async with kubernetes_cluster() as (platform, made):
            name = (await platform.create(TEMPLATE)).id
            pod = made.api.pods()[name]
            metadata = {**pod["metadata"], "deletionTimestamp": "2026-09-01T12:00:00Z"}
            made.api.write({**pod, "metadata": metadata})
            async with running_platform(made.api, made.cache, made.port) as second:
                assert await second.list() == ()
                made.api.remove(POD, NAMESPACE, name)
                await all_gone(platform)
                assert second.last_start_failure == ""

    asyncio.run(scenario())


@pytest.mark.parametrize("change", ["component", "owner"])
def test_ignores_pods_that_are_not_sandboxes_of_this_model(change: str) -> None:
    async def scenario() -> None:
        async with kubernetes_cluster() as (platform, made):
            pod: dict[str, Any] = TEMPLATE.new_pod()
            if change == "component":
                pod["metadata"]["labels"][COMPONENT_LABEL] = "router"
            else:
                pod["metadata"]["ownerReferences"][0]["uid"] = "u-2"
            made.api.write({**pod, "status": {"phase": "Failed"}})
            created = await platform.create(TEMPLATE)
            await next_state(platform, is_ready)
            assert [sandbox.id for sandbox in await platform.list()] == [created.id]
            await platform.delete(pod["metadata"]["name"])
            assert set(made.api.pods()) == {created.id, pod["metadata"]["name"]}

    asyncio.run(scenario())
