"""Cost attribution adds up to the total cost, and usage survives restarts."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from faasmoe_contracts.routing_table import FunctionSpec
from faasmoe_contracts.store import Store
from faasmoe_router.dispatch.load import LoadMeter
from faasmoe_router.errors import RouterConfigError
from faasmoe_router.tenants.usage import FunctionCost, FunctionCostMeter, RouterUsage, TenantUsage
from faasmoe_router.tenants.usage_store import UsageFileStore

TENANTS = st.dictionaries(st.sampled_from("abc"), st.integers(0, 1000))
COSTS = st.builds(FunctionCost, st.floats(0, 1e3), st.floats(0, 1e3))
LAYERS = [SimpleNamespace(expert_bytes=1e9), SimpleNamespace(expert_bytes=2e9)]
STORE = cast(Store, SimpleNamespace(manifest=SimpleNamespace(layers=LAYERS)))


def test_cost_is_attributed_in_proportion_to_tokens() -> None:
    usage = RouterUsage(0.0)
    usage.attribute_cost(FunctionCost(8.0, 4.0), {"a": 3, "b": 1})
    assert usage.for_tenant("a").cost == FunctionCost(6.0, 3.0)
    assert usage.for_tenant("b").cost == FunctionCost(2.0, 1.0)


def test_the_cost_of_an_interval_without_tokens_is_carried_over() -> None:
    usage = RouterUsage(0.0)
    usage.attribute_cost(FunctionCost(1.0, 1.0), {})
    usage.attribute_cost(FunctionCost(1.0, 1.0), {"a": 0})
    assert usage.for_tenant("a").cost == FunctionCost()
    usage.attribute_cost(FunctionCost(1.0, 1.0), {"a": 5})
    assert usage.for_tenant("a").cost == FunctionCost(3.0, 3.0)


@given(intervals=st.lists(st.tuples(COSTS, TENANTS), max_size=20))
def test_attributed_cost_adds_up_to_the_total_cost(
    intervals: list[tuple[FunctionCost, dict[str, int]]],
) -> None:
    usage = RouterUsage(0.0)
    for cost, tokens in intervals:
        usage.attribute_cost(cost, tokens)
    usage.attribute_cost(FunctionCost(), {"last": 1})  # attributes the rest
    assert usage.total_cost.seconds == pytest.approx(math.fsum(c.seconds for c, _ in intervals))
    for field in ("seconds", "gb_seconds"):
        attributed = math.fsum(getattr(tenant.cost, field) for _, tenant in usage)
        assert attributed == pytest.approx(getattr(usage.total_cost, field))


def test_a_function_costs_its_time_and_its_time_multiplied_by_its_size() -> None:
    """Two experts of both layers: 2 * 1 GB + 2 * 2 GB. Two calls in flight for 0.5 s."""
    meter, reader = LoadMeter(), FunctionCostMeter(STORE)
    specs = {"f": FunctionSpec("f", (0, 1), (0, 1))}
    meter.record_start("f", 10.0, rows=1)
    meter.record_start("f", 10.0, rows=1)
    meter.record_end("f", 10.5)
    meter.record_end("f", 10.5)
    assert reader.read_delta(meter.snapshot(11.0), specs) == FunctionCost(1.0, 6.0)
    assert reader.read_delta(meter.snapshot(12.0), specs) == FunctionCost()
    meter.record_start("f", 12.0, rows=1)
    assert reader.read_delta(meter.snapshot(12.25), specs) == FunctionCost(0.25, 1.5)


def test_a_function_removed_from_the_table_still_costs_its_time() -> None:
    meter, reader = LoadMeter(), FunctionCostMeter(STORE)
    meter.record_start("removed", 0.0, rows=1)
    meter.record_end("removed", 1.0)
    assert reader.read_delta(meter.snapshot(1.0), {}) == FunctionCost(1.0, 0.0)
    meter.retain(())
    assert reader.read_delta(meter.snapshot(2.0), {}) == FunctionCost()


def example_usage() -> RouterUsage:
    usage = RouterUsage(12.5)
    usage.attribute_cost(FunctionCost(1.5, 0.25), {"a": 1})
    usage.attribute_cost(FunctionCost(0.5, 0.5), {})
    usage.for_tenant("a").prompt_tokens = 7
    usage.for_tenant("a").requests["completed"] = 3
    return usage


def test_usage_survives_a_restart(tmp_path: Path) -> None:
    store = UsageFileStore(tmp_path / "state")
    assert list(store.load()) == []
    usage = example_usage()
    store.save(json.dumps(usage.to_json()))
    restored = UsageFileStore(tmp_path / "state").load()
    assert restored.to_json() == usage.to_json()
    assert dict(restored)["a"] == TenantUsage(
        7, 0, {"completed": 3, "cancelled": 0, "failed": 0, "limited": 0}, FunctionCost(1.5, 0.25)
    )
    restored.attribute_cost(FunctionCost(), {"a": 1})  # attributes the restored unattributed cost
    assert restored.for_tenant("a").cost == FunctionCost(2.0, 0.75)


def test_usage_of_a_version_without_source_id_gets_one(tmp_path: Path) -> None:
    old = example_usage().to_json()
    del old["book"]
    (tmp_path / "usage.json").write_text(json.dumps(old))
    restored = UsageFileStore(tmp_path).load()
    assert dict(restored)["a"].prompt_tokens == 7
    assert len(restored.source_id) == 32
    assert restored.source_id != RouterUsage(0.0).source_id


def test_the_file_is_replaced_as_a_whole_when_its_content_changes(tmp_path: Path) -> None:
    store = UsageFileStore(tmp_path)
    store.save("{}")
    inode = (tmp_path / "usage.json").stat().st_ino
    store.save("{}")  # unchanged
    assert (tmp_path / "usage.json").stat().st_ino == inode
    store.save('{"version": 1}')
    assert [path.name for path in tmp_path.iterdir()] == ["usage.json"]
    assert (tmp_path / "usage.json").stat().st_ino != inode


@pytest.mark.parametrize(
    "content",
    [
        pytest.param("{", id="json"),
        pytest.param("[]", id="list"),
        pytest.param('{"version": 9, "since_s": 0}', id="version"),
        pytest.param(
            '{"version": 1, "since_s": 0, "spent": {"x": 1}, "pending": {}, "tenants": {}}',
            id="field",
        ),
        pytest.param('{"version": 1, "since_s": 0, "book": "my own"}', id="source-id"),
    ],
)
def test_a_damaged_file_is_quarantined(
    tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "usage.json").write_text(content)
    with caplog.at_level(logging.ERROR):
        usage = UsageFileStore(tmp_path).load()
    assert list(usage) == []
    assert (tmp_path / "usage.damaged").read_text() == content
    assert "cannot be read" in caplog.text


def test_a_state_dir_that_is_a_file_prevents_the_start(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("")
    with pytest.raises(RouterConfigError, match="FAASMOE_STATE_DIR"):
        UsageFileStore(tmp_path / "state")


def test_a_failed_save_is_logged_and_retried(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = UsageFileStore(tmp_path / "state")
    (tmp_path / "state").rmdir()
    with caplog.at_level(logging.ERROR):
        store.save("{}")
    assert "cannot be saved" in caplog.text
    (tmp_path / "state").mkdir()
    store.save("{}")
    assert (tmp_path / "state" / "usage.json").read_text() == "{}"


def test_invalid_tenant_usage_is_rejected() -> None:
    broken: Any = {"prompt_tokens": 1}
    with pytest.raises(KeyError):
        TenantUsage.from_json(broken)
