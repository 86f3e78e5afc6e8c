"""Damaged or unsupported quantised checkpoints: an error names file, tensor, got and expected."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from published.checkpoints import Published, Write, build, publish
from published.floats import fp8_blocks, fp8_scaled, gpt_oss
from published.integers import awq, gptq, nvfp4, packed_integers, plain_integers
from safetensors.torch import load_file, save_file
from torch import Tensor

from faasmoe_contracts.store.references import StoreMode
from faasmoe_router.checkpoint.formats.methods import METHODS, dequantized_tensors
from faasmoe_router.checkpoint.formats.settings import QuantizationSettings
from faasmoe_router.checkpoint.kept_codes import CodedSource
from faasmoe_router.checkpoint.prepare import prepare
from faasmoe_router.checkpoint.store_plan import SAFETENSORS_DTYPE_NAMES
from faasmoe_router.errors import PrepareError, SourceUnsupported

LAYER = "model.layers.1.mlp.experts.2.up_proj"
GPT_OSS_LAYER = "model.layers.1.mlp.experts.down_proj"
FP8 = {"quant_method": "fp8", "weight_block_size": [32, 32]}
INT4 = {
    "quant_method": "compressed-tensors",
    "config_groups": {"all": {"weights": {"num_bits": 4, "type": "int", "group_size": 32}}},
}
INT8 = {
    "quant_method": "compressed-tensors",
    "config_groups": {"all": {"weights": {"num_bits": 8, "type": "int", "group_size": 32}}},
}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32}
NVFP4 = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
FORMATS: dict[str, tuple[str, Write, dict[str, Any]]] = {
    "fp8": ("qwen3_moe", fp8_blocks(block=32), FP8),
    "fp8-row": ("qwen3_moe", fp8_scaled("row"), {"quant_method": "fbgemm_fp8"}),
    "int4": ("qwen3_moe", packed_integers(), INT4),
    "int8": ("qwen3_moe", plain_integers(group=32), INT8),
    "int8-zeros": ("qwen3_moe", plain_integers(group=32, symmetric=False), INT8),
    "int4-zeros": ("qwen3_moe", packed_integers(symmetric=False), INT4),
    "gptq": ("qwen3_moe", gptq(), GPTQ),
    "awq": ("qwen3_moe", awq(), AWQ),
    "nvfp4": ("qwen3_moe", nvfp4(), NVFP4),
    "mxfp4": ("gpt_oss", gpt_oss(), {"quant_method": "mxfp4"}),
}
Change = Callable[[dict[str, Tensor]], object]


def published(name: str, folder: Path) -> Published:
    family, write, config = FORMATS[name]
    return publish(build(family), folder, write, config)


def put(name: str, value: Any) -> Change:
    """Return a change that puts a tensor in the place of another, or a number into its corner."""

    def change(tensors: dict[str, Tensor]) -> None:
        if isinstance(value, Tensor):
            tensors[name] = value
        else:
            tensors[name].view(-1)[0] = value

    return change


def drop(name: str) -> Change:
    return lambda tensors: tensors.pop(name)


SCALES = f"{LAYER}.weight_scale_inv"
LAYER_CODES = r"model\.layers\.1\.mlp\.experts: expert 2 \(.*gate_up_proj"


def put_nan_code(tensors: dict[str, Tensor]) -> None:
    tensors[f"{LAYER}.weight"].view(torch.uint8).view(-1)[0] = 0x7F


@pytest.mark.parametrize(
    ("name", "change", "tensor", "got", "expected"),
    [
        pytest.param(
            "fp8", drop(SCALES), f"{LAYER}.weight", f"no tensor {SCALES}", "F32", id="missing"
        ),
        pytest.param(
            "fp8", put(SCALES, torch.ones(2, 2)), SCALES, r"shape \[2, 2\]", r"\[3, 2\]", id="shape"
        ),
        pytest.param(
            "fp8", put(SCALES, torch.ones(1, 1)), SCALES, r"\[1, 1\]", "per 32 x 32", id="block"
        ),
        pytest.param("fp8", put(SCALES, math.nan), SCALES, "first nan", "finite", id="nan"),
        pytest.param("fp8", put(SCALES, math.inf), SCALES, "first inf", "finite", id="inf"),
        pytest.param("fp8", put(SCALES, 0.0), SCALES, "first 0.0", "other than 0", id="zero"),
        pytest.param(
            "fp8",
            put(SCALES, torch.ones(3, 2, dtype=torch.int32)),
            SCALES,
            "dtype I32",
            "F32, BF16",
            id="scale-dtype",
        ),
        pytest.param(
            "fp8", put_nan_code, f"{LAYER}.weight", "not finite", "numbers",
            id="nan-code",
        ),
        pytest.param(
            "fp8",
            put(f"{LAYER}.weight", torch.ones(96, 64).to(torch.float8_e5m2)),
            f"{LAYER}.weight",
            "dtype F8_E5M2",
            "F8_E4M3",
            id="e5m2",
        ),
        pytest.param(
            "fp8-row",
            put(f"{LAYER}.weight_scale", torch.ones(95, 1)),
            f"{LAYER}.weight_scale",
            r"shape \[95, 1\]",
            r"\[96, 1\]: one scale per 1 x 64",
            id="rows",
        ),
        pytest.param(
            "mxfp4", drop(f"{GPT_OSS_LAYER}_scales"), f"{GPT_OSS_LAYER}_blocks", "no tensor", "U8",
            id="mxfp4-scales",
        ),
        pytest.param(
            "mxfp4", drop(f"{GPT_OSS_LAYER}_blocks"), f"{GPT_OSS_LAYER}_scales", "no tensor", "U8",
            id="mxfp4-blocks",
        ),
        pytest.param(
            "mxfp4", put(f"{GPT_OSS_LAYER}_scales", 255), f"{GPT_OSS_LAYER}_scales", "NaN",
            "finite", id="mxfp4-nan",
        ),
        pytest.param(
            "mxfp4",
            put(f"{GPT_OSS_LAYER}_scales", torch.ones(8, 64, 1, dtype=torch.uint8)),
            f"{GPT_OSS_LAYER}_scales",
            r"shape \[8, 64, 1\]",
            "one scale per 32 columns",
            id="mxfp4-shape",
        ),
        pytest.param(
            "int4", drop(f"{LAYER}.weight_shape"), f"{LAYER}.weight_packed", "no tensor", "I64",
            id="int4-without-shape",
        ),
        pytest.param(
            "int4", put(f"{LAYER}.weight_shape", torch.tensor([96, 96])), f"{LAYER}.weight_packed",
            "96 x 96 weights with num_bits", r"\[96, 12\] \(4 bits\)", id="int4-other-shape",
        ),
        pytest.param(
            "int4", put(f"{LAYER}.weight_scale", torch.ones(96, 4)), f"{LAYER}.weight_scale",
            r"shape \[96, 4\]", r"\[96, 2\]: one scale per row and group", id="int4-group",
        ),
        pytest.param(
            "int4", put(f"{LAYER}.weight_scale", 0.0), f"{LAYER}.weight_scale", "first 0.0",
            "other than 0", id="int4-zero-scale",
        ),
        pytest.param(
            "gptq", drop(f"{LAYER}.qzeros"), f"{LAYER}.qweight", "no tensor", "I32",
            id="gptq-without-zeros",
        ),
        pytest.param(
            "gptq", put(f"{LAYER}.qzeros", 5), f"{LAYER}.qweight", "a zero point of", "8 for all",
            id="gptq-asymmetric",
        ),
        pytest.param(
            "gptq", put(f"{LAYER}.g_idx", 1), f"{LAYER}.qweight", "another order", "no such order",
            id="gptq-order",
        ),
        pytest.param(
            "gptq", put(f"{LAYER}.scales", torch.ones(1, 96)), f"{LAYER}.scales",
            r"shape \[1, 96\]", r"\[2, 96\]", id="gptq-group",
        ),
        pytest.param(
            "int8-zeros", drop(f"{LAYER}.weight_scale"), f"{LAYER}.weight", "no tensor", "F32",
            id="int8-without-scales",
        ),
        pytest.param(
            "int8-zeros", put(f"{LAYER}.weight_zero_point", torch.ones(96, 3, dtype=torch.int8)),
            f"{LAYER}.weight_zero_point", r"shape \[96, 3\]", r"\[96, 2\]: as the scales",
            id="int8-zero-shape",
        ),
        pytest.param(
            "int4-zeros", put(f"{LAYER}.weight_zero_point", torch.ones(96, 2, dtype=torch.int8)),
            f"{LAYER}.weight_zero_point", "dtype I8", "I32", id="int4-zero-dtype",
        ),
        pytest.param(
            "awq", put(f"{LAYER}.scales", math.inf), f"{LAYER}.scales", "first inf", "other than 0",
            id="awq-inf",
        ),
        pytest.param(
            "gptq", put(f"{LAYER}.scales", math.nan), f"{LAYER}.scales", "first nan", "finite",
            id="gptq-nan",
        ),
        pytest.param(
            "nvfp4", put(f"{LAYER}.weight_scale", math.nan), f"{LAYER}.weight_scale", "first nan",
            "finite", id="nvfp4-nan",
        ),
        pytest.param(
            "nvfp4", put(f"{LAYER}.weight_scale", torch.ones(96, 2).to(torch.float8_e4m3fn)),
            f"{LAYER}.weight_scale", r"shape \[96, 2\]", r"\[96, 4\]: one scale per 1 x 16",
            id="nvfp4-shape",
        ),
        pytest.param(
            "awq", put(f"{LAYER}.scales", torch.ones(96, 2)), f"{LAYER}.scales",
            r"shape \[96, 2\]", r"\[2, 96\]", id="awq-shape",
        ),
        pytest.param(
            "nvfp4", drop(f"{LAYER}.weight_scale_2"), f"{LAYER}.weight", "no tensor", "F32",
            id="nvfp4-global",
        ),
        pytest.param(
            "nvfp4", put(f"{LAYER}.weight_scale_2", torch.tensor(0.0)), f"{LAYER}.weight_scale_2",
            "first 0.0", "other than 0", id="nvfp4-zero",
        ),
        pytest.param(
            "nvfp4", put(f"{LAYER}.pre_quant_scale", torch.ones(64)), f"{LAYER}.pre_quant_scale",
            "scales of a weight's inputs", "none", id="nvfp4-awq",
        ),
    ],
)  # fmt: skip
def test_damaged_tensors_are_named(
    name: str, change: Change, tensor: str, got: str, expected: str, tmp_path: Path
) -> None:
    folder = published(name, tmp_path).folder
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    pattern = f"{re.escape(str(file))}: {re.escape(tensor)}: got .*{got}.*, expected .*{expected}"
    with pytest.raises(SourceUnsupported, match=pattern):
        prepare(str(folder), tmp_path / "store")


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        pytest.param(
            "fp8",
            {"quant_method": "bitsandbytes"},
            r"quantization_config: got quant_method 'bitsandbytes' "
            r"\(model\.layers\.0\..*weight in .*model\.safetensors\), expected .* fp8",
            id="method",
        ),
        pytest.param("fp8", {"quant_method": None}, "got quant_method None", id="no-method"),
        pytest.param("fp8", {"weight_block_size": [128, 128]}, "per 128 x 128", id="block"),
        pytest.param(
            "fp8", {"weight_block_size": [0, 1]}, r"weight_block_size: got \[0, 1\]", id="0"
        ),
        pytest.param("fp8", {"expert_dtype": "fp6"}, 'expert_dtype: got "fp6"', id="expert-dtype"),
        pytest.param("gptq", {"bits": 3}, "got 3 bits, expected 2, 4 or 8", id="gptq-3-bits"),
        pytest.param(
            "gptq",
            {"group_size": 64},
            r"scales: got shape \[3, 64\], expected \[2, 64\]",
            id="gptq-group",
        ),
        pytest.param("gptq", {"group_size": 0}, "group_size: got 0", id="gptq-no-group"),
        pytest.param("gptq", {"checkpoint_format": "marlin"}, 'got "marlin"', id="gptq-marlin"),
        pytest.param("awq", {"version": "gemv"}, 'version: got "gemv"', id="awq-gemv"),
        pytest.param("awq", {"bits": 8}, "bits: got 8, expected 4", id="awq-8-bits"),
        pytest.param("int4", {"config_groups": {}}, "expected an object of groups", id="groups"),
        pytest.param("int4", {"transform_config": {"a": 1}}, "transform_config", id="transform"),
        pytest.param(
            "int4", {"sparsity_config": {"format": "sparse-24"}}, "sparsity_config", id="sparse"
        ),
        pytest.param(
            "nvfp4", {"quant_algo": "INT4_AWQ"}, 'quant_algo: got "INT4_AWQ"', id="modelopt"
        ),
        pytest.param("mxfp4", {"quant_method": "fp8"}, "no tensor of its codes", id="no-codes"),
    ],
)
def test_unsupported_settings_are_named(
    name: str, fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = published(name, tmp_path).folder
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= fields
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceUnsupported, match=message):
        prepare(str(folder), tmp_path / "store")


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = published("fp8", tmp_path).folder
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(PrepareError, match=r"names model-00002-of-00002\.safetensors, got only"):
        prepare(str(folder), tmp_path / "store")


class MemoryTensor:
    """A tensor in memory, read as one of a file."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def get_shape(self) -> list[int]:
        return list(self._tensor.shape)

    def get_dtype(self) -> str:
        names = {
            **SAFETENSORS_DTYPE_NAMES,
            torch.float8_e4m3fn: "F8_E4M3",
            torch.float8_e5m2: "F8_E5M2",
            torch.float8_e8m0fnu: "F8_E8M0",
        }
        return str(names[self._tensor.dtype])

    def __getitem__(self, index: Any) -> Tensor:
        return self._tensor[index]


def one_layer(write: Write) -> dict[str, Tensor]:
    """Return what is published of one layer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        weight = torch.randn(64, 64)
    stacked = write("layer.down_proj", weight[None].expand(2, 64, 64))
    written = stacked or write("layer.weight", weight)
    assert written is not None
    return {name: tensor.contiguous() for name, tensor in written[0].items()}


SHAPES = st.lists(st.integers(0, 70), max_size=4).filter(lambda shape: math.prod(shape) < 10_000)
DTYPES = st.sampled_from(
    [torch.float32, torch.uint8, torch.int8, torch.int32, torch.int64, torch.float8_e4m3fn]
)


@pytest.mark.parametrize("name", FORMATS)
@hypothesis_settings(max_examples=60)
@given(data=st.data())
def test_any_tensors_are_read_or_refused(name: str, data: st.DataObject) -> None:
    """Whatever shape, dtype and bytes the parts of a weight have: no other error than ours."""
    _, write, config = FORMATS[name]
    parts = one_layer(write)
    for part in data.draw(st.sets(st.sampled_from(sorted(parts)), max_size=2)):
        if data.draw(st.booleans()):
            shape = tuple(parts[part].shape)
            shape = shape if data.draw(st.booleans()) else tuple(data.draw(SHAPES))
            dtype = parts[part].dtype if data.draw(st.booleans()) else data.draw(DTYPES)
            byte = data.draw(st.integers(0, 255))
            n_bytes = math.prod(shape) * dtype.itemsize
            parts[part] = torch.full((n_bytes,), byte, dtype=torch.uint8).view(dtype).view(shape)
        else:
            del parts[part]
    settings = QuantizationSettings(config["quant_method"], "config.json", config)
    assert settings.method in METHODS
    tensors = {part: MemoryTensor(tensor) for part, tensor in parts.items()}
    refusal = ""
    try:
        for tensor in dequantized_tensors(tensors, [], settings).values():
            if tensor.get_shape():
                assert tensor[...].shape == tuple(tensor.get_shape())
            if isinstance(tensor, CodedSource) and tensor.stored is not None:
                stored = tensor.read_stored(0, tensor.get_shape()[0])
                assert set(stored) == set(tensor.stored.components)
                tensor.check_scales()
    except SourceUnsupported as error:
        refusal = str(error)
    assert not refusal or re.search("got .*, expected", refusal)


@pytest.mark.parametrize(
    ("name", "change", "tensor", "got"),
    [
        ("fp8", put(SCALES, math.nan), SCALES, "first nan"),
        ("fp8", put(SCALES, 0.0), SCALES, "first 0.0"),
        ("fp8", put_nan_code, LAYER_CODES, "values that are NaN or infinite"),
        ("nvfp4", put(f"{LAYER}.weight_scale_2", 0.0), f"{LAYER}.weight_scale_2", "first 0.0"),
        ("mxfp4", put(f"{GPT_OSS_LAYER}_scales", 255), f"{GPT_OSS_LAYER}_scales", "NaN"),
        ("int4", put(f"{LAYER}.weight_scale", math.nan), f"{LAYER}.weight_scale", "first nan"),
        ("int8", put(f"{LAYER}.weight_scale", 0.0), f"{LAYER}.weight_scale", "first 0.0"),
    ],
)
def test_damage_is_named_where_codes_are_referred_to(
    name: str, change: Change, tensor: str, got: str, tmp_path: Path
) -> None:
    folder = published(name, tmp_path).folder
    file = folder / "model.safetensors"
    prepare(str(folder), tmp_path / "sound", mode=StoreMode.REFERENCE)
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(PrepareError, match=f"{re.escape(str(file))}: .*{tensor}.*: got .*{got}"):
        prepare(str(folder), tmp_path / "store", mode=StoreMode.REFERENCE)
