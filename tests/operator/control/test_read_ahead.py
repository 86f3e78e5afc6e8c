import mmap
import shutil
from collections.abc import Iterable
from pathlib import Path

import pytest
from sandbox_processes import PreparedStore

from faasmoe_contracts.routing_table import FunctionSpec
from faasmoe_contracts.store import Store
from faasmoe_operator.control import read_ahead as module
from faasmoe_operator.control.functions import ManagedFunction
from faasmoe_operator.control.read_ahead import (
    ByteRange,
    byte_ranges,
    free_memory_bytes,
    read_ahead,
    router_ranges,
    start_reading_ahead,
)
from faasmoe_operator.control.state_files import PopularityFile, popularity_path
from faasmoe_operator.scaling.settings import ScalingSettings


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


def covered(ranges: Iterable[ByteRange]) -> dict[Path, set[int]]:
    """Return the bytes of each file that ranges cover."""
    found: dict[Path, set[int]] = {}
    for part in ranges:
        found.setdefault(part.path, set()).update(range(part.offset, part.offset + part.length))
    return found


@pytest.mark.parametrize("mode", ["copy", "reference"])
def test_router_ranges_cover_its_tensors_in_store_and_checkpoint(
    prepared_store: PreparedStore, mode: str
) -> None:
    store = prepared_store("mixtral", mode=mode)
    found = covered(router_ranges(store))
    assert all(len(found[path]) == path.stat().st_size for path in store.router_files())
    mapped = store.map_router_references()
    assert bool(mapped.tensors) == (mode == "reference")
    for view in mapped.tensors.values():
        for piece in view.pieces:
            of_piece = range(piece.offset, piece.offset + piece.buffer.nbytes)
            assert found[mapped.files[piece.file].path].issuperset(of_piece)


def test_start_reads_the_router_first_and_then_what_the_last_run_used(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    functions = [
        ManagedFunction(FunctionSpec(f"f{i}", (0,), (i,)), 1, ScalingSettings()) for i in range(3)
    ]
    rows = {functions[0].stable_key: 1.0, functions[2].stable_key: 5.0}
    file = PopularityFile(popularity_path(store.path), model_digest=store.manifest.digest)
    file.write(rows)
    advised: list[ByteRange] = []
    monkeypatch.setattr(module, "_advise_will_need", advised.append)
    start_reading_ahead(store, functions).join()
    expected = [
        *router_ranges(store),
        *byte_ranges(store, functions[2].spec),
        *byte_ranges(store, functions[0].spec),
    ]
    assert advised == expected


def test_missing_files_end_reading_ahead_without_an_error(
    prepared_store: PreparedStore, tmp_path: Path
) -> None:
    store = Store.open(shutil.copytree(prepared_store("mixtral").path, tmp_path / "store"))
    for path in store.router_files():
        path.unlink()
    start_reading_ahead(store, []).join()
