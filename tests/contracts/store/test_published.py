from typing import Any

import pytest

from faasmoe_contracts.store import StoreError
from faasmoe_contracts.store.published import PublishedEntry, collapse_layers

ENTRY = PublishedEntry(
    "experts",
    "fp8 128 x 128",
    "dequantised to bfloat16",
    ("model.layers.0-3.mlp.experts.down_proj", "a", "b", "c"),
    7,
    1_000_000_000,
    2_000_000_000,
)


def test_says_what_becomes_of_the_weights_and_where() -> None:
    assert str(ENTRY) == (
        "experts: 7 weights in fp8 128 x 128 are dequantised to bfloat16: 2 GB, 2.00 times the "
        "1 GB of the checkpoint"
    )
    assert ENTRY.where == "model.layers.0-3.mlp.experts.down_proj, a, b and 1 more"


def test_json_round_trip() -> None:
    assert PublishedEntry.from_json(ENTRY.to_json(), path="published[0]") == ENTRY


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"part": "gate"}, r"published\[0\].part: got 'gate'"),
        ({"weights": []}, r"published\[0\].weights: got \[\]"),
        ({"weights": [1]}, r"published\[0\].weights: got"),
        ({"count": 0}, r"published\[0\].count: got 0"),
        ({"stored_bytes": "1"}, r"published\[0\].stored_bytes: got '1'"),
        ({"more": 1}, "more"),
    ],
)
def test_invalid_entries_name_the_field(change: dict[str, Any], message: str) -> None:
    with pytest.raises(StoreError, match=message):
        PublishedEntry.from_json({**ENTRY.to_json(), **change}, path="published[0]")


def test_layers_are_collapsed() -> None:
    layers = [f"model.layers.{i}.mlp.experts.0.up" for i in (0, 1, 2, 7, 9, 10)]
    assert collapse_layers([*layers, "lm_head.weight", "model.layers.4.q"]) == (
        "model.layers.0-2,7,9-10.mlp.experts.0.up",
        "model.layers.4.q",
        "lm_head.weight",
    )
