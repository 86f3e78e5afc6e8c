"""Layout of the store's files, and writing slices into them."""

import tempfile
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from faasmoe_contracts.store import FileEntry, sha256_of_file
from faasmoe_contracts.store.tensors import map_tensors
from faasmoe_router.checkpoint.store_plan import (
    ALIGNMENT,
    SAFETENSORS_DTYPE_NAMES,
    TensorSpec,
    plan_file,
    plan_router_files,
)
from faasmoe_router.checkpoint.store_writer import StoreWriter
from faasmoe_transformers.weight_conversion import ParameterSlice

_SHAPES = st.lists(st.integers(1, 5), max_size=3).map(tuple)
_SPECS = st.lists(
    st.tuples(st.sampled_from(sorted(SAFETENSORS_DTYPE_NAMES, key=str)), _SHAPES),
    min_size=1,
    max_size=6,
).map(
    lambda drawn: [
        TensorSpec(f"model.{i}", str(i), dtype, shape) for i, (dtype, shape) in enumerate(drawn)
    ]
)


def _random(spec: TensorSpec) -> torch.Tensor:
    return torch.randint(0, 2, spec.shape).to(spec.dtype)


def _slices(spec: TensorSpec, tensor: torch.Tensor) -> list[ParameterSlice]:
    if not tensor.dim():
        return [ParameterSlice(spec.name, 0, tensor)]
    return [ParameterSlice(spec.name, row, tensor[row : row + 1]) for row in range(len(tensor))]


@settings(max_examples=60, deadline=None)
@given(specs=_SPECS, random=st.randoms(use_true_random=False))
def test_slices_in_any_order_make_the_file(specs: list[TensorSpec], random: object) -> None:
    tensors = {spec.local_name: _random(spec) for spec in specs}
    slices = [part for spec in specs for part in _slices(spec, tensors[spec.local_name])]
    random.shuffle(slices)  # type: ignore[attr-defined]
    done: dict[str, FileEntry] = {}
    written: list[int] = []
    with tempfile.TemporaryDirectory() as folder:
        layout = plan_file("part/x.safetensors", specs)
        writer = StoreWriter(
            Path(folder),
            [layout],
            on_file_finished=done.__setitem__,
            on_bytes_written=written.append,
        )
        for part in slices:
            assert not done
            writer.write(part)
        path = Path(folder) / layout.name
        got = load_file(path)
        assert done == {layout.name: FileEntry(path.stat().st_size, sha256_of_file(path))}
        assert sum(written) == layout.size_bytes
        assert set(map_tensors(path).tensors) == set(tensors)
        assert len(layout.header) % ALIGNMENT == 0
    assert all(torch.equal(got[name], tensor) for name, tensor in tensors.items())


@given(specs=_SPECS, shard_bytes=st.integers(1, 2000))
def test_router_shards_are_bounded_and_complete(specs: list[TensorSpec], shard_bytes: int) -> None:
    layouts = plan_router_files(specs, shard_bytes=shard_bytes)
    assert sorted(t.name for file in layouts for t in file.tensors) == [t.name for t in specs]
    for i, file in enumerate(layouts, 1):
        assert file.name == f"router/model-{i:05}-of-{len(layouts):05}.safetensors"
        size_bytes = sum(tensor.size_bytes for tensor in file.tensors)
        assert size_bytes <= shard_bytes or len(file.tensors) == 1


def test_slice_of_no_file_is_dropped(tmp_path: Path) -> None:
    writer = StoreWriter(
        tmp_path, [], on_file_finished=lambda *_: None, on_bytes_written=lambda _: None
    )
    writer.write(ParameterSlice("unknown", 0, torch.zeros(2)))
    assert not writer.contains("unknown")
    assert list(tmp_path.iterdir()) == []


def test_unfinished_file_stays_partial(tmp_path: Path) -> None:
    spec = TensorSpec("a", "a", torch.float32, (2, 2))
    writer = StoreWriter(
        tmp_path,
        [plan_file("a", [spec])],
        on_file_finished=lambda *_: None,
        on_bytes_written=lambda _: None,
    )
    writer.write(ParameterSlice("a", 0, torch.zeros(1, 2)))
    writer.close()
    assert [path.name for path in tmp_path.iterdir()] == ["a.partial"]
