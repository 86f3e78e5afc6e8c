"""Functions on the device: their outputs, and the memory they use and free."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from published.checkpoints import Write, build, publish
from published.floats import fp8_blocks
from published.integers import nvfp4
from sandbox_processes import PreparedStore, make_function_spec

from faasmoe_contracts.store import Store
from faasmoe_contracts.store.references import StoreMode
from faasmoe_contracts.wire import Dtype, ExpertRequest, OutputMode, decode_request, encode_request
from faasmoe_expert.functions import ExpertFunction
from faasmoe_expert.functions.transfer import CudaCopyStream, Uploader
from faasmoe_expert.functions.weights import copy_weights, map_weights
from faasmoe_router.checkpoint.prepare import prepare

FAMILIES = ["mixtral", "qwen2_moe", "aria", "nemotron_h", "gpt_oss", "muse_spark", "deepseek_v4"]
EXPERTS = 8
PUBLISHED: dict[str, tuple[Write, dict[str, Any]]] = {
    "fp8": (fp8_blocks(block=32), {"quant_method": "fp8", "weight_block_size": [32, 32]}),
    "nvfp4": (nvfp4(), {"quant_method": "modelopt", "quant_algo": "NVFP4"}),
}
TOLERANCES = {"float32": 1e-5, "bfloat16": 2**-6}
KERNEL_TOLERANCE = 2e-4
WIRE_DTYPES = {"float32": Dtype.FLOAT32, "bfloat16": Dtype.BFLOAT16}


def request_for(
    store: Store, experts: Sequence[int], *, mode: OutputMode, n_rows: int = 21
) -> ExpertRequest:
    entry, dtype = store.manifest.layers[0], store.manifest.model.dtype
    generator = torch.Generator().manual_seed(n_rows)
    hidden = torch.randn(n_rows, entry.hidden_size, generator=generator).to(getattr(torch, dtype))
    local = torch.rand(n_rows, len(experts), generator=generator).topk(2).indices  # [T, 2]
    expert = torch.tensor(list(experts))[local].reshape(-1)  # [P]
    frame = encode_request(
        hidden.view(torch.uint8).numpy().tobytes(),
        dtype=WIRE_DTYPES[dtype],
        mode=mode,
        layer=0,
        hidden_size=entry.hidden_size,
        n_rows=n_rows,
        pair_row=torch.arange(n_rows).repeat_interleave(2).int().numpy(),
        pair_expert=expert.int().numpy(),
        pair_weight=torch.rand(2 * n_rows, generator=generator).numpy(),
    )
    return decode_request(bytearray(b"".join(frame)))


@pytest.mark.parametrize("mode", OutputMode)
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_computes_the_same_as_on_the_cpu(
    family: str, dtype: str, mode: OutputMode, prepared_store: PreparedStore, uploader: Uploader
) -> None:
    store = prepared_store(family, dtype=dtype)
    for block in (range(EXPERTS), [0, 3, 4, 7]):
        spec, request = make_function_spec(store, [0], block), request_for(store, block, mode=mode)
        expected = ExpertFunction(spec, store).compute(request).float()
        got = ExpertFunction(spec, store, uploader=uploader).compute(request)
        assert got.device.type == "cpu"
        error = (got.float() - expected).abs().max()
        assert error <= TOLERANCES[dtype] * expected.abs().max()


@pytest.mark.parametrize("scheme", ["int8", "int4", "mxfp4"])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v4", "aria"])
def test_quantised_functions_are_dequantised_to_the_models_dtype(
    family: str, dtype: str, scheme: str, prepared_store: PreparedStore, uploader: Uploader
) -> None:
    store = prepared_store(family, dtype=dtype, experts=scheme)
    block = [0, 3, 4, 7]
    spec = make_function_spec(store, [0], block)
    on_device = ExpertFunction(spec, store, uploader=uploader)
    for mode in OutputMode:
        request = request_for(store, block, mode=mode)
        expected = ExpertFunction(spec, store).compute(request).float()
        error = (on_device.compute(request).float() - expected).abs().max()
        # The CPU's kernels multiply codes with activations of 16 bits.
        assert error <= max(TOLERANCES[dtype], KERNEL_TOLERANCE) * expected.abs().max()
    plain = prepared_store(family, dtype=dtype)
    floats = ExpertFunction(make_function_spec(plain, [0], block), plain, uploader=uploader)
    assert on_device.size_bytes == floats.size_bytes > ExpertFunction(spec, store).size_bytes


@pytest.mark.parametrize("scheme", ["int8", "int4", "mxfp4"])
def test_uploaded_codes_become_the_weights_of_the_store(
    scheme: str, prepared_store: PreparedStore, uploader: Uploader
) -> None:
    store, block = prepared_store("gpt_oss", experts=scheme), [1, 2, 6]
    entry, layer = store.manifest.layers[0], store.map_layer(0)
    there = copy_weights(
        layer,
        n_experts=EXPERTS,
        experts=block,
        uploader=uploader,
        quantization=entry.quantization,
        dtype=torch.float32,
    )
    here = map_weights(layer, n_experts=EXPERTS, quantization=entry.quantization)
    for name in entry.quantization:
        for expert in block:
            assert torch.equal(there.stacked[name][expert].cpu(), here.stacked[name][expert])


@pytest.mark.parametrize("mode", [StoreMode.COPY, StoreMode.REFERENCE])
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_codes_become_the_weights_that_they_stand_for(
    name: str, mode: StoreMode, tmp_path: Path, uploader: Uploader
) -> None:
    """Also where gate and up, with scales of their own, lie apart in the checkpoint."""
    write, config = PUBLISHED[name]
    folder = publish(build("qwen3_moe"), tmp_path, write, config, dtype=torch.float32).folder
    store = prepare(str(folder), tmp_path / "store", mode=mode)
    block, entry = [1, 2, 6], store.manifest.layers[0]
    assert len(entry.quantization) == 2
    layer, n_experts = store.map_layer(0), entry.num_experts
    there = copy_weights(
        layer,
        n_experts=n_experts,
        experts=block,
        uploader=uploader,
        quantization=entry.quantization,
        dtype=torch.float32,
    )
    here = map_weights(layer, n_experts=n_experts, quantization=entry.quantization)
    for parameter in entry.quantization:
        for expert in block:
            expected = here.stacked[parameter][expert]
            assert torch.equal(there.stacked[parameter][expert].cpu(), expected)
    spec = make_function_spec(store, [0], block)
    request = request_for(store, block, mode=OutputMode.REDUCED)
    expected = ExpertFunction(spec, store).compute(request)
    got = ExpertFunction(spec, store, uploader=uploader).compute(request)
    assert (got - expected).abs().max() <= KERNEL_TOLERANCE * expected.abs().max()


@pytest.mark.usefixtures("emulated")
def test_frame_synchronizes_with_the_device_once(
    prepared_store: PreparedStore, uploader: Uploader
) -> None:
    from emulated.streams import WaitCounts, counts

    store = prepared_store("mixtral")
    function = ExpertFunction(
        make_function_spec(store, [0], range(EXPERTS)), store, uploader=uploader
    )
    for n_rows in (1, 21, 300):
        request = request_for(store, range(EXPERTS), mode=OutputMode.REDUCED, n_rows=n_rows)
        before = counts.copy()
        function.compute(request)
        assert counts - before == WaitCounts(explicit=0, implicit=1)


@pytest.mark.parametrize("chunk_bytes", [1000, 4096, 16 << 20])
def test_every_byte_is_copied(
    chunk_bytes: int, prepared_store: PreparedStore, cuda: torch.device
) -> None:
    store = prepared_store("muse_spark")
    layer, block = store.map_layer(0), [1, 2, 6]
    there = copy_weights(
        layer,
        n_experts=EXPERTS,
        experts=block,
        uploader=Uploader(CudaCopyStream(cuda), chunk_bytes=chunk_bytes),
    )
    here = map_weights(layer, n_experts=EXPERTS)
    for name, stack in here.stacked.items():
        for expert in block:
            assert torch.equal(there.stacked[name][expert].cpu(), stack[expert])
    for name, tensor in here.shared.items():
        assert torch.equal(there.shared[name].cpu(), tensor)


def test_detached_function_frees_its_device_memory(
    prepared_store: PreparedStore, uploader: Uploader
) -> None:
    store = prepared_store("mixtral")
    spec = make_function_spec(store, [0, 1, 2], range(EXPERTS))
    request = request_for(store, range(EXPERTS), mode=OutputMode.REDUCED)
    taken = []
    for _ in range(20):
        before = torch.cuda.memory_allocated()
        function = ExpertFunction(spec, store, uploader=uploader)
        assert function.compute(request).isfinite().all()
        taken.append(torch.cuda.memory_allocated() - before)
        assert taken[-1] >= function.size_bytes
        del function
        assert torch.cuda.memory_allocated() == before
    assert len(set(taken)) == 1
