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
from families.registry import FAMILIES, Family, forward_logits
from published.checkpoints import Published, Write, build, publish
from published.floats import deepseek_v4, fp8_blocks, fp8_scaled, gpt_oss, mxfp8
from published.integers import awq, gptq, nvfp4, packed_integers, plain_integers
from sandbox_processes import StartSandbox
from test_golden import TOLERANCE, Sandboxes, logits_through_functions
from torch import Tensor

from faasmoe_contracts.store import Store
from faasmoe_contracts.wire import OutputMode
from faasmoe_router.checkpoint.prepare import prepare

FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
FP4 = FP8 | {"scale_fmt": "ue8m0", "expert_dtype": "fp4"}
FP8_SIZES = {"hidden_size": 128, "moe_intermediate_size": 128, "intermediate_size": 128}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
NVFP4 = {"quant_method": "modelopt", "quant_algo": "NVFP4"}


def compressed(**weights: Any) -> dict[str, Any]:
    weights = {"type": "int", "symmetric": True, **weights}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "config_groups": groups}


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32}
MXFP8 = {"quant_method": "mxfp8", "weight_block_size": [1, 32], "scale_fmt": "ue8m0"}
CT_INT4 = compressed(num_bits=4, group_size=32)
CT_INT8 = compressed(num_bits=8, strategy="channel")
CT_FP8 = compressed(num_bits=8, type="float", strategy="channel")
CT_NVFP4 = compressed(num_bits=4, type="float", strategy="tensor_group", group_size=16)


def only_experts(write: Write) -> Write:
    """Apply a writer to routed experts, as Kimi K2 is published."""
    return lambda name, weight: write(name, weight) if ".experts." in name else None


FORMATS: dict[str, tuple[str, Write, dict[str, Any], dict[str, Any]]] = {
    # Families in the formats that their publishers, or those of quantised copies, use.
    "fp8-qwen3_moe": ("qwen3_moe", fp8_blocks(), FP8, FP8_SIZES),
    "fp8-minimax_m2": ("minimax_m2", fp8_blocks(), FP8, FP8_SIZES),
    "fp8-deepseek_v3": ("deepseek_v3", fp8_blocks(), FP8, FP8_SIZES),
    "fp4-deepseek_v4": ("deepseek_v4", deepseek_v4(), FP4, FP8_SIZES),
    "mxfp4-gpt_oss": ("gpt_oss", gpt_oss(), {"quant_method": "mxfp4"}, {}),
    "mxfp8-qwen3_moe": ("qwen3_moe", mxfp8(), MXFP8, {}),
    "ct-int4-qwen3_moe": ("qwen3_moe", packed_integers(), CT_INT4, {}),
    "ct-int4-deepseek_v3": ("deepseek_v3", only_experts(packed_integers()), CT_INT4, {}),
    "ct-int8-mixtral": ("mixtral", plain_integers(), CT_INT8, {}),
    "ct-int8-qwen3_moe": ("qwen3_moe", plain_integers(), CT_INT8, {}),
    "ct-fp8-glm4_moe": ("glm4_moe", fp8_scaled("row"), CT_FP8, {}),
    "ct-fp8-mixtral": ("mixtral", fp8_scaled("row"), CT_FP8, {}),
    "ct-nvfp4-qwen3_moe": ("qwen3_moe", nvfp4(is_divisor=True), CT_NVFP4, {}),
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
    **dict.fromkeys(("ct-int4", "gptq", "awq"), "int4"),
    "ct-int8": "int8",
    **dict.fromkeys(("fp8", "mxfp8", "ct-fp8"), "fp8"),
    **dict.fromkeys(("nvfp4", "ct-nvfp4"), "nvfp4"),
}


@pytest.fixture(scope="module")
def sandboxes(sandbox: StartSandbox) -> Iterator[Sandboxes]:
    with ExitStack() as stack:
        yield tuple(stack.enter_context(sandbox(capacity=100, token="secret")) for _ in range(2))


def published_and_served(
    name: str, sandboxes: Sandboxes, folder: Path, dtype: torch.dtype
) -> tuple[Published, Family, Store, Tensor]:
    """Publish a model in `dtype`, prepare it, and return its logits [B, S, V] through functions."""
    family_name, write, config, sizes = FORMATS[name]
    checkpoint = publish(build(family_name, **sizes), folder, write, config, dtype=dtype)
    store = prepare(str(checkpoint.folder), folder / "store")
    family = next(family for family in FAMILIES if family.name == family_name)
    logits = logits_through_functions(
        family, store, sandboxes, block=3, mode=OutputMode.REDUCED, dtype=torch.float32
    )
    return checkpoint, family, store, logits


def loaded_logits(folder: Path, family: Family, store: Store, dtype: torch.dtype) -> Tensor:
    """Return the logits of a checkpoint as transformers loads it, computed in float32."""
    model_class = getattr(transformers, store.manifest.model.architecture)
    model = model_class.from_pretrained(folder, dtype=dtype).float().eval()
    model.set_experts_implementation("eager")
    return forward_logits(family, model, prompts())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FORMATS)
def test_logits_equal_those_of_the_weights_that_the_writer_meant(
    name: str, sandboxes: Sandboxes, tmp_path: Path
) -> None:
    checkpoint, family, store, got = published_and_served(name, sandboxes, tmp_path, torch.float32)
    schemes = {e.scheme for layer in store.manifest.layers for e in layer.quantization.values()}
    assert schemes == {KEPT_SCHEMES[name.rpartition("-")[0]]}
    expected = loaded_logits(checkpoint.reference, family, store, torch.float32)
    # Twice that of floats: native kernels round activations to 16 bits in every layer. These models
    # are wider than the registry's and their logits larger.
    assert (got - expected).abs().max() <= 2 * TOLERANCE * expected.abs().max().clamp(min=1)
    assert torch.equal(got.argmax(-1), expected.argmax(-1))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", LOADED_BY_TRANSFORMERS)
def test_logits_are_those_of_from_pretrained_but_for_rounding(
    name: str, sandboxes: Sandboxes, tmp_path: Path
) -> None:
    """The same weights, which transformers rounds to bfloat16; functions' outputs are bfloat16.

    Where two experts are almost as good for a gate, rounding decides, and that position differs.
    """
    checkpoint, family, store, got = published_and_served(name, sandboxes, tmp_path, torch.bfloat16)
    expected = loaded_logits(checkpoint.folder, family, store, torch.bfloat16)
    errors = (got - expected).norm(dim=-1) / expected.norm(dim=-1)  # [B, S]
    assert errors.quantile(0.9) <= 0.02
