"""The structure of a body is counted without parsing it."""

import json
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from faasmoe_router.api import body_limits
from faasmoe_router.api.body_limits import BodyLimits, check_structure, measure_structure
from faasmoe_router.api.errors import ApiError

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(alphabet=r"a\"[]{},:é" + "\n"),
    lambda children: st.lists(children) | st.dictionaries(st.text(alphabet='\\",:[b'), children),
)


def count(value: Any) -> tuple[int, int, int]:
    """Return the values and names, the containers and the depth of a value."""
    if not isinstance(value, dict | list):
        return 1, 0, 0
    children = [count(child) for child in (value.values() if isinstance(value, dict) else value)]
    n_values = 1 + sum(n for n, _, _ in children) + (len(value) if isinstance(value, dict) else 0)
    n_containers = 1 + sum(n for _, n, _ in children)
    return n_values, n_containers, 1 + max((depth for _, _, depth in children), default=0)


@given(JSON_VALUES, st.booleans(), st.integers(1, 40))
@example(['\\"', "\\\\", '\\\\"[', {"a\\": [[]]}], False, 1)
@settings(max_examples=300, deadline=None)
def test_counts_are_those_of_the_parsed_value(
    value: Any, ensure_ascii: bool, slice_bytes: int
) -> None:
    body = json.dumps(value, ensure_ascii=ensure_ascii).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(body_limits, "SLICE_BYTES", slice_bytes)
        structure = measure_structure(body)
    n_values, n_containers, depth = count(value)
    assert (structure.n_containers, structure.max_depth) == (n_containers, depth)
    # An empty container has no separator that tells it from one with a value.
    assert n_values <= structure.n_values <= n_values + n_containers + 1


@given(st.binary(min_size=1, max_size=200))
def test_anything_can_be_measured(body: bytes) -> None:
    assert measure_structure(body).n_values <= 2 * len(body) + 1


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"[" + b"{}," * 40_000 + b"{}]", 413, "objects and lists, expected at most 32768"),
        (b"[" + b"1," * 300_000 + b"1]", 413, "values, expected at most 262144"),
        (b'{"a":' * 200 + b"1" + b"}" * 200, 400, "nested too deeply"),
        ('{"a": "' + "∀" * 9 + '"}', 400, "expected UTF-8"),
    ],
)
def test_a_body_beyond_a_limit_is_refused(body: Any, status: int, message: str) -> None:
    content = body.encode("utf-16") if isinstance(body, str) else body
    with pytest.raises(ApiError, match=message) as refused:
        check_structure(content, BodyLimits())
    assert refused.value.status == status


def test_the_limit_follows_from_the_context() -> None:
    small, large = (
        BodyLimits.for_model(max_model_len=n, max_token_bytes=16, max_prompts=128)
        for n in (256, 1 << 20)
    )
    assert small.max_bytes == (256 << 10) + 8 * 256 * 128
    assert large.max_bytes == 8 << 20
