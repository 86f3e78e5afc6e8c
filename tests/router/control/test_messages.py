import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from faasmoe_contracts.routing_table import FunctionEndpoints, FunctionSpec, RoutingTable
from faasmoe_router.control.messages import (
    LineDecoder,
    Ping,
    TableSnapshot,
    TableUpdate,
    TableVersion,
    parse_message,
)
from faasmoe_router.errors import ControlProtocolError

TABLE = RoutingTable("sha256:0", 3, (FunctionEndpoints(FunctionSpec("a", (0,), (0, 1)), ("h:1",)),))
SNAPSHOT = {"kind": "snapshot", "epoch": "e", "version": 3, "table": TABLE.to_json()}
UPDATE = {"kind": "change", "version": 4, "functions": [{"id": "a", "addresses": ["h:2"]}]}


def read(message: Any) -> object:
    return parse_message(json.dumps(message).encode())


def test_reads_every_kind() -> None:
    assert read(SNAPSHOT) == TableSnapshot(TableVersion("e", 3), TABLE)
    assert read(UPDATE) == TableUpdate(4, {"a": ("h:2",)})
    assert read({"kind": "ping"}) == Ping()


def test_a_kind_of_tomorrow_is_a_sign_of_life() -> None:
    assert read({"kind": "weather", "rain": True}) == Ping()


@pytest.mark.parametrize(
    ("message", "field"),
    [
        pytest.param([], "line: got list", id="no object"),
        pytest.param({}, "kind: got None", id="no kind"),
        pytest.param({**SNAPSHOT, "epoch": None}, "epoch: got None", id="no epoch"),
        pytest.param({**SNAPSHOT, "epoch": True}, "epoch: got True", id="epoch"),
        pytest.param({**SNAPSHOT, "version": -1}, "version: got -1", id="version"),
        pytest.param({**SNAPSHOT, "version": True}, "version: got True", id="bool version"),
        pytest.param({**SNAPSHOT, "table": []}, "table: got list", id="table"),
        pytest.param({**SNAPSHOT, "table": {}}, "model_digest: missing", id="empty table"),
        pytest.param({**UPDATE, "version": "4"}, "version: got '4'", id="text version"),
        pytest.param({**UPDATE, "functions": {}}, "functions: got dict", id="functions"),
        pytest.param({**UPDATE, "functions": [1]}, "functions: got int", id="function"),
        pytest.param({**UPDATE, "functions": [{"id": 1}]}, "addresses: missing", id="no places"),
        pytest.param(
            {**UPDATE, "functions": [{"id": 1, "addresses": []}]}, "id: got int", id="number id"
        ),
        pytest.param(
            {**UPDATE, "functions": [{"id": "a", "addresses": ["h"]}]},
            "addresses: got 'h'",
            id="address",
        ),
    ],
)
def test_garbage_is_refused_with_its_field(message: Any, field: str) -> None:
    with pytest.raises(ControlProtocolError, match=field):
        read(message)


@pytest.mark.parametrize("line", [b"{", b"\xff\xfe", b"[" * 100_000])
def test_what_is_not_json_is_garbage(line: bytes) -> None:
    with pytest.raises(ControlProtocolError, match="line: "):
        parse_message(line)


@given(st.lists(st.binary(max_size=20)), st.integers(1, 7))
def test_lines_do_not_depend_on_how_they_arrive(parts: list[bytes], size: int) -> None:
    stream = b"\n".join(parts) + b"\n"
    lines = LineDecoder()
    chunks = [stream[i : i + size] for i in range(0, len(stream), size)]
    assert [x for chunk in chunks for x in lines.feed(chunk)] == list(
        filter(None, stream.split(b"\n"))
    )


def test_a_line_without_end_is_cut_off() -> None:
    lines = LineDecoder(max_bytes=10)
    assert list(lines.feed(b"0123456789\n01234")) == [b"0123456789"]
    with pytest.raises(ControlProtocolError, match="more than 10 bytes"):
        list(lines.feed(b"567890"))
