from dataclasses import replace
from pathlib import Path

import pytest
from benchmarks.evaluation.compare import ComparisonPlan, check_memory_fits, rotated
from benchmarks.evaluation.models import BenchmarkModel
from benchmarks.evaluation.strategies import STRATEGIES, StrategySettings
from benchmarks.evaluation.tasks import TaskSizes
from benchmarks.evaluation.workload import rounds_workload
from sandbox_processes import PreparedStore


@pytest.fixture
def plan(prepared_store: PreparedStore) -> ComparisonPlan:
    """A plan for a tiny model and six tenants."""
    store = prepared_store("qwen2_moe").path
    model = BenchmarkModel(
        "tiny", store.parent / "checkpoint", store, "float32", 2, 1, 64, TaskSizes()
    )
    workload = rounds_workload(1, seed=0, sizes=TaskSizes())
    settings = StrategySettings(model, 6, {}, lambda _: "eager")
    return ComparisonPlan(settings, workload, workload, tuple(STRATEGIES), repeats=1)


def test_rotates_order_of_strategies() -> None:
    names = ("a", "b", "c")
    assert [rotated(names, n)[0] for n in range(4)] == ["a", "b", "c", "a"]
    assert sorted(rotated(names, 2)) == sorted(names)


def test_rejects_full_models_that_exceed_memory(plan: ComparisonPlan) -> None:
    check_memory_fits(plan, 6 << 30)
    with pytest.raises(SystemExit, match=r"6 copies of .* only 2\.0 GB are available"):
        check_memory_fits(plan, 2 * 10**9)


def test_shared_full_model_is_not_checked(plan: ComparisonPlan) -> None:
    check_memory_fits(replace(plan, strategies=("full-model-shared", "functions-shared")), 0)


def test_model_description_and_deployment(plan: ComparisonPlan, tmp_path: Path) -> None:
    model = plan.settings.model.with_changes(experts_per_function=1)
    assert model.describe()["experts_per_function"] == 1
    assert model.describe()["weights_bytes"] == model.floor_bytes > 0
    deployment = model.deployment(tmp_path, {"warmPool": 2})
    assert deployment.model.spec.experts.warm_pool == 2
    assert deployment.template.capacity == 1
