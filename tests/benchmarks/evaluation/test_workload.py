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


def test_a_round_is_the_papers() -> None:
    found = rounds_workload(2, seed=0, sizes=SIZES)
    assert (found.n_tenants, len(found.requests)) == (6, 60)
    for tenant in range(6):
        asked = found.of_tenant(tenant)
        assert Counter(request.task.kind for request in asked) == dict.fromkeys(KINDS, 2)
        assert [request.number for request in asked] == list(range(10))
    assert found.is_closed_loop


def test_tenants_do_not_ask_the_same_at_the_same_time() -> None:
    found = rounds_workload(1, seed=0, sizes=SIZES)
    orders = {tuple(r.task.kind for r in found.of_tenant(tenant)) for tenant in range(6)}
    assert len(orders) > 3


def test_the_digest_tells_workloads_apart() -> None:
    some = rounds_workload(1, seed=0, sizes=SIZES)
    assert some.digest == rounds_workload(1, seed=0, sizes=SIZES).digest
    assert some.digest != rounds_workload(1, seed=1, sizes=SIZES).digest


def test_random_arrivals_come_at_their_rate() -> None:
    found = poisson_workload(2.0, 1000.0, seed=0, sizes=SIZES)
    times = sorted(r.at_s for r in found.requests if r.at_s is not None)
    assert len(times) == pytest.approx(2000, rel=0.1)
    assert 0 < times[0] < times[-1] < found.duration_s == 1000.0
    gaps = [b - a for a, b in itertools.pairwise(times)]
    spread = sum((gap - 0.5) ** 2 for gap in gaps) / len(gaps)
    assert spread == pytest.approx(0.25, rel=0.3)  # exponential: as wide as its mean is long


def test_refuses_a_workload_without_a_request() -> None:
    with pytest.raises(ValueError, match=r"poisson: got no request in 0\.001 s"):
        poisson_workload(0.5, 0.001, seed=0, sizes=SIZES)


def test_a_day_has_nights_and_gaps() -> None:
    found = day_workload(600, 2400.0, seed=0, sizes=SIZES)
    assert len(found.requests) == 600
    hours = [r.at_s / 100.0 for r in found.requests if r.at_s is not None]
    by_hour = Counter(int(hour) for hour in hours)
    assert {hour for hour, weight in enumerate(HOURLY_WEIGHTS) if not weight}.isdisjoint(by_hour)
    assert by_hour[9] > 3 * by_hour[18]
    assert all(hour % 1 <= 1 / 3 for hour in hours)
    assert not found.is_closed_loop


def test_every_request_has_its_place_among_its_tenants() -> None:
    found = day_workload(100, 240.0, seed=0, sizes=SIZES)
    for tenant in range(found.n_tenants):
        asked = found.of_tenant(tenant)
        assert [request.number for request in asked] == list(range(len(asked)))
        times = [request.at_s or 0.0 for request in asked]
        assert times == sorted(times)
