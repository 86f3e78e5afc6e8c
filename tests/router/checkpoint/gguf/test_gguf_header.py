"""The header reader: valid files, each kind of invalid one by its message, and fuzzed ones."""

from __future__ import annotations

import io
import re
import struct
import time
import tracemalloc
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from faasmoe_router.checkpoint.gguf.header import Header, read_header
from faasmoe_router.errors import SourceDamaged

U32, STRING, ARRAY = 4, 8, 9
F32, Q8_0 = 0, 8
FUZZ_MEMORY_BYTES = 2 << 20
FUZZ_TIME_S = 2.0
MAX_MESSAGE_CHARS = 2000


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def key(name: str | bytes, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def array(kind: int, count: int, items: bytes) -> bytes:
    return struct.pack("<IQ", kind, count) + items


def tensor(name: str, dimensions: Iterable[int], kind: int = F32, offset: int = 0) -> bytes:
    sizes = list(dimensions)
    return text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)


def file(
    keys: Iterable[bytes] = (),
    tensors: Iterable[bytes] = (),
    data: int = 0,
    *,
    counts: tuple[int, int] | None = None,
    version: int = 3,
) -> bytes:
    """Return a file with its tensors' bytes at the next multiple of 32."""
    keys, tensors = list(keys), list(tensors)
    n_tensors, n_keys = counts or (len(tensors), len(keys))
    head = b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_keys) + b"".join(keys + tensors)
    return head + bytes(-len(head) % 32) + bytes(data)


def read(content: bytes) -> Header:
    return read_header(io.BytesIO(content), name="x.gguf", size_bytes=len(content))


def test_reads_keys_and_tensors() -> None:
    content = file(
        [
            key("a.number", U32, struct.pack("<I", 7)),
            key("a.flag", 7, b"\x01"),
            key("a.name", STRING, text("größe")),
            key("a.list", ARRAY, array(STRING, 2, text("x") + text(""))),
            key("a.floats", ARRAY, array(6, 2, struct.pack("<2f", 1.5, -2.0))),
        ],
        [tensor("w", [4, 2]), tensor("q", [64, 3], Q8_0, 32)],
        data=32 + 3 * 68,
    )
    header = read(content)
    values = dict(header.metadata)
    floats: Any = values.pop("a.floats")
    assert floats.tolist() == [1.5, -2.0]
    assert values == {"a.number": 7, "a.flag": True, "a.name": "größe", "a.list": ["x", ""]}
    w, q = header.tensors.values()
    assert (w.name, w.type.name, w.shape, w.size_bytes) == ("w", "F32", (2, 4), 32)
    assert (q.name, q.type.name, q.shape, q.size_bytes) == ("q", "Q8_0", (3, 64), 204)
    assert q.offset - w.offset == 32
    assert q.offset + q.size_bytes == len(content)


HUGE = 1 << 62
INVALID: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "magic: got 4 bytes, expected at most 0"),
    "another format": (b"PK\x03\x04" + bytes(60), "magic: got b'PK.x03.x04', expected b'GGUF'"),
    "version 1": (file(version=1), "version: got 1, expected 2 or 3"),
    "big-endian": (file(version=3 << 24), "version: got 50331648 .big-endian"),
    "too many tensors": (file(counts=(HUGE, 0)), "number of tensors: got .* items, expected at"),
    "too many keys": (file(counts=(0, HUGE)), "number of keys: got .* items, expected at most"),
    "long key": (
        file([struct.pack("<Q", HUGE)], data=64, counts=(0, 1)),
        "name of key 0: got .* items",
    ),
    "long string": (file([key("k", STRING, struct.pack("<Q", HUGE))]), "k: got .* items"),
    "long array": (file([key("k", ARRAY, array(U32, HUGE, b""))]), "k: got .* items"),
    "array of many empty strings": (
        file([key("k", ARRAY, array(STRING, 1 << 40, bytes(800)))]),
        "k: got 1099511627776 items, expected at most",
    ),
    "nested array": (
        file([key("k", ARRAY, array(ARRAY, 1, array(ARRAY, 1, b"")))]),
        "k: got an array of arrays, expected an array of strings or numbers",
    ),
    "unknown value type": (file([key("k", 99, bytes(8))]), "k: got value type 99, expected a type"),
    "not UTF-8": (file([key("k", STRING, text(b"\xff\xfe"))]), "k: got bytes that are not UTF-8"),
    "key twice": (file([key("k", 7, b"\0"), key("k", 7, b"\0")]), "k: got the key twice"),
    "alignment": (
        file([key("general.alignment", U32, struct.pack("<I", 3))]),
        "general.alignment: got 3, expected a power of two",
    ),
    "no alignment": (
        file([key("general.alignment", U32, struct.pack("<I", 0))]),
        "general.alignment: got 0, expected a power of two",
    ),
    "no dimension": (file(tensors=[tensor("w", [])]), "w: got 0 dimensions, expected 1 to 4"),
    "many dimensions": (file(tensors=[tensor("w", [1] * 5)]), "w: got 5 dimensions, expected 1"),
    "zero dimension": (
        file(tensors=[tensor("w", [4, 0])]),
        r"w: got shape \[4, 0\], expected positive dimensions",
    ),
    "unknown type": (file(tensors=[tensor("w", [4], 777)], data=64), "w: got type 777, expected"),
    "half a block": (
        file(tensors=[tensor("w", [48], Q8_0)], data=64),
        "w: got 48 columns, expected a multiple of 32, the block of Q8_0",
    ),
    "overflowing dimensions": (
        file(tensors=[tensor("w", [1 << 62, 1 << 62, 4, 4])], data=64),
        "w: got [0-9]+ bytes from [0-9]+ on, expected an end within the file's",
    ),
    "offset beyond the end": (
        file(tensors=[tensor("w", [4], offset=1 << 60)], data=64),
        "w: got 16 bytes from [0-9]+ on, expected an end within",
    ),
    "unaligned offset": (file(tensors=[tensor("w", [4], offset=4)], data=64), "w: got offset 4"),
    "overlap": (
        file(tensors=[tensor("v", [16]), tensor("w", [4], offset=32)], data=64),
        "w: got offset 32, expected at least 64, the end of 'v'",
    ),
    "tensor twice": (
        file(tensors=[tensor("w", [4]), tensor("w", [4], offset=32)], data=64),
        "w: got the tensor twice, expected each tensor once",
    ),
    "truncated data": (
        file(tensors=[tensor("w", [64], Q8_0)], data=67),
        "w: got 68 bytes from [0-9]+ on, expected an end within the file's [0-9]+ bytes",
    ),
}


@pytest.mark.parametrize("name", INVALID)
def test_names_what_is_wrong(name: str) -> None:
    content, message = INVALID[name]
    with pytest.raises(SourceDamaged, match=f"^x.gguf: {message}"):
        read(content)


def test_a_file_that_shrinks_while_it_is_read_is_truncated() -> None:
    content = file([key("k", STRING, text("x" * 100))])
    with pytest.raises(
        SourceDamaged, match=r"k: got .* bytes, expected 100: the file was truncated"
    ):
        read_header(io.BytesIO(content[:60]), name="x.gguf", size_bytes=len(content))


def test_every_truncation_is_an_error() -> None:
    content = file(
        [key("k", ARRAY, array(STRING, 2, text("x") + text("yy"))), key("n", U32, bytes(4))],
        [tensor("w", [32], Q8_0)],
        data=34,
    )
    read(content)
    for end in range(len(content)):
        with pytest.raises(SourceDamaged):
            read(content[:end])


@st.composite
def mutated_files(draw: st.DrawFn) -> bytes:
    """Return a valid file in which some bytes were changed, removed or repeated."""
    content = bytearray(
        file(
            [
                key("general.alignment", U32, struct.pack("<I", 64)),
                key("tokens", ARRAY, array(STRING, 3, text("a") + text("b") + text("c"))),
                key("scores", ARRAY, array(6, 3, bytes(12))),
                key("name", STRING, text("model")),
            ],
            [tensor("w", [32, 2], Q8_0), tensor("v", [4, 4, 2], offset=128)],
            data=512,
        )
    )
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(content) - 1))
        match draw(st.sampled_from(["byte", "word", "cut", "repeat", "end"])):
            case "byte":
                content[start] = draw(st.integers(0, 255))
            case "word":
                word = draw(st.sampled_from([0, 1, 255, (1 << 31) - 1, 1 << 63, (1 << 64) - 1]))
                content[start : start + 8] = struct.pack("<Q", word)
            case "cut":
                del content[start : start + draw(st.integers(1, 16))]
            case "repeat":
                content[start:start] = content[start : start + draw(st.integers(1, 64))]
            case "end":
                del content[start:]
        if not content:
            break
    return bytes(content)


def assert_bounded(content: bytes) -> None:
    """Assert that a file is read, or refused by our error, in bounded time and memory."""
    tracemalloc.start()
    started_s = time.thread_time()  # CPU time, whatever else the machine does
    try:
        read(content)
    except SourceDamaged as error:
        message = str(error)
    else:
        message = ""
    finally:
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert not message or re.match("x.gguf: .+: got .+, expected .+", message, re.DOTALL)
    assert len(message) < MAX_MESSAGE_CHARS
    assert peak_bytes < FUZZ_MEMORY_BYTES
    assert time.thread_time() - started_s < FUZZ_TIME_S


@settings(max_examples=600, deadline=None)
@given(mutated_files())
def test_mutated_files_are_read_or_refused(content: bytes) -> None:
    assert_bounded(content)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=400))
def test_random_bytes_are_refused(content: bytes) -> None:
    assert_bounded(b"GGUF\x03\0\0\0" + content)
