"""The simulated engine: steps, slots, prompts and interruptions, computed by hand."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from benchmarks.simulation.calibration import Calibration
from benchmarks.simulation.engine import Engine, EngineHooks, EngineLimits, ServedRequest
from benchmarks.simulation.events import EventLoop
from benchmarks.simulation.geometry import ModelGeometry, MoELayer
from benchmarks.simulation.step_time import StepTime, distinct_experts
from benchmarks.simulation.traffic import TrafficRequest

from faasmoe_router.engine.fair_queue import Share
from faasmoe_router.errors import TenantQueueFull

GEOMETRY = ModelGeometry("toy", (MoELayer(0, 4, 1, 8),), 4, 10, 20, 2, 8)
STEP_S = 1.0
COSTS = Calibration(
    STEP_S, 0, 1e18, 1e18, 0, 0, 0, 1e18, 0, 0, 0, 0, 0, 0
)  # each step takes a second


class Bench:
    """An engine whose finished requests are recorded."""

    def __init__(self, limits: EngineLimits, shares: Mapping[str, Share] | None = None) -> None:
        self.loop = EventLoop()
        self.finished: list[int] = []
        self.busy: list[bool] = []
        step_time = StepTime(GEOMETRY, COSTS, call_s=0.0)
        hooks = EngineHooks(lambda s: self.finished.append(s.request.number), self.busy.append)
        self.engine = Engine(self.loop, limits, step_time, shares=shares or {}, hooks=hooks)
        self._n = 0

    def submit(self, *, n_prompt: int, n_output: int, tenant: str = "a") -> ServedRequest:
        served = ServedRequest(TrafficRequest(self._n, self.loop.now, tenant, n_prompt, n_output))
        self._n += 1
        self.engine.submit(served)
        return served


def test_a_prompt_takes_steps_of_the_budget_and_each_token_one_more() -> None:
    bench = Bench(EngineLimits(4, 10, 8))
    served = bench.submit(n_prompt=25, n_output=3)
    bench.loop.run_until(100)
    assert served.first_token_s == pytest.approx(3)
    assert served.finished_s == pytest.approx(5)
    assert bench.engine.totals.steps == 5
    assert bench.busy == [True, False]


def test_an_arrival_joins_the_next_step() -> None:
    bench = Bench(EngineLimits(4, 10, 8))
    first = bench.submit(n_prompt=1, n_output=6)
    bench.loop.run_until(2.5)
    second = bench.submit(n_prompt=4, n_output=2)
    bench.loop.run_until(100)
    assert second.started_s == pytest.approx(3)
    assert second.first_token_s == pytest.approx(4)
    assert second.finished_s == pytest.approx(5)
    assert first.finished_s == pytest.approx(6)


def test_a_full_batch_queues_and_a_free_slot_is_taken() -> None:
    bench = Bench(EngineLimits(1, 10, 8))
    bench.submit(n_prompt=1, n_output=4)
    second = bench.submit(n_prompt=1, n_output=1)
    assert bench.engine.n_waiting == 1
    bench.loop.run_until(100)
    assert second.started_s == pytest.approx(4)
    assert bench.finished == [0, 1]


def test_the_fair_queue_preempts_and_the_answer_is_still_complete() -> None:
    bench = Bench(EngineLimits(2, 100, 8))
    greedy = [bench.submit(n_prompt=2, n_output=30) for _ in range(4)]
    bench.loop.run_until(5.5)
    quiet = bench.submit(n_prompt=2, n_output=2, tenant="quiet")
    bench.loop.run_until(1000)
    assert quiet.finished_s < 10
    assert all(one.n_done == 30 and one.finished_s > 0 for one in greedy)
    assert bench.engine.n_held == 0


def test_a_full_queue_refuses() -> None:
    bench = Bench(EngineLimits(1, 10, 1))
    for _ in range(2):
        bench.submit(n_prompt=1, n_output=9)
    with pytest.raises(TenantQueueFull):
        bench.submit(n_prompt=1, n_output=9)


def test_a_pause_repeats_the_step_that_it_cut() -> None:
    bench = Bench(EngineLimits(4, 10, 8))
    served = bench.submit(n_prompt=1, n_output=4)
    bench.loop.run_until(1.5)
    bench.engine.pause()
    bench.loop.run_until(7)
    bench.engine.resume()
    bench.loop.run_until(100)
    assert served.first_token_s == pytest.approx(1)
    assert served.finished_s == pytest.approx(10)


def test_a_request_that_moves_keeps_its_tokens() -> None:
    bench, other = Bench(EngineLimits(4, 10, 8)), Bench(EngineLimits(4, 10, 8))
    served = bench.submit(n_prompt=5, n_output=8)
    bench.loop.run_until(3.5)
    (moved,) = bench.engine.take_all()
    moved.n_moved += 1
    other.engine.submit(moved)
    other.loop.run_until(100)
    assert served.first_token_s == pytest.approx(1)
    assert served.n_done == 8
    assert other.engine.totals.steps == 5  # 5 prompt and 3 done tokens in one step, then 4 left


def test_distinct_experts_grow_to_all_of_them() -> None:
    assert distinct_experts(8, 2, 1) == pytest.approx(2)
    assert distinct_experts(8, 2, 2) == pytest.approx(8 - 8 * 0.75**2)
    assert distinct_experts(8, 2, 1000) == pytest.approx(8)
