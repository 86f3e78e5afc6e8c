"""A router without tenants: whoever reaches it may call.

The tenants of one router: recognised, let in within their limits, and billed; an async context.

What is decided is decided by the pure parts; here they are put together, and run: the tenants file
and the keys are read again each second, the expert functions' cost is shared out, and the accounts
are written to their file.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, Self

from faasmoe_router.engine.fair_queue import Share
from faasmoe_router.engine.generation import GenerationRequest
from faasmoe_router.errors import RateLimitExceeded
from faasmoe_router.tenants.caller import (
    Caller,
    NullUsageRecorder,
    TenantUsageRecorder,
    UsageRecorder,
)
from faasmoe_router.tenants.metrics import TenantCollector
from faasmoe_router.tenants.quota import (
    ActivationQueueCapacity,
    RateLimiter,
    RateLimiters,
    Reservation,
    TenantQueueQuota,
)
from faasmoe_router.tenants.registry import (
    TenantConfig,
    TenantLimitsConfig,
    TenantRegistry,
    one_sided_sharing,
    prefix_cache_groups,
)
from faasmoe_router.tenants.usage import REQUEST_OUTCOMES, FunctionCost, RequestOutcome, RouterUsage
from faasmoe_router.tenants.usage_store import ClusterUsage, UsageFileStore

logger = logging.getLogger(__name__)


class NoTenants:
    """No tenants: whoever reaches the router may call, and nothing is counted."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        return None

    def admit(
        self, caller: Caller, requests: Sequence[GenerationRequest], *, n_prompt: int
    ) -> UsageRecorder:
        """Let a request in."""
        return NullUsageRecorder()

    @contextmanager
    def queue_slot(self, caller: Caller, *, size_bytes: int) -> Iterator[None]:
        """Count nothing."""
        yield

    def usage(self, caller: Caller) -> dict[str, Any] | None:
        """Return that there are no accounts."""
        return None


COST_ATTRIBUTION_INTERVAL_S = 1.0
SAVE_INTERVAL_S = 10.0


class TenantQueue(Protocol):
    """What makes the tenants' requests wait; the engine."""

    def set_tenants(self, shares: Mapping[str, Share], prefix_groups: Mapping[str, str]) -> None:
        """Take what each tenant is entitled to, and which share the cache of prefixes."""

    def sequence_counts(self, tenant: str) -> tuple[int, int]:
        """Return how many of a tenant's sequences run, and how many wait."""


@dataclass(frozen=True, slots=True)
class UsageSources:
    """What tells what is spent, since it was asked last.

    Attributes:
        cost: of expert functions.
        tokens: tokens that were computed for each tenant.
    """

    read_cost: Callable[[], FunctionCost]
    read_tokens: Callable[[], Mapping[str, int]]


class TenantService:
    """The tenants. Belongs to the event loop.

    Args:
        directory: who they are.
        accounts: what they have used.
        queue: where their requests wait.
        spending: what is shared out among them.
        file: where the accounts are kept; None keeps them in memory only.
        held: what may wait for functions; each tenant has its part of it.
        n_routers: routers that share the limits, unless the tenants file tells.
        clock: tells the time in seconds.

    Attributes:
        books: what they have used, with what they have through other routers.
    """

    def __init__(
        self,
        registry: TenantRegistry,
        usage: RouterUsage,
        *,
        queue: TenantQueue,
        usage_sources: UsageSources,
        store: UsageFileStore | None = None,
        queue_capacity: ActivationQueueCapacity | None = None,
        n_routers: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._registry = registry
        self._usage = usage
        self._queue = queue
        self._usage_sources = usage_sources
        self.cluster_usage = ClusterUsage(usage, store)
        self._queue_quota = TenantQueueQuota(queue_capacity or ActivationQueueCapacity())
        self._default_n_routers = n_routers
        self._clock = clock
        self._rate_limiters = RateLimiters()
        self._tasks: list[asyncio.Task[None]] = []
        self._apply_config()

    @property
    def n_routers(self) -> int:
        """Routers that share the limits."""
        return self._registry.config.router_replicas or self._default_n_routers

    def n_keys(self) -> dict[str, int]:
        """Return how many keys each tenant has."""
        return dict(self._registry.key_ring.n_keys)

    def collector(self) -> TenantCollector:
        """Return what tells Prometheus of the tenants."""
        return TenantCollector(
            self._usage,
            sequences=lambda: {n: self._queue.sequence_counts(n) for n in self._registry.tenants},
            n_keys=self.n_keys,
        )

    def authenticate(self, tenant: str | None, api_key: str) -> Caller | None:
        """Return who calls with a key, if it is this tenant's; with None, whoever it is."""
        tenant_config = self._registry.authenticate(api_key)
        if tenant_config is None or tenant not in (None, tenant_config.name):
            return None
        return self._to_caller(tenant_config)

    def admit(
        self, caller: Caller, requests: Sequence[GenerationRequest], *, n_prompt: int
    ) -> UsageRecorder:
        """Let a request in.

        Args:
            caller: whose it is.
            requests: its choices.
            n_prompt: tokens of its prompts, each once.

        Raises:
            RateLimited: the tenant has used up its minute.
            NeverFits: it asks for more than a minute allows.
        """
        n_tokens = n_prompt + sum(r.max_tokens for r in requests)
        now_s, limiter = self._clock(), self._rate_limiter(caller.tenant)
        tenant_usage = self._usage.for_tenant(caller.tenant)
        try:
            reservation = limiter.admit(n_tokens, now_s)
        except RateLimitExceeded:
            tenant_usage.requests["limited"] += 1
            raise
        return TenantUsageRecorder(
            limiter.headers(now_s),
            len(requests),
            n_prompt,
            on_finish=lambda n_prompt_used, n_generated, outcome: self._record_usage(
                caller.tenant, reservation, n_prompt_used, n_generated, outcome
            ),
        )

    def queue_slot(self, caller: Caller, *, size_bytes: int) -> AbstractContextManager[None]:
        """Count a request as waiting for functions to be started; raises HoldQueueFull."""
        return self._queue_quota.reserve(
            caller.tenant, self._queue_share(caller.tenant), size_bytes=size_bytes
        )

    def usage(self, caller: Caller) -> dict[str, Any] | None:
        """Return what a caller has used over all routers, as its usage endpoint tells it."""
        totals, remote = self.cluster_usage.cluster_total(caller.tenant), self.cluster_usage.remote
        return {
            "object": "usage",
            "tenant": caller.tenant,
            "since": int(remote.since_s),
            "prompt_tokens": totals["prompt_tokens"],
            "completion_tokens": totals["generated_tokens"],
            "total_tokens": totals["prompt_tokens"] + totals["generated_tokens"],
            "requests": {outcome: totals[outcome] for outcome in REQUEST_OUTCOMES},
            "expert_seconds": totals["expert_seconds"],
            "expert_gb_seconds": totals["expert_gb_seconds"],
            "router_replicas": self.n_routers,
            "others_as_of": None if remote.as_of_s is None else int(remote.as_of_s),
        }

    async def __aenter__(self) -> Self:
        jobs = {
            "refresh": self._refresh_periodically,
            "accounts": self._attribute_costs_periodically,
            "file": self._save_periodically,
        }
        self._tasks = [
            asyncio.create_task(job(), name=f"tenants-{name}") for name, job in jobs.items()
        ]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._attribute_costs()
        await self.cluster_usage.save()

    async def _refresh_periodically(self) -> None:
        while True:
            await asyncio.sleep(self._registry.refresh_interval_s / 2)
            if await asyncio.to_thread(self._registry.refresh, self._clock()):
                self._apply_config()

    async def _attribute_costs_periodically(self) -> None:
        while True:
            await asyncio.sleep(COST_ATTRIBUTION_INTERVAL_S)
            self._attribute_costs()

    async def _save_periodically(self) -> None:
        while True:
            await asyncio.sleep(SAVE_INTERVAL_S)
            await self.cluster_usage.save()

    def _attribute_costs(self) -> None:
        self._usage.attribute_cost(
            self._usage_sources.read_cost(), self._usage_sources.read_tokens()
        )

    def _apply_config(self) -> None:
        config = self._registry.config
        groups = prefix_cache_groups(config.tenants)
        for name, other in one_sided_sharing(config.tenants, groups):
            logger.warning(
                "Tenants: %s lists %s in sharePrefixCacheWith, but not mutually: ignored",
                name,
                other,
            )
        n_routers = self.n_routers
        shares = {t.name: t.share(n_routers=n_routers) for t in config.tenants}
        self._queue.set_tenants(shares, groups)
        self._rate_limiters.retain(shares)
        logger.info("Tenants: %d, limits split over %d routers", len(shares), n_routers)

    def _rate_limiter(self, tenant: str) -> RateLimiter:
        config = self._registry.tenants.get(tenant)
        limits = TenantLimitsConfig() if config is None else config.limits
        return self._rate_limiters.get_or_create(
            tenant, limits, self._clock(), n_routers=self.n_routers
        )

    def _record_usage(
        self,
        tenant: str,
        reservation: Reservation,
        n_prompt: int,
        n_generated: int,
        outcome: RequestOutcome,
    ) -> None:
        reservation.release_unused(n_prompt + n_generated, self._clock())
        tenant_usage = self._usage.for_tenant(tenant)
        tenant_usage.prompt_tokens += n_prompt
        tenant_usage.generated_tokens += n_generated
        tenant_usage.requests[outcome] += 1

    def _queue_share(self, tenant: str) -> float:
        tenants = self._registry.tenants
        weight = tenants[tenant].weight if tenant in tenants else 1
        return weight / max(weight, sum(t.weight for t in tenants.values()))

    def _to_caller(self, tenant: TenantConfig) -> Caller:
        limits = tenant.limits
        return Caller(
            tenant.name,
            model_alias=tenant.model_alias,
            system_prompt=tenant.system_prompt,
            max_model_len=limits.max_model_len,
            max_output_tokens=limits.max_output_tokens,
            max_request_tokens=limits.tokens_per_minute,
        )
