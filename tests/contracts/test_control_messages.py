"""Control messages survive JSON; invalid ones are rejected with the name of the field."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from faasmoe_contracts.control_messages import (
    MAX_TENANTS,
    ActivationRequest,
    FunctionLoad,
    LineDecoder,
    LoadReport,
    Ping,
    TableMessage,
    TableSnapshot,
    TableUpdate,
    TableVersion,
    parse_table_message,
)
from faasmoe_contracts.json_reader import MAX_COUNT, ContractError
from faasmoe_contracts.routing_table import FunctionEndpoints, FunctionSpec, RoutingTable

TABLE = RoutingTable("sha256:0", 3, (FunctionEndpoints(FunctionSpec("a", (0,), (0, 1)), ("h:1",)),))
SNAPSHOT = {"kind": "snapshot", "epoch": "e", "version": 3, "table": TABLE.to_json()}
UPDATE = {"kind": "change", "version": 4, "functions": [{"id": "a", "addresses": ["h:2"]}]}


def parse(message: Any) -> TableMessage:
    return parse_table_message(json.dumps(message).encode())


def test_table_messages_of_every_kind_are_read_and_written() -> None:
    messages: list[tuple[dict[str, Any], TableMessage]] = [
        (SNAPSHOT, TableSnapshot(TableVersion("e", 3), TABLE)),
        (UPDATE, TableUpdate(4, {"a": ("h:2",)})),
    ]
    for value, message in messages:
        assert parse(value) == message
        assert message.to_json() == value
    assert Ping(7).to_json() == {"kind": "ping", "version": 7}
    assert parse({"kind": "ping"}) == Ping()


def test_a_message_of_an_unknown_kind_is_a_ping() -> None:
    assert parse({"kind": "weather", "rain": True}) == Ping()


@pytest.mark.parametrize(
    ("message", "error"),
    [
        pytest.param([], r"line: got \[\]", id="no-object"),
        pytest.param({}, "kind: got nothing", id="no-kind"),
        pytest.param({"kind": 1}, "kind: got 1", id="kind"),
        pytest.param({**SNAPSHOT, "epoch": None}, "epoch: got None", id="no-epoch"),
        pytest.param({**SNAPSHOT, "epoch": True}, "epoch: got True", id="epoch"),
        pytest.param({**SNAPSHOT, "version": -1}, "version: got -1", id="version"),
        pytest.param({**SNAPSHOT, "version": True}, "version: got True", id="bool-version"),
        pytest.param({**SNAPSHOT, "table": []}, r"table: got \[\]", id="table"),
        pytest.param({**SNAPSHOT, "table": {}}, "model_digest: missing", id="empty-table"),
        pytest.param({**UPDATE, "version": "4"}, "version: got '4'", id="text-version"),
        pytest.param({**UPDATE, "functions": {}}, "functions: got {}", id="functions"),
        pytest.param({**UPDATE, "functions": [1]}, "functions: got 1", id="function"),
        pytest.param({**UPDATE, "functions": [{"id": 1}]}, "addresses: missing", id="no-addresses"),
        pytest.param(
            {**UPDATE, "functions": [{"id": 1, "addresses": []}]}, "id: got int", id="number-id"
        ),
        pytest.param(
            {**UPDATE, "functions": [{"id": "a", "addresses": ["h"]}]},
            "addresses: got 'h'",
            id="address",
        ),
    ],
)
def test_an_invalid_table_message_is_rejected_with_its_field(message: Any, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        parse(message)


@pytest.mark.parametrize("line", [b"{", b"\xff\xfe", b"[" * 100_000])
def test_a_line_that_is_not_json_is_rejected(line: bytes) -> None:
    with pytest.raises(ContractError, match="line: "):
        parse_table_message(line)


@given(st.lists(st.binary(max_size=20)), st.integers(1, 7))
def test_lines_do_not_depend_on_the_chunks(parts: list[bytes], size: int) -> None:
    stream = b"\n".join(parts) + b"\n"
    decoder = LineDecoder()
    chunks = [stream[i : i + size] for i in range(0, len(stream), size)]
    assert [line for chunk in chunks for line in decoder.feed(chunk)] == list(
        filter(None, stream.split(b"\n"))
    )


def test_a_line_that_is_too_long_is_rejected() -> None:
    decoder = LineDecoder(max_bytes=10)
    assert list(decoder.feed(b"0123456789\n01234")) == [b"0123456789"]
    with pytest.raises(ContractError, match="more than 10 bytes"):
        list(decoder.feed(b"567890"))


LOADS = st.builds(FunctionLoad, st.floats(0, 1e9), st.integers(0, 1000), st.integers(0, 1000))
REPORTS = st.builds(
    LoadReport,
    st.just("router-1"),
    st.dictionaries(st.sampled_from("abc"), LOADS),
    queued=st.integers(0, MAX_COUNT),
    n_local_calls=st.integers(0, MAX_COUNT),
    tenant_key_counts=st.none()
    | st.dictionaries(st.sampled_from(["acme", "b"]), st.integers(0, MAX_COUNT)),
    interval_s=st.floats(0.001, 60),
    sent_at_s=st.floats(-1e12, 1e12),
)


@given(report=REPORTS)
def test_load_reports_survive_json(report: LoadReport) -> None:
    assert LoadReport.from_json(json.loads(json.dumps(report.to_json()))) == report


def test_a_report_has_load_if_a_call_is_in_flight_or_queued() -> None:
    assert not LoadReport("r", {"f": FunctionLoad(0.0, 3, 5)}).has_load
    assert LoadReport("r", {"f": FunctionLoad(0.1)}).has_load
    assert LoadReport("r", queued=1).has_load


def load_report(**changes: Any) -> dict[str, Any]:
    return {**LoadReport("r", {"f": FunctionLoad(1.0, 2, 3)}).to_json(), **changes}


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"router": "a b"}, "router"),
        ({"router": "r\n"}, "router"),
        ({"router": "r" * 65}, "router"),
        ({"sent_at_s": "now"}, "sent_at_s"),
        ({"sent_at_s": float("inf")}, "sent_at_s"),
        ({"interval_s": 0}, "interval_s"),
        ({"interval_s": 61}, "interval_s"),
        ({"held": -1}, "held"),
        ({"local": 1.5}, "local"),
        ({"functions": {"f" * 65: FunctionLoad(1.0).to_json()}}, "functions"),
        (
            {"functions": {"f": {"concurrency": 2e9, "calls": 1, "rows": 1}}},
            "functions.f.concurrency",
        ),
        ({"functions": {"f": {"concurrency": 1.0, "calls": 1}}}, "functions.f.rows"),
        ({"functions": {"f": []}}, "functions.f"),
        ({"tenants": None}, "tenants"),
        ({"tenants": {"A": 1}}, "tenants"),
        ({"tenants": {"acme": "1"}}, "tenants.acme"),
        ({"tenants": {f"t{n}": 1 for n in range(MAX_TENANTS + 1)}}, "tenants"),
        ({"more": 1}, "more"),
    ],
)
def test_an_invalid_load_report_is_rejected_with_its_field(
    changes: dict[str, Any], field: str
) -> None:
    with pytest.raises(ContractError) as rejected:
        LoadReport.from_json(load_report(**changes))
    assert rejected.value.field == field


def test_an_unknown_field_is_named_without_its_whole_name() -> None:
    with pytest.raises(ContractError) as rejected:
        LoadReport.from_json(load_report(**{"x" * 10_000: 1}))
    assert len(str(rejected.value)) < 200


def test_activation_requests_survive_json() -> None:
    request = ActivationRequest("r", ("f0", "f1"), 12.5)
    assert ActivationRequest.from_json(json.loads(json.dumps(request.to_json()))) == request


@pytest.mark.parametrize(
    ("functions", "field"),
    [
        ([], "functions"),
        ("f0", "functions"),
        (["f0", 7], "functions.1"),
        (["f" * 65], "functions.0"),
    ],
)
def test_an_invalid_activation_request_is_rejected_with_its_field(
    functions: Any, field: str
) -> None:
    with pytest.raises(ContractError) as rejected:
        ActivationRequest.from_json({"router": "r", "sent_at_s": 0.0, "functions": functions})
    assert rejected.value.field == field


def test_a_load_report_has_the_documented_fields() -> None:
    report = LoadReport(
        "r",
        {"busy": FunctionLoad(0.5, 2, 9)},
        queued=3,
        n_local_calls=4,
        interval_s=1.0,
        sent_at_s=100.0,
    )
    assert report.to_json() == {
        "router": "r",
        "sent_at_s": 100.0,
        "interval_s": 1.0,
        "functions": {"busy": {"concurrency": 0.5, "calls": 2, "rows": 9}},
        "held": 3,
        "local": 4,
    }


def test_a_load_report_contains_key_counts_only_with_tenants() -> None:
    assert "tenants" not in LoadReport("r").to_json()
    report = LoadReport("r", tenant_key_counts={"acme": 2, "beta": 0})
    assert report.to_json()["tenants"] == {"acme": 2, "beta": 0}
