"""The tenant service: authenticates callers, admits requests within quotas and records their usage.

`TenantService` combines the pure parts of this package and runs their periodic jobs: it reloads
tenants and keys, attributes the expert functions' cost and saves usage. `NoTenants` replaces it in
a router without tenants. `Caller` is who sent a request, with its limits.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

from faasmoe_router.engine.fair_queue import Share
from faasmoe_router.engine.generation import GenerationRequest, NullUsageRecorder, UsageRecorder
from faasmoe_router.errors import RateLimitExceeded
from faasmoe_router.tenants.metrics import TenantCollector
from faasmoe_router.tenants.quota import (
    ActivationQueueCapacity,
    RateLimiter,
    RateLimiters,
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
from faasmoe_router.tenants.usage_journal import RequestUsage
from faasmoe_router.tenants.usage_store import ClusterUsage, UsageFileStore

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Caller:
    """Identity and limits of a request's caller; by default anonymous and unlimited.

    Attributes:
        tenant: name of the tenant; empty without tenants.
        weight: its share of what is done before generation, relative to other tenants'.
        model_alias: name by which the caller may address the model besides the model's own.
        system_prompt: prepended to conversations without a system message.
        max_model_len: tokens of one request, prompt and output together.
        max_output_tokens: tokens that one choice may generate.
        max_request_tokens: tokens that all choices of a request together may reserve.
    """

    tenant: str = ""
    weight: float = 1.0
    model_alias: str | None = None
    system_prompt: str | None = None
    max_model_len: int | None = None
    max_output_tokens: int | None = None
    max_request_tokens: int | None = None

    def model_names(self, model_name: str) -> tuple[str, ...]:
        """Return the names by which this caller may address the model."""
        names = (model_name, self.model_alias)
        return tuple(dict.fromkeys(name for name in names if name is not None))

    def effective_max_model_len(self, max_model_len: int) -> int:
        """Return the longest request of this caller in tokens, given the model's limit."""
        return min(max_model_len, self.max_model_len or max_model_len)

    def with_system_prompt(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the messages, with the caller's system prompt first if they have none."""
        has_system_message = any(message["role"] in ("system", "developer") for message in messages)
        if self.system_prompt is None or has_system_message:
            return messages
        return [{"role": "system", "content": self.system_prompt}, *messages]


ANONYMOUS = Caller()


class RequestUsageRecorder(UsageRecorder, Protocol):
    """Records the usage of an admitted request, and its outcome if the sequences do not tell it.

    Attributes:
        headers: response headers that state the tenant's remaining limits.
    """

    headers: Mapping[str, str]

    def finish(self, outcome: RequestOutcome | None = None) -> None:
        """Finalize the record; idempotent. Without an outcome it is derived from the sequences."""


class NullRequestUsageRecorder(NullUsageRecorder):
    """Records nothing: there are no tenants."""

    headers: Mapping[str, str] = {}

    def finish(self, outcome: RequestOutcome | None = None) -> None:
        """Do nothing."""


@dataclass(slots=True)
class TenantUsageRecorder:
    """Records the usage of a tenant's request.

    Attributes:
        headers: rate limit headers of the response.
        n_sequences: choices of the request.
        n_prompt_tokens: tokens of its prompts, each prompt once.
        on_finish: called once with the prompt tokens, the generated tokens and the outcome.
    """

    headers: Mapping[str, str]
    n_sequences: int
    n_prompt_tokens: int
    on_finish: Callable[[int, int, RequestOutcome], None]
    _n_generated_tokens: int = field(default=0, init=False)
    _n_finished: int = field(default=0, init=False)
    _is_started: bool = field(default=False, init=False)
    _has_failed: bool = field(default=False, init=False)
    _is_finished: bool = field(default=False, init=False)

    def record_started(self) -> None:
        """Count the prompt."""
        self._is_started = True

    def record_tokens(self, n_tokens: int, *, is_last: bool) -> None:
        """Count generated tokens, and finished sequences."""
        self._n_generated_tokens += n_tokens
        self._n_finished += is_last

    def record_failure(self) -> None:
        """Count the request as failed."""
        self._has_failed = True

    def finish(self, outcome: RequestOutcome | None = None) -> None:
        """Report the usage, once."""
        if self._is_finished:
            return
        self._is_finished = True
        n_prompt_tokens = self.n_prompt_tokens if self._is_started else 0
        self.on_finish(n_prompt_tokens, self._n_generated_tokens, outcome or self._derive_outcome())

    def _derive_outcome(self) -> RequestOutcome:
        if self._n_finished == self.n_sequences:
            return "completed"
        return "failed" if self._has_failed else "cancelled"


COST_ATTRIBUTION_INTERVAL_S = 1.0
SAVE_INTERVAL_S = 10.0


class NoTenants:
    """Admits every request and records nothing; for a router without tenants."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        return None

    def count_request(self, caller: Caller) -> None:
        """Count nothing."""

    def admit(
        self,
        caller: Caller,
        requests: Sequence[GenerationRequest],
        *,
        n_prompt: int,
        request_id: str = "",
        is_admitted: bool = False,
    ) -> RequestUsageRecorder:
        """Admit a request."""
        return NullRequestUsageRecorder()

    @contextmanager
    def queue_slot(self, caller: Caller, *, size_bytes: int) -> Iterator[None]:
        """Count nothing."""
        yield

    def usage(self, caller: Caller) -> dict[str, Any] | None:
        """Return None: no usage is recorded."""
        return None


class TenantQueue(Protocol):
    """Fair queue of the tenants' sequences, such as the engine."""

    def set_tenants(self, shares: Mapping[str, Share], prefix_groups: Mapping[str, str]) -> None:
        """Replace the tenants' shares and prefix cache groups."""

    def sequence_counts(self, tenant: str) -> tuple[int, int]:
        """Return the running and the waiting sequences of a tenant."""


@dataclass(frozen=True, slots=True)
class UsageSources:
    """Sources of the usage to attribute; each returns the amount since its last call.

    Attributes:
        read_cost: returns the cost of expert functions.
        read_tokens: returns the tokens computed for each tenant.
    """

    read_cost: Callable[[], FunctionCost]
    read_tokens: Callable[[], Mapping[str, int]]


class TenantService:
    """The tenants of one router. An async context manager, used on the event loop only.

    Args:
        registry: the tenants and their keys.
        usage: usage through this router.
        queue: fair queue of their sequences.
        usage_sources: sources of the usage to attribute.
        store: where usage is saved; None keeps it in memory only.
        queue_capacity: capacity of the activation queue, of which each tenant has a share.
        n_routers: routers that share the limits, unless the tenants file states their number.
        clock: returns monotonic seconds.

    Attributes:
        cluster_usage: usage over all routers.
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
        """Number of routers that share the limits."""
        return self._registry.config.router_replicas or self._default_n_routers

    def n_keys(self) -> dict[str, int]:
        """Return the number of valid API keys of each tenant."""
        return dict(self._registry.key_ring.n_keys)

    def collector(self) -> TenantCollector:
        """Return a Prometheus collector of the tenants' metrics."""
        return TenantCollector(
            self._usage,
            sequences=lambda: {n: self._queue.sequence_counts(n) for n in self._registry.tenants},
            n_keys=self.n_keys,
        )

    def authenticate(self, tenant: str | None, api_key: str) -> Caller | None:
        """Return the caller of an API key; None if the key is unknown or another tenant's.

        Args:
            tenant: tenant that the key must belong to; None for any.
            api_key: the key.
        """
        tenant_config = self._registry.authenticate(api_key)
        if tenant_config is None or tenant not in (None, tenant_config.name):
            return None
        return self._to_caller(tenant_config)

    def caller(self, tenant: str) -> Caller | None:
        """Return the caller of a tenant whose key was verified; None if there is no such tenant."""
        tenant_config = self._registry.tenants.get(tenant)
        return None if tenant_config is None else self._to_caller(tenant_config)

    def count_request(self, caller: Caller) -> None:
        """Count a request, whatever becomes of it; raises RateLimitExceeded."""
        try:
            self._rate_limiter(caller.tenant).count_request(self._clock())
        except RateLimitExceeded:
            self._usage.for_tenant(caller.tenant).requests["limited"] += 1
            raise

    def admit(
        self,
        caller: Caller,
        requests: Sequence[GenerationRequest],
        *,
        n_prompt: int,
        request_id: str = "",
        is_admitted: bool = False,
    ) -> RequestUsageRecorder:
        """Admit the tokens of a counted request and return the recorder of its usage.

        Args:
            caller: caller of the request.
            requests: one generation request for each choice.
            n_prompt: tokens of its prompts, each prompt once.
            request_id: the same for a request that is repeated; empty if it never is.
            is_admitted: whether another router has admitted it, so that it is only counted.

        Raises:
            RateLimitExceeded: the tenant's limit does not admit the request now.
            RequestTooLarge: the request exceeds the limit of one minute.
        """
        n_tokens = n_prompt + sum(r.max_tokens for r in requests)
        now_s, limiter = self._clock(), self._rate_limiter(caller.tenant)
        tenant_usage = self._usage.for_tenant(caller.tenant)
        try:
            reservation = limiter.reserve_tokens(n_tokens, now_s, is_admitted=is_admitted)
        except RateLimitExceeded:
            tenant_usage.requests["limited"] += 1
            raise

        def record(n_prompt_used: int, n_generated: int, outcome: RequestOutcome) -> None:
            reservation.release_unused(n_prompt_used + n_generated, self._clock())
            self.cluster_usage.record(
                RequestUsage(caller.tenant, n_prompt_used, n_generated, outcome, request_id)
            )

        headers = limiter.headers(now_s)
        return TenantUsageRecorder(headers, len(requests), n_prompt, on_finish=record)

    def queue_slot(self, caller: Caller, *, size_bytes: int) -> AbstractContextManager[None]:
        """Count a request in the activation queue; raises ActivationQueueFull."""
        return self._queue_quota.reserve(
            caller.tenant, self._queue_share(caller.tenant), size_bytes=size_bytes
        )

    def usage(self, caller: Caller) -> dict[str, Any] | None:
        """Return a caller's usage over all routers, as the body of its usage endpoint."""
        totals, remote = self.cluster_usage.cluster_total(caller.tenant), self.cluster_usage.remote
        return {
            "object": "usage",
            "tenant": caller.tenant,
            "since": int(remote.since_s),
            "prompt_tokens": totals.prompt_tokens,
            "completion_tokens": totals.generated_tokens,
            "total_tokens": totals.prompt_tokens + totals.generated_tokens,
            "requests": {outcome: getattr(totals, outcome) for outcome in REQUEST_OUTCOMES},
            "expert_seconds": totals.expert_seconds,
            "expert_gb_seconds": totals.expert_gb_seconds,
            "router_replicas": self.n_routers,
            "others_as_of": None if remote.as_of_s is None else int(remote.as_of_s),
        }

    async def __aenter__(self) -> Self:
        jobs = {
            "refresh": self._refresh_periodically,
            "cost": self._attribute_costs_periodically,
            "save": self._save_periodically,
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
        await self.cluster_usage.close()

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

    def _queue_share(self, tenant: str) -> float:
        tenants = self._registry.tenants
        weight = tenants[tenant].weight if tenant in tenants else 1
        return weight / max(weight, sum(t.weight for t in tenants.values()))

    def _to_caller(self, tenant: TenantConfig) -> Caller:
        limits = tenant.limits
        return Caller(
            tenant.name,
            weight=tenant.weight,
            model_alias=tenant.model_alias,
            system_prompt=tenant.system_prompt,
            max_model_len=limits.max_model_len,
            max_output_tokens=limits.max_output_tokens,
            max_request_tokens=limits.tokens_per_minute,
        )
