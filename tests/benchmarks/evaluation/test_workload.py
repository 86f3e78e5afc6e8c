import itertools
from collections import Counter

import pytest
from benchmarks.evaluation.tasks import KINDS, TaskSizes
from benchmarks.evaluation.workload import (
    HOURLY_WEIGHTS,
    day_workload,
    poisson_workload,
    rounds_workload,
)

SIZES = TaskSizes()


def test_rounds_have_every_kind_for_every_tenant() -> None:
    workload = rounds_workload(2, seed=0, sizes=SIZES)
    assert (workload.n_tenants, len(workload.requests)) == (6, 60)
    for tenant in range(6):
        requests = workload.of_tenant(tenant)
        assert Counter(request.task.kind for request in requests) == dict.fromkeys(KINDS, 2)
        assert [request.number for request in requests] == list(range(10))
    assert workload.is_closed_loop


def test_order_of_kinds_differs_between_tenants() -> None:
    workload = rounds_workload(1, seed=0, sizes=SIZES)
    orders = {tuple(r.task.kind for r in workload.of_tenant(tenant)) for tenant in range(6)}
    assert len(orders) > 3


def test_digest_identifies_workload() -> None:
    workload = rounds_workload(1, seed=0, sizes=SIZES)
    assert workload.digest == rounds_workload(1, seed=0, sizes=SIZES).digest
    assert workload.digest != rounds_workload(1, seed=1, sizes=SIZES).digest


def test_poisson_arrivals_have_given_rate() -> None:
    workload = poisson_workload(2.0, 1000.0, seed=0, sizes=SIZES)
    times = sorted(r.at_s for r in workload.requests if r.at_s is not None)
    assert len(times) == pytest.approx(2000, rel=0.1)
    assert 0 < times[0] < times[-1] < workload.duration_s == 1000.0
    gaps = [b - a for a, b in itertools.pairwise(times)]
    variance = sum((gap - 0.5) ** 2 for gap in gaps) / len(gaps)
    assert variance == pytest.approx(0.25, rel=0.3)  # exponential: square of the mean


def test_rejects_workload_without_requests() -> None:
    with pytest.raises(ValueError, match=r"poisson: got no request in 0\.001 s"):
        poisson_workload(0.5, 0.001, seed=0, sizes=SIZES)


def test_day_has_nights_and_gaps() -> None:
    workload = day_workload(600, 2400.0, seed=0, sizes=SIZES)
    assert len(workload.requests) == 600
    hours = [r.at_s / 100.0 for r in workload.requests if r.at_s is not None]
    by_hour = Counter(int(hour) for hour in hours)
    assert {hour for hour, weight in enumerate(HOURLY_WEIGHTS) if not weight}.isdisjoint(by_hour)
    assert by_hour[9] > 3 * by_hour[18]
    assert all(hour % 1 <= 1 / 3 for hour in hours)
    assert not workload.is_closed_loop


def test_requests_of_a_tenant_are_numbered_in_order_of_time() -> None:
    workload = day_workload(100, 240.0, seed=0, sizes=SIZES)
    for tenant in range(workload.n_tenants):
        requests = workload.of_tenant(tenant)
        assert [request.number for request in requests] == list(range(len(requests)))
        times = [request.at_s or 0.0 for request in requests]
        assert times == sorted(times)
