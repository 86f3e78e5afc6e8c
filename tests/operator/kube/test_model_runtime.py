"""The control cores of several models over pods that answer: started, made anew, kept apart."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
from fake_cluster import NAMESPACE, FakeCluster, running_cluster
from fake_platform import TIMING, eventually, routable_functions
from model_contexts import SUMMARY, make_context

from faasmoe_operator.control.controller import Controller, ControllerTiming
from faasmoe_operator.control.load_reports import LoadReport, ReportedLoad
from faasmoe_operator.control.usage_ledger import TenantUsage, UsageReport
from faasmoe_operator.errors import PlanError
from faasmoe_operator.kube import model_runtime
from faasmoe_operator.kube.errors import Forbidden, Unavailable
from faasmoe_operator.kube.manifests import ControlSecrets, ModelContext
from faasmoe_operator.kube.manifests.names import (
    FUNCTION_LABEL,
    FUNCTIONS_ANNOTATION,
    POOL_LABEL,
)
from faasmoe_operator.kube.model_runtime import RuntimeDependencies, RuntimeManager
from faasmoe_operator.kube.platform import PodPlatformTiming as PodTiming
from faasmoe_operator.kube.pod_labels import PodLabeler
from faasmoe_operator.kube.store_summary import LayerGroup
from faasmoe_operator.kube.types import CONFIG_MAP, POD, ModelKey

SMALL = replace(SUMMARY, layers=(LayerGroup(2, 8, 2, 1000, 0),))
SCALING = {
    "windowSeconds": 6,
    "panicWindowPercentage": 20,
    "scaleToZeroGracePeriodSeconds": 2,
}
FAST_TIMING = replace(
    TIMING, tick_s=0.5, popularity_save_interval_s=0.05, usage_save_interval_s=0.05
)
DEADLINE_S = 60.0
KEY = ModelKey(NAMESPACE, "qwen")


def model_context(name: str = "qwen", *, uid: str = "u-1", **experts: Any) -> ModelContext:
    spec = {
        "granularity": {"expertsPerFunction": 4},
        "experts": {"warmPool": 0, "device": "cpu", "scaling": SCALING, **experts},
    }
    secrets = ControlSecrets(f"token-{uid}", uid.encode().ljust(16).hex())
    return make_context(spec, name=name, uid=uid, summary=SMALL, secrets=secrets)


class RuntimeHarness:
    """Cores over a cluster; `changed` counts what the reconciler is told."""

    def __init__(self, made: FakeCluster, timing: ControllerTiming) -> None:
        self.cluster = made
        self.changed: list[ModelKey] = []
        grounds = RuntimeDependencies(
            made.api,
            made.cache,
            timing=timing,
            pod_timing=PodTiming(probe_interval_s=0.01, grace_s=1),
            port=made.port,
        )
        self.runtimes = RuntimeManager(grounds, on_change=self.changed.append)

    async def controller(self, name: str = "qwen") -> Controller:
        """Return a model's controller once it has started."""
        await eventually(
            lambda: self.runtimes.find_controller(NAMESPACE, name) is not None, "a controller"
        )
        found = self.runtimes.find_controller(NAMESPACE, name)
        assert found is not None
        return found[0]

    def pod_labels(self) -> list[tuple[str, str | None]]:
        """Return the pool and function that each pod tells."""
        labels = [pod["metadata"]["labels"] for pod in self.cluster.api.pods().values()]
        return sorted((each[POOL_LABEL], each.get(FUNCTION_LABEL)) for each in labels)


@asynccontextmanager
async def world(timing: ControllerTiming = FAST_TIMING) -> AsyncIterator[RuntimeHarness]:
    async with asyncio.timeout(DEADLINE_S), running_cluster() as made:
        running = RuntimeHarness(made, timing)
        try:
            yield running
        finally:
            await running.runtimes.stop()


def test_a_model_has_a_controller_with_its_functions_and_token() -> None:
    async def story() -> None:
        async with world() as running:
            assert running.runtimes.find_controller(NAMESPACE, "qwen") is None
            assert running.runtimes.counts(KEY) is None
            ctx = model_context()
            await running.runtimes.ensure(ctx)
            controller = await running.controller()
            found = running.runtimes.find_controller(NAMESPACE, "qwen")
            assert found == (controller, ctx.secrets.token)
            assert len(controller.model.functions) == 4
            assert str(controller.model.store.path) == "/store/qwen"
            assert controller.timing.start_deadline_s == FAST_TIMING.start_deadline_s
            counts = running.runtimes.counts(KEY)
            assert counts is not None
            assert (counts.functions, counts.active, counts.sandboxes) == (4, 0, 0)
            assert counts.tenant_keys is None
            await eventually(lambda: running.changed == [KEY])

    asyncio.run(story())


def test_a_wake_makes_a_pod_that_tells_its_function() -> None:
    async def story() -> None:
        async with world() as running:
            await running.runtimes.ensure(model_context())
            controller = await running.controller()
            name = next(iter(controller.model.functions))
            controller.activate([name])
            await eventually(lambda: routable_functions(controller) == {name})
            await eventually(lambda: running.pod_labels() == [("assigned", name)], "labels")
            (pod,) = running.cluster.api.pods().values()
            held = json.loads(pod["metadata"]["annotations"][FUNCTIONS_ANNOTATION])
            assert held == [{"id": name, "layers": "0", "experts": "0-3"}]
            await eventually(lambda: len(running.changed) >= 2)
            counts = running.runtimes.counts(KEY)
            assert counts is not None
            assert (counts.active, counts.replicas, counts.ready, counts.generic) == (1, 1, 1, 0)
            assert counts.failure == ""

    asyncio.run(story())


def test_labels_that_are_refused_follow_later() -> None:
    async def story() -> None:
        async with world(replace(FAST_TIMING, tick_s=0.02)) as running:
            await running.runtimes.ensure(model_context(warmPool=1))
            controller = await running.controller()
            await eventually(lambda: running.pod_labels() == [("warm", None)])
            name = next(iter(controller.model.functions))
            running.cluster.api.errors["patch", POD] = Unavailable("away", status=503)
            controller.activate([name])
            await eventually(lambda: routable_functions(controller) == {name})
            patches = [request for request in running.cluster.api.requests if request[0] == "patch"]
            await eventually(lambda: len(running.cluster.api.pods()) == 2, "the pool is filled")
            assert len(patches) <= 1
            del running.cluster.api.errors["patch", POD]
            await eventually(lambda: ("assigned", name) in running.pod_labels(), "patched later")

    asyncio.run(story())


def test_a_core_that_is_made_anew_keeps_what_serves_and_routers_see_another_epoch() -> None:
    async def story() -> None:
        async with world() as running:
            await running.runtimes.ensure(model_context())
            first = await running.controller()
            names = list(first.model.functions)[:2]
            first.activate(names)
            await eventually(lambda: routable_functions(first) == set(names))
            before = {e.spec.id: e.addresses for e in first.routing_table.table.functions}
            await running.runtimes.ensure(model_context(scaling={**SCALING, "maxScale": 3}))
            await eventually(lambda: first.routing_table.is_closed)
            await eventually(lambda: running.runtimes.counts(KEY) is not None)
            second = await running.controller()
            assert second is not first
            assert second.routing_table.epoch != first.routing_table.epoch
            assert {e.spec.id: e.addresses for e in second.routing_table.table.functions} == before
            assert next(iter(second.model.functions.values())).scaling.max_scale == 3
            load = LoadReport("r", {name: ReportedLoad(1.0, 1, 1) for name in names})
            for _ in range(4):
                second.add_load_report(load)
                await asyncio.sleep(FAST_TIMING.tick_s)
            assert {e.spec.id: e.addresses for e in second.routing_table.table.functions} == before
            calls = [call for box in running.cluster.pods.servers.values() for call in box.calls]
            assert sorted(calls) == sorted(f"PUT {name}" for name in names)
            assert running.cluster.api.n_created == 2

    asyncio.run(story())


def test_what_does_not_matter_to_a_core_leaves_it_as_it_is() -> None:
    async def story() -> None:
        async with world() as running:
            await running.runtimes.ensure(model_context())
            controller = await running.controller()
            await running.runtimes.ensure(model_context())
            await running.runtimes.ensure(replace(model_context(), generation=2))
            router = {"router": {"replicas": 3}}
            spec = {
                **model_context().model.spec.model_dump(by_alias=True, exclude_unset=True),
                **router,
            }
            await running.runtimes.ensure(
                make_context(spec, summary=SMALL, secrets=model_context().secrets)
            )
            assert await running.controller() is controller
            assert not controller.routing_table.is_closed

    asyncio.run(story())


def test_another_template_replaces_the_pods_one_by_one() -> None:
    async def story() -> None:
        async with world() as running:
            await running.runtimes.ensure(model_context())
            first = await running.controller()
            (name, *_) = first.model.functions
            first.activate([name])
            await eventually(lambda: routable_functions(first) == {name})
            (old,) = running.cluster.api.pods()
            await running.runtimes.ensure(model_context(threads=2))
            await eventually(lambda: first.routing_table.is_closed)
            second = await running.controller()
            assert routable_functions(second) == {name}
            second.add_load_report(LoadReport("r", {name: ReportedLoad(1.0, 1, 1)}))
            await eventually(lambda: old not in running.cluster.api.pods(), "replaced")
            assert routable_functions(second) == {name}

    asyncio.run(story())


def test_a_model_that_was_made_anew_gets_a_core_of_its_own() -> None:
    async def story() -> None:
        async with world() as running:
            await running.runtimes.ensure(model_context(warmPool=1))
            first = await running.controller()
            await eventually(lambda: first.fleet.n_generic() == 1)
            await running.runtimes.ensure(model_context(uid="u-2"))
            second = await running.controller()
            assert second is not first
            assert (
                len(second.fleet.sandboxes) == 0
            )  # the other one's pods are the garbage collector's

    asyncio.run(story())


def test_a_granularity_that_cannot_be_is_refused_and_changes_nothing() -> None:
    async def story() -> None:
        async with world() as running:
            await running.runtimes.ensure(model_context())
            controller = await running.controller()
            wrong = make_context({"granularity": {"expertsPerFunction": 9}}, summary=SMALL)
            with pytest.raises(PlanError, match=r"spec\.granularity\.expertsPerFunction: got 9"):
                await running.runtimes.ensure(wrong)
            with pytest.raises(PlanError, match="expected a store that is prepared"):
                await running.runtimes.ensure(replace(model_context(), summary=None))
            assert await running.controller() is controller

    asyncio.run(story())


@pytest.mark.parametrize("delete", [True, False])
def test_a_model_that_is_removed_has_no_core_and_its_pods_go_if_asked(delete: bool) -> None:
    async def story() -> None:
        async with world() as running:
            await running.runtimes.ensure(model_context(warmPool=2))
            controller = await running.controller()
            await eventually(lambda: controller.fleet.n_generic() == 2)
            await running.runtimes.remove(KEY, delete_sandboxes=delete)
            await running.runtimes.remove(KEY, delete_sandboxes=delete)
            assert running.runtimes.find_controller(NAMESPACE, "qwen") is None
            assert running.runtimes.counts(KEY) is None
            if delete:
                await eventually(lambda: not running.cluster.api.pods())
            else:
                assert len(running.cluster.api.pods()) == 2

    asyncio.run(story())


def test_why_sandboxes_cannot_be_had_is_told_until_they_can() -> None:
    async def story() -> None:
        async with world() as running:
            quota = "exceeded quota: compute, requested: pods=1, used: pods=9, limited: pods=9"
            running.cluster.api.errors["create", POD] = Forbidden(quota, status=403)
            await running.runtimes.ensure(model_context(warmPool=1))
            await eventually(
                lambda: (c := running.runtimes.counts(KEY)) is not None and c.failure != ""
            )
            counts = running.runtimes.counts(KEY)
            assert counts is not None
            assert quota in counts.failure
            del running.cluster.api.errors["create", POD]
            await eventually(
                lambda: (c := running.runtimes.counts(KEY)) is not None and c.generic == 1
            )
            counts = running.runtimes.counts(KEY)
            assert counts is not None
            assert counts.failure == ""

    asyncio.run(story())


def test_two_models_are_apart_even_if_one_cores_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    update = PodLabeler.update
    broken = True

    async def fails_for_one(labels: PodLabeler) -> bool:
        if broken and labels._controller.model.name == "other":
            raise RuntimeError("a fault of ours")
        return await update(labels)

    monkeypatch.setattr(PodLabeler, "update", fails_for_one)
    monkeypatch.setattr(model_runtime, "RETRY_DELAYS_S", (0.05,))
    other = ModelKey(NAMESPACE, "other")

    async def story() -> None:
        nonlocal broken
        async with world() as running:
            await running.runtimes.ensure(model_context())
            await running.runtimes.ensure(model_context("other", uid="u-2"))
            controller = await running.controller()
            name = next(iter(controller.model.functions))
            controller.activate([name])
            await eventually(lambda: routable_functions(controller) == {name})
            await eventually(
                lambda: (
                    (c := running.runtimes.counts(other)) is not None
                    and "RuntimeError" in c.failure
                )
            )
            assert other in running.changed
            assert await running.controller() is controller
            assert [key for key, _ in running.runtimes.controllers()][-1] == KEY
            broken = False
            await eventually(
                lambda: (c := running.runtimes.counts(other)) is not None and not c.failure
            )
            second = await running.controller("other")
            assert set(second.model.functions).isdisjoint(controller.model.functions)
            assert routable_functions(second) == set()

    asyncio.run(story())


def test_popularity_outlives_the_operator() -> None:
    async def story() -> None:
        async with world() as running:
            await running.runtimes.ensure(model_context())
            controller = await running.controller()
            names = list(controller.model.functions)
            controller.add_load_report(LoadReport("r", {names[2]: ReportedLoad(0.0, 1, 500)}))
            kept = (CONFIG_MAP, NAMESPACE, "qwen-popularity")
            await eventually(lambda: kept in running.cluster.api.objects, "written")
            await running.runtimes.stop()
            n_writes = len(running.cluster.api.writes())
            await running.runtimes.ensure(model_context())
            again = await running.controller()
            assert again.function_stats.by_popularity()[0] == names[2]
            for _ in range(10):
                await asyncio.sleep(FAST_TIMING.popularity_save_interval_s)
            assert running.cluster.api.writes() == []  # nothing was used since
            assert n_writes >= 1
            await running.runtimes.stop()
            held = running.cluster.api.objects[kept]
            assert held["metadata"]["ownerReferences"][0]["uid"] == "u-1"
            running.cluster.api.write({**held, "data": {"popularity.json": "{"}})
            await running.runtimes.ensure(model_context())
            damaged = await running.controller()
            assert damaged.function_stats.by_popularity() == names

    asyncio.run(story())


USAGE_CONFIG_MAP = (CONFIG_MAP, NAMESPACE, "qwen-accounts")
USAGE_REPORT = UsageReport("a" * 32, 100.0, {"acme": TenantUsage(7, 5)})


def test_the_tenants_accounts_outlive_the_operator_and_the_routers() -> None:
    async def story() -> None:
        async with world() as running:
            await running.runtimes.ensure(model_context())
            (await running.controller()).add_usage_report(USAGE_REPORT)
            await eventually(lambda: USAGE_CONFIG_MAP in running.cluster.api.objects, "written")
            await running.runtimes.stop()
            await running.runtimes.ensure(model_context())
            again = await running.controller()
            assert again.usage_ledger.usage_by_tenant == {"acme": TenantUsage(7, 5)}
            again.add_usage_report(USAGE_REPORT)  # a router that went on tells its book again
            again.add_usage_report(replace(USAGE_REPORT, source="b" * 32))
            assert again.usage_ledger.usage_by_tenant == {"acme": TenantUsage(14, 10)}
            await running.runtimes.ensure(model_context(warmPool=1))  # another life of the core
            await eventually(
                lambda: running.runtimes.find_controller(NAMESPACE, "qwen") is not None
            )
            assert (await running.controller()).usage_ledger is again.usage_ledger
            await running.runtimes.stop()
            held = running.cluster.api.objects[USAGE_CONFIG_MAP]
            assert held["metadata"]["ownerReferences"][0]["uid"] == "u-1"
            assert json.loads(held["data"]["accounts.json"])["accounts"]["acme"][:2] == [14, 10]

    asyncio.run(story())


def test_accounts_that_are_damaged_are_kept_to_look_at() -> None:
    async def story() -> None:
        async with world() as running:
            await running.runtimes.ensure(model_context())
            (await running.controller()).add_usage_report(USAGE_REPORT)
            await eventually(lambda: USAGE_CONFIG_MAP in running.cluster.api.objects, "written")
            await running.runtimes.stop()
            held = running.cluster.api.objects[USAGE_CONFIG_MAP]
            running.cluster.api.write({**held, "data": {"accounts.json": "{"}})
            await running.runtimes.ensure(model_context())
            damaged = await running.controller()
            assert damaged.usage_ledger.usage_by_tenant == {}
            damaged.add_usage_report(USAGE_REPORT)
            await running.runtimes.stop()
            data = running.cluster.api.objects[USAGE_CONFIG_MAP]["data"]
            assert data["accounts.damaged"] == "{"
            assert json.loads(data["accounts.json"])["accounts"]["acme"][0] == 7

    asyncio.run(story())


def test_popularity_that_cannot_be_written_is_no_error() -> None:
    async def story() -> None:
        async with world() as running:
            running.cluster.api.errors["apply", CONFIG_MAP] = Forbidden("no", status=403)
            await running.runtimes.ensure(model_context())
            controller = await running.controller()
            name = next(iter(controller.model.functions))
            controller.add_load_report(LoadReport("r", {name: ReportedLoad(0.0, 1, 500)}))
            applies = ("apply", "ConfigMap", "qwen-popularity")
            await eventually(
                lambda: running.cluster.api.requests.count(applies) >= 3, "tried again"
            )
            assert await running.controller() is controller

    asyncio.run(story())


def test_many_cores_that_have_nothing_to_do_ask_for_nothing() -> None:
    async def story() -> None:
        async with world() as running:
            contexts = [model_context(f"m{number}", uid=f"u-{number}") for number in range(30)]
            await asyncio.gather(*map(running.runtimes.ensure, contexts))
            await eventually(lambda: len(list(running.runtimes.controllers())) == 30)
            await eventually(lambda: len(running.changed) == 30)
            requests = len(running.cluster.api.requests)
            await asyncio.sleep(4 * FAST_TIMING.tick_s)
            assert len(running.cluster.api.requests) == requests
            assert len(running.changed) == 30

    asyncio.run(story())
