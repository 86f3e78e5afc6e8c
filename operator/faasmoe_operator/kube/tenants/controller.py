"""Follows Tenants: plans what gateways and routers are told, and writes each Tenant's status.

Everything is planned anew when a Tenant, a model or a router changes, as names, hosts and keys are
unique over all Tenants; Secrets are read every few seconds. Level-based: what is written follows
from the cluster's state, and only differences are written.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime

from faasmoe_contracts.json_reader import ContractError
from faasmoe_contracts.tls import TlsFolder
from faasmoe_operator.api.v1alpha1.tenants import TenantSpec
from faasmoe_operator.control.gateway_links import GatewayLinks
from faasmoe_operator.control.lease_book import LeaseBook
from faasmoe_operator.control.lease_server import LeaseServer
from faasmoe_operator.control.tenant_ledger import TenantLedger
from faasmoe_operator.kube.cache import ObjectCache, ObjectChange
from faasmoe_operator.kube.client import KubeApi
from faasmoe_operator.kube.conditions import build_conditions
from faasmoe_operator.kube.errors import Conflict, KubeApiError, NotFound, Unavailable
from faasmoe_operator.kube.events import EventRecorder
from faasmoe_operator.kube.tenants.gateway_objects import GatewayObjects
from faasmoe_operator.kube.tenants.link_server import GatewayLinkServer
from faasmoe_operator.kube.tenants.observed import (
    ObservedTenant,
    observe_models,
    observe_tenants,
    router_model,
)
from faasmoe_operator.kube.tenants.plan import (
    GATEWAY_DISABLED,
    TenantOutcome,
    TenantPlan,
    plan_tenants,
    secret_ref,
)
from faasmoe_operator.kube.tenants.secret_keys import SecretKeys
from faasmoe_operator.kube.tenants.status import (
    tenant_conditions,
    tenant_events,
    tenant_status,
    without_usage,
)
from faasmoe_operator.kube.types import MOEMODEL, POD, TENANT, ModelKey, Object

logger = logging.getLogger(__name__)

DEBOUNCE_S = 0.1
PERIOD_S = 2.0  # of plans without a change: keys expire, Secrets and usage change
USAGE_INTERVAL_S = 10.0  # of status updates that tell nothing but usage
MAX_USAGE_UPDATES_PER_S = 10.0
RETRY_S = 1.0
ENDED_AFTER_S = 30.0  # without a renewal a gateway's pod is looked up


@dataclass(frozen=True, slots=True)
class GatewayTokens:
    """What gateways show.

    Attributes:
        operator: to the operator.
        router: returns what they show the routers of the model with a uid.
    """

    operator: str
    router: Callable[[str], str]


class TenantController:
    """The Tenants of all namespaces that the operator manages.

    Args:
        api: the API server.
        cache: the object cache.
        objects: the gateways' objects.
        tokens: what gateways show; None if no gateway runs.
        links: what gateways report of requests.
        events: records Kubernetes events.
        enqueue: called with each model whose routers must be told of other tenants.
        tls: the operator's certificate for gateways, with which routers have some, too; None for
            no TLS.
        clock: monotonic clock, in seconds.
        wall_clock: Unix time, in seconds.
    """

    def __init__(
        self,
        api: KubeApi,
        cache: ObjectCache,
        objects: GatewayObjects,
        tokens: GatewayTokens | None,
        *,
        links: GatewayLinks,
        events: EventRecorder,
        enqueue: Callable[[ModelKey], None],
        tls: TlsFolder | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._tls = tls
        self._api, self._cache = api, cache
        self._objects, self._tokens = objects, tokens
        self._links, self._events, self._enqueue = links, events, enqueue
        self._clock, self._wall_clock = clock, wall_clock
        self._keys = SecretKeys(api)
        self._ledger = TenantLedger()
        self._book = LeaseBook((), clock(), ledger=self._ledger)
        self._server: GatewayLinkServer | None = None
        self._router_tenants: Mapping[ModelKey, tuple[TenantSpec, ...]] = {}
        self._written_file = b""
        self._statuses: dict[str, tuple[Object, float]] = {}  # by uid: what was written, and when
        self._is_changed = asyncio.Event()
        cache.add_event_handler(self._on_change)

    def router_tenants(self, model: ModelKey) -> tuple[TenantSpec, ...]:
        """Return what a model's routers are told of Tenants."""
        return self._router_tenants.get(model, ())

    async def start(self) -> None:
        """Plan for the first time, once the cache has synced; raises KubeApiError."""
        tenants = observe_tenants(self._cache)
        for tenant in tenants:
            self._restore_usage(tenant)
        if self._tokens is None:
            return
        await self._refresh_keys(tenants)
        plan = self._plan(tenants, self._tokens)
        self._router_tenants = plan.router_tenants
        self._book = LeaseBook(
            plan.file.tenants,
            self._clock(),
            saved=await self._read_shares(),
            ledger=self._ledger,
        )
        leases = LeaseServer(self._book, self._objects.write_shares)
        self._server = GatewayLinkServer(self._tokens.operator, leases, self._links, tls=self._tls)
        self._server.publish(plan.file.dumps(indent=None))

    @asynccontextmanager
    async def listening(self, host: str, port: int) -> AsyncIterator[None]:
        """Serve gateways for the lifetime of the context, after `start`; raises OSError."""
        assert self._server is not None
        async with self._server.listening(host, port):
            yield

    async def run(self) -> None:
        """Plan and write until cancelled."""
        while True:
            self._is_changed.clear()
            try:
                await self.sync()
            except KubeApiError as error:
                logger.warning("Tenants: %s; trying again", error)
                await asyncio.sleep(RETRY_S)
                continue
            except Exception:  # of one bad object, say: models are managed nevertheless
                logger.exception("Tenants: not brought up to date; trying again")
                await asyncio.sleep(RETRY_S)
                continue
            try:
                async with asyncio.timeout(PERIOD_S):
                    await self._is_changed.wait()
            except TimeoutError:
                continue
            await asyncio.sleep(DEBOUNCE_S)

    async def sync(self) -> None:
        """Plan once, and write what has changed; raises KubeApiError."""
        tenants = observe_tenants(self._cache)
        if self._tokens is None:
            refused = TenantOutcome.refused(GATEWAY_DISABLED)
            failure = await self._write_statuses(tenants, {t.key: refused for t in tenants})
            if failure is not None:
                raise failure
            return
        await self._refresh_keys(tenants)
        plan = self._plan(tenants, self._tokens)
        self._book.configure(plan.file.tenants, self._clock())
        file = plan.file.dumps(indent=None)
        assert self._server is not None
        self._server.publish(file)
        self._tell_routers(plan)
        failure = await self._write_statuses(tenants, plan.outcomes)
        if file != self._written_file:
            await self._objects.write_secret(self._tokens.operator, file)
            self._written_file = file
        await self._forget_ended_gateways()
        if failure is not None:
            raise failure

    def _plan(self, tenants: list[ObservedTenant], tokens: GatewayTokens) -> TenantPlan:
        return plan_tenants(
            tenants,
            observe_models(self._cache),
            self._keys.states,
            front_token=tokens.router,
            has_tls=self._tls is not None,
            time_s=self._wall_clock(),
        )

    async def _refresh_keys(self, tenants: list[ObservedTenant]) -> None:
        wanted = {secret_ref(tenant) for tenant in tenants if tenant.tenant is not None}
        await self._keys.refresh(wanted, self._clock())

    def _tell_routers(self, plan: TenantPlan) -> None:
        before, self._router_tenants = self._router_tenants, plan.router_tenants
        for model in before.keys() | plan.router_tenants.keys():
            if before.get(model) != plan.router_tenants.get(model):
                self._enqueue(model)

    async def _read_shares(self) -> Mapping[str, Mapping[str, float]] | None:
        try:
            return await self._objects.read_shares()
        except ValueError as error:
            logger.error("shares of limits: starting without: %s", error)
            return None

    def _restore_usage(self, tenant: ObservedTenant) -> None:
        record = tenant.obj.get("status", {}).get("usageRecord")
        if record is None:
            return
        try:
            self._ledger.restore(tenant.key.name, json.loads(record))
        except (ContractError, ValueError) as error:
            logger.error("Tenant %s: usage starts from zero: %s", tenant.key, error)

    async def _forget_ended_gateways(self) -> None:
        for gateway in self._book.unseen(self._clock(), for_s=ENDED_AFTER_S):
            if not await self._objects.has_pod(gateway):
                logger.info("gateway %s has ended: its share of limits is free", gateway)
                self._book.forget(gateway)

    async def _write_statuses(
        self, tenants: list[ObservedTenant], outcomes: Mapping[ModelKey, TenantOutcome]
    ) -> KubeApiError | None:
        """Write all statuses; return an error of one that could not be written.

        One that the API server refuses keeps no other from being written.
        """
        uids = {tenant.obj["metadata"]["uid"] for tenant in tenants}
        self._statuses = {uid: s for uid, s in self._statuses.items() if uid in uids}
        failure: KubeApiError | None = None
        for tenant in tenants:
            try:
                await self._write_status(tenant, outcomes[tenant.key])
            except Unavailable as error:
                return error
            except KubeApiError as error:
                logger.warning("Tenant %s: status not written: %s", tenant.key, error)
                failure = error
        return failure

    async def _write_status(self, tenant: ObservedTenant, outcome: TenantOutcome) -> None:
        """Write a Tenant's status if something has changed; usage only now and then."""
        metadata, name = tenant.obj["metadata"], tenant.key.name
        uid, previous = metadata["uid"], tenant.obj.get("status") or {}
        # The usage of a name is its owner's, who is accepted.
        owns_usage = outcome.accepted.reason not in ("NameTaken", "SpecInvalid")
        totals = self._ledger.tenants.get(name) if owns_usage else None
        usage = None if totals is None else totals.total
        now_s, before = self._wall_clock(), previous.get("conditions", [])
        states = tenant_conditions(outcome, tenant.tenant, usage, now_s)
        generation = metadata.get("generation", 0)
        timestamp = datetime.fromtimestamp(now_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        status = tenant_status(
            outcome,
            build_conditions(states, before, generation=generation, now=timestamp),
            usage,
            self._ledger.dump(name) if owns_usage else None,
            generation=generation,
        )
        if not self._is_due(uid, status, previous):
            return
        try:
            result = await self._api.patch_status(TENANT, *tenant.key, status, uid=uid)
        except (NotFound, Conflict):
            return  # deleted or recreated; a watch event follows
        self._cache.update(TENANT, result)
        self._statuses[uid] = status, self._clock()
        for event in tenant_events(before, status["conditions"]):
            logger.info("%s: %s: %s", tenant.key, event.reason, event.note)
            await self._events.record(tenant.obj, event, now=timestamp)

    def _is_due(self, uid: str, status: Object, previous: Object) -> bool:
        written, at_s = self._statuses.get(uid, ({}, float("-inf")))
        if status in (written, previous):
            return False
        if without_usage(status) not in (without_usage(written), without_usage(previous)):
            return True
        interval_s = max(USAGE_INTERVAL_S, len(self._statuses) / MAX_USAGE_UPDATES_PER_S)
        return self._clock() - at_s >= interval_s

    def _on_change(self, change: ObjectChange) -> None:
        if change.kind in (TENANT, MOEMODEL) or (
            change.kind == POD and router_model(change.object) is not None
        ):
            self._is_changed.set()
