"""Bodies that the gateway of several models would be long in parsing are refused before."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from faasmoe_gateway.body_structure import MAX_CONTAINERS, MAX_VALUES, count_parts
from faasmoe_gateway.refusal import Refusal
from faasmoe_gateway.request_body import read_work

VALUES = st.recursive(
    st.none() | st.integers() | st.text(st.sampled_from('a,:[]{}"\\\n\u00e9'), max_size=12),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=20,
)


def count(value: Any) -> tuple[int, int]:
    """Return values with names, and containers, of a parsed text."""
    if isinstance(value, list):
        inner = [count(entry) for entry in value]
    elif isinstance(value, dict):
        inner = [count(entry) for entry in value.values()] + [(1, 0)] * len(value)
    else:
        return 1, 0
    return 1 + sum(n for n, _ in inner), 1 + sum(n for _, n in inner)


@given(VALUES, st.booleans())
def test_count_is_never_less_than_what_is_parsed(value: Any, is_ascii: bool) -> None:
    parts = count_parts(json.dumps(value, ensure_ascii=is_ascii).encode())
    n_values, n_containers = count(value)
    assert parts.n_values >= n_values
    assert parts.n_containers >= n_containers


@pytest.mark.parametrize("text", ["[{,:}]", '[\\"', "\\\\", '\\\\\\"['], ids=repr)
def test_what_a_text_consists_of_is_not_counted(text: str) -> None:
    body = json.dumps({"prompt": text * MAX_VALUES, "model": "a"}).encode()
    parts = count_parts(body)
    assert parts.is_within_limits
    assert parts.n_containers == 1


@pytest.mark.parametrize(
    "field",
    [
        b"[" + b"[]," * 2_000_000 + b"[]]",
        b"[" + b"{}," * (MAX_CONTAINERS + 1) + b"{}]",
        b"[" + b"1," * MAX_VALUES + b"1]",
        b"[" + b'"",' * MAX_VALUES + b'""]',
        b"[" + b'"[",' * (2 * MAX_VALUES) + b'""]',
        b"{" + b'"a":1,' * MAX_VALUES + b'"b":1}',
    ],
    ids=["lists", "objects", "numbers", "texts", "brackets in texts", "names"],
)
def test_body_of_too_many_parts_is_refused(field: bytes) -> None:
    with pytest.raises(Refusal) as refused:
        asyncio.run(read_work(b'{"model":"a","x":' + field + b"}", encoding=""))
    assert refused.value.status == 413
    assert refused.value.code == "request_too_large"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32-be"])
def test_what_is_not_in_utf_8_is_refused_before_it_is_parsed(encoding: str) -> None:
    text = '{"model":"a","x":"\\"","y":[' + "[]," * (2 * MAX_CONTAINERS) + "[]]}"
    with pytest.raises(Refusal, match="UTF-8") as refused:
        asyncio.run(read_work(text.encode(encoding), encoding=""))
    assert refused.value.status == 400


def test_long_prompts_of_text_and_of_tokens_are_read() -> None:
    code = 'if (a[i] == "x\\y") { b["k"] = [1, 2, {}]; }\n' * 20_000
    for prompt in (code, [7] * (MAX_VALUES - 10)):
        body = json.dumps({"model": "a", "prompt": prompt, "max_tokens": 5}).encode()
        work = asyncio.run(read_work(body, encoding=""))
        assert (work.model, work.max_output_tokens) == ("a", 5)
