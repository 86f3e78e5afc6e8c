"""What is shared out sums to what was spent, and what is kept is what was."""

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


def test_cost_is_shared_in_proportion_to_tokens() -> None:
    accounts = RouterUsage(0.0)
    accounts.attribute_cost(FunctionCost(8.0, 4.0), {"a": 3, "b": 1})
    assert accounts.for_tenant("a").cost == FunctionCost(6.0, 3.0)
    assert accounts.for_tenant("b").cost == FunctionCost(2.0, 1.0)


def test_the_cost_of_an_interval_without_tokens_goes_with_the_next() -> None:
    accounts = RouterUsage(0.0)
    accounts.attribute_cost(FunctionCost(1.0, 1.0), {})
    accounts.attribute_cost(FunctionCost(1.0, 1.0), {"a": 0})
    assert accounts.for_tenant("a").cost == FunctionCost()
    accounts.attribute_cost(FunctionCost(1.0, 1.0), {"a": 5})
    assert accounts.for_tenant("a").cost == FunctionCost(3.0, 3.0)


@given(intervals=st.lists(st.tuples(COSTS, TENANTS), max_size=20))
def test_what_is_shared_out_sums_to_what_was_spent(
    intervals: list[tuple[FunctionCost, dict[str, int]]],
) -> None:
    accounts = RouterUsage(0.0)
    for cost, tokens in intervals:
        accounts.attribute_cost(cost, tokens)
    accounts.attribute_cost(FunctionCost(), {"last": 1})  # whatever is left
    assert accounts.total_cost.seconds == pytest.approx(math.fsum(c.seconds for c, _ in intervals))
    for field in ("seconds", "gb_seconds"):
        shared = math.fsum(getattr(account.cost, field) for _, account in accounts)
        assert shared == pytest.approx(getattr(accounts.total_cost, field))


def test_a_function_costs_its_time_and_the_same_times_its_size() -> None:
    """Two experts of both layers: 2 * 1 GB + 2 * 2 GB. In flight for 0.5 s, twice at once."""
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


def test_a_function_that_left_the_table_still_costs_its_time() -> None:
    meter, reader = LoadMeter(), FunctionCostMeter(STORE)
    meter.record_start("gone", 0.0, rows=1)
    meter.record_end("gone", 1.0)
    assert reader.read_delta(meter.snapshot(1.0), {}) == FunctionCost(1.0, 0.0)
    meter.retain(())
    assert reader.read_delta(meter.snapshot(2.0), {}) == FunctionCost()


def filled() -> RouterUsage:
    accounts = RouterUsage(12.5)
    accounts.attribute_cost(FunctionCost(1.5, 0.25), {"a": 1})
    accounts.attribute_cost(FunctionCost(0.5, 0.5), {})
    accounts.for_tenant("a").prompt_tokens = 7
    accounts.for_tenant("a").requests["completed"] = 3
    return accounts


def test_accounts_are_kept_across_starts(tmp_path: Path) -> None:
    file = UsageFileStore(tmp_path / "state")
    assert list(file.load()) == []
    accounts = filled()
    file.save(json.dumps(accounts.to_json()))
    kept = UsageFileStore(tmp_path / "state").load()
    assert kept.to_json() == accounts.to_json()
    assert dict(kept)["a"] == TenantUsage(
        7, 0, {"completed": 3, "cancelled": 0, "failed": 0, "limited": 0}, FunctionCost(1.5, 0.25)
    )
    kept.attribute_cost(FunctionCost(), {"a": 1})  # what was pending is not lost either
    assert kept.for_tenant("a").cost == FunctionCost(2.0, 0.75)


def test_accounts_from_before_books_had_names_get_one(tmp_path: Path) -> None:
    old = filled().to_json()
    del old["book"]
    (tmp_path / "usage.json").write_text(json.dumps(old))
    kept = UsageFileStore(tmp_path).load()
    assert dict(kept)["a"].prompt_tokens == 7
    assert len(kept.ledger_id) == 32
    assert kept.ledger_id != RouterUsage(0.0).ledger_id


def test_the_file_is_put_in_its_place_whole(tmp_path: Path) -> None:
    file = UsageFileStore(tmp_path)
    file.save("{}")
    written = (tmp_path / "usage.json").stat().st_ino
    file.save("{}")  # nothing new
    assert (tmp_path / "usage.json").stat().st_ino == written
    file.save('{"version": 1}')
    assert [path.name for path in tmp_path.iterdir()] == ["usage.json"]
    assert (tmp_path / "usage.json").stat().st_ino != written


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
        pytest.param('{"version": 1, "since_s": 0, "book": "my own"}', id="book"),
    ],
)
def test_a_damaged_file_is_put_aside(
    tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "usage.json").write_text(content)
    with caplog.at_level(logging.ERROR):
        accounts = UsageFileStore(tmp_path).load()
    assert list(accounts) == []
    assert (tmp_path / "usage.damaged").read_text() == content
    assert "cannot be read" in caplog.text


def test_a_folder_that_is_a_file_ends_the_start(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("")
    with pytest.raises(RouterConfigError, match="FAASMOE_STATE_DIR"):
        UsageFileStore(tmp_path / "state")


def test_a_file_that_cannot_be_written_is_told_and_tried_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = UsageFileStore(tmp_path / "state")
    (tmp_path / "state").rmdir()
    with caplog.at_level(logging.ERROR):
        file.save("{}")
    assert "cannot be saved" in caplog.text
    (tmp_path / "state").mkdir()
    file.save("{}")
    assert (tmp_path / "state" / "usage.json").read_text() == "{}"


def test_an_account_of_another_kind_is_no_account() -> None:
    broken: Any = {"prompt_tokens": 1}
    with pytest.raises(KeyError):
        TenantUsage.from_json(broken)
