"""How a front and a router divide a stream of events, so that another router can go on with it.

A front is the process that clients talk to. It shows the router its token in `FRONT_HEADER`; the
router then answers streams with records instead of plain events and marks them with
`RECORDS_HEADER`. A record has a frame for the client, and a piece of journal, which the front keeps
without reading it:

    kind u8 | tokens u32 | journal bytes u32 | frame bytes u32 | journal | frame     (big-endian)

With each request, `ORIGIN_HEADER: NONCE SECONDS` says where ids, seed and time of its response come
from, so that a request that is repeated is the same one, and counts once.

The tokens are those generated since the record before. Of a whole response, and of a stream's
prompts, headers tell the front how many there are, so that it can count what a tenant uses.

When a router has prepared a request (read, validated and tokenized it), or refuses it, it has done
its part of the work that requests of all senders share. It tells the front so before its response,
with the interim response `PREPARED_STATUS`, and the front hands on the next request of that sender.

If the router dies, the front sends the same request to the next one, with the journal in front of
the body and `JOURNAL_HEADER: BYTES FRAMES`: how many bytes of the body are journal, and how many
frames of kind EVENT the client has. The router repeats what the journal says without telling it
again and goes on after those frames.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

FRONT_HEADER = "x-faasmoe-front"
JOURNAL_HEADER = "x-faasmoe-journal"
ORIGIN_HEADER = "x-faasmoe-origin"
RECORDS_HEADER = "x-faasmoe-records"
TENANT_HEADER = "x-faasmoe-tenant"  # of a request: whose it is, which the front has verified
INPUT_TOKENS_HEADER = "x-faasmoe-input-tokens"  # of a response: tokens of its prompts
DRAINING_HEADER = "x-faasmoe-draining"  # of a refusal: the server is ending, another one may not
OUTPUT_TOKENS_HEADER = "x-faasmoe-output-tokens"  # of a whole response: generated tokens
PREPARED_STATUS = 102  # Processing (RFC 2518): interim, so whoever does not know it skips it
EVENT = 1  # frames that a resumed stream counts
COMMENT = 2  # frames that keep a connection, at any time

_HEAD = struct.Struct(">BIII")
MAX_RECORD_BYTES = 64 << 20


class Record(NamedTuple):
    """One record of a stream.

    Attributes:
        kind: EVENT or COMMENT.
        journal: what the front keeps for the next router.
        frame: what the client gets.
        n_tokens: tokens generated since the record before.
    """

    kind: int
    journal: bytes
    frame: bytes
    n_tokens: int = 0


class StreamRecordError(Exception):
    """Bytes that are not records, or a header that is not one of this protocol."""


def pack_record(kind: int, journal: bytes, frame: bytes, n_tokens: int = 0) -> bytes:
    """Return the bytes of a record."""
    return _HEAD.pack(kind, n_tokens, len(journal), len(frame)) + journal + frame


class RecordReader:
    """Splits a stream of bytes into records.

    Attributes:
        is_between_records: whether all bytes so far belong to whole records.
    """

    def __init__(self) -> None:
        self._rest = b""

    @property
    def is_between_records(self) -> bool:
        """Whether all bytes so far belong to whole records."""
        return not self._rest

    def feed(self, data: bytes) -> Iterator[Record]:
        """Yield the records that are complete with these bytes; raises StreamRecordError."""
        data = self._rest + data if self._rest else data
        start = 0
        while len(data) - start >= _HEAD.size:
            kind, n_tokens, n_journal, n_frame = _HEAD.unpack_from(data, start)
            if kind not in (EVENT, COMMENT) or n_journal + n_frame > MAX_RECORD_BYTES:
                raise StreamRecordError(f"got a record of kind {kind}, {n_frame} bytes")
            frame_at = start + _HEAD.size + n_journal
            if len(data) < frame_at + n_frame:
                break
            journal = data[start + _HEAD.size : frame_at]
            start = frame_at + n_frame
            self._rest = b""
            yield Record(kind, journal, data[frame_at:start], n_tokens)
        self._rest = data[start:]


def format_origin_header(nonce: str, created_s: int) -> str:
    """Return the value of ORIGIN_HEADER."""
    return f"{nonce} {created_s}"


def parse_origin_header(value: str) -> tuple[str, int]:
    """Return the nonce and the seconds since the epoch; raises StreamRecordError."""
    nonce, _, created = value.partition(" ")
    is_number = created.isascii() and created.isdecimal() and len(created) < 12
    if not (nonce.isascii() and nonce.isalnum() and len(nonce) <= 64 and is_number):
        raise StreamRecordError(f"{ORIGIN_HEADER}: got {value[:80]!r}, expected NONCE SECONDS")
    return nonce, int(created)


def format_journal_header(n_bytes: int, n_frames: int) -> str:
    """Return the value of JOURNAL_HEADER."""
    return f"{n_bytes} {n_frames}"


def parse_journal_header(value: str) -> tuple[int, int]:
    """Return the bytes of the journal and the frames sent; raises StreamRecordError."""
    parts = value.split(" ")
    if len(parts) != 2 or not all(p.isascii() and p.isdecimal() and len(p) < 12 for p in parts):
        raise StreamRecordError(f"{JOURNAL_HEADER}: got {value[:40]!r}, expected BYTES FRAMES")
    return int(parts[0]), int(parts[1])
