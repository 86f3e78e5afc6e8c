import contextlib
import json
import struct
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from faasmoe_contracts.store import Store, StoreError
from faasmoe_contracts.store.tensors import MappedPieces, TensorView, map_range, map_tensors


def write_safetensors(
    directory: Path, header: Any, data: bytes, *, length: int | None = None
) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = directory / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def tensor_entry(start: int, end: int, *, dtype: str = "U8", shape: Any = None) -> dict[str, Any]:
    shape = [end - start] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def test_maps_all_tensors(store_path: Path) -> None:
    tensors = Store.open(store_path).map_layer(1).tensors
    assert list(tensors) == ["down_proj", "gate_up_proj", "norm.weight"]
    assert (tensors["down_proj"].dtype, tensors["down_proj"].shape) == ("F32", (3, 4, 2))
    assert tensors["gate_up_proj"].buffer.tobytes() == bytes(range(48))


def test_views_work_with_torch_without_copy_or_warning(store_path: Path) -> None:
    view = Store.open(store_path).map_layer(0).tensors["down_proj"]
    tensor = torch.frombuffer(view.buffer, dtype=torch.float32).view(view.shape)  # [E, H, I]
    assert tensor.flatten().tolist() == list(range(24))
    view.buffer[0:4] = struct.pack("<f", 7.0)
    assert tensor[0, 0, 0] == 7.0


def test_writes_never_reach_the_file(store_path: Path) -> None:
    store = Store.open(store_path)
    for view in store.map_layer(0).tensors.values():
        view.buffer[:] = bytes(view.buffer.nbytes)
    store.verify()
    assert any(store.map_layer(0).tensors["down_proj"].buffer)


def test_pieces_are_made_when_they_are_read(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    path.write_bytes(bytes(range(64)))
    mapped = map_range(path, size_bytes=64, start=8, end=64)
    not_mapped = (9, 0)
    pieces = MappedPieces([(7, 40), (7, 8), not_mapped, (7, 20)], 4, {7: (1, mapped)})
    assert len(pieces) == 4
    assert [bytes(piece.buffer) for piece in pieces[:2]] == [bytes(range(40, 44)), b"\x08\t\n\v"]
    assert (pieces[-1].offset, pieces[-1].file) == (20, 1)
    view = TensorView("U8", (2, 8), pieces)
    assert view.nbytes == 16
    assert view.expert_pieces(0) == pieces[:2]
    with pytest.raises(KeyError):
        view.expert_pieces(1)
    with pytest.raises(IndexError):
        pieces[4]


def test_data_section_is_page_aligned(store_path: Path) -> None:
    (length,) = struct.unpack("<Q", (store_path / "experts/00000.safetensors").read_bytes()[:8])
    assert (8 + length) % 4096 == 0


@pytest.mark.parametrize(
    ("header", "message"),
    [
        pytest.param(b"{", "header: invalid JSON", id="json"),
        pytest.param(b"\xff\xff", "header: invalid JSON", id="encoding"),
        pytest.param([], "expected a JSON object", id="array"),
        pytest.param({"a": 1}, "a: got 1", id="entry"),
        pytest.param({"a": {"dtype": "U8"}}, "a.shape: got nothing", id="no-shape"),
        pytest.param({"a": tensor_entry(0, 8, dtype="C64")}, "a.dtype: got 'C64'", id="dtype"),
        pytest.param({"a": tensor_entry(0, 8, shape=[-8])}, "a.shape", id="negative"),
        pytest.param({"a": tensor_entry(0, 8, shape=["8"])}, "a.shape", id="text"),
        pytest.param(
            {"a": tensor_entry(0, 8, shape=[9])}, "expected 9 bytes apart", id="mis-sized"
        ),
        pytest.param(
            {"a": tensor_entry(0, 8) | {"data_offsets": [0]}},
            "two non-negative integers",
            id="one-offset",
        ),
        pytest.param({"a": tensor_entry(8, 0, shape=[8])}, "a.data_offsets", id="backwards"),
        pytest.param({"a": tensor_entry(0, 4)}, "got 8 bytes of tensors, expected 4", id="rest"),
        pytest.param(
            {"a": tensor_entry(0, 16)}, "got 8 bytes of tensors, expected 16", id="beyond"
        ),
        pytest.param(
            {"a": tensor_entry(0, 4), "b": tensor_entry(3, 8)}, "got start 3", id="overlap"
        ),
        pytest.param({"a": tensor_entry(0, 3), "b": tensor_entry(4, 8)}, "got start 4", id="gap"),
    ],
)
def test_names_the_invalid_field_of_the_header(tmp_path: Path, header: Any, message: str) -> None:
    path = write_safetensors(tmp_path, header, bytes(8))
    with pytest.raises(StoreError, match=message) as caught:
        map_tensors(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("length", [100, 1 << 40, (1 << 64) - 1])
def test_rejects_a_header_longer_than_the_file(tmp_path: Path, length: int) -> None:
    with pytest.raises(StoreError, match=f"header length: got {length}"):
        map_tensors(write_safetensors(tmp_path, b"{}", b"", length=length))


@pytest.mark.parametrize("size", [0, 7])
def test_rejects_a_file_without_header(tmp_path: Path, size: int) -> None:
    (tmp_path / "x").write_bytes(bytes(size))
    with pytest.raises(StoreError, match=f"got {size} bytes"):
        map_tensors(tmp_path / "x")


@settings(max_examples=200, deadline=None)
@given(
    changes=st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), min_size=1, max_size=4),
    cut=st.integers(0, 20),
)
def test_damaged_file_maps_within_bounds_or_raises_store_error(
    changes: list[Any], cut: int
) -> None:
    header = json.dumps(
        {"a": tensor_entry(0, 6), "b": tensor_entry(6, 14, dtype="F32", shape=[2, 1])}
    )
    content = bytearray(struct.pack("<Q", len(header)) + header.encode() + bytes(14))
    for position, value in changes:
        content[position % len(content)] = value
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "x"
        path.write_bytes(content[: len(content) - cut])
        with contextlib.suppress(StoreError):
            tensors = map_tensors(path).tensors
            assert sum(view.buffer.nbytes for view in tensors.values()) <= len(content)
