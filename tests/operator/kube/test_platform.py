"""The Kubernetes platform: pods come and go, and answer over real HTTP at their own addresses."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from fake_cluster import (
    NAMESPACE,
    FakeCluster,
    FakeKubeApiWithPods,
    ServerPodRunner,
    free_port,
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
DEADLINE_S = 20.0


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


def test_a_sandbox_is_a_pod_and_ready_when_it_answers_itself() -> None:
    async def story() -> None:
        async with kubernetes_cluster() as (platform, made):
            created = await platform.create(TEMPLATE)
            assert (created.ready, created.template_hash) == (False, TEMPLATE.digest)
            assert created.id.startswith("qwen-sandbox-")
            (found,) = await next_state(platform, is_ready)
            pod = made.api.pods()[created.id]
            assert found.id == created.id
            assert found.address == f"{pod['status']['podIP']}:{made.port}"
            assert "conditions" not in pod["status"]  # the kubelet has not said a word
            assert pod["metadata"]["ownerReferences"][0]["uid"] == CTX.uid

    asyncio.run(story())


def test_a_sandbox_that_says_it_is_not_ready_is_asked_again() -> None:
    answers = iter([503, 503, 503])

    async def loading(request: web.Request) -> web.Response | None:
        status = next(answers, None)
        return None if status is None else web.Response(status=status)

    def prepare(box: SandboxServer) -> None:
        box.fault_handler = loading

    async def story() -> None:
        async with kubernetes_cluster(prepare) as (platform, _):
            await platform.create(TEMPLATE)
            await next_state(platform, is_ready)
            assert next(answers, None) is None

    asyncio.run(story())


def test_a_created_pod_is_there_at_once_though_the_watch_has_not_told_it() -> None:
    async def story() -> None:
        silent, cache = (
            FakeKubeApiWithPods(None, ServerPodRunner(), port=free_port()),
            ObjectCache(),
        )
        silent.is_unschedulable = True
        async with running_platform(silent, cache, 1) as platform:
            created = await platform.create(TEMPLATE)
            assert [sandbox.id for sandbox in await platform.list()] == [created.id]
            assert OwnedPods(cache, CTX.uid).get(NAMESPACE, created.id) is not None

    asyncio.run(story())


def test_a_deleted_sandbox_is_not_ready_at_once_and_never_comes_back() -> None:
    async def story() -> None:
        async with kubernetes_cluster() as (platform, made):
            name = (await platform.create(TEMPLATE)).id
            await next_state(platform, is_ready)
            before = made.cache.get(POD, NAMESPACE, name)
            assert before is not None
            await platform.delete(name)
            assert not is_ready(await platform.list())
            await eventually(lambda: not made.api.pods())
            await all_gone(platform)
            made.cache.update(POD, before)  # news from before, late
            await platform.delete(name)
            assert await platform.list() == ()

    asyncio.run(story())


def test_a_pod_that_somebody_deletes_is_not_ready_while_it_goes() -> None:
    async def story() -> None:
        async with kubernetes_cluster() as (platform, made):
            name = (await platform.create(TEMPLATE)).id
            await next_state(platform, is_ready)
            pod = made.api.pods()[name]
            metadata = {**pod["metadata"], "deletionTimestamp": "2026-09-01T12:00:00Z"}
            made.api.write({**pod, "metadata": metadata})
            found = await next_state(platform, lambda found: not is_ready(found))
            assert [sandbox.id for sandbox in found] == [name]
            made.api.remove(POD, NAMESPACE, name)
            await all_gone(platform)
            assert ("delete", "Pod", name) not in made.api.requests

    asyncio.run(story())


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        ({"reason": "Evicted", "message": "The node was low on disk."}, "Evicted: The node was"),
        ({"phase": "Succeeded"}, "its pod is Succeeded"),
        ({"phase": "Unknown"}, "its node is unreachable"),
    ],
)
def test_a_pod_that_is_over_is_gone_with_a_reason_and_deleted(
    status: dict[str, str], reason: str
) -> None:
    async def story() -> None:
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
            assert platform.last_start_failure == ""  # it had been ready

    asyncio.run(story())


def test_a_sandbox_that_ends_before_it_is_ready_is_told_until_one_is_ready() -> None:
    async def story() -> None:
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

    asyncio.run(story())


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
def test_a_pod_that_is_refused_says_why(error: KubeApiError) -> None:
    async def story() -> None:
        async with kubernetes_cluster() as (platform, made):
            made.api.errors["create", POD] = error
            with pytest.raises(PlatformError, match="could not be created: ") as caught:
                await platform.create(TEMPLATE)
            assert str(error) in str(caught.value)
            assert await platform.list() == ()

    asyncio.run(story())


class NameConflictApi(FakeKubeApiWithPods):
    """Refuses the first names."""

    n_left = 2

    async def create(self, kind: Kind, obj: Object) -> Object:
        self.n_left -= 1
        if self.n_left >= 0:
            raise Conflict("exists", status=409, reason="AlreadyExists")
        return await super().create(kind, obj)


def test_a_name_that_is_taken_is_not_the_end() -> None:
    async def story() -> None:
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

    asyncio.run(story())


def test_a_deletion_that_is_refused_is_tried_again() -> None:
    async def story() -> None:
        async with kubernetes_cluster() as (platform, made):
            name = (await platform.create(TEMPLATE)).id
            await next_state(platform, is_ready)
            made.api.errors["delete", POD] = Unavailable("away", status=503)
            await platform.delete(name)
            await platform.delete(name)
            deletes = ("delete", "Pod", name)
            await eventually(lambda: made.api.requests.count(deletes) > 3)
            assert not is_ready(await platform.list())
            del made.api.errors["delete", POD]
            await all_gone(platform)

    asyncio.run(story())


def test_a_new_platform_reads_back_what_runs() -> None:
    async def story() -> None:
        async with kubernetes_cluster() as (platform, made):
            name = (await platform.create(TEMPLATE)).id
            await next_state(platform, is_ready)
            async with running_platform(made.api, made.cache, made.port) as second:
                assert [sandbox.id for sandbox in await second.list()] == [name]
                assert await next_state(second, is_ready) == await platform.list()

    asyncio.run(story())


def test_a_new_platform_does_not_count_what_an_earlier_one_has_ended() -> None:
    async def story() -> None:
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

    asyncio.run(story())


@pytest.mark.parametrize("change", ["component", "owner"])
def test_pods_that_are_no_sandboxes_of_this_model_are_left_alone(change: str) -> None:
    async def story() -> None:
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

    asyncio.run(story())
