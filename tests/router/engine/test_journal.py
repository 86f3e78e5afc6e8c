"""The journal of a request: its lines, and what other processes make of them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from faasmoe_router.engine.journal import JournalEntry, JournalError, Progress
from faasmoe_router.engine.sampler import SampledLogprob

TOKENS = st.integers(0, 1 << 20)
LOGPROBS = st.floats(-100, 0)
SAMPLED = st.builds(
    SampledLogprob, TOKENS, LOGPROBS, st.lists(st.tuples(TOKENS, LOGPROBS)).map(tuple)
)
ENTRIES = st.builds(
    JournalEntry,
    st.integers(0, 100),
    st.builds(Progress, st.lists(TOKENS).map(tuple), st.lists(SAMPLED).map(tuple), st.booleans()),
    st.none() | st.integers(0, 1 << 20),
    st.integers(0, 1 << 20),
)


@given(ENTRIES)
def test_entry_survives(entry: JournalEntry) -> None:
    line = entry.dumps()
    assert line.endswith(b"\n")
    assert b"\n" not in line[:-1]
    assert JournalEntry.loads(line) == entry


def test_line_without_what_the_cache_gained_is_read() -> None:
    entry = JournalEntry(0, Progress((5,)), 16)
    assert entry.dumps() == b"[0,[5],16,0]\n"
    assert JournalEntry.loads(b"[0,[5],16,0,[]]") == entry


@pytest.mark.parametrize(
    "line",
    [b"", b"{}", b"[]", b"[0,[1]]", b'[0,["a"],null,0]', b"[null,[],null,0]", b"[0,1,null,0]"],
)
def test_other_lines_are_refused(line: bytes) -> None:
    with pytest.raises(JournalError, match="no entry"):
        JournalEntry.loads(line)
