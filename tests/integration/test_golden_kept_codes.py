"""Golden tests of codes that a store keeps as published, over the families that publish so.

A family's checkpoint is written as the publishers' tools write it and prepared, with the codes
copied and referred to. Layer by layer, with three block sizes, natively and over the
general path, functions equal transformers' module with the weights that the writer meant.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families.registry import experts_modules
from published.checkpoints import Published, Write, build, publish
from published.floats import fp8_blocks, fp8_scaled, gpt_oss, mxfp8
from published.integers import awq, gptq, nvfp4, packed_integers, plain_integers
from test_golden import EXPERTS_PER_FUNCTION
from test_golden_quantized import assert_equal, general_path, path, random_call, through_functions

from faasmoe_contracts.store import Store
from faasmoe_contracts.store.references import StoreMode
from faasmoe_contracts.wire import OutputMode
from faasmoe_router.checkpoint.prepare import prepare

__all__ = ["general_path", "path"]

FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32]}


def compressed(**weights: Any) -> dict[str, Any]:
    group = {"weights": {"type": "int", "group_size": 32, **weights}}
    return {"quant_method": "compressed-tensors", "config_groups": {"all": group}}


FORMATS: dict[str, tuple[str, Write, dict[str, Any]]] = {
    "fp8-blocks": ("fp8", fp8_blocks(block=32), FP8),
    "fp8-uneven": ("fp8", fp8_blocks(), FP8 | {"weight_block_size": [128, 128]}),
    "fp8-rows": ("fp8", fp8_scaled("row"), {"quant_method": "fbgemm_fp8"}),
    "fp8-tensors": (
        "fp8",
        fp8_scaled("tensor", suffix="weight_scale_inv"),
        FP8 | {"weight_block_size": None},
    ),
    "mxfp8": ("fp8", mxfp8(), {"quant_method": "mxfp8", "weight_block_size": [1, 32]}),
    "nvfp4": ("nvfp4", nvfp4(), {"quant_method": "modelopt", "quant_algo": "NVFP4"}),
    "awq": ("int4", awq(), {"quant_method": "awq", "bits": 4, "group_size": 32}),
    "int4": ("int4", packed_integers(), compressed(num_bits=4)),
    "int4-zeros": (
        "int4",
        packed_integers(symmetric=False),
        compressed(num_bits=4, symmetric=False),
    ),
    "int8-groups": ("int8", plain_integers(group=32), compressed(num_bits=8)),
    "int8-zeros": (
        "int8",
        gptq(bits=8, symmetric=False),
        {"quant_method": "gptq", "bits": 8, "group_size": 32, "sym": False},
    ),
    "mxfp4": ("mxfp4", gpt_oss(), {"quant_method": "mxfp4"}),
}
QUICK = {
    ("fp8-blocks", "qwen3_moe"),
    ("fp8-uneven", "mixtral"),
    ("fp8-tensors", "glm4_moe"),
    ("nvfp4", "qwen3_moe"),
    ("awq", "mixtral"),
    ("int4", "mixtral"),
    ("int8-groups", "qwen3_moe"),
    ("int8-zeros", "qwen3_moe"),
    ("mxfp4", "gpt_oss"),
}
STACKED_LINEARS = (
    "afmoe",
    "deepseek_v2",
    "deepseek_v3",
    "dots1",
    "ernie4_5_moe",
    "exaone_moe",
    "flex_olmo",
    "glm4_moe",
    "hunyuan_v1_moe",
    "hy_v3",
    "minimax",
    "minimax_m2",
    "mixtral",
    "olmoe",
    "phimoe",
    "qwen2_moe",
    "qwen3_moe",
    "qwen3_next",
    "solar_open",
)
"""Families whose experts are published as linear layers, [out, in], of gate, up and down."""
COPIED = ("awq", "int4-zeros", "int8-zeros")
"""Formats whose codes and scales are not read where the checkpoint has them."""


def cases() -> Iterator[Any]:
    for name in FORMATS:
        for family in ("gpt_oss",) if name == "mxfp4" else STACKED_LINEARS:
            marks = [] if (name, family) in QUICK else [pytest.mark.slow]
            yield pytest.param(name, family, id=f"{name}-{family}", marks=marks)


def experts_only(write: Write) -> Write:
    """Return a writer of experts, whose sizes fit all formats; others of tiny models do not."""
    return lambda name, weight: write(name, weight) if ".experts." in name else None


def expected_modules(checkpoint: Published, store: Store) -> list[Any]:
    """Return transformers' experts modules with the dequantised weights, in float32."""
    model_class = getattr(transformers, store.manifest.model.architecture)
    model = model_class.from_pretrained(checkpoint.reference, dtype=torch.float32).eval()
    model.set_experts_implementation("eager")
    return list(experts_modules(model).values())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "family"), list(cases()))
def test_functions_equal_the_module_with_the_published_weights(
    name: str, family: str, path: str, tmp_path: Path
) -> None:
    scheme, write, config = FORMATS[name]
    model = build(family)
    checkpoint = publish(model, tmp_path, experts_only(write), config, dtype=torch.float32)
    make = partial(prepare, str(checkpoint.folder))
    modes = [StoreMode.COPY, *([] if name in COPIED else [StoreMode.REFERENCE])]
    stores = [make(tmp_path / f"store-{mode.value}", mode=mode) for mode in modes]
    modules = expected_modules(checkpoint, stores[0])
    for store in stores:
        assert len(modules) == len(store.manifest.layers)
        for layer, module in zip(store.manifest.layers, modules, strict=True):
            assert {entry.scheme for entry in layer.quantization.values()} == {scheme}
            assert bool(layer.file) == (store is stores[0])
            call = random_call(store, layer.index)
            with torch.no_grad():
                expected = module(*call)  # [T, H]
            for block in EXPERTS_PER_FUNCTION:
                for mode in OutputMode:
                    got = through_functions(store, layer.index, call, block=block, mode=mode)
                    assert_equal(got, expected, path)
