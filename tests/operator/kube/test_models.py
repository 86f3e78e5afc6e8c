"""The control cores of several models over pods that answer: started, made anew, kept apart."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
from boxes import TIMING, eventually, serving
from model_contexts import SUMMARY, make_context
from pod_world import NAMESPACE, Cluster, cluster

from faasmoe_operator.control.controller import Controller
from faasmoe_operator.control.ledger import Statement, Use
from faasmoe_operator.control.reports import FunctionLoad, LoadReport
from faasmoe_operator.control.timing import Timing
from faasmoe_operator.errors import PlanError
from faasmoe_operator.kube import core
from faasmoe_operator.kube.core import Grounds
from faasmoe_operator.kube.errors import Forbidden, Unavailable
from faasmoe_operator.kube.keys import ModelKey
from faasmoe_operator.kube.kinds import CONFIG_MAP, POD
from faasmoe_operator.kube.manifests import ControlSecrets, ModelContext
from faasmoe_operator.kube.manifests.names import (
    FUNCTION_LABEL,
    FUNCTIONS_ANNOTATION,
    POOL_LABEL,
)
from faasmoe_operator.kube.models import ModelCores
from faasmoe_operator.kube.pod_labels import PodLabels
from faasmoe_operator.kube.store_summary import LayerRun
from faasmoe_operator.platforms.kubernetes import Timing as PodTiming

SMALL = replace(SUMMARY, layers=(LayerRun(2, 8, 2, 1000, 0),))
SCALING = {
    "windowSeconds": 6,
    "panicWindowPercentage": 20,
    "scaleToZeroGracePeriodSeconds": 2,
}
QUICK = replace(TIMING, tick_s=0.5, save_interval_s=0.05, accounts_interval_s=0.05)
DEADLINE_S = 60.0
KEY = ModelKey(NAMESPACE, "qwen")


def context(name: str = "qwen", *, uid: str = "u-1", **experts: Any) -> ModelContext:
    spec = {
        "granularity": {"expertsPerFunction": 4},
        "experts": {"warmPool": 0, "device": "cpu", "scaling": SCALING, **experts},
    }
    secrets = ControlSecrets(f"token-{uid}", uid.encode().ljust(16).hex())
    return make_context(spec, name=name, uid=uid, summary=SMALL, secrets=secrets)


class World:
    """Cores over a cluster; `changed` counts what the reconciler is told."""

    def __init__(self, made: Cluster, timing: Timing) -> None:
        self.made = made
        self.changed: list[ModelKey] = []
        grounds = Grounds(
            made.api,
            made.cache,
            timing=timing,
            pod_timing=PodTiming(probe_interval_s=0.01, grace_s=1),
            port=made.port,
        )
        self.cores = ModelCores(grounds, on_change=self.changed.append)

    async def controller(self, name: str = "qwen") -> Controller:
        """Return a model's controller once it has started."""
        await eventually(lambda: self.cores.find(NAMESPACE, name) is not None, "a controller")
        found = self.cores.find(NAMESPACE, name)
        assert found is not None
        return found[0]

    def marks(self) -> list[tuple[str, str | None]]:
        """Return the pool and function that each pod tells."""
        labels = [pod["metadata"]["labels"] for pod in self.made.api.pods().values()]
        return sorted((each[POOL_LABEL], each.get(FUNCTION_LABEL)) for each in labels)


@asynccontextmanager
async def world(timing: Timing = QUICK) -> AsyncIterator[World]:
    async with asyncio.timeout(DEADLINE_S), cluster() as made:
        running = World(made, timing)
        try:
            yield running
        finally:
            await running.cores.end()


def test_a_model_has_a_controller_with_its_functions_and_token() -> None:
    async def story() -> None:
        async with world() as running:
            assert running.cores.find(NAMESPACE, "qwen") is None
            assert running.cores.counts(KEY) is None
            ctx = context()
            await running.cores.ensure(ctx)
            controller = await running.controller()
            found = running.cores.find(NAMESPACE, "qwen")
            assert found == (controller, ctx.secrets.token)
            assert len(controller.model.functions) == 4
            assert str(controller.model.store.path) == "/store/qwen"
            assert controller.timing.start_deadline_s == QUICK.start_deadline_s
            counts = running.cores.counts(KEY)
            assert counts is not None
            assert (counts.functions, counts.active, counts.sandboxes) == (4, 0, 0)
            assert counts.tenant_keys is None
            await eventually(lambda: running.changed == [KEY])

    asyncio.run(story())


def test_a_wake_makes_a_pod_that_tells_its_function() -> None:
    async def story() -> None:
        async with world() as running:
            await running.cores.ensure(context())
            controller = await running.controller()
            name = next(iter(controller.model.functions))
            controller.wake([name])
            await eventually(lambda: serving(controller) == {name})
            await eventually(lambda: running.marks() == [("assigned", name)], "labels")
            (pod,) = running.made.api.pods().values()
            held = json.loads(pod["metadata"]["annotations"][FUNCTIONS_ANNOTATION])
            assert held == [{"id": name, "layers": "0", "experts": "0-3"}]
            await eventually(lambda: len(running.changed) >= 2)
            counts = running.cores.counts(KEY)
            assert counts is not None
            assert (counts.active, counts.replicas, counts.ready, counts.generic) == (1, 1, 1, 0)
            assert counts.trouble == ""

    asyncio.run(story())


def test_labels_that_are_refused_follow_later() -> None:
    async def story() -> None:
        async with world(replace(QUICK, tick_s=0.02)) as running:
            await running.cores.ensure(context(warmPool=1))
            controller = await running.controller()
            await eventually(lambda: running.marks() == [("warm", None)])
            name = next(iter(controller.model.functions))
            running.made.api.refusals["patch", POD] = Unavailable("away", status=503)
            controller.wake([name])
            await eventually(lambda: serving(controller) == {name})
            patches = [request for request in running.made.api.requests if request[0] == "patch"]
            await eventually(lambda: len(running.made.api.pods()) == 2, "the pool is filled")
            assert len(patches) <= 1
            del running.made.api.refusals["patch", POD]
            await eventually(lambda: ("assigned", name) in running.marks(), "patched later")

    asyncio.run(story())


def test_a_core_that_is_made_anew_keeps_what_serves_and_routers_see_another_epoch() -> None:
    async def story() -> None:
        async with world() as running:
            await running.cores.ensure(context())
            first = await running.controller()
            names = list(first.model.functions)[:2]
            first.wake(names)
            await eventually(lambda: serving(first) == set(names))
            before = {e.spec.id: e.addresses for e in first.feed.table.functions}
            await running.cores.ensure(context(scaling={**SCALING, "maxScale": 3}))
            await eventually(lambda: first.feed.is_closed)
            await eventually(lambda: running.cores.counts(KEY) is not None)
            second = await running.controller()
            assert second is not first
            assert second.feed.epoch != first.feed.epoch
            assert {e.spec.id: e.addresses for e in second.feed.table.functions} == before
            assert next(iter(second.model.functions.values())).scaling.max_scale == 3
            load = LoadReport("r", {name: FunctionLoad(1.0, 1, 1) for name in names})
            for _ in range(4):
                second.take(load)
                await asyncio.sleep(QUICK.tick_s)
            assert {e.spec.id: e.addresses for e in second.feed.table.functions} == before
            calls = [call for box in running.made.boxes.boxes.values() for call in box.calls]
            assert sorted(calls) == sorted(f"PUT {name}" for name in names)
            assert running.made.api.n_created == 2

    asyncio.run(story())


def test_what_does_not_matter_to_a_core_leaves_it_as_it_is() -> None:
    async def story() -> None:
        async with world() as running:
            await running.cores.ensure(context())
            controller = await running.controller()
            await running.cores.ensure(context())
            await running.cores.ensure(replace(context(), generation=2))
            router = {"router": {"replicas": 3}}
            spec = {**context().model.spec.model_dump(by_alias=True, exclude_unset=True), **router}
            await running.cores.ensure(make_context(spec, summary=SMALL, secrets=context().secrets))
            assert await running.controller() is controller
            assert not controller.feed.is_closed

    asyncio.run(story())


def test_another_template_replaces_the_pods_one_by_one() -> None:
    async def story() -> None:
        async with world() as running:
            await running.cores.ensure(context())
            first = await running.controller()
            (name, *_) = first.model.functions
            first.wake([name])
            await eventually(lambda: serving(first) == {name})
            (old,) = running.made.api.pods()
            await running.cores.ensure(context(threads=2))
            await eventually(lambda: first.feed.is_closed)
            second = await running.controller()
            assert serving(second) == {name}
            second.take(LoadReport("r", {name: FunctionLoad(1.0, 1, 1)}))
            await eventually(lambda: old not in running.made.api.pods(), "replaced")
            assert serving(second) == {name}

    asyncio.run(story())


def test_a_model_that_was_made_anew_gets_a_core_of_its_own() -> None:
    async def story() -> None:
        async with world() as running:
            await running.cores.ensure(context(warmPool=1))
            first = await running.controller()
            await eventually(lambda: first.fleet.n_generic() == 1)
            await running.cores.ensure(context(uid="u-2"))
            second = await running.controller()
            assert second is not first
            assert (
                len(second.fleet.members) == 0
            )  # the other one's pods are the garbage collector's

    asyncio.run(story())


def test_a_granularity_that_cannot_be_is_refused_and_changes_nothing() -> None:
    async def story() -> None:
        async with world() as running:
            await running.cores.ensure(context())
            controller = await running.controller()
            wrong = make_context({"granularity": {"expertsPerFunction": 9}}, summary=SMALL)
            with pytest.raises(PlanError, match=r"spec\.granularity\.expertsPerFunction: got 9"):
                await running.cores.ensure(wrong)
            with pytest.raises(PlanError, match="expected a store that is prepared"):
                await running.cores.ensure(replace(context(), summary=None))
            assert await running.controller() is controller

    asyncio.run(story())


@pytest.mark.parametrize("delete", [True, False])
def test_a_model_that_is_removed_has_no_core_and_its_pods_go_if_asked(delete: bool) -> None:
    async def story() -> None:
        async with world() as running:
            await running.cores.ensure(context(warmPool=2))
            controller = await running.controller()
            await eventually(lambda: controller.fleet.n_generic() == 2)
            await running.cores.remove(KEY, delete_sandboxes=delete)
            await running.cores.remove(KEY, delete_sandboxes=delete)
            assert running.cores.find(NAMESPACE, "qwen") is None
            assert running.cores.counts(KEY) is None
            if delete:
                await eventually(lambda: not running.made.api.pods())
            else:
                assert len(running.made.api.pods()) == 2

    asyncio.run(story())


def test_why_sandboxes_cannot_be_had_is_told_until_they_can() -> None:
    async def story() -> None:
        async with world() as running:
            quota = "exceeded quota: compute, requested: pods=1, used: pods=9, limited: pods=9"
            running.made.api.refusals["create", POD] = Forbidden(quota, status=403)
            await running.cores.ensure(context(warmPool=1))
            await eventually(
                lambda: (c := running.cores.counts(KEY)) is not None and c.trouble != ""
            )
            counts = running.cores.counts(KEY)
            assert counts is not None
            assert quota in counts.trouble
            del running.made.api.refusals["create", POD]
            await eventually(
                lambda: (c := running.cores.counts(KEY)) is not None and c.generic == 1
            )
            counts = running.cores.counts(KEY)
            assert counts is not None
            assert counts.trouble == ""

    asyncio.run(story())


def test_two_models_are_apart_even_if_one_cores_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    update = PodLabels.update
    broken = True

    async def fails_for_one(labels: PodLabels) -> bool:
        if broken and labels._controller.model.name == "other":
            raise RuntimeError("a fault of ours")
        return await update(labels)

    monkeypatch.setattr(PodLabels, "update", fails_for_one)
    monkeypatch.setattr(core, "RETRY_DELAYS_S", (0.05,))
    other = ModelKey(NAMESPACE, "other")

    async def story() -> None:
        nonlocal broken
        async with world() as running:
            await running.cores.ensure(context())
            await running.cores.ensure(context("other", uid="u-2"))
            controller = await running.controller()
            name = next(iter(controller.model.functions))
            controller.wake([name])
            await eventually(lambda: serving(controller) == {name})
            await eventually(
                lambda: (
                    (c := running.cores.counts(other)) is not None and "RuntimeError" in c.trouble
                )
            )
            assert other in running.changed
            assert await running.controller() is controller
            assert [key for key, _ in running.cores.controllers()][-1] == KEY
            broken = False
            await eventually(
                lambda: (c := running.cores.counts(other)) is not None and not c.trouble
            )
            second = await running.controller("other")
            assert set(second.model.functions).isdisjoint(controller.model.functions)
            assert serving(second) == set()

    asyncio.run(story())


def test_popularity_outlives_the_operator() -> None:
    async def story() -> None:
        async with world() as running:
            await running.cores.ensure(context())
            controller = await running.controller()
            names = list(controller.model.functions)
            controller.take(LoadReport("r", {names[2]: FunctionLoad(0.0, 1, 500)}))
            kept = (CONFIG_MAP, NAMESPACE, "qwen-popularity")
            await eventually(lambda: kept in running.made.api.objects, "written")
            await running.cores.end()
            n_writes = len(running.made.api.writes())
            await running.cores.ensure(context())
            again = await running.controller()
            assert again.records.order()[0] == names[2]
            for _ in range(10):
                await asyncio.sleep(QUICK.save_interval_s)
            assert running.made.api.writes() == []  # nothing was used since
            assert n_writes >= 1
            await running.cores.end()
            held = running.made.api.objects[kept]
            assert held["metadata"]["ownerReferences"][0]["uid"] == "u-1"
            running.made.api.put({**held, "data": {"popularity.json": "{"}})
            await running.cores.ensure(context())
            damaged = await running.controller()
            assert damaged.records.order() == names

    asyncio.run(story())


ACCOUNTS = (CONFIG_MAP, NAMESPACE, "qwen-accounts")
USED = Statement("a" * 32, 100.0, {"acme": Use(7, 5)})


def test_the_tenants_accounts_outlive_the_operator_and_the_routers() -> None:
    async def story() -> None:
        async with world() as running:
            await running.cores.ensure(context())
            (await running.controller()).settle(USED)
            await eventually(lambda: ACCOUNTS in running.made.api.objects, "written")
            await running.cores.end()
            await running.cores.ensure(context())
            again = await running.controller()
            assert again.ledger.accounts == {"acme": Use(7, 5)}
            again.settle(USED)  # a router that went on tells its book again
            again.settle(replace(USED, book="b" * 32))
            assert again.ledger.accounts == {"acme": Use(14, 10)}
            await running.cores.ensure(context(warmPool=1))  # another life of the core
            await eventually(lambda: running.cores.find(NAMESPACE, "qwen") is not None)
            assert (await running.controller()).ledger is again.ledger
            await running.cores.end()
            held = running.made.api.objects[ACCOUNTS]
            assert held["metadata"]["ownerReferences"][0]["uid"] == "u-1"
            assert json.loads(held["data"]["accounts.json"])["accounts"]["acme"][:2] == [14, 10]

    asyncio.run(story())


def test_accounts_that_are_damaged_are_kept_to_look_at() -> None:
    async def story() -> None:
        async with world() as running:
            await running.cores.ensure(context())
            (await running.controller()).settle(USED)
            await eventually(lambda: ACCOUNTS in running.made.api.objects, "written")
            await running.cores.end()
            held = running.made.api.objects[ACCOUNTS]
            running.made.api.put({**held, "data": {"accounts.json": "{"}})
            await running.cores.ensure(context())
            damaged = await running.controller()
            assert damaged.ledger.accounts == {}
            damaged.settle(USED)
            await running.cores.end()
            data = running.made.api.objects[ACCOUNTS]["data"]
            assert data["accounts.damaged"] == "{"
            assert json.loads(data["accounts.json"])["accounts"]["acme"][0] == 7

    asyncio.run(story())


def test_popularity_that_cannot_be_written_is_no_error() -> None:
    async def story() -> None:
        async with world() as running:
            running.made.api.refusals["apply", CONFIG_MAP] = Forbidden("no", status=403)
            await running.cores.ensure(context())
            controller = await running.controller()
            name = next(iter(controller.model.functions))
            controller.take(LoadReport("r", {name: FunctionLoad(0.0, 1, 500)}))
            applies = ("apply", "ConfigMap", "qwen-popularity")
            await eventually(lambda: running.made.api.requests.count(applies) >= 3, "tried again")
            assert await running.controller() is controller

    asyncio.run(story())


def test_many_cores_that_have_nothing_to_do_ask_for_nothing() -> None:
    async def story() -> None:
        async with world() as running:
            contexts = [context(f"m{number}", uid=f"u-{number}") for number in range(30)]
            await asyncio.gather(*map(running.cores.ensure, contexts))
            await eventually(lambda: len(list(running.cores.controllers())) == 30)
            await eventually(lambda: len(running.changed) == 30)
            requests = len(running.made.api.requests)
            await asyncio.sleep(4 * QUICK.tick_s)
            assert len(running.made.api.requests) == requests
            assert len(running.changed) == 30

    asyncio.run(story())
