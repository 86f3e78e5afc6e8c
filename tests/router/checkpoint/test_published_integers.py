"""Checkpoints of GPTQ, AWQ, compressed-tensors and Model Optimizer hold what their writer meant."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from published.checkpoints import Write, build, publish
from published.comparison import assert_same_weights, stored_weights
from published.floats import fp8_blocks, fp8_scaled, mxfp8
from published.integers import awq, gptq, nvfp4, packed_integers, plain_integers

from faasmoe_contracts.store import Store
from faasmoe_contracts.store.references import StoreMode, describe_weights
from faasmoe_router.checkpoint.prepare import prepare
from faasmoe_router.errors import SourceUnsupported


def gptq_config(**fields: Any) -> dict[str, Any]:
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
    return config | fields


def compressed(**weights: Any) -> dict[str, Any]:
    defaults = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"}
    group = {"targets": ["Linear"], "weights": {**defaults, "group_size": 32, **weights}}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


FLOAT8 = {"num_bits": 8, "type": "float", "group_size": None}
NVFP4 = {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16}
FORMATS: dict[str, tuple[Write, dict[str, Any], str | None]] = {
    "gptq": (gptq(), gptq_config(), "int4"),
    "gptq-v2": (gptq(version=2), gptq_config(checkpoint_format="gptq_v2"), "int4"),
    "gptq-row": (gptq(group=-1), gptq_config(group_size=-1), "int4"),
    "gptq-8-bit": (gptq(bits=8), gptq_config(bits=8), "int8"),
    "gptq-2-bit": (gptq(bits=2), gptq_config(bits=2), None),
    "gptq-dynamic": (gptq(bits=8), gptq_config(dynamic={"+:.*": {"bits": 8}}), "int8"),
    "gptq-asymmetric": (gptq(symmetric=False), gptq_config(sym=False), "int4"),
    "gptq-8-bit-asymmetric": (
        gptq(bits=8, symmetric=False),
        gptq_config(bits=8, sym=False),
        "int8",
    ),
    "gptq-order": (gptq(order=True), gptq_config(desc_act=True), None),
    "gptq-group-16": (gptq(group=16), gptq_config(group_size=16), None),
    "awq": (
        awq(),
        {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True},
        "int4",
    ),
    "ct-int4": (packed_integers(), compressed(), "int4"),
    "ct-int4-row": (
        packed_integers(group=-1),
        compressed(strategy="channel", group_size=-1),
        "int4",
    ),
    "ct-int8-packed": (packed_integers(bits=8), compressed(num_bits=8), "int8"),
    "ct-int4-asymmetric": (packed_integers(symmetric=False), compressed(symmetric=False), "int4"),
    "ct-int8-packed-asymmetric": (
        packed_integers(bits=8, symmetric=False),
        compressed(num_bits=8, symmetric=False),
        "int8",
    ),
    "ct-int4-order": (packed_integers(order=True), compressed(actorder="group"), None),
    "ct-int8": (
        plain_integers(),
        compressed(num_bits=8, strategy="channel", group_size=None),
        "int8",
    ),
    "ct-int8-groups": (plain_integers(group=32), compressed(num_bits=8), "int8"),
    "ct-int8-asymmetric": (
        plain_integers(symmetric=False),
        compressed(num_bits=8, strategy="channel", symmetric=False, group_size=None),
        "int8",
    ),
    "ct-fp8": (fp8_scaled("row"), compressed(**FLOAT8, strategy="channel"), "fp8"),
    "ct-fp8-tensor": (fp8_scaled("tensor"), compressed(**FLOAT8, strategy="tensor"), "fp8"),
    "ct-fp8-block": (
        fp8_blocks(block=32, suffix="weight_scale"),
        compressed(**FLOAT8, strategy="block", block_structure=[32, 32]),
        "fp8",
    ),
    "ct-mxfp8": (
        mxfp8(suffix="weight_scale"),
        compressed(**FLOAT8 | {"group_size": 32}, strategy="group"),
        "fp8",
    ),
    "ct-nvfp4": (
        nvfp4(is_divisor=True),
        compressed(type="float", strategy="tensor_group", group_size=16),
        "nvfp4",
    ),
    "modelopt-nvfp4": (nvfp4(), NVFP4, "nvfp4"),
    "modelopt-fp8": (
        fp8_scaled("tensor"),
        {"quant_method": "modelopt", "quant_algo": "FP8"},
        "fp8",
    ),
    "modelopt-fp8-block": (
        fp8_blocks(suffix="weight_scale"),
        {"quant_method": "modelopt", "quant_algo": "FP8_PB_WO"},
        "fp8",
    ),
    "modelopt-mxfp8": (
        mxfp8(suffix="weight_scale"),
        {"quant_method": "modelopt", "quant_algo": "MXFP8"},
        "fp8",
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_holds_the_weights_that_the_writer_meant(name: str, tmp_path: Path) -> None:
    write, config, scheme = FORMATS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        checkpoint = publish(build("qwen3_moe"), tmp_path, write, config)
    store = prepare(str(checkpoint.folder), tmp_path / "store")
    expected = prepare(str(checkpoint.reference), tmp_path / "expected")
    # A divisor is kept as its reciprocal, in float32, before weights are rounded to bfloat16.
    rtol = 2**-7 if name == "ct-nvfp4" else 0.0
    assert_same_weights(stored_weights(store), stored_weights(expected), rtol=rtol)
    schemes = {e.scheme for layer in store.manifest.layers for e in layer.quantization.values()}
    assert schemes == ({scheme} if scheme else set())


REFERRED = (
    *("ct-int4", "ct-int4-row", "ct-int8", "ct-int8-groups", "ct-fp8", "ct-fp8-tensor"),
    *("ct-fp8-block", "ct-mxfp8", "modelopt-nvfp4", "modelopt-fp8", "modelopt-mxfp8"),
)
COPIED = {
    "gptq": "int4 codes are not laid out as kernels read them",
    "awq": "int4 codes are not laid out as kernels read them",
    "ct-int8-packed": "int8 codes are not laid out as kernels read them",
    "ct-int4-asymmetric": "int4 codes are not laid out as kernels read them",
    "ct-int8-asymmetric": "int8 codes are not laid out as kernels read them",
    "ct-nvfp4": "nvfp4 factors are not laid out as kernels read them",
    "gptq-2-bit": "decoded",
}


def prepared(name: str, folder: Path, mode: StoreMode) -> Store:
    write, config, _ = FORMATS[name]
    if not (folder / "published").exists():
        publish(build("qwen3_moe"), folder, write, config)
    return prepare(str(folder / "published"), folder / f"store-{mode.value}", mode=mode)


@pytest.mark.parametrize("name", REFERRED)
def test_codes_that_lie_as_kernels_read_them_are_referred_to(name: str, tmp_path: Path) -> None:
    copy = prepared(name, tmp_path, StoreMode.COPY)
    store = prepared(name, tmp_path, StoreMode.REFERENCE)
    assert store.manifest.published == copy.manifest.published
    for layer, other in zip(store.manifest.layers, copy.manifest.layers, strict=True):
        assert not layer.file
        assert layer.quantization == other.quantization
        got, expected = store.map_layer(layer.index), copy.map_layer(layer.index)
        assert set(got.tensors) == set(expected.tensors)
        for tensor, view in expected.tensors.items():
            assert got.tensors[tensor].shape == view.shape
            assert got.tensors[tensor].dtype == view.dtype
            pieces = got.tensors[tensor].pieces
            assert b"".join(piece.buffer for piece in pieces) == bytes(view.buffer)


@pytest.mark.parametrize("name", COPIED)
def test_codes_that_do_not_are_copied_and_plan_says_why(name: str, tmp_path: Path) -> None:
    entry = prepared(name, tmp_path, StoreMode.AUTO).manifest.checkpoint
    assert entry is not None
    assert not entry.layers
    (reason,) = {why for why, names in entry.copied.items() if any("experts" in n for n in names)}
    assert COPIED[name] in reason
    lines = describe_weights(3, entry)
    assert any(line.startswith("copied: model.layers.0.mlp.experts and 2 more: ") for line in lines)
    with pytest.raises(SourceUnsupported, match=re.escape(f"must be copied: {reason}")):
        prepared(name, tmp_path, StoreMode.REFERENCE)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        (
            "gptq-8-bit-asymmetric",
            r"int8 in groups of 32 with zero points are kept as int8: .* 0.96 times",
        ),
        ("ct-int8-asymmetric", r"int8 in rows with zero points are kept as int8: .* 1.0"),
        ("gptq-2-bit", r"int2 in groups of 32 are dequantised to bfloat16: .* \d\.\d+ times the"),
        (
            "gptq-order",
            r"int4 in groups of 32 in another order are dequantised .* 3\.\d+ times the",
        ),
        ("gptq-group-16", r"int4 in groups of 16 are dequantised to bfloat16: .* 2\.\d+ times the"),
    ],
)
def test_plan_says_what_becomes_of_the_codes_and_what_it_costs(
    name: str, line: str, tmp_path: Path
) -> None:
    store = prepared(name, tmp_path, StoreMode.COPY)
    (experts,) = [str(e) for e in store.manifest.published if e.part == "experts"]
    assert re.match(rf"experts: 6 weights in {line}", experts)


def test_reads_the_settings_of_model_optimizer_from_its_own_file(tmp_path: Path) -> None:
    checkpoint = publish(build("qwen3_moe"), tmp_path, nvfp4(), {})
    own_file = checkpoint.folder / "hf_quant_config.json"
    own_file.write_text('{"producer": {}, "quantization": {"quant_algo": "NVFP4"}}')
    store = prepare(str(checkpoint.folder), tmp_path / "store")
    expected = prepare(str(checkpoint.reference), tmp_path / "expected")
    assert_same_weights(stored_weights(store), stored_weights(expected))
    assert not (store.path / "model" / own_file.name).exists()
