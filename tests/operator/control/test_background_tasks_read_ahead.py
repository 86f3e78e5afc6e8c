import mmap
from pathlib import Path

import pytest
from sandbox_processes import PreparedStore

from faasmoe_contracts.routing_table import FunctionSpec
from faasmoe_contracts.store import Store
from faasmoe_operator.control.background_tasks import byte_ranges, free_memory_bytes, read_ahead


@pytest.fixture
def store(prepared_store: PreparedStore) -> Store:
    return prepared_store("mixtral")


def test_byte_ranges_cover_a_functions_experts(store: Store) -> None:
    spec = FunctionSpec("f", (0,), (0, 1, 3))
    ranges = list(byte_ranges(store, spec))
    layer = store.layer_entry(0)
    assert sum(part.length for part in ranges) == 3 * layer.expert_bytes + layer.shared_bytes
    tensors = store.map_layer(0).tensors
    expected = []
    for view in tensors.values():
        stride = view.buffer.nbytes // layer.num_experts
        expected += [
            bytes(view.buffer[: 2 * stride]),
            bytes(view.buffer[3 * stride : 4 * stride]),
        ]
    content = (store.path / layer.file).read_bytes()
    actual = [content[part.offset : part.offset + part.length] for part in ranges]
    assert actual == expected


def test_read_ahead_stops_at_the_memory_bound(store: Store) -> None:
    functions = [(FunctionSpec(f"f{index}", (0,), (index,)), 100) for index in range(3)]
    assert read_ahead(store, functions, max_bytes=250) == 2
    assert read_ahead(store, functions, max_bytes=99) == 0
    assert read_ahead(store, [], max_bytes=99) == 0


def test_reads_free_memory(tmp_path: Path) -> None:
    assert free_memory_bytes() > mmap.PAGESIZE
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 9 kB\nMemAvailable:     5 kB\n")
    assert free_memory_bytes(meminfo) == 5 * 1024
    assert free_memory_bytes(tmp_path / "none") == 0
