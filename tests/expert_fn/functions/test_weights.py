"""Attaching copies nothing: tensors lie in the mapped file, whose pages stay shared and clean."""

import re
from pathlib import Path

import pytest
import torch
import transformers
from sandbox_processes import PreparedStore, make_function_spec

from faasmoe_contracts.store import Store
from faasmoe_contracts.wire import Dtype, OutputMode, decode_request, encode_request
from faasmoe_expert.functions import ExpertFunction
from faasmoe_expert.functions.weights import map_weights, tensor_view

HIDDEN, INTER, EXPERTS = 256, 512, 16
_MAPPING = re.compile(r"^[0-9a-f]+-[0-9a-f]+ (\S+) .*? (/.*)?$")


@pytest.fixture(scope="module")
def large_store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """One layer of 16 experts of 1.5 MiB each."""
    from faasmoe_router.checkpoint import prepare

    config = transformers.MixtralConfig(
        vocab_size=32, hidden_size=HIDDEN, intermediate_size=INTER, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=EXPERTS,
        dtype=torch.float32,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("large")
    transformers.MixtralForCausalLM(config).save_pretrained(folder / "checkpoint")
    return prepare(str(folder / "checkpoint"), folder / "store")


def mapping_of(path: Path) -> dict[str, int]:
    """The kB fields of smaps for a file's mappings in this process, added up."""
    fields: dict[str, int] = {}
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        found = _MAPPING.match(line)
        if found:
            inside = found[2] == str(path)
        elif inside and line.endswith(" kB"):
            name, value = line.split(":")
            fields[name] = fields.get(name, 0) + int(value.split()[0])
    return fields


def frame(expert: int) -> bytearray:
    rows = torch.ones(1, HIDDEN).numpy().tobytes()
    one = torch.ones(1)
    buffers = encode_request(
        rows, dtype=Dtype.FLOAT32, mode=OutputMode.REDUCED, layer=0, hidden_size=HIDDEN, n_rows=1,
        pair_row=one.int().numpy() - 1, pair_expert=one.int().numpy() * expert,
        pair_weight=one.numpy(),
    )  # fmt: skip
    return bytearray(b"".join(buffers))


def test_an_attached_function_holds_no_memory_but_the_pages_it_reads(large_store: Store) -> None:
    path = large_store.path / large_store.manifest.layers[0].file
    spec = make_function_spec(large_store, [0], range(4, 8))
    assert mapping_of(path) == {}
    function = ExpertFunction(spec, large_store)
    attached = mapping_of(path)
    function.compute(decode_request(frame(5)))
    used = mapping_of(path)
    expert_kb = large_store.manifest.layers[0].expert_bytes // 1024
    assert attached["Size"] >= EXPERTS * expert_kb
    # Of 16 experts its own 4 were read to be verified; the kernel maps some cached pages around.
    for read in (attached, used):
        assert 4 * expert_kb <= read["Rss"] <= EXPERTS * expert_kb // 2
    for field in ("Private_Dirty", "Anonymous", "Swap"):
        assert used[field] == 0
    del function
    assert mapping_of(path) == {}


def test_populating_brings_in_the_experts_that_are_named_and_no_others(large_store: Store) -> None:
    layer = large_store.manifest.layers[0]
    path = large_store.path / layer.file
    path.read_bytes()  # cached, for the system to have pages to enter
    mapped = large_store.map_layer(0)
    before_kb = mapping_of(path)["Rss"]
    mapped.prefault(EXPERTS, range(4, 12))
    found_kb = mapping_of(path)["Rss"] - before_kb
    # Not one by one: the system may enter what lies in one piece with them, too.
    assert 8 * layer.expert_bytes <= found_kb * 1024 < EXPERTS * layer.expert_bytes


def test_every_tensor_lies_in_the_map(prepared_store: PreparedStore) -> None:
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


def test_a_write_never_reaches_the_file(large_store: Store) -> None:
    path = large_store.path / large_store.manifest.layers[0].file
    weights = map_weights(large_store.map_layer(0), n_experts=EXPERTS)
    stack = weights.stacked["down_proj"]
    assert isinstance(stack, torch.Tensor)
    stack[0].fill_(7.0)
    large_store.verify([path.relative_to(large_store.path).as_posix()])


def test_an_empty_tensor_needs_no_bytes() -> None:
    assert tensor_view(memoryview(b""), "F16", (0, 3)).shape == (0, 3)
