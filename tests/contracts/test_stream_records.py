"""Records of a stream, however their bytes are divided."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from faasmoe_contracts.stream_records import (
    COMMENT,
    EVENT,
    Record,
    RecordReader,
    StreamRecordError,
    format_journal_header,
    pack_record,
    parse_journal_header,
)

RECORDS = st.lists(
    st.builds(
        Record,
        st.sampled_from([EVENT, COMMENT]),
        st.binary(max_size=40),
        st.binary(),
        st.integers(0, 1 << 20),
    )
)


@given(RECORDS, st.lists(st.integers(0, 400)))
def test_records_survive_any_division(records: list[Record], cuts: list[int]) -> None:
    data = b"".join(pack_record(*record) for record in records)
    edges = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    reader = RecordReader()
    read: list[Record] = []
    for start, end in itertools.pairwise(edges):
        read += reader.feed(data[start:end])
    assert read == records
    assert reader.is_between_records


def test_part_of_a_record_is_no_record() -> None:
    reader = RecordReader()
    assert list(reader.feed(pack_record(EVENT, b"a", b"bc")[:-1])) == []
    assert not reader.is_between_records


@pytest.mark.parametrize(
    "data", [b"data: {1:2, 3:4}\n\n", b"\x01\x00\x00\x00\x00\xff\xff\xff\xff\x00\x00\x00\x00"]
)
def test_other_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(StreamRecordError):
        list(RecordReader().feed(data))


@given(st.integers(0, 10**10), st.integers(0, 10**10))
def test_journal_header_survives(n_bytes: int, n_frames: int) -> None:
    assert parse_journal_header(format_journal_header(n_bytes, n_frames)) == (n_bytes, n_frames)


@pytest.mark.parametrize("value", ["", "1", "1 2 3", "-1 2", "1 x", "1  2", "9" * 13 + " 1", "١ 1"])
def test_other_headers_are_refused(value: str) -> None:
    with pytest.raises(StreamRecordError, match="expected BYTES FRAMES"):
        parse_journal_header(value)
