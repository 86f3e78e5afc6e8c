"""Usage messages survive JSON and are read strictly; totals tolerate other versions."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from faasmoe_contracts.json_reader import MAX_COUNT, ContractError
from faasmoe_contracts.usage import (
    MAX_TENANTS_IN_LEDGER,
    ClusterTotals,
    UsageRecord,
    UsageReport,
)

COUNTS = st.integers(0, MAX_COUNT)
SECONDS = st.floats(0, 1e9)
RECORDS = st.builds(UsageRecord, *[COUNTS] * 6, SECONDS, SECONDS)
TENANTS = st.dictionaries(st.sampled_from(["acme", "beta", "a-1"]), RECORDS)
RECORD = UsageRecord(7, 5, 2, 1, 0, 3, 1.5, 0.25)
REPORT = UsageReport("a" * 32, 10.5, {"acme": RECORD}).to_json()


@given(tenants=TENANTS, is_final=st.booleans())
def test_messages_survive_json(tenants: dict[str, UsageRecord], is_final: bool) -> None:
    report = UsageReport("0123456789abcdef" * 2, 12.5, tenants, is_final)
    assert UsageReport.from_json(json.loads(json.dumps(report.to_json()))) == report
    totals = ClusterTotals(12.5, tenants)
    assert ClusterTotals.from_json(json.loads(json.dumps(totals.to_json()))) == totals


def test_a_report_has_the_documented_fields() -> None:
    assert REPORT == {
        "book": "a" * 32,
        "since_s": 10.5,
        "ends": False,
        "tenants": {
            "acme": {
                "prompt_tokens": 7,
                "generated_tokens": 5,
                "completed": 2,
                "cancelled": 1,
                "failed": 0,
                "limited": 3,
                "expert_seconds": 1.5,
                "expert_gb_seconds": 0.25,
            }
        },
    }


def test_a_report_without_ends_is_not_final() -> None:
    assert not UsageReport.from_json({k: v for k, v in REPORT.items() if k != "ends"}).is_final


def record_with(**changes: Any) -> dict[str, Any]:
    return {**REPORT, "tenants": {"acme": {**RECORD.to_json(), **changes}}}


@pytest.mark.parametrize(
    ("value", "field"),
    [
        pytest.param([], "body", id="list"),
        pytest.param({**REPORT, "more": 1}, "more", id="unknown-field"),
        pytest.param({**REPORT, "book": "a"}, "book", id="short-source"),
        pytest.param({**REPORT, "book": None}, "book", id="no-source"),
        pytest.param({**REPORT, "since_s": -1}, "since_s", id="negative-time"),
        pytest.param({**REPORT, "since_s": 1e300}, "since_s", id="large-time"),
        pytest.param({**REPORT, "ends": 1}, "ends", id="number-for-boolean"),
        pytest.param({**REPORT, "tenants": []}, "tenants", id="tenants-in-a-list"),
        pytest.param({**REPORT, "tenants": {"A": {}}}, "tenants", id="tenant-name"),
        pytest.param({**REPORT, "tenants": {"x" * 64: {}}}, "tenants", id="long-tenant-name"),
        pytest.param({**REPORT, "tenants": {"acme": 1}}, "tenants.acme", id="no-record"),
        pytest.param(
            {**REPORT, "tenants": {f"t{n}": {} for n in range(MAX_TENANTS_IN_LEDGER + 1)}},
            "tenants",
            id="many-tenants",
        ),
        pytest.param(record_with(failed=-1), "tenants.acme.failed", id="negative-count"),
        pytest.param(record_with(failed=True), "tenants.acme.failed", id="boolean-count"),
        pytest.param(record_with(failed=1.0), "tenants.acme.failed", id="fractional-count"),
        pytest.param(record_with(failed=MAX_COUNT + 1), "tenants.acme.failed", id="large-count"),
        pytest.param(record_with(other=0), "tenants.acme.other", id="unknown-record-field"),
        pytest.param(
            record_with(expert_seconds=float("nan")), "tenants.acme.expert_seconds", id="nan"
        ),
        pytest.param(
            record_with(expert_seconds=10**400), "tenants.acme.expert_seconds", id="large-cost"
        ),
    ],
)
def test_an_invalid_report_is_rejected_with_its_field(value: Any, field: str) -> None:
    with pytest.raises(ContractError) as rejected:
        UsageReport.from_json(value)
    assert rejected.value.field == field
    assert str(rejected.value).startswith(f"{field}: got ")


def test_totals_of_another_version_are_read() -> None:
    value = {"since_s": 1, "tenants": {"acme": {"prompt_tokens": 3, "of_tomorrow": "x"}}, "z": 1}
    assert ClusterTotals.from_json(value) == ClusterTotals(1.0, {"acme": UsageRecord(3)})


@pytest.mark.parametrize(
    "value",
    [
        pytest.param([], id="list"),
        pytest.param({"since_s": 1.0}, id="no-tenants"),
        pytest.param({"since_s": 1.0, "tenants": {"acme": 3}}, id="no-record"),
        pytest.param({"since_s": 1.0, "tenants": {"acme": {"completed": "3"}}}, id="text"),
        pytest.param({"since_s": 1.0, "tenants": {"acme": {"completed": -1}}}, id="negative"),
        pytest.param({"since_s": 1.0, "tenants": {"acme": {"completed": True}}}, id="boolean"),
        pytest.param({"since_s": float("nan"), "tenants": {}}, id="nan"),
        pytest.param({"since_s": 1.0, "tenants": {"a": {"failed": 10**400}}}, id="large"),
    ],
)
def test_invalid_totals_are_rejected(value: Any) -> None:
    with pytest.raises(ContractError, match="got "):
        ClusterTotals.from_json(value)


def test_records_are_added_subtracted_and_compared_by_field() -> None:
    more = UsageRecord(9, 6, 3, 1, 1, 2, 2.0, 0.5)
    assert RECORD + more == UsageRecord(16, 11, 5, 2, 1, 5, 3.5, 0.75)
    assert more.minus(RECORD) == UsageRecord(2, 1, 1, 0, 1, 0, 0.5, 0.25)  # never below 0
    assert more.maximum(RECORD) == UsageRecord(9, 6, 3, 1, 1, 3, 2.0, 0.5)
