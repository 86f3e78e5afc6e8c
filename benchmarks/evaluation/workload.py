"""Workloads: which tenant sends which task at what time; fully determined by a seed."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from benchmarks.evaluation.tasks import KINDS, Task, TaskSizes, make_task

TENANTS = 6
HOURS = 24
# Relative number of requests per hour of a working day: quiet nights, two peaks, a late batch.
HOURLY_WEIGHTS = (0, 0, 0, 0, 0, 0, 1, 3, 6, 9, 8, 5, 3, 6, 9, 8, 6, 4, 2, 1, 0, 0, 2, 0)
BURST_HOUR_FRACTION = 1 / 3  # all requests of an hour arrive in its first third


@dataclass(frozen=True, slots=True)
class WorkloadRequest:
    """One request of a workload.

    Attributes:
        tenant: number of the tenant.
        number: index among the requests of the tenant.
        task: the task.
        at_s: time to send it, from the start of the workload; None to send it once the previous
            request of the tenant is complete.
    """

    tenant: int
    number: int
    task: Task
    at_s: float | None


@dataclass(frozen=True, slots=True)
class Workload:
    """All requests of one run.

    Attributes:
        name: kind of workload.
        requests: requests ordered by tenant and number.
        duration_s: minimum duration; the end may be idle.
    """

    name: str
    requests: tuple[WorkloadRequest, ...]
    duration_s: float = 0.0

    @property
    def is_closed_loop(self) -> bool:
        """Whether each tenant waits for a response before it sends the next request."""
        return all(request.at_s is None for request in self.requests)

    @property
    def n_tenants(self) -> int:
        """Number of tenants."""
        return 1 + max(request.tenant for request in self.requests)

    @property
    def n_tokens(self) -> int:
        """Number of tokens to generate."""
        return sum(request.task.max_tokens for request in self.requests)

    @property
    def digest(self) -> str:
        """Short digest of all fields."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def of_tenant(self, tenant: int) -> Sequence[WorkloadRequest]:
        """Return the requests of a tenant in order."""
        return [request for request in self.requests if request.tenant == tenant]


def rounds_workload(
    n_rounds: int, *, seed: int, sizes: TaskSizes, tenants: int = TENANTS
) -> Workload:
    """Return the paper's workload: concurrent tenants, each with one task of every kind per round.

    With 6 tenants and 5 kinds, that is 30 requests per round. A tenant sends a task once the
    previous one is complete; the order of kinds differs between tenants.
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
    """Return an open-loop workload with Poisson arrivals."""
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
    """Return a working day compressed into `duration_s`, with idle nights and gaps.

    The requests of an hour arrive at random times in its first third.
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
