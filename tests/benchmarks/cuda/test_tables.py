"""Tables and plan of the GPU benchmark."""

import time
from typing import Any

import pytest
from benchmarks.cuda.plan import SHUTDOWN_MARGIN_S, CudaPlan, Deadline, full_plan, quick_plan
from benchmarks.cuda.tables import (
    EXPERTS,
    WAITING,
    WHOLE,
    step_parts_ms,
    step_shares,
    throughput_table,
    transport_table,
)
from benchmarks.decoding import DecodeRun
from benchmarks.step_breakdown import TIMERS


def make_run(
    *, steps: int = 10, step_s: float = 0.01, experts_s: float = 0.0, **timers: float
) -> DecodeRun:
    counters = dict.fromkeys(TIMERS, 0.0) | {"cpu_router": 0.1, "cpu_others": 0.2}
    counters |= {f"timer_{name}": seconds for name, seconds in timers.items()}
    counters["experts_of_run"] = experts_s
    return DecodeRun(4, steps, steps * step_s, 0.3, counters, ((1, 2),), ttft_s=0.05)


def test_step_shares_sum_to_one() -> None:
    long = make_run(experts_s=0.030, whole=0.08, land=0.01, group=0.005, calls=0.05, wait=0.04)
    parts = step_parts_ms(long, make_run(experts_s=0.006), extra_steps=8)
    assert parts[EXPERTS] == pytest.approx(3.0)  # 24 ms in 8 steps
    shares = step_shares(parts)
    assert sum(shares.values()) == pytest.approx(1.0)
    assert shares["experts"] == pytest.approx(0.3)
    assert shares["wire"] == pytest.approx(0.1 + 0.4 - 0.3)
    assert shares["gate"] == pytest.approx(0.2 + 0.1)
    assert shares["dispatch"] == pytest.approx(0.2)


def test_expert_share_is_limited_to_waiting_time() -> None:
    long = make_run(experts_s=9.0, whole=0.05, calls=0.04, wait=0.02)
    parts = step_parts_ms(long, make_run(), extra_steps=8)
    shares = step_shares(parts)
    assert shares["experts"] == pytest.approx(parts[WAITING] / parts[WHOLE])
    assert sum(shares.values()) == pytest.approx(1.0)


def test_throughput_table_has_ratio_where_baseline_was_measured() -> None:
    runs = {
        "in_process": {8: [make_run(step_s=0.01)]},
        "ours": {1: [make_run()], 8: [make_run(step_s=0.02)]},
    }
    lines = throughput_table(runs, baseline="in_process").splitlines()
    assert [line.split()[:4] for line in lines[1:]] == [
        ["in_process", "8", "400", "1.00"],
        ["ours", "1", "400", "10.00"],
        ["ours", "8", "200", "0.50"],
    ]


def test_deadline_reserves_shutdown_margin() -> None:
    before_s = time.monotonic()
    deadline = Deadline(SHUTDOWN_MARGIN_S + 100.0)
    assert deadline.remaining_s <= 100.0
    assert deadline.remaining_s >= 100.0 - (time.monotonic() - before_s) - 1e-6


def test_full_plan_has_all_layers_and_batch_sizes() -> None:
    plan = full_plan("cuda", 24, 540.0)
    assert (plan.geometry.layers, plan.geometry.vocabulary) == (24, 151_936)
    assert sorted(plan.amount.batches) == [1, 8, 32, 64, 128, 256]
    expert_bytes = 3 * plan.geometry.hidden * plan.geometry.intermediate * 2
    assert round(plan.attached_experts * expert_bytes / 1e6) == 346


@pytest.mark.parametrize("plan", [full_plan("cuda", 24, 540.0), quick_plan("cpu", 60.0)])
def test_variants_have_capacity_for_all_functions(plan: CudaPlan) -> None:
    for variant in plan.variants:
        blocks = -(-plan.geometry.experts // variant.experts_per_function)
        per_sandbox = variant.settings(plan.geometry)["functionsPerSandbox"]
        assert variant.n_sandboxes * per_sandbox >= blocks * plan.geometry.layers
        assert (variant.n_sandboxes - 1) * per_sandbox < blocks * plan.geometry.layers
    names = [variant.name for variant in plan.variants]
    assert len(set(names)) == len(names)


def test_transport_table_shows_reason_of_failure() -> None:
    transports: dict[str, dict[str, Any]] = {
        "sockets": {"4096": {"median": 80.4}, "262144": {"median": 300.0}},
        "CUDA IPC": {"failed": "not on this machine"},
    }
    lines = transport_table(transports).splitlines()
    assert lines[0].split() == ["US", "PER", "ROUND", "TRIP", "4", "KIB", "256", "KIB"]
    assert lines[1].split() == ["sockets", "80", "300"]
    assert lines[2].split() == ["CUDA", "IPC", "failed:", "not", "on", "this", "machine"]
