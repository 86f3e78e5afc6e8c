"""Whole simulations: conservation, memory, determinism, scale to zero and lost nodes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from benchmarks.simulation.calibration import Calibration
from benchmarks.simulation.errors import SimulationError
from benchmarks.simulation.geometry import ModelGeometry, MoELayer
from benchmarks.simulation.outcome import format_outcomes, summarize
from benchmarks.simulation.strategies import STRATEGIES, Scenario
from benchmarks.simulation.system import Run
from benchmarks.simulation.traffic import (
    ClusterSpec,
    NodeLossSpec,
    PricesSpec,
    Traffic,
    TrafficRequest,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from faasmoe_operator.api.v1alpha1.moemodel import MoEModelSpec

MB = 1_000_000
N_LAYERS = 3
GEOMETRY = ModelGeometry(
    "toy",
    tuple(MoELayer(index, 8, 2, 10 * MB) for index in range(N_LAYERS)),
    expert_weights=5 * MB,
    dense_weights=10 * MB,
    router_bytes=20 * MB,
    kv_token_bytes=100,
    hidden_size=64,
)
COSTS = Calibration(
    step_s=0.01,
    call_s=0.001,
    read_bytes_per_s=1e10,
    flops_per_s=1e12,
    request_s=0.01,
    control_s=0.02,
    attach_s=0.005,
    weights_bytes_per_s=1e9,
    sandbox_start_s=0.3,
    router_start_s=2.0,
    system_bytes=50.0 * MB,
    router_bytes=30.0 * MB,
    runtime_bytes=10.0 * MB,
    sandbox_bytes=1.0 * MB,
)


def _scenario(*, max_waiting: int = 16, **cluster: Any) -> Scenario:
    spec = MoEModelSpec.model_validate(
        {
            "model": {"source": "file:///toy"},
            "router": {"maxNumSeqs": 4, "maxNumBatchedTokens": 64, "maxWaiting": max_waiting},
            "experts": {
                "functionsPerSandbox": 3,
                "scaling": {
                    "windowSeconds": 6,
                    "panicWindowPercentage": 20,
                    "scaleToZeroGracePeriodSeconds": 0,
                },
            },
            "tenants": [
                {"name": "limited", "apiKeysPath": "k", "limits": {"requestsPerMinute": 3}}
            ],
        }
    )
    defaults = {"nodes": 6, "nodeMemory": "200M", "routers": 2}
    cluster_spec = ClusterSpec.model_validate(defaults | cluster)
    return Scenario(spec, GEOMETRY, COSTS, cluster_spec, kv_cache_bytes=10 * MB)


def _traffic(*arrivals_s: float, n_output: int = 5, duration_s: float = 60.0) -> Traffic:
    requests = tuple(
        TrafficRequest(number, at_s, "a", 20, n_output) for number, at_s in enumerate(arrivals_s)
    )
    return Traffic(requests, duration_s)


def _run(name: str, scenario: Scenario, traffic: Traffic) -> Run:
    return STRATEGIES[name](scenario).run(traffic, losses=scenario.cluster.losses)


REQUESTS = st.lists(
    st.tuples(
        st.floats(0, 40),
        st.sampled_from(["a", "b", "limited"]),
        st.integers(1, 200),
        st.integers(1, 40),
    ),
    min_size=1,
    max_size=40,
)
LOSSES = st.lists(st.tuples(st.floats(0, 50), st.integers(1, 2)), max_size=2)


@pytest.mark.parametrize("name", STRATEGIES)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(requests=REQUESTS, losses=LOSSES, seed_nodes=st.integers(4, 8))
def test_every_request_ends_once_and_nodes_are_never_overfull(
    name: str,
    requests: list[tuple[float, str, int, int]],
    losses: list[tuple[float, int]],
    seed_nodes: int,
) -> None:
    traffic = Traffic(
        tuple(TrafficRequest(n, *one) for n, one in enumerate(sorted(requests))), 60.0
    )
    scenario = _scenario(nodes=seed_nodes, minRouters=0)
    system = STRATEGIES[name](scenario)
    lost = [NodeLossSpec.model_validate({"atSeconds": s, "nodes": n}) for s, n in losses]
    run = system.run(traffic, losses=lost)
    served = [one for one in run.requests if one.finished_s >= 0]
    refused = [one for one in run.requests if one.refusal]
    unfinished = [one for one in run.requests if one.finished_s < 0 and not one.refusal]
    assert len(served) + len(refused) + len(unfinished) == len(requests)
    assert not set(map(id, served)) & set(map(id, refused))
    assert system.pool is not None
    assert system.pool.n_held == len(unfinished)
    assert all(one.request.arrival_s <= one.first_token_s <= one.finished_s for one in served)
    assert all(one.n_done == one.request.n_output for one in served)
    assert system.nodes.max_used_bytes <= scenario.cluster.node_memory_bytes
    assert system.nodes.reserved_bytes.value >= 0
    assert system.memory_bytes.value >= 0


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_same_traffic_gives_the_same_figures(name: str) -> None:
    traffic = _traffic(*(0.7 * n for n in range(30)))
    first, second = (summarize(_run(name, _scenario(), traffic), PricesSpec()) for _ in range(2))
    assert first == second
    assert first["served"] == 30


def test_functions_start_on_demand_and_leave_when_idle() -> None:
    system = STRATEGIES["functions"](_scenario())
    run = system.run(_traffic(5.0, 30.0))
    cold = [one.cold_start_s for one in run.requests]
    # Activation, then 9 functions in 3 sandboxes, one of them from the warm pool.
    assert cold == [pytest.approx(cold[0]), pytest.approx(cold[0], rel=0.05)]
    assert COSTS.control_s + COSTS.sandbox_start_s < cold[0] < 2.0
    assert run.max_gb * 1e9 == pytest.approx(
        50 * MB + 2 * 60 * MB + 4 * 11 * MB + GEOMETRY.expert_bytes, rel=0.05
    )
    system.loop.run_until(120)
    idle_bytes = 50 * MB + 2 * 60 * MB + 11 * MB  # two routers and the warm pool's sandbox
    assert system.memory_bytes.value == pytest.approx(idle_bytes)


def test_whole_models_take_longer_to_start_and_more_memory() -> None:
    traffic = _traffic(5.0, 5.1)
    functions, whole, resident = (
        summarize(_run(name, _scenario(minRouters=0), traffic), PricesSpec()) for name in STRATEGIES
    )
    assert whole["cold_start_p50_s"] > COSTS.router_start_s
    assert whole["served"] == functions["served"] == resident["served"] == 2
    assert resident["cold_starts"] == 0
    assert resident["gb_seconds"] > functions["gb_seconds"]


def test_limits_refuse_as_the_router_does() -> None:
    traffic = Traffic(tuple(TrafficRequest(n, 1.0, "limited", 5, 2) for n in range(5)), 30.0)
    figures = summarize(_run("functions", _scenario(), traffic), PricesSpec())
    assert figures["refusals"] == {"RateLimitExceeded": 2}


def test_a_request_that_waits_too_long_is_refused() -> None:
    scenario = _scenario(minRouters=0, activationTimeoutSeconds=0.1)
    figures = summarize(_run("functions", scenario, _traffic(1.0)), PricesSpec())
    assert figures["refusals"] == {"ActivationTimeout": 1}


def test_a_lost_node_delays_but_loses_nothing() -> None:
    traffic = _traffic(*(0.2 * n for n in range(100)), n_output=10)
    calm = summarize(_run("functions", _scenario(max_waiting=300), traffic), PricesSpec())
    lossy = _scenario(max_waiting=300, losses=[{"atSeconds": 10.0, "nodes": 2}])
    figures = summarize(_run("functions", lossy, traffic), PricesSpec())
    assert figures["served"] == calm["served"] == 100
    assert figures["ttft_p99_s"] > calm["ttft_p99_s"] + 5


def test_a_model_that_fits_no_node_is_an_error() -> None:
    with pytest.raises(SimulationError, match=r"cluster\.nodeMemory: got '50M'"):
        STRATEGIES["functions"](_scenario(nodeMemory="50M"))
    with pytest.raises(SimulationError, match=r"cluster\.nodes: got 1, expected 2 for one whole"):
        STRATEGIES["whole-model"](_scenario(nodes=1))


def test_faster_nodes_answer_sooner() -> None:
    traffic = _traffic(*(0.1 * n for n in range(50)), n_output=20)
    slow, fast = _scenario(), _scenario()
    fast = replace(fast, costs=COSTS.scaled(speed=10, weights_bytes_per_s=1e10))
    slow_run, fast_run = (
        summarize(_run("functions", one, traffic), PricesSpec()) for one in (slow, fast)
    )
    assert fast_run["ttft_p50_s"] < slow_run["ttft_p50_s"]
    assert fast_run["tpot_p50_s"] < slow_run["tpot_p50_s"]
    assert fast_run["cold_start_p50_s"] < slow_run["cold_start_p50_s"]


def test_prices_count_nodes_and_memory() -> None:
    run = _run("resident", _scenario(), _traffic(1.0, duration_s=3600))
    prices = PricesSpec.model_validate({"nodeHour": 2.0, "gigabyteHour": 0.5})
    figures = summarize(run, prices)
    expected = figures["node_hours"] * 2 + figures["gb_seconds"] / 3600 * 0.5
    assert figures["cost"] == pytest.approx(expected)
    assert "COST" in format_outcomes({"resident": figures}).upper()
