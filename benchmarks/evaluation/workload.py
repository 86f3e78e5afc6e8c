"""Workloads: which tenant asks what, and when. Pure: a seed gives the same one everywhere."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from benchmarks.evaluation.tasks import KINDS, Task, TaskSizes, make_task

TENANTS = 6
HOURS = 24
# Requests of each hour of a working day, relative: nights without any, two peaks, a late batch.
HOURLY_WEIGHTS = (0, 0, 0, 0, 0, 0, 1, 3, 6, 9, 8, 5, 3, 6, 9, 8, 6, 4, 2, 1, 0, 0, 2, 0)
BURST_HOUR_FRACTION = 1 / 3  # requests of an hour come within this part of it


@dataclass(frozen=True, slots=True)
class WorkloadRequest:
    """One request of a workload.

    Attributes:
        tenant: its number.
        number: its place among the tenant's requests.
        task: what is asked.
        at_s: when it is sent, from the workload's begin; None: once the tenant's last is answered.
    """

    tenant: int
    number: int
    task: Task
    at_s: float | None


@dataclass(frozen=True, slots=True)
class Workload:
    """Everything that is asked in one run.

    Attributes:
        name: its kind.
        requests: in the order of the tenants and their numbers.
        duration_s: it lasts at least so long, idle at the end if need be.
    """

    name: str
    requests: tuple[WorkloadRequest, ...]
    duration_s: float = 0.0

    @property
    def is_closed_loop(self) -> bool:
        """Whether a tenant waits for an answer before it asks again."""
        return all(request.at_s is None for request in self.requests)

    @property
    def n_tenants(self) -> int:
        """Tenants that take part."""
        return 1 + max(request.tenant for request in self.requests)

    @property
    def n_tokens(self) -> int:
        """Tokens that are asked for."""
        return sum(request.task.max_tokens for request in self.requests)

    @property
    def digest(self) -> str:
        """A short digest of everything in it."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def of_tenant(self, tenant: int) -> Sequence[WorkloadRequest]:
        """Return a tenant's requests, in order."""
        return [request for request in self.requests if request.tenant == tenant]


def rounds_workload(
    n_rounds: int, *, seed: int, sizes: TaskSizes, tenants: int = TENANTS
) -> Workload:
    """Return the paper's workload: 6 tenants at once, each with one task of each of five kinds.

    That is 30 requests a round. Within a tenant a task begins when the one before is answered; the
    order of kinds differs between tenants.
    """
    requests: list[WorkloadRequest] = []
    for tenant in range(tenants):
        draw = random.Random(f"rounds {seed} {tenant}")
        kinds = [k for _ in range(n_rounds) for k in draw.sample(list(KINDS), len(KINDS))]
        requests += [
            WorkloadRequest(tenant, i, make_task(k, draw, sizes), None) for i, k in enumerate(kinds)
        ]
    return Workload("rounds", tuple(requests))


def poisson_workload(
    rate_per_s: float, duration_s: float, *, seed: int, sizes: TaskSizes, tenants: int = TENANTS
) -> Workload:
    """Return requests whose distances in time are exponential, whatever becomes of them."""
    draw = random.Random(f"poisson {seed}")
    times: list[float] = []
    at_s = draw.expovariate(rate_per_s)
    while at_s < duration_s:
        times.append(at_s)
        at_s += draw.expovariate(rate_per_s)
    return _workload_at_times("poisson", times, draw, sizes, tenants, duration_s)


def day_workload(
    n_requests: int, duration_s: float, *, seed: int, sizes: TaskSizes, tenants: int = TENANTS
) -> Workload:
    """Return a working day compressed into `duration_s`, with nights and gaps in which none comes.

    Requests of an hour come in a burst in its first third, at random times.
    """
    draw = random.Random(f"day {seed}")
    hour_s = duration_s / HOURS
    hours = draw.choices(range(HOURS), HOURLY_WEIGHTS, k=n_requests)
    times = sorted((hour + draw.random() * BURST_HOUR_FRACTION) * hour_s for hour in hours)
    return _workload_at_times("day", times, draw, sizes, tenants, duration_s)


def _workload_at_times(
    name: str,
    times: Sequence[float],
    draw: random.Random,
    sizes: TaskSizes,
    tenants: int,
    duration_s: float,
) -> Workload:
    if not times:
        raise ValueError(f"{name}: got no request in {duration_s:g} s, expected at least one")
    counts = [0] * tenants
    requests: list[WorkloadRequest] = []
    for at_s in times:
        tenant = draw.randrange(tenants)
        task = make_task(draw.choice(list(KINDS)), draw, sizes)
        requests.append(WorkloadRequest(tenant, counts[tenant], task, at_s))
        counts[tenant] += 1
    return Workload(name, tuple(sorted(requests, key=lambda r: (r.tenant, r.number))), duration_s)
