"""The chaos tool on a tiny model: schedules are reproducible, and faults cause no failures."""

from __future__ import annotations

import asyncio
import gc
import json
from pathlib import Path

import pytest
from engines import ENGINES, RouterEngine
from hypothesis import given
from hypothesis import strategies as st
from tests.chaos.run import ChaosPlan, run_chaos
from tests.chaos.schedule import FAULT_WEIGHTS, QUIET_S, Fault, FaultKind, draw_schedule
from tests.chaos.tenants import N_TENANTS

from faasmoe_router.checkpoint.prepare import prepare

DURATION_S = 40.0
SEED = 2


@given(st.integers(0, 1 << 40), st.floats(0.0, 600.0), st.floats(0.25, 5.0))
def test_schedule_is_determined_by_seed_and_survives_json(
    seed: int, duration_s: float, period_s: float
) -> None:
    faults = draw_schedule(seed, duration_s=duration_s, period_s=period_s)
    assert faults == draw_schedule(seed, duration_s=duration_s, period_s=period_s)
    report = json.loads(json.dumps([fault.to_json() for fault in faults]))
    assert [Fault.from_json(value) for value in report] == faults
    assert all(0 <= f.at_s <= duration_s for f in faults)
    assert [f.at_s for f in faults] == sorted(f.at_s for f in faults)


@given(st.integers(0, 1 << 40), st.floats(0.0, 200.0))
def test_kills_only_phase_has_one_kill_per_second_and_a_quiet_end(
    seed: int, kills_only_s: float
) -> None:
    faults = draw_schedule(seed, duration_s=300.0, kills_only_s=kills_only_s)
    kills = [fault for fault in faults if fault.at_s < kills_only_s]
    assert {fault.kind for fault in kills} <= {FaultKind.KILL_SANDBOX}
    assert all(fault.at_s <= kills_only_s - QUIET_S for fault in kills)
    assert all(n <= fault.at_s <= n + 1 for n, fault in enumerate(kills))  # may be rounded up
    assert len(kills) >= kills_only_s - QUIET_S - 1


def test_long_schedule_has_every_kind_of_fault() -> None:
    assert set(FAULT_WEIGHTS) == set(FaultKind)
    assert {fault.kind for fault in draw_schedule(1, duration_s=600.0)} == set(FaultKind)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("engine", ENGINES)
# A connection that a proxy accepts while the run ends may be left to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_requests_succeed_with_correct_responses_under_faults(
    engine: RouterEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in engine.variables.items():
        monkeypatch.setenv(name, value)
    model = engine.save_model(tmp_path / "model")
    store = tmp_path / "store"
    prepare(str(model), store)
    faults = draw_schedule(SEED, duration_s=DURATION_S)
    if not engine.resumes_streams:
        faults = [fault for fault in faults if fault.kind is not FaultKind.KILL_ROUTER]
    plan = ChaosPlan(
        SEED,
        DURATION_S,
        faults,
        model,
        store,
        experts=2,
        capacity=2,
        replicated_layers="0",
        router_fields=engine.router_spec(),
    )
    report = asyncio.run(run_chaos(plan, tmp_path))
    gc.collect()
    assert report["failures"] == []
    assert report["wrong_answers"] == []
    assert report["recovered"]
    assert report["requests"] > 20
    assert report["faults"] > DURATION_S / 2
    # Each tenant's completed requests equal those in its usage account, whatever was killed.
    assert len(report["answers_by_tenant"]) == N_TENANTS
    assert report["answers_by_tenant"] == report["accounted_by_tenant"]
    # The faults had an effect and were handled.
    assert report["failed_calls"] > 0
    assert report["retries"] + report["local_computations"] > 0
