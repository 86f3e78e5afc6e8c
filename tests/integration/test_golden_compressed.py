"""Golden tests of checkpoints that compressed-tensors itself writes, through real sandboxes.

The logits equal those of `from_pretrained`, which decodes with the same package, where transformers
loads the format of a model with stacked experts; and always those of a plain checkpoint with the
weights that the package decodes. transformers 5.23 cannot load experts with zero points, in blocks,
in mxfp8 or in int-quantized, leaves out NVFP4's factors, and computes what is not an expert in
bfloat16 with mxfp4.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from published.checkpoints import Published, Write, build, publish
from published.compressed import compressed
from published.logits import (
    assert_equal_logits,
    family_named,
    kept_schemes,
    loaded_logits,
    served_logits,
)
from sandbox_processes import StartSandbox
from test_golden import Sandboxes

from faasmoe_contracts.store.references import StoreMode

INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
FP8 = {"num_bits": 8, "type": "float"}
E4M3, UINT8 = "torch.float8_e4m3fn", "torch.uint8"
NVFP4 = {
    **{"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
    **{"scale_dtype": E4M3, "zp_dtype": E4M3},
}
MX = {
    **{"type": "float", "strategy": "group", "group_size": 32},
    **{"scale_dtype": UINT8, "zp_dtype": UINT8},
}
FORMATS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "int4": ("int4", "pack-quantized", INT4),
    "int4-zeros": ("int4", "pack-quantized", INT4 | {"symmetric": False}),
    "int8-packed": ("int8", "pack-quantized", INT4 | {"num_bits": 8}),
    "int8": ("int8", "int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}),
    "int8-zeros": (
        "int8",
        "int-quantized",
        {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": False},
    ),
    "fp8": ("fp8", "float-quantized", FP8 | {"strategy": "channel"}),
    "fp8-tensor": ("fp8", "float-quantized", FP8 | {"strategy": "tensor"}),
    "fp8-block": (
        "fp8",
        "float-quantized",
        FP8 | {"strategy": "block", "block_structure": [32, 32]},
    ),
    "nvfp4": ("nvfp4", "nvfp4-pack-quantized", NVFP4),
    "mxfp4": ("mxfp4", "mxfp4-pack-quantized", MX | {"num_bits": 4}),
    "mxfp8": ("fp8", "mxfp8-quantized", MX | {"num_bits": 8}),
}
COPIED = ("int4-zeros", "int8-packed", "int8-zeros", "nvfp4")
"""Formats whose codes and scales are not read where the checkpoint has them."""
LOADED_BY_TRANSFORMERS = ("int4", "int8-packed", "fp8", "fp8-tensor")
CASES = [
    *((name, "qwen3_moe") for name in FORMATS),
    *(("int4", "deepseek_v3"), ("fp8", "glm4_moe"), ("fp8", "mixtral"), ("int8", "mixtral")),
]


@pytest.fixture(scope="module")
def sandboxes(sandbox: StartSandbox) -> Iterator[Sandboxes]:
    with ExitStack() as stack:
        yield tuple(stack.enter_context(sandbox(capacity=100, token="secret")) for _ in range(2))


def published(name: str, family: str, folder: Path) -> Published:
    _, layout, weights = FORMATS[name]
    write, config = compressed(layout, **weights)
    if family == "deepseek_v3":  # as Kimi K2 is published
        write = only_experts(write)
        (group,) = config["config_groups"].values()
        group["targets"] = [r"re:.*\.experts\..*_proj$"]
    return publish(build(family), folder, write, config, dtype=torch.float32)


def only_experts(write: Write) -> Write:
    return lambda name, weight: write(name, weight) if ".experts." in name else None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "family_name"), CASES)
def test_logits_equal_those_of_the_weights_that_the_package_decodes(
    name: str, family_name: str, sandboxes: Sandboxes, tmp_path: Path
) -> None:
    checkpoint = published(name, family_name, tmp_path)
    family = family_named(family_name)
    mode = StoreMode.COPY if name in COPIED else StoreMode.REFERENCE
    store, got = served_logits(checkpoint, family, sandboxes, mode=mode)
    assert kept_schemes(store) == {FORMATS[name][0]}
    assert_equal_logits(got, loaded_logits(checkpoint.reference, family, store))
    if name in LOADED_BY_TRANSFORMERS:
        assert_equal_logits(got, loaded_logits(checkpoint.folder, family, store))
