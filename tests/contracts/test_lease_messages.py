"""Lines between gateways and the authority of limits."""

from __future__ import annotations

import json
from typing import Any

import pytest

from faasmoe_contracts.json_reader import ContractError
from faasmoe_contracts.lease_messages import LeaseAnswer, LeaseReport, PeriodUsage
from faasmoe_contracts.tenant_usage import Usage
from faasmoe_contracts.token_leases import LeaseGrant, LeaseRequest

USAGE = {"acme": PeriodUsage("2026-11-29", Usage(1, 2, 3, 0.5), Usage(4, 5, 6, 0.75))}
REPORT = LeaseReport("0", {"acme/tokens": LeaseRequest(2, 1, 1.5, 0.0, 3.0, 0.25)}, USAGE, "run")
ANSWER = LeaseAnswer({"acme/tokens": LeaseGrant(2, 3.0, 0.5)}, {"acme/tokens": 7.0}, USAGE)


def test_lines_are_read_as_they_were_written() -> None:
    assert LeaseReport.loads(REPORT.dumps()) == REPORT
    assert LeaseAnswer.loads(ANSWER.dumps()) == ANSWER
    assert REPORT.dumps().count(b"\n") == 1


def test_what_counts_the_usage_is_the_holder_unless_named() -> None:
    assert LeaseReport.loads(LeaseReport("0", {}).dumps()).run == "0"


def changed(line: bytes, **fields: Any) -> bytes:
    return json.dumps({**json.loads(line), **fields}).encode()


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"holder": ""}, "holder"),
        ({"other": 1}, "other"),
        ({"requests": {"a/tokens": [1, 0, 0, 0, 0]}}, "requests.a/tokens"),
        ({"requests": {"a/tokens": [1, 0, 0, 0, -1, 0]}}, "requests.a/tokens.4"),
        ({"requests": {"a/tokens": [1, 0, "0", 0, 0, 0]}}, "requests.a/tokens.2"),
        ({"usage": {"a": {"day": "today", "in_day": {}, "in_month": {}}}}, "usage.a.day"),
        ({"usage": {"a": {"day": "2026-11-29", "in_day": {}}}}, "usage.a.in_day.requests"),
    ],
)
def test_other_reports_are_refused(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(ContractError) as caught:
        LeaseReport.loads(changed(REPORT.dumps(), **fields))
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"grants": {"a/tokens": [1, 0]}}, "grants.a/tokens"),
        ({"grants": {"a/tokens": [1, -1, 0]}}, "grants.a/tokens.1"),
        ({"levels": {"a/tokens": -1}}, "levels.a/tokens"),
        ({"levels": []}, "levels"),
    ],
)
def test_other_answers_are_refused(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(ContractError) as caught:
        LeaseAnswer.loads(changed(ANSWER.dumps(), **fields))
    assert caught.value.field == field
