"""Reflectors against an API server over real HTTP: list, watch, resume, relist."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace

import pytest
from fake_watch_server import FakeWatchServer, watch_client
from kube_objects import make_object

from faasmoe_operator.kube.api_discovery import OptionalApis
from faasmoe_operator.kube.cache import ObjectCache
from faasmoe_operator.kube.client import KubeClient
from faasmoe_operator.kube.informer import Informers, ReflectorTiming, label_selector_for
from faasmoe_operator.kube.types import MOEMODEL, POD, SERVICE_MONITOR, Kind, ModelKey, Object

TIMEOUT_S = 120.0
FAST = ReflectorTiming(min_backoff_s=0.01, unavailable_backoff_s=0.02, max_backoff_s=0.02)


async def until(condition: Callable[[], bool]) -> None:
    """Poll until a condition holds; fails after TIMEOUT_S."""
    async with asyncio.timeout(TIMEOUT_S):
        while not condition():  # noqa: ASYNC110  (what is polled has no event)
            await asyncio.sleep(0.002)


@dataclass
class Follower:
    """An operator's informers and their cache."""

    client: KubeClient
    informers: Informers
    apis: OptionalApis
    cache: ObjectCache
    events: list[Kind] = field(default_factory=list)
    enqueued: list[ModelKey] = field(default_factory=list)

    def names(self, kind: Kind = POD) -> set[str]:
        return {obj["metadata"]["name"] for obj in self.cache.list_all(kind)}


@asynccontextmanager
async def following(
    server: FakeWatchServer,
    *,
    kinds: Sequence[Kind] = (POD,),
    namespaces: Sequence[str] = (),
    timing: ReflectorTiming = FAST,
) -> AsyncIterator[Follower]:
    """Run informers against a server, as the operator does."""
    cache = ObjectCache()
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(watch_client(server))
        group = await stack.enter_async_context(_task_group())
        apis = OptionalApis(client, cache, enqueue=lambda key: follower.enqueued.append(key))
        informers = Informers(
            client,
            cache,
            namespaces=namespaces,
            task_group=group,
            on_event=lambda kind: follower.events.append(kind),
            on_not_served=apis.mark_not_served,
            timing=timing,
        )
        follower = Follower(client, informers, apis, cache)
        informers.start(kinds)
        yield follower


@asynccontextmanager
async def _task_group() -> AsyncIterator[asyncio.TaskGroup]:
    """Yield a task group whose tasks are cancelled at the end."""
    started: asyncio.Future[asyncio.TaskGroup] = asyncio.get_running_loop().create_future()

    async def hold() -> None:
        async with asyncio.TaskGroup() as group:
            started.set_result(group)
            await asyncio.Event().wait()

    holder = asyncio.create_task(hold())
    try:
        yield await started
    finally:
        holder.cancel()
        await asyncio.wait([holder])


def run(
    scenario: Callable[[FakeWatchServer, Follower], Awaitable[None]],
    timing: ReflectorTiming = FAST,
) -> None:
    """Run a scenario with a follower of the pods a and b whose watch is open."""

    async def main() -> None:
        server = FakeWatchServer(POD)
        server.write(POD, "a")
        server.write(POD, "b")
        async with following(server, timing=timing) as follower:
            await follower.informers.wait_for_cache_sync()
            await until(lambda: server.n_watching() == 1)
            await scenario(server, follower)

    asyncio.run(main())


def test_lists_all_pages_before_the_cache_counts_as_synced() -> None:
    async def main() -> None:
        server = FakeWatchServer(POD)
        for number in range(5):
            server.write(POD, f"pod-{number}")
        async with following(server) as follower:
            await follower.informers.wait_for_cache_sync()
            assert follower.names() == {f"pod-{number}" for number in range(5)}
            assert server.count("list") == 3
            (pod, *_) = follower.cache.list_all(POD)
            assert (pod["apiVersion"], pod["kind"]) == ("v1", "Pod")

    asyncio.run(main())


def test_an_empty_cluster_counts_as_synced() -> None:
    async def main() -> None:
        async with following(FakeWatchServer(POD, MOEMODEL), kinds=(POD, MOEMODEL)) as follower:
            async with asyncio.timeout(TIMEOUT_S):
                await follower.informers.wait_for_cache_sync()
            assert follower.names() == set()

    asyncio.run(main())


def test_follows_additions_changes_and_deletions() -> None:
    async def scenario(server: FakeWatchServer, follower: Follower) -> None:
        server.write(POD, "c")
        await until(lambda: follower.names() == {"a", "b", "c"})
        server.write(POD, "c", status={"phase": "Running"})
        await until(lambda: follower.cache.get(POD, "llm", "c") is not None)
        await until(lambda: "status" in (follower.cache.get(POD, "llm", "c") or {}))
        server.delete(POD, "a")
        await until(lambda: follower.names() == {"b", "c"})
        assert follower.events == [POD] * 3
        assert server.count("list") == 1

    run(scenario)


def test_requests_only_managed_objects_of_its_namespaces() -> None:
    async def main() -> None:
        server = FakeWatchServer(POD, MOEMODEL)
        server.write(POD, "ours")
        server.write(POD, "elsewhere", namespace="other")
        server.write(POD, "unmanaged", labels={})
        server.write(MOEMODEL, "moe", labels={})
        namespaces = ("llm", "lab")
        async with following(server, kinds=(POD, MOEMODEL), namespaces=namespaces) as follower:
            await follower.informers.wait_for_cache_sync()
            await until(lambda: server.n_watching() == 4)
            assert (follower.names(), follower.names(MOEMODEL)) == ({"ours"}, {"moe"})
        selectors = {seen.path: seen.query.get("labelSelector") for seen in server.requests}
        managed = "app.kubernetes.io/managed-by=faasmoe-operator"
        assert selectors == {
            "/api/v1/namespaces/llm/pods": managed,
            "/api/v1/namespaces/lab/pods": managed,
            "/apis/faasmoe.dev/v1alpha1/namespaces/llm/moemodels": None,
            "/apis/faasmoe.dev/v1alpha1/namespaces/lab/moemodels": None,
        }

    asyncio.run(main())


def test_watches_with_bookmarks_and_a_server_side_timeout() -> None:
    async def scenario(server: FakeWatchServer, follower: Follower) -> None:
        query = server.requests[-1].query
        assert query["allowWatchBookmarks"] == "true"
        assert 300 <= int(query["timeoutSeconds"]) <= 600

    run(scenario)


def test_resumes_an_ended_watch_from_the_last_version_without_a_relist() -> None:
    async def scenario(server: FakeWatchServer, follower: Follower) -> None:
        changed = server.write(POD, "c")
        await until(lambda: "c" in follower.names())
        server.end_watches()
        server.delete(POD, "a")
        await until(lambda: follower.names() == {"b", "c"})
        assert server.watch_versions()[-1] == changed["metadata"]["resourceVersion"]
        assert server.count("list") == 1

    run(scenario)


def test_resumes_from_the_version_of_a_bookmark() -> None:
    async def scenario(server: FakeWatchServer, follower: Follower) -> None:
        server.send_bookmark()
        server.compact()
        await until(lambda: follower.events == [POD])
        server.end_watches()
        server.delete(POD, "a")
        await until(lambda: follower.names() == {"b"})
        assert server.count("list") == 1

    run(scenario)


def test_relist_after_410_finds_a_missed_deletion() -> None:
    async def scenario(server: FakeWatchServer, follower: Follower) -> None:
        server.end_watches()
        server.delete(POD, "a")
        server.write(POD, "c")
        server.compact()
        await until(lambda: follower.names() == {"b", "c"})
        assert server.count("list") == 2

    run(scenario)


def test_an_old_list_is_repeated_when_its_watch_ends() -> None:
    async def scenario(server: FakeWatchServer, follower: Follower) -> None:
        server.end_watches()
        await until(lambda: server.count("list") >= 2)

    run(scenario, timing=replace(FAST, relist_interval_s=0.0))


def test_an_object_that_cannot_be_read_delays_its_kind_and_ends_nothing(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    update, n_failures = ObjectCache.update, iter(range(2))

    def fail_twice(cache: ObjectCache, kind: Kind, obj: Object) -> None:
        if next(n_failures, None) is not None:
            raise KeyError("metadata")
        update(cache, kind, obj)

    monkeypatch.setattr(ObjectCache, "update", fail_twice)

    async def scenario(server: FakeWatchServer, follower: Follower) -> None:
        server.write(POD, "c")
        await until(lambda: "c" in follower.names())
        server.write(POD, "d")
        await until(lambda: "d" in follower.names())

    run(scenario)
    assert "unexpected failure, listing again" in caplog.text


def test_relists_after_an_expired_error_event() -> None:
    async def scenario(server: FakeWatchServer, follower: Follower) -> None:
        server.send_error(410, "Expired")
        server.delete(POD, "a")
        server.compact()
        await until(lambda: follower.names() == {"b"})

    run(scenario)


def test_resumes_after_other_error_events_without_a_relist() -> None:
    async def scenario(server: FakeWatchServer, follower: Follower) -> None:
        server.send_error(500, "InternalError")
        server.delete(POD, "a")
        await until(lambda: follower.names() == {"b"})
        assert server.count("list") == 1

    run(scenario)


@pytest.mark.parametrize("status", [403, 429, 500, 503])
def test_retries_a_refused_watch_from_the_same_version(status: int) -> None:
    async def scenario(server: FakeWatchServer, follower: Follower) -> None:
        server.failures["watch"] = [status] * 3
        server.end_watches()
        server.write(POD, "c")
        await until(lambda: "c" in follower.names())
        assert len(set(server.watch_versions())) == 1
        assert server.count("list") == 1

    run(scenario)


def test_reconnects_a_silent_watch_without_a_relist() -> None:
    async def scenario(server: FakeWatchServer, follower: Follower) -> None:
        await until(lambda: server.count("watch") >= 3)
        server.write(POD, "c")
        await until(lambda: "c" in follower.names())
        assert server.count("list") == 1

    silence = ReflectorTiming(idle_timeout_s=0.1, min_backoff_s=0.01, unavailable_backoff_s=0.02)
    run(scenario, timing=silence)


def test_a_watch_that_always_ends_at_once_is_not_repeated_in_a_busy_loop() -> None:
    async def scenario(server: FakeWatchServer, follower: Follower) -> None:
        started_at, n_before = time.monotonic(), server.count("watch")
        server.end_watches()
        for n_watches in range(n_before + 1, n_before + 4):
            await until(lambda n_watches=n_watches: server.count("watch") == n_watches)  # type: ignore[misc]
            await until(lambda: server.n_watching() == 1)
            server.end_watches()
        assert time.monotonic() - started_at >= 3 * 0.2 / 2

    slow = ReflectorTiming(min_backoff_s=0.2, unavailable_backoff_s=0.2)
    run(scenario, timing=slow)


def test_is_not_synced_until_a_refused_list_succeeds() -> None:
    async def main() -> None:
        server = FakeWatchServer(POD)
        server.write(POD, "a")
        server.failures["list"] = [403, 503, 410]
        async with following(server) as follower:
            await follower.informers.wait_for_cache_sync()
            assert follower.names() == {"a"}
            assert server.count("list") == 4

    asyncio.run(main())


def test_open_watches_do_not_use_the_connection_pool_of_requests() -> None:
    async def scenario(server: FakeWatchServer, follower: Follower) -> None:
        async with asyncio.timeout(TIMEOUT_S):
            listed = await follower.client.list(POD, "llm")
        assert len(listed.objects) == 2
        assert server.n_watching() == 1

    run(scenario)


def test_reads_an_object_larger_than_the_stream_chunk() -> None:
    async def scenario(server: FakeWatchServer, follower: Follower) -> None:
        server.write(POD, "large", spec={"note": "x" * 1_000_000})
        await until(lambda: "large" in follower.names())

    run(scenario)


def test_an_object_written_while_a_list_is_under_way_stays() -> None:
    async def scenario(server: FakeWatchServer, follower: Follower) -> None:
        follower.cache.update(POD, make_object(POD, "created", version=10_000))
        server.end_watches()
        server.delete(POD, "a")
        server.compact()
        await until(lambda: follower.names() == {"b", "created"})

    run(scenario)


def test_follows_an_optional_kind_that_appears_later_and_disappears() -> None:
    async def main() -> None:
        server = FakeWatchServer(MOEMODEL)
        server.write(MOEMODEL, "moe", labels={}, spec={"monitoring": {"serviceMonitor": {}}})
        async with following(server, kinds=(MOEMODEL,)) as follower:
            await follower.apis.start(follower.informers)
            await follower.informers.wait_for_cache_sync()
            await follower.apis.discover_missing()
            assert follower.apis.served_versions() == frozenset()

            server.served.add(SERVICE_MONITOR)
            server.write(SERVICE_MONITOR, "moe-router")
            await follower.apis.discover_missing()
            await until(lambda: follower.names(SERVICE_MONITOR) == {"moe-router"})
            assert follower.enqueued == [ModelKey("llm", "moe")]

            server.served.remove(SERVICE_MONITOR)
            server.end_watches()
            await until(lambda: follower.apis.served_versions() == frozenset())
            assert follower.names(SERVICE_MONITOR) == set()

            server.served.add(SERVICE_MONITOR)
            await follower.apis.discover_missing()
            await until(lambda: follower.names(SERVICE_MONITOR) == {"moe-router"})

    asyncio.run(main())


def test_an_optional_kind_that_vanishes_before_its_list_does_not_block_the_sync() -> None:
    async def main() -> None:
        server = FakeWatchServer(POD, SERVICE_MONITOR)
        async with following(server, namespaces=("llm", "lab")) as follower:
            await follower.apis.start(follower.informers)
            server.served.remove(SERVICE_MONITOR)
            async with asyncio.timeout(TIMEOUT_S):
                await follower.informers.wait_for_cache_sync()

    asyncio.run(main())


def test_waits_for_a_required_kind_that_is_not_served_yet() -> None:
    async def main() -> None:
        server = FakeWatchServer()
        server.write(POD, "a")
        async with following(server) as follower:
            await until(lambda: server.count("list") >= 2)
            server.served.add(POD)
            await follower.informers.wait_for_cache_sync()
            assert follower.names() == {"a"}

    asyncio.run(main())


def test_selects_all_models_and_only_managed_objects_of_other_kinds() -> None:
    assert label_selector_for(MOEMODEL) == ""
    assert label_selector_for(POD) == "app.kubernetes.io/managed-by=faasmoe-operator"
