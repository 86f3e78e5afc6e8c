"""Routing tables round-trip through JSON, and invalid ones raise errors naming a field."""

import json
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from faasmoe_contracts.routing_table import (
    FunctionEndpoints,
    FunctionSpec,
    RoutingTable,
    RoutingTableError,
    make_function_id,
)

INDICES = st.lists(st.integers(0, 200), min_size=1, max_size=5, unique=True).map(sorted)
ADDRESSES = st.lists(st.builds("10.0.0.{}:{}".format, st.integers(0, 255), st.integers(1, 65535)))


@st.composite
def tables(draw: st.DrawFn) -> RoutingTable:
    """Random layers, each cut into two blocks that are functions."""
    entries = []
    for layer in range(draw(st.integers(0, 3))):
        experts = draw(st.permutations(range(6)))
        cut = draw(st.integers(1, 5))
        for name, block in (("a", experts[:cut]), ("b", experts[cut:])):
            spec = FunctionSpec(f"{name}{layer}", (layer,), tuple(sorted(block)))
            entries.append(FunctionEndpoints(spec, tuple(draw(ADDRESSES))))
    return RoutingTable("sha256:00", draw(st.integers(0, 2**40)), tuple(entries))


def entry(**changes: Any) -> dict[str, Any]:
    return {"id": "f1", "layers": [0], "experts": [0, 1], "addresses": []} | changes


@given(tables())
def test_table_round_trips_through_json(table: RoutingTable) -> None:
    assert RoutingTable.loads(json.dumps(table.to_json())) == table


@pytest.mark.parametrize(
    ("value", "message"),
    [
        pytest.param(
            entry(id=""), "id: got '', expected 1 to 64 ASCII letters and digits", id="no id"
        ),
        pytest.param(entry(id="a/b"), "id: got 'a/b'", id="id with a slash"),
        pytest.param(entry(id="a" * 65), "id: got 'aaaa", id="long id"),
        pytest.param(entry(id="é1"), "id: got 'é1'", id="id of other letters"),
        pytest.param(entry(id="f²"), "id: got 'f²'", id="id of other digits"),
        pytest.param(entry(id=7), "id: got int, expected str", id="id of another type"),
        pytest.param(entry(layers=[]), "layers: got an empty list", id="no layers"),
        pytest.param(entry(layers="0"), "layers: got str, expected list", id="layers as text"),
        pytest.param(
            entry(experts=[1, 0]), r"experts: got \[1, 0\], expected ascending", id="order"
        ),
        pytest.param(entry(experts=[1, 1]), r"experts: got \[1, 1\]", id="repeated"),
        pytest.param(
            entry(experts=[-1]), r"experts: got \[-1\], expected indices of", id="negative"
        ),
        pytest.param(entry(experts=[0.5]), r"experts: got \[0.5\]", id="fraction"),
        pytest.param(entry(experts=[True]), r"experts: got \[True\]", id="truth value"),
        pytest.param(entry(experts=[None]), r"experts: got \[None\]", id="null"),
        pytest.param(
            entry(addresses=["host"]), "addresses: got 'host', expected host:port", id="port"
        ),
        pytest.param(entry(addresses=[":80"]), "addresses: got ':80'", id="no host"),
        pytest.param(entry(addresses=["h:²"]), "addresses: got 'h:²'", id="no decimal digit"),
        pytest.param(entry(addresses=["h:８０"]), "addresses: got 'h:８０'", id="no ASCII digit"),
        pytest.param(entry(addresses=["h:" + "9" * 5000]), "addresses: got 'h:999", id="long port"),
        pytest.param(entry(addresses=["h:0"]), "addresses: got 'h:0'", id="port 0"),
        pytest.param(entry(addresses=["h:65536"]), "addresses: got 'h:65536'", id="port too high"),
        pytest.param([], "function: got list, expected an object", id="no object"),
        pytest.param({}, "addresses: missing", id="empty"),
    ],
)
def test_rejects_invalid_entries_by_field(value: Any, message: str) -> None:
    table = {"model_digest": "sha256:00", "version": 0, "functions": [value]}
    with pytest.raises(RoutingTableError, match=message):
        RoutingTable.loads(json.dumps(table))


@pytest.mark.parametrize(
    "value",
    [
        entry(id="x" * 100_000),
        entry(layers=list(range(100_000, 0, -1))),
        entry(experts=["x" * 100_000]),
        entry(addresses=["x" * 100_000]),
    ],
    ids=["id", "layers", "experts", "addresses"],
)
def test_truncates_long_values_in_errors(value: Any) -> None:
    table = {"model_digest": "sha256:00", "version": 0, "functions": [value]}
    with pytest.raises(RoutingTableError) as refused:
        RoutingTable.loads(json.dumps(table))
    assert len(str(refused.value)) < 200


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "table: not JSON"),
        ("[]", "table: got list, expected an object"),
        ("{}", "model_digest: missing"),
        ('{"model_digest": "a", "version": true, "functions": []}', "version: got bool"),
        ('{"model_digest": "a", "version": 0, "functions": {}}', "functions: got dict"),
        (b"\xff", "table: not JSON"),
        ("[" * 200_000, "table: not JSON"),
    ],
)
def test_rejects_invalid_tables(text: str | bytes, message: str) -> None:
    with pytest.raises(RoutingTableError, match=message):
        RoutingTable.loads(text)


def test_rejects_an_expert_in_two_functions() -> None:
    entries = [FunctionEndpoints(FunctionSpec(name, (0, 1), (1, 2))) for name in ("f1", "f2")]
    with pytest.raises(RoutingTableError, match="layer 0 expert 1 is in f1 and in f2"):
        RoutingTable("sha256:00", 0, tuple(entries))


def test_lists_uncovered_experts() -> None:
    table = RoutingTable("sha256:00", 0, (FunctionEndpoints(FunctionSpec("f1", (0, 1), (0, 2))),))
    assert table.uncovered_experts(n_layers=2, n_experts=3) == [(0, 1), (1, 1)]


@given(layers=INDICES, experts=INDICES, other=INDICES)
def test_function_id_depends_on_all_inputs(
    layers: list[int], experts: list[int], other: list[int]
) -> None:
    def name(key: bytes = b"k", digest: str = "d", experts: list[int] = experts) -> str:
        return make_function_id(key, model_digest=digest, layers=layers, experts=experts)

    assert name() == name()
    assert FunctionSpec(name(), tuple(layers), tuple(experts)).id == name()
    assert len({name(), name(key=b"other"), name(digest="e")}) == 3
    assert (name(experts=other) == name()) == (other == experts)
