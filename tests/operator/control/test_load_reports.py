import pytest

from faasmoe_contracts.control_messages import FunctionLoad, LoadReport
from faasmoe_operator.control.load_reports import (
    MAX_ROUTERS,
    ROUTER_TIMEOUT_S,
    STARTUP_GRACE_S,
    LoadReports,
)


def report(router: str, queued: int = 0, **concurrency: float) -> LoadReport:
    loads = {name: FunctionLoad(value) for name, value in concurrency.items()}
    return LoadReport(router, loads, queued=queued)


def test_knows_nothing_before_a_router_has_reported() -> None:
    reports = LoadReports(now=100.0)
    assert reports.concurrency(100.0) is None
    assert reports.concurrency(100.0 + STARTUP_GRACE_S - 0.1) is None


def test_is_idle_after_the_startup_grace_without_reports() -> None:
    assert LoadReports(now=100.0).concurrency(100.0 + STARTUP_GRACE_S) == {}


def test_adds_the_loads_of_routers() -> None:
    reports = LoadReports(now=0.0)
    reports.add(report("a", f=1.5, g=2.0), now=1.0)
    reports.add(report("b", f=0.25), now=1.2)
    assert reports.concurrency(2.0) == {"f": 1.75, "g": 2.0}


def test_counts_a_router_once_however_often_it_reports() -> None:
    reports = LoadReports(now=0.0)
    for now in (1.0, 1.1, 1.2):
        reports.add(report("a", f=2.0), now=now)
    assert reports.concurrency(2.0) == {"f": 2.0}


def test_functions_omitted_from_a_report_are_idle() -> None:
    reports = LoadReports(now=0.0)
    reports.add(report("a", f=2.0, g=1.0), now=1.0)
    reports.add(report("a", g=1.0), now=2.0)
    assert reports.concurrency(2.0) == {"g": 1.0}


@pytest.mark.parametrize(
    ("elapsed_s", "loads"), [(ROUTER_TIMEOUT_S, {"f": 2.0}), (ROUTER_TIMEOUT_S + 0.1, {})]
)
def test_drops_a_router_after_the_timeout(elapsed_s: float, loads: dict[str, float]) -> None:
    reports = LoadReports(now=0.0)
    reports.add(report("a", queued=3, f=2.0), now=1.0)
    assert reports.concurrency(1.0 + elapsed_s) == loads
    assert reports.queued(1.0 + elapsed_s) == (3 if loads else 0)


def test_the_number_of_routers_is_bounded() -> None:
    reports = LoadReports(now=0.0)
    for number in range(MAX_ROUTERS):
        assert not reports.is_full(str(number))
        reports.add(report(str(number)), now=1.0)
    assert reports.is_full("another")
    assert not reports.is_full("0")
