"""Attaching copies nothing: tensors are views of a mapped file whose pages stay clean."""

import re
from pathlib import Path

import pytest
import torch
import transformers
from fake_copy_streams import FakeCopyStream
from sandbox_processes import PreparedStore, make_function_spec

from faasmoe_contracts.store import Store
from faasmoe_contracts.store.tensors import TensorPiece, TensorView
from faasmoe_contracts.wire import Dtype, OutputMode, decode_request, encode_request
from faasmoe_expert.functions import ExpertFunction
from faasmoe_expert.functions.stacks import StackedBlock
from faasmoe_expert.functions.transfer import Uploader
from faasmoe_expert.functions.weights import (
    MappedParts,
    consecutive_runs,
    copy_weights,
    map_weights,
    tensor_view,
)

HIDDEN, INTER, EXPERTS = 256, 512, 16
_MAPPING = re.compile(r"^[0-9a-f]+-[0-9a-f]+ (\S+) .*? (/.*)?$")


@pytest.fixture(scope="module")
def large_store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store with one layer of 16 experts of 1.5 MiB each."""
    from faasmoe_router.checkpoint.prepare import prepare

    config = transformers.MixtralConfig(
        vocab_size=32, hidden_size=HIDDEN, intermediate_size=INTER, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=EXPERTS,
        dtype=torch.float32,
    )  # fmt: skip
    directory = tmp_path_factory.mktemp("large")
    transformers.MixtralForCausalLM(config).save_pretrained(directory / "checkpoint")
    return prepare(str(directory / "checkpoint"), directory / "store")


def mapping_sizes_kb(path: Path) -> dict[str, int]:
    """Return the sums of smaps fields over this process's mappings of a file, in kB."""
    fields: dict[str, int] = {}
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        match = _MAPPING.match(line)
        if match:
            inside = match[2] == str(path)
        elif inside and line.endswith(" kB"):
            name, value = line.split(":")
            fields[name] = fields.get(name, 0) + int(value.split()[0])
    return fields


def request_frame(expert: int) -> bytearray:
    rows = torch.ones(1, HIDDEN).numpy().tobytes()
    one = torch.ones(1)
    buffers = encode_request(
        rows, dtype=Dtype.FLOAT32, mode=OutputMode.REDUCED, layer=0, hidden_size=HIDDEN, n_rows=1,
        pair_row=one.int().numpy() - 1, pair_expert=one.int().numpy() * expert,
        pair_weight=one.numpy(),
    )  # fmt: skip
    return bytearray(b"".join(buffers))


def test_attached_function_uses_only_the_pages_it_reads(large_store: Store) -> None:
    path = large_store.path / large_store.manifest.layers[0].file
    spec = make_function_spec(large_store, [0], range(4, 8))
    assert mapping_sizes_kb(path) == {}
    function = ExpertFunction(spec, large_store)
    attached = mapping_sizes_kb(path)
    function.compute(decode_request(request_frame(5)))
    used = mapping_sizes_kb(path)
    expert_kb = large_store.manifest.layers[0].expert_bytes // 1024
    assert attached["Size"] >= EXPERTS * expert_kb
    # Verification read 4 of 16 experts; the kernel also maps cached pages around them.
    for sizes_kb in (attached, used):
        assert 4 * expert_kb <= sizes_kb["Rss"] <= EXPERTS * expert_kb // 2
    for field in ("Private_Dirty", "Anonymous", "Swap"):
        assert used[field] == 0
    del function
    assert mapping_sizes_kb(path) == {}


def test_prefault_populates_only_the_given_experts(large_store: Store) -> None:
    layer = large_store.manifest.layers[0]
    path = large_store.path / layer.file
    path.read_bytes()  # into the page cache
    mapped = large_store.map_layer(0)
    before_kb = mapping_sizes_kb(path)["Rss"]
    mapped.prefault(EXPERTS, range(4, 12))
    found_kb = mapping_sizes_kb(path)["Rss"] - before_kb
    # The kernel may also map pages that are contiguous with them.
    assert 8 * layer.expert_bytes <= found_kb * 1024 < EXPERTS * layer.expert_bytes


def test_tensors_are_views_of_the_mapping(prepared_store: PreparedStore) -> None:
    store = prepared_store("muse_spark")
    layer = store.map_layer(0)
    weights = map_weights(layer, n_experts=8)
    assert set(weights.stacked) | set(weights.shared) == set(layer.tensors)
    assert set(weights.shared) == {"post_expert_norm.weight"}
    for name, tensor in {**weights.stacked, **weights.shared}.items():
        assert isinstance(tensor, torch.Tensor)
        view = layer.tensors[name]
        start = torch.frombuffer(view.buffer, dtype=torch.uint8).data_ptr()
        assert tensor.data_ptr() == start
        assert tensor.shape == view.shape


def test_writes_never_reach_the_file(large_store: Store) -> None:
    path = large_store.path / large_store.manifest.layers[0].file
    weights = map_weights(large_store.map_layer(0), n_experts=EXPERTS)
    stack = weights.stacked["down_proj"]
    assert isinstance(stack, torch.Tensor)
    stack[0].fill_(7.0)
    large_store.verify([path.relative_to(large_store.path).as_posix()])


def test_supports_empty_tensors() -> None:
    assert tensor_view(memoryview(b""), "F16", (0, 3)).shape == (0, 3)


@pytest.mark.parametrize(
    ("indices", "expected"),
    [
        ((0,), [(0, 1)]),
        ((0, 1, 2), [(0, 3)]),
        ((1, 2, 5, 7, 8), [(1, 2), (5, 1), (7, 2)]),
        ((), []),
    ],
)
def test_consecutive_runs(indices: tuple[int, ...], expected: list[tuple[int, int]]) -> None:
    assert list(consecutive_runs(indices)) == expected


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "gpt_oss"])
def test_a_device_gets_the_same_weights_from_a_checkpoint_as_from_a_copy(
    prepared_store: PreparedStore, family: str
) -> None:
    experts = [0, 1, 5]
    stores = [prepared_store(family, mode=mode) for mode in ("copy", "reference")]
    assert stores[1].manifest.checkpoint is not None
    expected, got = (
        copy_weights(
            store.map_layer(0),
            n_experts=store.manifest.layers[0].num_experts,
            experts=experts,
            uploader=Uploader(FakeCopyStream(), chunk_bytes=1000),
        )
        for store in stores
    )
    assert set(got.stacked) == set(expected.stacked)
    for name, block in expected.stacked.items():
        assert isinstance(block, StackedBlock)
        assert all(torch.equal(got.stacked[name][e], block[e]) for e in experts)


def test_an_expert_of_scattered_pieces_is_viewed_when_it_is_read() -> None:
    values = torch.arange(8, dtype=torch.float32)
    content = memoryview(bytearray(values.numpy().tobytes()))
    pieces = [TensorPiece(content, offset=0, file=0)] * 4
    pieces[2] = TensorPiece(content[:7], offset=0, file=0)  # which nobody can view
    parts = MappedParts(TensorView("F32", (2, 4, 4), tuple(pieces)))  # two of each expert
    assert len(parts) == 2
    first, second = parts[0]
    assert torch.equal(first, values.view(2, 4))
    assert torch.equal(second, values.view(2, 4))
    assert parts[-2] is parts[0]
    assert parts[:1] == [parts[0]]
    with pytest.raises(ValueError, match="buffer"):
        parts[1]
    with pytest.raises(IndexError):
        parts[2]
