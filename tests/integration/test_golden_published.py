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
import transformers
from families.inputs import prompts
from families.registry import FAMILIES, forward_logits
from published.checkpoints import Write, build, publish
from published.floats import fp8_blocks, gpt_oss
from published.integers import awq, gptq, nvfp4, packed_integers, plain_integers
from sandbox_processes import StartSandbox
from test_golden import TOLERANCE, Sandboxes, logits_through_functions

from faasmoe_contracts.wire import OutputMode
from faasmoe_router.checkpoint.prepare import prepare

FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
FP8_SIZES = {"hidden_size": 128, "moe_intermediate_size": 128, "intermediate_size": 128}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
NVFP4 = {"quant_method": "modelopt", "quant_algo": "NVFP4"}


def compressed(**weights: Any) -> dict[str, Any]:
    weights = {"type": "int", "symmetric": True, **weights}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "config_groups": groups}


FORMATS: dict[str, tuple[str, Write, dict[str, Any], dict[str, Any]]] = {
    "fp8": ("qwen3_moe", fp8_blocks(), FP8, FP8_SIZES),
    "mxfp4": ("gpt_oss", gpt_oss(), {"quant_method": "mxfp4"}, {}),
    "int4": ("qwen3_moe", packed_integers(), compressed(num_bits=4, group_size=32), {}),
    "int8": ("mixtral", plain_integers(), compressed(num_bits=8, strategy="channel"), {}),
    "gptq": ("qwen3_moe", gptq(), GPTQ, {}),
    "awq": ("qwen3_moe", awq(), {"quant_method": "awq", "bits": 4, "group_size": 32}, {}),
    "nvfp4": ("qwen3_moe", nvfp4(), NVFP4, {}),
}
LOADED_BY_TRANSFORMERS = ("fp8", "mxfp4")


@pytest.fixture(scope="module")
def sandboxes(sandbox: StartSandbox) -> Iterator[Sandboxes]:
    with ExitStack() as stack:
        yield tuple(stack.enter_context(sandbox(capacity=100, token="secret")) for _ in range(2))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FORMATS)
def test_logits_equal_those_of_the_dequantised_model(
    name: str, sandboxes: Sandboxes, tmp_path: Path
) -> None:
    family_name, write, config, sizes = FORMATS[name]
    checkpoint = publish(build(family_name, **sizes), tmp_path, write, config)
    store = prepare(str(checkpoint.folder), tmp_path / "store")
    model_class = getattr(transformers, store.manifest.model.architecture)
    is_loaded = name in LOADED_BY_TRANSFORMERS
    source = checkpoint.folder if is_loaded else checkpoint.reference
    model = model_class.from_pretrained(source, dtype=torch.bfloat16).float().eval()
    model.set_experts_implementation("eager")
    family = next(family for family in FAMILIES if family.name == family_name)
    expected = forward_logits(family, model, prompts())  # [B, S, V]
    got = logits_through_functions(
        family, store, sandboxes, block=3, mode=OutputMode.REDUCED, dtype=torch.float32
    )  # [B, S, V]
    assert (got - expected).abs().max() <= TOLERANCE
    assert torch.equal(got.argmax(-1), expected.argmax(-1))
