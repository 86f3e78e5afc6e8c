"""An attached function matches the family's own experts module for its block."""

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_copy_streams import DeferredCopyStream
from families.registry import FAMILIES, experts_modules
from sandbox_processes import PreparedStore, make_function_spec
from torch import Tensor

from faasmoe_contracts.store import Store, manifest_digest
from faasmoe_contracts.wire import Dtype, ExpertRequest, OutputMode, decode_request, encode_request
from faasmoe_expert.errors import BadAttachment, BadFrame
from faasmoe_expert.functions import ExpertFunction
from faasmoe_expert.functions.transfer import Uploader
from faasmoe_kernels import load

GATED_FAMILIES = ["mixtral", "qwen2_moe", "aria", "gemma4", "nemotron_h", "gpt_oss"]
MODULE_FAMILIES = ["muse_spark", "deepseek_v4", "inkling2", "hy_v4"]
WIRE_DTYPES = {"float32": Dtype.FLOAT32, "bfloat16": Dtype.BFLOAT16, "float16": Dtype.FLOAT16}
EXPERTS = 8
TOP_K = 3


@pytest.fixture
def torch_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Mapped blocks are computed by torch, as copies are; it rounds between bfloat16 products."""
    monkeypatch.setenv("FAASMOE_KERNELS", "off")
    load.cache_clear()
    yield
    load.cache_clear()


@dataclass(frozen=True, slots=True)
class Batch:
    """Random rows with TOP_K experts each."""

    hidden: Tensor  # [T, H]
    index: Tensor  # [T, k]
    weight: Tensor  # [T, k] float32

    @classmethod
    def make(cls, store: Store, layer: int, n_rows: int = 21) -> "Batch":
        generator = torch.Generator().manual_seed(layer)
        entry = store.manifest.layers[layer]
        dtype = getattr(torch, store.manifest.model.dtype)
        return cls(
            torch.randn(n_rows, entry.hidden_size, generator=generator).to(dtype),
            torch.rand(n_rows, EXPERTS, generator=generator).topk(TOP_K).indices,
            torch.rand(n_rows, TOP_K, generator=generator),
        )

    def request(
        self, experts: Sequence[int], *, mode: OutputMode, layer: int = 0, **changes: Any
    ) -> ExpertRequest:
        """Return a decoded frame with the pairs of `experts`."""
        wanted = torch.isin(self.index, torch.tensor(list(experts)))  # [T, k]
        rows, slots = wanted.nonzero(as_tuple=True)  # [P], [P]
        fields: dict[str, Any] = {
            "dtype": WIRE_DTYPES[str(self.hidden.dtype).removeprefix("torch.")],
            "mode": mode,
            "layer": layer,
            "hidden_size": self.hidden.shape[1],
            "n_rows": len(self.hidden),
            "pair_row": rows.int().numpy(),
            "pair_expert": self.index[rows, slots].int().numpy(),
            "pair_weight": self.weight[rows, slots].numpy(),
            **changes,
        }
        raw = self.hidden.view(torch.uint8).numpy().tobytes()
        return decode_request(bytearray(b"".join(encode_request(raw, **fields))))


@cache
def modules(family: str) -> list[torch.nn.Module]:
    model = next(f for f in FAMILIES if f.name == family).build()
    return list(experts_modules(model).values())


def module_output(family: str, batch: Batch, layer: int) -> Tensor:
    """Return the output of the family's module in float32, [T, H]."""
    with torch.no_grad():
        total: Tensor = modules(family)[layer](batch.hidden.float(), batch.index, batch.weight)
    return total


def mapped_function(store: Store, layers: Sequence[int], experts: Sequence[int]) -> ExpertFunction:
    return ExpertFunction(make_function_spec(store, layers, experts), store)


def copied_function(store: Store, layers: Sequence[int], experts: Sequence[int]) -> ExpertFunction:
    """Return a function that copies its experts in chunks, as on a CUDA device."""
    uploader = Uploader(DeferredCopyStream(), chunk_bytes=1000)
    return ExpertFunction(make_function_spec(store, layers, experts), store, uploader=uploader)


@pytest.mark.parametrize("family", GATED_FAMILIES)
def test_common_families_use_the_gated_kernel(family: str, prepared_store: PreparedStore) -> None:
    assert all(layer.kernel for layer in prepared_store(family).manifest.layers)


@pytest.mark.parametrize("family", MODULE_FAMILIES)
def test_other_families_use_their_module(family: str, prepared_store: PreparedStore) -> None:
    assert not any(layer.kernel for layer in prepared_store(family).manifest.layers)


@pytest.mark.parametrize("family", GATED_FAMILIES + MODULE_FAMILIES)
def test_all_experts_match_the_module(family: str, prepared_store: PreparedStore) -> None:
    store = prepared_store(family)
    for layer in range(len(store.manifest.layers)):
        batch = Batch.make(store, layer)
        function = mapped_function(store, [layer], range(EXPERTS))
        got = function.compute(batch.request(range(EXPERTS), mode=OutputMode.REDUCED, layer=layer))
        expected = module_output(family, batch, layer)
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mode", OutputMode)
@pytest.mark.parametrize("family", GATED_FAMILIES + MODULE_FAMILIES)
def test_outputs_of_non_contiguous_blocks_add_up(
    family: str, mode: OutputMode, prepared_store: PreparedStore
) -> None:
    store = prepared_store(family)
    batch = Batch.make(store, 0)
    total = torch.zeros_like(batch.hidden)  # [T, H]
    for block in ([0, 3, 4, 7], [1, 6], [2, 5]):
        request = batch.request(block, mode=mode)
        part = mapped_function(store, [0], block).compute(request)  # [T, H] or [P, H]
        if mode is OutputMode.UNREDUCED:
            rows = torch.from_numpy(request.pair_row.astype(np.int64))  # [P]
            total.index_add_(0, rows, part)
        else:
            total += part
    torch.testing.assert_close(total, module_output(family, batch, 0), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("family", ["mixtral", "nemotron_h", "gpt_oss", "muse_spark"])
def test_supports_every_dtype(family: str, dtype: str, prepared_store: PreparedStore) -> None:
    store = prepared_store(family, dtype=dtype)
    batch = Batch.make(store, 0)
    function = mapped_function(store, [0], range(EXPERTS))
    got = function.compute(batch.request(range(EXPERTS), mode=OutputMode.REDUCED))
    assert got.dtype == torch.float32  # a sum, whatever the dtype of the rows
    expected = module_output(family, batch, 0)
    error = (got.float() - expected).abs().max() / expected.abs().max()
    assert error < {"float32": 1e-5, "bfloat16": 3e-2, "float16": 4e-3}[dtype]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", GATED_FAMILIES + MODULE_FAMILIES)
def test_unreduced_pairs_are_bit_identical_in_any_block_and_batch(
    family: str, dtype: str, prepared_store: PreparedStore
) -> None:
    store = prepared_store(family, dtype=dtype)
    batch = Batch.make(store, 0)
    full_request = batch.request(range(EXPERTS), mode=OutputMode.UNREDUCED)
    full_output = mapped_function(store, [0], range(EXPERTS)).compute(full_request)  # [P, H]
    block = mapped_function(store, [0], [1, 5])
    for pair in np.flatnonzero(np.isin(full_request.pair_expert, [1, 5])):
        row = slice(full_request.pair_row[pair], full_request.pair_row[pair] + 1)
        alone = Batch(batch.hidden[row], batch.index[row], batch.weight[row])
        request = alone.request([int(full_request.pair_expert[pair])], mode=OutputMode.UNREDUCED)
        assert torch.equal(block.compute(request)[0], full_output[pair])


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_function_may_span_several_layers(family: str, prepared_store: PreparedStore) -> None:
    store = prepared_store(family)
    function = mapped_function(store, [0, 2], range(EXPERTS))
    for layer in (0, 2):
        batch = Batch.make(store, layer)
        got = function.compute(batch.request(range(EXPERTS), mode=OutputMode.REDUCED, layer=layer))
        expected = module_output(family, batch, layer)
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    one = store.manifest.layers[0].expert_bytes
    assert function.size_bytes == 2 * EXPERTS * one


@pytest.mark.parametrize("block", [range(EXPERTS), [0, 3, 4, 7]])
@pytest.mark.parametrize("mode", OutputMode)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", GATED_FAMILIES + MODULE_FAMILIES)
@pytest.mark.usefixtures("torch_kernels")
def test_copied_block_matches_the_mapped_block(
    family: str, dtype: str, mode: OutputMode, block: Sequence[int], prepared_store: PreparedStore
) -> None:
    store = prepared_store(family, dtype=dtype)
    request = Batch.make(store, 0).request(block, mode=mode)
    expected = mapped_function(store, [0, 1], block).compute(request)
    function = copied_function(store, [0, 1], block)
    got = function.compute(request)
    assert got.dtype == expected.dtype
    error = (got.float() - expected.float()).abs().max() / expected.float().abs().max()
    assert error <= {"float32": 1e-6, "bfloat16": 2**-7}[dtype]
    assert function.size_bytes == mapped_function(store, [0, 1], block).size_bytes


def test_copied_block_releases_the_mapping(prepared_store: PreparedStore) -> None:
    store = prepared_store("mixtral")
    path = str(store.path / store.manifest.layers[0].file)
    function = copied_function(store, [0], [1, 2])
    assert path not in Path("/proc/self/maps").read_text()
    assert function.compute(Batch.make(store, 0).request([1, 2], mode=OutputMode.REDUCED)).any()


@pytest.mark.parametrize(
    ("changes", "field", "message"),
    [
        ({"layer": 1}, "layer", "layer: got 1, expected one of \\[0\\]"),
        ({"dtype": Dtype.BFLOAT16, "hidden_size": 64}, "dtype", "got bfloat16, expected float32"),
        ({"hidden_size": 16, "n_rows": 42}, "hidden_size", "hidden_size: got 16, expected 32"),
    ],
)
def test_rejects_frames_for_another_function(
    changes: dict[str, Any], field: str, message: str, prepared_store: PreparedStore
) -> None:
    store = prepared_store("mixtral")
    request = Batch.make(store, 0).request([1, 2], mode=OutputMode.REDUCED, **changes)
    with pytest.raises(BadFrame, match=message) as refused:
        mapped_function(store, [0], [1, 2]).compute(request)
    assert refused.value.field == field


@pytest.mark.parametrize("expert", [0, 3, 8, 2**31 - 1])
def test_rejects_experts_outside_the_block(expert: int, prepared_store: PreparedStore) -> None:
    store = prepared_store("mixtral")
    request = Batch.make(store, 0).request([1, 2], mode=OutputMode.REDUCED)
    request.pair_expert[2] = expert
    with pytest.raises(BadFrame, match=f"pair_expert: got {expert}, expected .* \\[1, 2\\]"):
        mapped_function(store, [0], [1, 2]).compute(request)


@pytest.mark.parametrize(
    ("layers", "experts", "message"),
    [
        ([3], [0], "layers: got 3, expected indices below 3"),
        ([0, 9], [0], "layers: got 9, expected indices below 3"),
        ([0], [7, 8], "experts: got 8, expected indices below 8"),
    ],
)
def test_rejects_layers_and_experts_that_the_store_lacks(
    layers: list[int], experts: list[int], message: str, prepared_store: PreparedStore
) -> None:
    with pytest.raises(BadAttachment, match=message):
        mapped_function(prepared_store("mixtral"), layers, experts)


@pytest.mark.parametrize(
    "kernel",
    [
        {"name": "gated", "activation": "tanh"},
        {"name": "gated", "activation": "silu", "transposed": False, "swizzled": True},
        {"name": "mixture"},
    ],
)
def test_rejects_kernels_of_another_version(
    kernel: dict[str, Any], prepared_store: PreparedStore, tmp_path: Path
) -> None:
    store = modified_store(prepared_store("mixtral"), tmp_path, kernel=kernel)
    with pytest.raises(BadAttachment, match="layer 0 of MixtralForCausalLM cannot be computed"):
        mapped_function(store, [0], [0])


def test_rejects_unknown_architectures(prepared_store: PreparedStore, tmp_path: Path) -> None:
    store = modified_store(
        prepared_store("deepseek_v4"), tmp_path, architecture="GptNextForCausalLM"
    )
    with pytest.raises(BadAttachment, match="layer 0 of GptNextForCausalLM cannot be computed"):
        mapped_function(store, [0], [0])


def modified_store(store: Store, directory: Path, *, architecture: str = "", **layer: Any) -> Store:
    """Return a copy of a store with other fields in its manifest."""
    shutil.copytree(store.path, directory / "store")
    path = directory / "store" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["layers"][0] |= layer
    manifest["model"]["architecture"] = architecture or manifest["model"]["architecture"]
    manifest["digest"] = manifest_digest(manifest)
    path.write_text(json.dumps(manifest))
    return Store.open(directory / "store")
