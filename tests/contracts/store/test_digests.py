"""Block digests detect flipped bits and misplaced pages."""

import os

from hypothesis import given
from hypothesis import strategies as st

from faasmoe_contracts.store.digests import page_sum_digest


@given(st.binary(min_size=1, max_size=20_000), st.data())
def test_a_flipped_bit_changes_the_digest(content: bytes, data: st.DataObject) -> None:
    expected = page_sum_digest([memoryview(content)])
    assert page_sum_digest([memoryview(content)]) == expected
    flipped = bytearray(content)
    bit = data.draw(st.integers(0, 8 * len(content) - 1))
    flipped[bit // 8] ^= 1 << bit % 8
    assert page_sum_digest([memoryview(flipped)]) != expected


def test_swapped_and_zeroed_pages_change_the_digest() -> None:
    first, second = os.urandom(4096), os.urandom(4096)
    digests = {
        page_sum_digest([memoryview(content)])
        for content in (first + second, second + first, first + bytes(4096), bytes(8192))
    }
    assert len(digests) == 4
