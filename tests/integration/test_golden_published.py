"""Golden tests of checkpoints that are published quantised, through real sandboxes.

The logits equal those of `from_pretrained` where transformers loads the format on a CPU, and else
those of the model with the weights that the writer meant.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from published.checkpoints import Published, Write, build, publish
from published.floats import deepseek_v4, fp8_blocks, gpt_oss, mxfp8
from published.integers import awq, gptq, nvfp4
from published.logits import (
    assert_equal_logits,
    family_named,
    kept_schemes,
    loaded_logits,
    served_logits,
)
from sandbox_processes import StartSandbox
from test_golden import Sandboxes

FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
FP4 = FP8 | {"scale_fmt": "ue8m0", "expert_dtype": "fp4"}
FP8_SIZES = {"hidden_size": 128, "moe_intermediate_size": 128, "intermediate_size": 128}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
NVFP4 = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32}
MXFP8 = {"quant_method": "mxfp8", "weight_block_size": [1, 32], "scale_fmt": "ue8m0"}
FORMATS: dict[str, tuple[str, Write, dict[str, Any], dict[str, Any]]] = {
    # Families in the formats that their publishers, or those of quantised copies, use.
    "fp8-qwen3_moe": ("qwen3_moe", fp8_blocks(), FP8, FP8_SIZES),
    "fp8-minimax_m2": ("minimax_m2", fp8_blocks(), FP8, FP8_SIZES),
    "fp8-deepseek_v3": ("deepseek_v3", fp8_blocks(), FP8, FP8_SIZES),
    "fp4-deepseek_v4": ("deepseek_v4", deepseek_v4(), FP4, FP8_SIZES),
    "mxfp4-gpt_oss": ("gpt_oss", gpt_oss(), {"quant_method": "mxfp4"}, {}),
    "mxfp8-qwen3_moe": ("qwen3_moe", mxfp8(), MXFP8, {}),
    "gptq-qwen2_moe": ("qwen2_moe", gptq(), GPTQ, {"shared_expert_intermediate_size": 64}),
    "gptq-qwen3_moe": ("qwen3_moe", gptq(), GPTQ, {}),
    "gptq-mixtral": ("mixtral", gptq(), GPTQ, {}),
    "awq-qwen3_moe": ("qwen3_moe", awq(), AWQ, {}),
    "awq-mixtral": ("mixtral", awq(), AWQ, {}),
    "nvfp4-qwen3_moe": ("qwen3_moe", nvfp4(), NVFP4, {}),
    "nvfp4-deepseek_v3": ("deepseek_v3", nvfp4(), NVFP4, {}),
}
LOADED_BY_TRANSFORMERS = (
    *("fp8-qwen3_moe", "fp8-minimax_m2", "fp4-deepseek_v4", "mxfp8-qwen3_moe", "mxfp4-gpt_oss"),
)
KEPT_SCHEMES = {
    **dict.fromkeys(("mxfp4", "fp4"), "mxfp4"),
    **dict.fromkeys(("gptq", "awq"), "int4"),
    **dict.fromkeys(("fp8", "mxfp8"), "fp8"),
    "nvfp4": "nvfp4",
}


@pytest.fixture(scope="module")
def sandboxes(sandbox: StartSandbox) -> Iterator[Sandboxes]:
    with ExitStack() as stack:
        yield tuple(stack.enter_context(sandbox(capacity=100, token="secret")) for _ in range(2))


def published(name: str, folder: Path, dtype: torch.dtype) -> Published:
    family, write, config, sizes = FORMATS[name]
    return publish(build(family, **sizes), folder, write, config, dtype=dtype)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FORMATS)
def test_logits_equal_those_of_the_weights_that_the_writer_meant(
    name: str, sandboxes: Sandboxes, tmp_path: Path
) -> None:
    family = family_named(FORMATS[name][0])
    checkpoint = published(name, tmp_path, torch.float32)
    store, got = served_logits(checkpoint, family, sandboxes)
    assert kept_schemes(store) == {KEPT_SCHEMES[name.rpartition("-")[0]]}
    assert_equal_logits(got, loaded_logits(checkpoint.reference, family, store))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", LOADED_BY_TRANSFORMERS)
def test_logits_are_those_of_from_pretrained_but_for_rounding(
    name: str, sandboxes: Sandboxes, tmp_path: Path
) -> None:
    """The same weights, which transformers rounds to bfloat16; functions' outputs are bfloat16.

    Where two experts are almost as good for a gate, rounding decides, and that position differs.
    """
    family = family_named(FORMATS[name][0])
    checkpoint = published(name, tmp_path, torch.bfloat16)
    store, got = served_logits(checkpoint, family, sandboxes)
    expected = loaded_logits(checkpoint.folder, family, store, torch.bfloat16)
    errors = (got - expected).norm(dim=-1) / expected.norm(dim=-1)  # [B, S]
    assert errors.quantile(0.9) <= 0.02
