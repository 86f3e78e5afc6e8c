"""Tenants of a cluster, with gateways that are connected: keys, limits, budgets, routers."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any

import pytest
from faasmoe_up import free_port
from fake_kube_api import FakeKubeApi
from kube_objects import make_object

from faasmoe_contracts.gateway_file import GatewayFile
from faasmoe_contracts.gateway_hello import PURPOSES, GatewayHello
from faasmoe_contracts.router_demand import RouterDemand
from faasmoe_contracts.socket_address import open_connection
from faasmoe_contracts.tenant_usage import day_of
from faasmoe_gateway.accounts import Accounts
from faasmoe_gateway.control_link import ControlLink
from faasmoe_gateway.demand_reporter import DemandReporter
from faasmoe_gateway.front import Front
from faasmoe_gateway.lease_client import LeaseClient
from faasmoe_gateway.refusal import Refusal
from faasmoe_gateway.tenant_directory import TenantDirectory
from faasmoe_operator.control import gateway_links
from faasmoe_operator.control.gateway_links import GatewayLinks
from faasmoe_operator.kube.cache import ObjectCache
from faasmoe_operator.kube.errors import Invalid, Unavailable
from faasmoe_operator.kube.events import EventRecorder
from faasmoe_operator.kube.manifests.names import router_name
from faasmoe_operator.kube.tenants import link_server
from faasmoe_operator.kube.tenants.controller import GatewayTokens, TenantController
from faasmoe_operator.kube.tenants.gateway_objects import GatewayObjects
from faasmoe_operator.kube.tenants.router_demand import RouterDemandScaler
from faasmoe_operator.kube.types import (
    CONFIG_MAP,
    DEPLOYMENT,
    EVENT,
    MOEMODEL,
    POD,
    SECRET,
    TENANT,
    Kind,
    ModelKey,
    Object,
)

TIMEOUT_S = 60.0
TOKEN = "operator-token"
KEY = ModelKey("llm", "chat")
EMPTY = GatewayFile((), (), is_closed=True)


class Gateway:
    """One gateway without its HTTP server.

    Attributes:
        front: its app.
        accounts: its accounts.
        leases: its leases.
        demand: its reporter of requests.
    """

    def __init__(self, port: int, name: str) -> None:
        links = {
            p: ControlLink(f"127.0.0.1:{port}", GatewayHello(TOKEN, name, p)) for p in PURPOSES
        }
        self.directory = TenantDirectory(EMPTY, time.time())
        self.accounts = Accounts((), None, time.monotonic(), share=0.0)
        self.leases = LeaseClient(
            links["leases"],
            name,
            self.accounts,
            run=f"{name}/1",
            clock=time.monotonic,
            wall_clock=time.time,
        )
        self.demand = DemandReporter(links["demand"])
        self.front = Front(
            self.directory,
            self.accounts,
            front_token="",
            hold_timeout_s=30.0,
            demand=self.demand,
            leases=self.leases,
            config_link=links["config"],
        )

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run what its lifespan runs."""
        ended, started = asyncio.Event(), asyncio.Event()
        incoming = [{"type": "lifespan.startup"}]

        async def receive() -> dict[str, Any]:
            if incoming:
                return incoming.pop()
            await ended.wait()
            return {"type": "lifespan.shutdown"}

        async def send(_: Any) -> None:
            started.set()

        task = asyncio.create_task(self.front({"type": "lifespan"}, receive, send))
        await started.wait()
        try:
            yield
        finally:
            ended.set()
            await task

    async def admits(self) -> bool:
        """Return whether a request of acme is admitted now, with the leases that there are."""
        try:
            limiter = self.accounts.of("acme").limiter
            await self.front._take(lambda: limiter.count_request(time.monotonic()))
        except Refusal:
            return False
        return True


class Cluster:
    """An in-memory API server with the operator's part for Tenants.

    Attributes:
        told: models whose routers are to be told of other tenants, or scaled.
    """

    def __init__(self) -> None:
        self.cache = ObjectCache()
        self.api = FakeKubeApi(self.cache)
        self.port = free_port()
        self.told: list[ModelKey] = []
        self.links = GatewayLinks()
        self.restart()

    def restart(self, *, has_gateway: bool = True) -> None:
        """Replace the operator, as a new process would; the cluster remains."""
        tokens = GatewayTokens(TOKEN, router=lambda uid: f"front-{uid}") if has_gateway else None
        self.controller = TenantController(
            self.api,
            self.cache,
            GatewayObjects(self.api, namespace="faasmoe-system", name="faasmoe-gateway"),
            tokens,
            links=self.links,
            events=EventRecorder(self.api, instance="operator-0"),
            enqueue=self.told.append,
        )
        self.demand = RouterDemandScaler(self.cache, self.links, enqueue=self.told.append)

    def add_model(self, name: str = "chat", **spec: Any) -> None:
        model = make_object(MOEMODEL, name)
        self._write(model, spec={"model": {"source": "hf://org/moe"}, **spec})
        self.api.set_status(MOEMODEL, "llm", name, model={"maxPositionEmbeddings": 100})

    def add_tenant(self, name: str = "acme", **spec: Any) -> None:
        fields = {"apiKeysSecretRef": {"name": f"{name}-keys"}, "models": [{"name": "chat"}]}
        self._write(make_object(TENANT, name), spec={**fields, **spec})

    def set_keys(self, name: str = "acme", **keys: str) -> None:
        data = {key: base64.b64encode(value.encode()).decode() for key, value in keys.items()}
        self._write(make_object(SECRET, f"{name}-keys"), data=data)
        self.controller._keys._read_at_s.clear()  # as if the interval had passed

    def add_router(self, name: str, address: str) -> None:
        labels = {"faasmoe.dev/model": "chat", "app.kubernetes.io/component": "router"}
        pod = make_object(POD, name, labels=labels)
        ready = [{"type": "Ready", "status": "True"}]
        self._write(pod, status={"podIP": address, "conditions": ready})

    def status(self, name: str = "acme") -> Object:
        found: Object = self.api.objects[TENANT, "llm", name].get("status", {})
        return found

    def condition(self, kind: str = "Ready", name: str = "acme") -> tuple[str, str]:
        found = {c["type"]: c for c in self.status(name).get("conditions", [])}
        return (found[kind]["status"], found[kind]["reason"]) if kind in found else ("", "")

    def events(self) -> list[str]:
        """Return the reasons of the events so far."""
        return [obj["reason"] for (kind, *_), obj in self.api.objects.items() if kind == EVENT]

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run the operator's part."""
        await self.controller.start()
        async with self.controller.listening("127.0.0.1", self.port):
            task = asyncio.create_task(self.controller.run())
            try:
                yield
            finally:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    def _write(self, obj: Object, **fields: Any) -> None:
        del obj["metadata"]["resourceVersion"]
        kind = {"MoEModel": MOEMODEL, "Tenant": TENANT, "Secret": SECRET, "Pod": POD}[obj["kind"]]
        metadata = obj["metadata"]
        known = self.api.objects.get((kind, metadata["namespace"], metadata["name"]), {})
        self.api.write({**known, **obj, **fields})


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while not condition():  # noqa: ASYNC110  # several parts, of which none has an event
            await asyncio.sleep(0.01)


def knows_acme(gateway: Gateway) -> bool:
    return "acme" in gateway.directory.tenants


def has_leases(gateway: Gateway) -> bool:
    return gateway.leases.renewed_s > 0


def run(work: Callable[[], Any]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(2 * TIMEOUT_S):
            await work()

    asyncio.run(bounded())


@pytest.fixture
def cluster() -> Cluster:
    cluster = Cluster()
    cluster.add_model()
    return cluster


def test_gateways_follow_keys_and_routers(cluster: Cluster) -> None:
    cluster.add_tenant(keys=[{"name": "old", "expiresAt": "2020-01-01T00:00:00Z"}])
    gateway = Gateway(cluster.port, "gateway-a")

    async def work() -> None:
        async with cluster.running(), gateway.running():
            await until(lambda: cluster.condition() == ("False", "SecretMissing"))
            cluster.set_keys(first="sk-1", old="sk-old")
            await until(lambda: gateway.directory.authenticate("sk-1"))
            assert gateway.directory.authenticate("sk-old") is None
            await until(lambda: cluster.condition() == ("True", "Ready"))
            assert cluster.status()["keys"] == 1
            cluster.set_keys(second="sk-2")
            await until(lambda: gateway.directory.authenticate("sk-2"))
            assert gateway.directory.authenticate("sk-1") is None
            cluster.add_router("chat-router-x", "10.0.0.7")
            route = gateway.front._routes["llm/chat"]
            await until(lambda: route.takes_requests("chat-router-x"))
            taken = route.take(b"", 1)
            assert taken is not None
            assert taken.address.address == "10.0.0.7:8000"
            assert taken.address.front_token == "front-uid-MoEModel-llm-chat"
            cluster.api.remove(POD, "llm", "chat-router-x")
            await until(lambda: not route.takes_requests("chat-router-x"))

    run(work)
    assert [t.name for t in cluster.controller.router_tenants(KEY)] == ["acme"]
    assert KEY not in cluster.told  # known before routers were made


def test_a_gateway_starts_with_the_secret_which_has_no_keys(cluster: Cluster) -> None:
    cluster.add_tenant()
    cluster.set_keys(first="sk-1")

    async def work() -> None:
        name = (SECRET, "faasmoe-system", "faasmoe-gateway")
        async with cluster.running():
            await until(lambda: name in cluster.api.objects)
        data = cluster.api.objects[name]["data"]
        file = base64.b64decode(data["gateway.json"])
        assert [t.name for t in GatewayFile.loads(file).tenants] == ["acme"]
        assert b"sk-1" not in file
        assert base64.b64decode(data["token"]).decode() == TOKEN

    run(work)


def test_two_gateways_admit_what_one_would_and_the_operator_may_restart(cluster: Cluster) -> None:
    cluster.add_tenant(limits={"requestsPerMinute": 6})
    cluster.set_keys(first="sk-1")
    gateways = [Gateway(cluster.port, f"gateway-{n}") for n in "ab"]

    async def count_admitted() -> int:
        n_admitted = 0
        for attempt in range(40):
            n_admitted += await gateways[attempt % 2].admits()
        return n_admitted

    async def work() -> None:
        start_s = time.monotonic()
        async with gateways[0].running(), gateways[1].running():
            async with cluster.running():
                for gateway in gateways:
                    await until(partial(knows_acme, gateway))
                    await until(partial(has_leases, gateway))
                n_admitted = await count_admitted()
                seconds = time.monotonic() - start_s
                assert 5 <= n_admitted <= 6 + 6 / 60 * seconds
            cluster.restart()
            async with cluster.running():
                for gateway in gateways:
                    gateway.leases.renewed_s = float("-inf")
                    await until(partial(has_leases, gateway))
                n_admitted += await count_admitted()
                seconds = time.monotonic() - start_s
                assert n_admitted <= 6 + 6 / 60 * seconds
        shares = cluster.api.objects[CONFIG_MAP, "faasmoe-system", "faasmoe-gateway-shares"]
        saved = json.loads(shares["data"]["shares.json"])["acme/requests"]
        assert set(saved) == {"gateway-a", "gateway-b"}

    run(work)


def test_budgets_hold_over_gateways_that_end_and_operators(cluster: Cluster) -> None:
    budgets = [{"unit": "outputTokens", "period": "month", "limit": 100}]
    cluster.add_tenant(budgets=budgets)
    cluster.set_keys(first="sk-1")

    async def use(name: str, n_tokens: int) -> None:
        gateway = Gateway(cluster.port, name)
        async with gateway.running():
            await until(lambda: "acme" in gateway.directory.tenants)
            gateway.accounts.of("acme").record(time.time(), "llm/chat", 0, n_tokens)
            totals = cluster.controller._ledger.tenants
            expected = n_tokens + (totals["acme"].total.in_month.output_tokens if totals else 0)
            await until(
                lambda: "acme" in totals and totals["acme"].total.in_month.output_tokens == expected
            )

    async def work() -> None:
        async with cluster.running():
            await use("gateway-a", 60)
            await until(lambda: cluster.status().get("usage", {}).get("inMonth"))
            await use("gateway-b", 25)
            await until(lambda: cluster.condition("WithinBudget") == ("True", "BudgetNearlyUsed"))
            await until(lambda: "BudgetNearlyUsed" in cluster.events())
        cluster.restart()
        other = Gateway(cluster.port, "gateway-c")
        async with cluster.running(), other.running():
            await until(lambda: "acme" in other.directory.tenants)
            other.accounts.of("acme").record(time.time(), "llm/chat", 0, 15)
            await until(lambda: cluster.condition("WithinBudget") == ("False", "BudgetReached"))
            account = other.accounts.of("acme")
            await until(lambda: account.elsewhere is not None)
            with pytest.raises(Refusal, match="Budget reached") as refused:
                account.check_budgets(time.time())
            assert refused.value.status == 429
            assert "retry-after" in refused.value.headers
        assert cluster.condition() == ("True", "Ready")  # a used-up budget is no fault
        assert cluster.status()["usage"]["inMonth"]["outputTokens"] == 100
        assert cluster.status()["usage"]["day"] == day_of(time.time())

    run(work)


def test_without_the_api_server_no_share_is_granted_that_is_not_saved(cluster: Cluster) -> None:
    cluster.add_tenant(limits={"requestsPerMinute": 60})
    cluster.set_keys(first="sk-1")
    gateway = Gateway(cluster.port, "gateway-a")

    async def work() -> None:
        error = Unavailable("away", status=0)
        cluster.api.errors["apply", CONFIG_MAP] = error
        async with cluster.running(), gateway.running():
            await until(lambda: "acme" in gateway.directory.tenants)
            attempts = len(cluster.api.requests)
            assert not await gateway.admits()  # wakes the bucket
            await until(
                lambda: (
                    ("apply", "ConfigMap", "faasmoe-gateway-shares")
                    in cluster.api.requests[attempts:]
                )
            )
            assert gateway.accounts.of("acme").limiter.buckets["requests"].share == 0
            del cluster.api.errors["apply", CONFIG_MAP]
            async with asyncio.timeout(TIMEOUT_S):
                while not await gateway.admits():  # noqa: ASYNC110  # it has no event
                    await asyncio.sleep(0.05)

    run(work)


@pytest.mark.parametrize(
    "saved", ["", "[]", '{"acme/requests": 1}', '{"acme/requests": {"a": "b"}}']
)
def test_operator_starts_with_shares_that_are_none(cluster: Cluster, saved: str) -> None:
    name, data = "faasmoe-gateway-shares", {"shares.json": saved}
    cluster.api.write(make_object(CONFIG_MAP, name, namespace="faasmoe-system") | {"data": data})
    cluster.add_tenant(limits={"requestsPerMinute": 6})
    cluster.set_keys(first="sk-1")

    async def work() -> None:
        async with cluster.running():
            await until(lambda: cluster.condition() == ("True", "Ready"))

    run(work)


def test_a_status_that_is_refused_keeps_no_other_and_no_secret_from_being_written(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("acme", "beta"):
        cluster.add_tenant(name)
        cluster.set_keys(name, first=f"sk-{name}")
    patch_status = cluster.api.patch_status

    async def refuse_acme(kind: Kind, namespace: str, name: str, *args: Any, **more: Any) -> Object:
        if (kind, name) == (TENANT, "acme"):
            raise Invalid("status.models: too many", status=422)
        return await patch_status(kind, namespace, name, *args, **more)

    monkeypatch.setattr(cluster.api, "patch_status", refuse_acme)

    async def work() -> None:
        async with cluster.running():
            await until(lambda: cluster.condition(name="beta") == ("True", "Ready"))
            secret = (SECRET, "faasmoe-system", "faasmoe-gateway")
            await until(lambda: secret in cluster.api.objects)

    run(work)
    assert cluster.status("acme") == {}


def test_without_a_gateway_tenants_say_so(cluster: Cluster) -> None:
    cluster.add_tenant()
    cluster.restart(has_gateway=False)

    async def work() -> None:
        await cluster.controller.start()
        await cluster.controller.sync()

    run(work)
    assert cluster.condition() == ("False", "GatewayDisabled")
    assert cluster.controller.router_tenants(KEY) == ()
    assert not [r for r in cluster.api.requests if r[1] == "Secret"]


def test_tenants_that_are_deleted_are_forgotten(cluster: Cluster) -> None:
    async def work() -> None:
        async with cluster.running():
            for number in range(3):
                cluster.add_tenant(f"t{number}")
                await until(partial(cluster.condition, name=f"t{number}"))
                cluster.api.remove(TENANT, "llm", f"t{number}")
            await until(lambda: not cluster.controller._statuses)

    run(work)


def test_routers_are_told_when_a_tenant_comes(cluster: Cluster) -> None:
    async def work() -> None:
        async with cluster.running():
            cluster.add_tenant()
            await until(lambda: KEY in cluster.told)

    run(work)
    assert [t.name for t in cluster.controller.router_tenants(KEY)] == ["acme"]


def test_a_request_wakes_a_router_once(cluster: Cluster) -> None:
    cluster.add_model(router={"scaling": {"minReplicas": 0, "idleSeconds": 10}})
    deployment = make_object(DEPLOYMENT, router_name("chat"), spec={"replicas": 0})
    cluster.cache.update(DEPLOYMENT, deployment)
    cluster.add_tenant()
    gateway = Gateway(cluster.port, "gateway-a")

    async def work() -> None:
        async with cluster.running(), gateway.running():
            assert cluster.demand.desired(KEY) == 0
            await until(lambda: "llm/chat" in gateway.front._routes)
            cluster.told.clear()
            with gateway.demand.request("llm/chat"), gateway.demand.request("llm/chat"):
                await until(lambda: cluster.demand.desired(KEY) == 1)
                cluster.demand.tick()
                assert cluster.told == [KEY]
                assert cluster.demand.desired(KEY) == 1

    run(work)
    assert cluster.demand.desired(ModelKey("llm", "nowhere")) is None


def test_requests_of_a_gateway_whose_machine_is_gone_are_none(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway_links, "SILENCE_S", 0.2)

    async def work() -> None:
        async with cluster.running():
            _, writer = await open_connection(f"127.0.0.1:{cluster.port}", limit=1 << 16)
            writer.write(GatewayHello(TOKEN, "gateway-a", "demand").dumps())
            writer.write(RouterDemand({"llm/chat": 3}).dumps())
            await until(lambda: seen[-1:] == [0])
            writer.close()

    seen: list[int] = []
    cluster.links.add("llm/chat", lambda: seen.append(cluster.links.n_requests("llm/chat")))
    run(work)
    assert seen == [3, 0]


@pytest.mark.parametrize(
    "line",
    [
        b"\n",
        b"x" * (1 << 20),
        b"GET / HTTP/1.1\r\n",
        GatewayHello("wrong", "x", "config").dumps(),
        b'{"token": "operator-token", "gateway": "x", "purpose": "else"}\n',
    ],
)
def test_others_get_nothing_from_the_operator(
    cluster: Cluster,
    line: bytes,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(link_server, "HELLO_TIMEOUT_S", 600)  # it waits for no end of a long line

    async def work() -> None:
        async with cluster.running():
            reader, writer = await open_connection(f"127.0.0.1:{cluster.port}", limit=1 << 16)
            writer.write(line)
            with suppress(ConnectionError):
                assert await reader.read() == b""
            writer.close()

    run(work)
    assert TOKEN not in caplog.text
