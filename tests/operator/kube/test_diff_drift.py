from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from faasmoe_operator.kube.diff import (
    LAST_APPLIED_HASH_ANNOTATION,
    contains_desired,
    desired_hash,
    fingerprint,
    last_applied_hash,
    with_last_applied_hash,
)


def desired_object(**metadata: Any) -> dict[str, Any]:
    return {"kind": "Service", "metadata": {"name": "a", **metadata}, "spec": {"type": "ClusterIP"}}


@pytest.mark.parametrize(
    ("live", "desired", "expected"),
    [
        pytest.param({"a": 1, "b": 2}, {"a": 1}, True, id="additional-fields"),
        pytest.param({"a": 1}, {"a": 2}, False, id="another-value"),
        pytest.param({}, {"a": 1}, False, id="missing"),
        pytest.param({"a": [{"x": 1, "y": 2}]}, {"a": [{"x": 1}]}, True, id="in-a-list"),
        pytest.param({"a": [1, 2]}, {"a": [1]}, False, id="one-more-in-a-list"),
        pytest.param({"a": [2, 1]}, {"a": [1, 2]}, False, id="another-order"),
        pytest.param({}, {"a": {}, "b": [], "c": None}, True, id="empty-is-dropped"),
        pytest.param({"a": {"b": 1}}, {"a": {}}, True, id="empty-and-defaulted"),
        pytest.param({"a": 1}, {"a": True}, False, id="one-is-not-true"),
        pytest.param({"a": "x"}, {"a": {"b": 1}}, False, id="another-shape"),
        pytest.param({"a": "1"}, {"a": "1000m"}, False, id="normalized-quantity"),
    ],
)
def test_contains_desired(live: Any, desired: Any, expected: bool) -> None:
    assert contains_desired(live, desired) is expected


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=10,
)


@given(values)
def test_every_value_contains_itself(value: Any) -> None:
    assert contains_desired(value, value)


def test_last_applied_hash_is_read_from_the_annotation() -> None:
    obj = with_last_applied_hash(desired_object(annotations={"x": "y"}))
    assert last_applied_hash(obj) == desired_hash(desired_object(annotations={"x": "y"}))
    assert obj["metadata"]["annotations"]["x"] == "y"
    assert LAST_APPLIED_HASH_ANNOTATION not in desired_object()["metadata"].get("annotations", {})


def test_desired_hash_changes_with_any_field() -> None:
    assert desired_hash(desired_object()) != desired_hash(desired_object(labels={"a": "b"}))
    assert desired_hash({"a": 1, "b": 2}) == desired_hash({"b": 2, "a": 1})


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        pytest.param({"status": {"x": 1}}, True, id="status"),
        pytest.param({"metadata": {"resourceVersion": "9", "generation": 3}}, True, id="counts"),
        pytest.param({"metadata": {"annotations": {"theirs": "2"}}}, True, id="their-annotation"),
        pytest.param({"metadata": {"labels": {"ours": "2"}}}, False, id="our-label"),
        pytest.param({"metadata": {"ownerReferences": []}}, False, id="owner"),
        pytest.param({"spec": {"type": "NodePort"}}, False, id="spec"),
        pytest.param({"data": {}}, False, id="another-field"),
    ],
)
def test_fingerprint_ignores_status_and_metadata_of_others(
    changes: dict[str, Any], same: bool
) -> None:
    desired = desired_object(labels={"ours": "1"}, ownerReferences=[{"uid": "u"}])
    before = {**desired, "status": {}}
    after = {**before, **changes, "metadata": {**before["metadata"], **changes.get("metadata", {})}}
    assert (fingerprint(before, desired) == fingerprint(after, desired)) is same
