"""Golden tests of checkpoints that GPTQModel and Model Optimizer write, through real sandboxes.

Run by `make test-publishers`, which installs their packages apart: both ask for another torch than
this project's. `from_pretrained` is no reference for these formats: with GPTQModel, transformers
5.23 leaves the experts of GPTQ and AWQ checkpoints random (their tensors are reported as
unexpected), and it does not read Model Optimizer's. So the logits equal those of a plain checkpoint
with the weights that the publisher's package decodes.
"""

import importlib
import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from published.checkpoints import Write, build, linears, publish
from published.logits import (
    assert_equal_logits,
    family_named,
    kept_schemes,
    loaded_logits,
    served_logits,
)
from sandbox_processes import StartSandbox
from test_golden import Sandboxes

if os.environ.get("REQUIRE_PUBLISHERS"):
    publishers: Any = importlib.import_module("published.publishers")
else:
    publishers = pytest.importorskip(
        "published.publishers", reason="make test-publishers", exc_type=ImportError
    )

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
FORMATS: dict[str, tuple[Write, dict[str, Any], str | None]] = {
    "gptq": (publishers.gptq(), GPTQ, "int4"),
    "gptq-zeros": (publishers.gptq(symmetric=False), GPTQ | {"sym": False}, "int4"),
    "gptq-8-bit": (publishers.gptq(bits=8), GPTQ | {"bits": 8}, "int8"),
    "gptq-8-bit-zeros": (
        publishers.gptq(bits=8, symmetric=False),
        GPTQ | {"bits": 8, "sym": False},
        "int8",
    ),
    "gptq-order": (publishers.gptq(order=True), GPTQ | {"desc_act": True}, None),
    "awq": (
        linears(publishers.awq),
        {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"},
        "int4",
    ),
    "nvfp4": (
        linears(publishers.nvfp4),
        {"quant_method": "modelopt", "quant_algo": "NVFP4"},
        "nvfp4",
    ),
}


@pytest.fixture(scope="module")
def sandboxes(sandbox: StartSandbox) -> Iterator[Sandboxes]:
    with ExitStack() as stack:
        yield tuple(stack.enter_context(sandbox(capacity=100, token="secret")) for _ in range(2))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family_name", ["qwen3_moe", "mixtral"])
@pytest.mark.parametrize("name", FORMATS)
def test_logits_equal_those_of_the_weights_that_the_publisher_decodes(
    name: str, family_name: str, sandboxes: Sandboxes, tmp_path: Path
) -> None:
    write, config, scheme = FORMATS[name]
    family = family_named(family_name)
    checkpoint = publish(build(family_name), tmp_path, write, config, dtype=torch.float32)
    # Experts that are dequantised are bfloat16, which the reference is rounded to as well.
    store, got = served_logits(checkpoint, family, sandboxes)
    assert kept_schemes(store) == ({scheme} if scheme else set())
    assert_equal_logits(got, loaded_logits(checkpoint.reference, family, store))
