"""The tenants of one router: recognised, let in within their limits, and billed; an async context.

What is decided is decided by the pure parts; here they are put together, and run: the tenants file
and the keys are read again each second, the expert functions' cost is shared out, and the accounts
are written to their file.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, Self

from faasmoe_router.engine.generation import GenerationRequest
from faasmoe_router.tenants.allowances import Allowances
from faasmoe_router.tenants.books import Books
from faasmoe_router.tenants.callers import Caller, TenantTicket, Ticket
from faasmoe_router.tenants.costs import Cost
from faasmoe_router.tenants.directory import Directory
from faasmoe_router.tenants.document import Tenant, TenantLimits
from faasmoe_router.tenants.errors import RateLimited
from faasmoe_router.tenants.fairness import Share
from faasmoe_router.tenants.held import HeldLimits, HeldRequests
from faasmoe_router.tenants.limits import RateLimits, Reservation
from faasmoe_router.tenants.metrics import TenantCollector
from faasmoe_router.tenants.prefixes import half_agreed, prefix_groups
from faasmoe_router.tenants.usage import OUTCOMES, Accounts, Outcome
from faasmoe_router.tenants.usage_file import UsageFile

logger = logging.getLogger(__name__)

SHARE_OUT_INTERVAL_S = 1.0
SAVE_INTERVAL_S = 10.0


class Queue(Protocol):
    """What makes the tenants' requests wait; the engine."""

    def set_tenants(self, shares: Mapping[str, Share], prefix_groups: Mapping[str, str]) -> None:
        """Take what each tenant is entitled to, and which share the cache of prefixes."""

    def sequences_of(self, tenant: str) -> tuple[int, int]:
        """Return how many of a tenant's sequences run, and how many wait."""


@dataclass(frozen=True, slots=True)
class Spending:
    """What tells what is spent, since it was asked last.

    Attributes:
        cost: of expert functions.
        tokens: tokens that were computed for each tenant.
    """

    cost: Callable[[], Cost]
    tokens: Callable[[], Mapping[str, int]]


class Tenancy:
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
        directory: Directory,
        accounts: Accounts,
        *,
        queue: Queue,
        spending: Spending,
        file: UsageFile | None = None,
        held: HeldLimits | None = None,
        n_routers: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._directory = directory
        self._accounts = accounts
        self._queue = queue
        self._spending = spending
        self.books = Books(accounts, file)
        self._held = HeldRequests(held or HeldLimits())
        self._given_n_routers = n_routers
        self._clock = clock
        self._allowances = Allowances()
        self._tasks: list[asyncio.Task[None]] = []
        self._take_document()

    @property
    def n_routers(self) -> int:
        """Routers that share the limits."""
        return self._directory.document.router_replicas or self._given_n_routers

    def n_keys(self) -> dict[str, int]:
        """Return how many keys each tenant has."""
        return dict(self._directory.ring.n_keys)

    def collector(self) -> TenantCollector:
        """Return what tells Prometheus of the tenants."""
        return TenantCollector(
            self._accounts,
            sequences=lambda: {n: self._queue.sequences_of(n) for n in self._directory.tenants},
            n_keys=self.n_keys,
        )

    def identify(self, tenant: str | None, key: str) -> Caller | None:
        """Return who calls with a key, if it is this tenant's; with None, whoever it is."""
        found = self._directory.identify(key)
        if found is None or tenant not in (None, found.name):
            return None
        return self._caller(found)

    def admit(
        self, caller: Caller, requests: Sequence[GenerationRequest], *, n_prompt: int
    ) -> Ticket:
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
        now_s, limits = self._clock(), self._limits_of(caller.tenant)
        account = self._accounts.of(caller.tenant)
        try:
            reservation = limits.admit(n_tokens, now_s)
        except RateLimited:
            account.requests["limited"] += 1
            raise
        return TenantTicket(
            limits.headers(now_s),
            len(requests),
            n_prompt,
            settle=lambda n_in, n_out, how: self._settle(
                caller.tenant, reservation, n_in, n_out, how
            ),
        )

    def holding(self, caller: Caller, *, size_bytes: int) -> AbstractContextManager[None]:
        """Count a request as waiting for functions to be started; raises HoldQueueFull."""
        return self._held.holding(caller.tenant, self._part(caller.tenant), size_bytes=size_bytes)

    def usage(self, caller: Caller) -> dict[str, Any] | None:
        """Return what a caller has used over all routers, as its usage endpoint tells it."""
        used, others = self.books.whole(caller.tenant), self.books.others
        return {
            "object": "usage",
            "tenant": caller.tenant,
            "since": int(others.since_s),
            "prompt_tokens": used["prompt_tokens"],
            "completion_tokens": used["generated_tokens"],
            "total_tokens": used["prompt_tokens"] + used["generated_tokens"],
            "requests": {outcome: used[outcome] for outcome in OUTCOMES},
            "expert_seconds": used["expert_seconds"],
            "expert_gb_seconds": used["expert_gb_seconds"],
            "router_replicas": self.n_routers,
            "others_as_of": None if others.as_of_s is None else int(others.as_of_s),
        }

    async def __aenter__(self) -> Self:
        jobs = {"refresh": self._refresh, "accounts": self._share_out, "file": self._keep}
        self._tasks = [
            asyncio.create_task(job(), name=f"tenants-{name}") for name, job in jobs.items()
        ]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._share_out_now()
        await self.books.save()

    async def _refresh(self) -> None:
        while True:
            await asyncio.sleep(self._directory.interval_s / 2)
            if await asyncio.to_thread(self._directory.refresh, self._clock()):
                self._take_document()

    async def _share_out(self) -> None:
        while True:
            await asyncio.sleep(SHARE_OUT_INTERVAL_S)
            self._share_out_now()

    async def _keep(self) -> None:
        while True:
            await asyncio.sleep(SAVE_INTERVAL_S)
            await self.books.save()

    def _share_out_now(self) -> None:
        self._accounts.share_out(self._spending.cost(), self._spending.tokens())

    def _take_document(self) -> None:
        document = self._directory.document
        groups = prefix_groups(document.tenants)
        for name, other in half_agreed(document.tenants, groups):
            logger.warning(
                "Tenants: %s names %s to share prefixes with; not all agree", name, other
            )
        n_routers = self.n_routers
        shares = {t.name: t.share(n_routers=n_routers) for t in document.tenants}
        self._queue.set_tenants(shares, groups)
        self._allowances.keep(shares)
        logger.info("Tenants: %d, limits split over %d routers", len(shares), n_routers)

    def _limits_of(self, tenant: str) -> RateLimits:
        known = self._directory.tenants.get(tenant)
        limits = TenantLimits() if known is None else known.limits
        return self._allowances.of(tenant, limits, self._clock(), n_routers=self.n_routers)

    def _settle(
        self,
        tenant: str,
        reservation: Reservation,
        n_prompt: int,
        n_generated: int,
        outcome: Outcome,
    ) -> None:
        reservation.settle(n_prompt + n_generated, self._clock())
        account = self._accounts.of(tenant)
        account.prompt_tokens += n_prompt
        account.generated_tokens += n_generated
        account.requests[outcome] += 1

    def _part(self, tenant: str) -> float:
        tenants = self._directory.tenants
        mine = tenants[tenant].weight if tenant in tenants else 1
        return mine / max(mine, sum(t.weight for t in tenants.values()))

    def _caller(self, tenant: Tenant) -> Caller:
        limits = tenant.limits
        return Caller(
            tenant.name,
            model_alias=tenant.model_alias,
            system_prompt=tenant.system_prompt,
            max_model_len=limits.max_model_len,
            max_output_tokens=limits.max_output_tokens,
            max_request_tokens=limits.tokens_per_minute,
        )
