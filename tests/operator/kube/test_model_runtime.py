"""Runtimes of several models over pods that answer: start, restart, isolation, persistence."""

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

from faasmoe_contracts.control_messages import FunctionLoad, LoadReport
from faasmoe_contracts.usage import UsageRecord, UsageReport
from faasmoe_operator.control.controller import Controller, ControllerTiming
from faasmoe_operator.errors import PlanError
from faasmoe_operator.kube import model_runtime
from faasmoe_operator.kube.cache import OwnedPods
from faasmoe_operator.kube.client import KubeApi
from faasmoe_operator.kube.errors import (
    Forbidden,
    Invalid,
    KubeApiError,
    NodeTooSmall,
    Unavailable,
)
from faasmoe_operator.kube.manifests import ControlSecrets, ModelContext
from faasmoe_operator.kube.manifests.names import (
    FUNCTION_LABEL,
    FUNCTIONS_ANNOTATION,
    POOL_LABEL,
)
from faasmoe_operator.kube.manifests.resources import resize_policy
from faasmoe_operator.kube.model_runtime import RuntimeDependencies, RuntimeManager
from faasmoe_operator.kube.platform import PodPlatformTiming
from faasmoe_operator.kube.pod_labels import PodLabeler
from faasmoe_operator.kube.pod_resizer import pod_requests
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
DEADLINE_S = 120.0
KEY = ModelKey(NAMESPACE, "qwen")


def model_context(name: str = "qwen", *, uid: str = "u-1", **experts: Any) -> ModelContext:
    spec = {
        "granularity": {"expertsPerFunction": 4},
        "experts": {"warmPool": 0, "device": "cpu", "scaling": SCALING, **experts},
    }
    secrets = ControlSecrets(f"token-{uid}", uid.encode().ljust(16).hex())
    return make_context(spec, name=name, uid=uid, summary=SMALL, secrets=secrets)


class RuntimeHarness:
    """Runtimes over a fake cluster; `changed` records calls of `on_change`."""

    def __init__(self, made: FakeCluster, timing: ControllerTiming) -> None:
        self.cluster = made
        self.changed: list[ModelKey] = []
        deps = RuntimeDependencies(
            made.api,
            made.cache,
            timing=timing,
            pod_timing=PodPlatformTiming(probe_interval_s=0.01, grace_s=1),
            port=made.port,
        )
        self.runtimes = RuntimeManager(deps, on_change=self.changed.append)

    async def controller(self, name: str = "qwen") -> Controller:
        """Return a model's controller once it has started."""
        await eventually(
            lambda: self.runtimes.find_controller(NAMESPACE, name) is not None, "a controller"
        )
        found = self.runtimes.find_controller(NAMESPACE, name)
        assert found is not None
        return found[0]

    def pod_labels(self) -> list[tuple[str, str | None]]:
        """Return the pool and function labels of each pod."""
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
    async def scenario() -> None:
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

    asyncio.run(scenario())


def test_an_activation_creates_a_pod_labelled_with_its_function() -> None:
    async def scenario() -> None:
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

    asyncio.run(scenario())


def test_rejected_labels_are_retried() -> None:
    async def scenario() -> None:
        async with world(replace(FAST_TIMING, tick_s=0.02)) as running:
            await running.runtimes.ensure(model_context(warmPool=1))
            controller = await running.controller()
            await eventually(lambda: running.pod_labels() == [("warm", None)])
            name = next(iter(controller.model.functions))
            running.cluster.api.errors["patch", POD] = Unavailable("unavailable", status=503)
            controller.activate([name])
            await eventually(lambda: routable_functions(controller) == {name})
            patches = [request for request in running.cluster.api.requests if request[0] == "patch"]
            await eventually(lambda: len(running.cluster.api.pods()) == 2, "the pool is filled")
            assert len(patches) <= 1
            del running.cluster.api.errors["patch", POD]
            await eventually(lambda: ("assigned", name) in running.pod_labels(), "patched later")

    asyncio.run(scenario())


def test_a_restarted_runtime_keeps_ready_sandboxes_and_has_a_new_epoch() -> None:
    async def scenario() -> None:
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
            load = LoadReport("r", {name: FunctionLoad(1.0, 1, 1) for name in names})
            for _ in range(4):
                second.add_load_report(load)
                await asyncio.sleep(FAST_TIMING.tick_s)
            assert {e.spec.id: e.addresses for e in second.routing_table.table.functions} == before
            calls = [call for box in running.cluster.pods.servers.values() for call in box.calls]
            assert sorted(calls) == sorted(f"PUT {name}" for name in names)
            assert running.cluster.api.n_created == 2

    asyncio.run(scenario())


def test_irrelevant_spec_changes_do_not_restart_the_runtime() -> None:
    async def scenario() -> None:
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

    asyncio.run(scenario())


def test_a_changed_template_replaces_pods_one_by_one() -> None:
    async def scenario() -> None:
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
            second.add_load_report(LoadReport("r", {name: FunctionLoad(1.0, 1, 1)}))
            await eventually(lambda: old not in running.cluster.api.pods(), "replaced")
            assert routable_functions(second) == {name}

    asyncio.run(scenario())


def test_a_recreated_model_gets_a_new_runtime() -> None:
    async def scenario() -> None:
        async with world() as running:
            await running.runtimes.ensure(model_context(warmPool=1))
            first = await running.controller()
            await eventually(lambda: first.fleet.n_generic() == 1)
            await running.runtimes.ensure(model_context(uid="u-2"))
            second = await running.controller()
            assert second is not first
            assert (
                len(second.fleet.sandboxes) == 0
            )  # the garbage collector deletes the other one's pods

    asyncio.run(scenario())


def test_an_invalid_granularity_is_rejected_and_changes_nothing() -> None:
    async def scenario() -> None:
        async with world() as running:
            await running.runtimes.ensure(model_context())
            controller = await running.controller()
            wrong = make_context({"granularity": {"expertsPerFunction": 9}}, summary=SMALL)
            with pytest.raises(PlanError, match=r"spec\.granularity\.expertsPerFunction: got 9"):
                await running.runtimes.ensure(wrong)
            with pytest.raises(PlanError, match="expected a prepared store"):
                await running.runtimes.ensure(replace(model_context(), summary=None))
            assert await running.controller() is controller

    asyncio.run(scenario())


@pytest.mark.parametrize("delete", [True, False])
def test_remove_stops_the_runtime_and_optionally_deletes_its_pods(delete: bool) -> None:
    async def scenario() -> None:
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

    asyncio.run(scenario())


def test_counts_report_why_sandboxes_cannot_be_started() -> None:
    async def scenario() -> None:
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

    asyncio.run(scenario())


def memory_requests(running: RuntimeHarness) -> list[int]:
    return sorted(pod_requests(p).memory_bytes for p in running.cluster.api.pods().values())


def test_pods_grow_at_attach_and_shrink_at_detach() -> None:
    ctx = replace(model_context(warmPool=1), can_resize=True)
    policy = resize_policy(ctx)
    assert policy is not None
    idle = policy.idle.memory_bytes

    async def scenario() -> None:
        async with world() as running:
            await running.runtimes.ensure(ctx)
            controller = await running.controller()
            await eventually(lambda: memory_requests(running) == [idle])
            name = next(iter(controller.model.functions))
            size_bytes = controller.model.functions[name].size_bytes
            controller.activate([name])
            await eventually(lambda: memory_requests(running) == [idle, idle + size_bytes])

            def is_shrunk() -> bool:
                controller.add_load_report(LoadReport("r"))  # a router that is idle
                return set(memory_requests(running)) == {idle}

            await eventually(is_shrunk)

    asyncio.run(scenario())


def test_a_resize_that_is_refused_keeps_nothing_from_serving() -> None:
    ctx = replace(model_context(warmPool=1), can_resize=True)

    async def scenario() -> None:
        async with world() as running:
            running.cluster.api.errors["resize", POD] = Forbidden("exceeded quota", status=403)
            await running.runtimes.ensure(ctx)
            controller = await running.controller()
            name = next(iter(controller.model.functions))
            controller.activate([name])
            await eventually(lambda: ("resize", "Pod") in requested(running))
            await eventually(lambda: routable_functions(controller) == {name})

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "error",
    [
        NodeTooSmall("node didn't have enough", status=403),
        Invalid("Pod running on node without support for resize", status=422),
    ],
)
def test_what_a_node_cannot_give_is_asked_for_once(error: KubeApiError) -> None:
    ctx = replace(model_context(warmPool=1), can_resize=True)

    async def scenario() -> None:
        async with world() as running:
            running.cluster.api.errors["resize", POD] = error
            await running.runtimes.ensure(ctx)
            controller = await running.controller()
            first, second = list(controller.model.functions)[:2]
            controller.activate([first])
            await eventually(lambda: len(set(resized(running))) == 1)
            controller.activate([second])
            await eventually(lambda: len(set(resized(running))) == 2)
            assert len(resized(running)) == 2

    asyncio.run(scenario())


def resized(running: RuntimeHarness) -> list[str]:
    """Return the pods whose resize was asked for, in order."""
    return [name for verb, _, name in running.cluster.api.requests if verb == "resize"]


def requested(running: RuntimeHarness) -> set[tuple[str, str]]:
    return {(verb, kind) for verb, kind, _ in running.cluster.api.requests}


def test_pods_have_a_fixed_size_where_they_cannot_be_resized() -> None:
    async def scenario() -> None:
        async with world() as running:
            await running.runtimes.ensure(model_context(warmPool=1))
            controller = await running.controller()
            name = next(iter(controller.model.functions))
            controller.activate([name])
            await eventually(lambda: ("assigned", name) in running.pod_labels())
            assert ("resize", "Pod") not in requested(running)

    asyncio.run(scenario())


def test_a_failing_runtime_does_not_affect_other_models(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = True

    class FailingLabeler(PodLabeler):
        """Raises for one model while `broken`."""

        def __init__(
            self, api: KubeApi, pods: OwnedPods, controller: Controller, *, namespace: str
        ) -> None:
            super().__init__(api, pods, controller, namespace=namespace)
            self._model = controller.model.name

        async def update(self) -> bool:
            if broken and self._model == "other":
                raise RuntimeError("a bug")
            return await super().update()

    monkeypatch.setattr(model_runtime, "PodLabeler", FailingLabeler)
    monkeypatch.setattr(model_runtime, "RETRY_DELAYS_S", (0.05,))
    other = ModelKey(NAMESPACE, "other")

    async def scenario() -> None:
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

    asyncio.run(scenario())


def test_popularity_survives_a_restart_of_the_operator() -> None:
    async def scenario() -> None:
        async with world() as running:
            await running.runtimes.ensure(model_context())
            controller = await running.controller()
            names = list(controller.model.functions)
            controller.add_load_report(LoadReport("r", {names[2]: FunctionLoad(0.0, 1, 500)}))
            kept = (CONFIG_MAP, NAMESPACE, "qwen-popularity")
            await eventually(lambda: kept in running.cluster.api.objects, "written")
            await running.runtimes.stop()
            n_writes = len(running.cluster.api.writes())
            await running.runtimes.ensure(model_context())
            again = await running.controller()
            assert again.function_stats.by_popularity()[0] == names[2]
            for _ in range(10):
                await asyncio.sleep(FAST_TIMING.popularity_save_interval_s)
            assert running.cluster.api.writes() == []  # no request has been served since
            assert n_writes >= 1
            await running.runtimes.stop()
            held = running.cluster.api.objects[kept]
            assert held["metadata"]["ownerReferences"][0]["uid"] == "u-1"
            running.cluster.api.write({**held, "data": {"popularity.json": "{"}})
            await running.runtimes.ensure(model_context())
            damaged = await running.controller()
            assert damaged.function_stats.by_popularity() == names

    asyncio.run(scenario())


USAGE_CONFIG_MAP = (CONFIG_MAP, NAMESPACE, "qwen-accounts")
USAGE_REPORT = UsageReport("a" * 32, 100.0, {"acme": UsageRecord(7, 5)})


def test_usage_survives_restarts_of_operator_and_routers() -> None:
    async def scenario() -> None:
        async with world() as running:
            await running.runtimes.ensure(model_context())
            (await running.controller()).add_usage_report(USAGE_REPORT)
            await eventually(lambda: USAGE_CONFIG_MAP in running.cluster.api.objects, "written")
            await running.runtimes.stop()
            await running.runtimes.ensure(model_context())
            again = await running.controller()
            assert again.usage_ledger.usage_by_tenant == {"acme": UsageRecord(7, 5)}
            again.add_usage_report(
                USAGE_REPORT
            )  # a router that kept running reports its usage again
            again.add_usage_report(replace(USAGE_REPORT, source_id="b" * 32))
            assert again.usage_ledger.usage_by_tenant == {"acme": UsageRecord(14, 10)}
            await running.runtimes.ensure(model_context(warmPool=1))  # restarts the runtime
            await eventually(
                lambda: running.runtimes.find_controller(NAMESPACE, "qwen") is not None
            )
            assert (await running.controller()).usage_ledger is again.usage_ledger
            await running.runtimes.stop()
            held = running.cluster.api.objects[USAGE_CONFIG_MAP]
            assert held["metadata"]["ownerReferences"][0]["uid"] == "u-1"
            assert json.loads(held["data"]["accounts.json"])["accounts"]["acme"][:2] == [14, 10]

    asyncio.run(scenario())


def test_corrupted_usage_is_retained_for_inspection() -> None:
    async def scenario() -> None:
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

    asyncio.run(scenario())


def test_a_failed_save_of_popularity_is_not_an_error() -> None:
    async def scenario() -> None:
        async with world() as running:
            running.cluster.api.errors["apply", CONFIG_MAP] = Forbidden("no", status=403)
            await running.runtimes.ensure(model_context())
            controller = await running.controller()
            name = next(iter(controller.model.functions))
            controller.add_load_report(LoadReport("r", {name: FunctionLoad(0.0, 1, 500)}))
            applies = ("apply", "ConfigMap", "qwen-popularity")
            await eventually(lambda: running.cluster.api.requests.count(applies) >= 3, "retries")
            assert await running.controller() is controller

    asyncio.run(scenario())


def test_idle_runtimes_send_no_requests() -> None:
    async def scenario() -> None:
        async with world() as running:
            contexts = [model_context(f"m{number}", uid=f"u-{number}") for number in range(30)]
            await asyncio.gather(*map(running.runtimes.ensure, contexts))
            await eventually(lambda: len(list(running.runtimes.controllers())) == 30)
            await eventually(lambda: len(running.changed) == 30)
            requests = len(running.cluster.api.requests)
            await asyncio.sleep(4 * FAST_TIMING.tick_s)
            assert len(running.cluster.api.requests) == requests
            assert len(running.changed) == 30

    asyncio.run(scenario())
