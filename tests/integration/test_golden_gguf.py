"""Golden tests of GGUF files, through real sandboxes: the logits are those of the decoded weights.

gguf encodes and decodes the weights; only transformers' class computes the expected logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from families.inputs import prompts
from families.registry import FAMILIES, forward_logits
from gguf_models import GGUF_FAMILIES, build_model, file_tensors, write_gguf
from sandbox_processes import StartSandbox
from test_golden import TOLERANCE, Sandboxes, logits_through_functions

from faasmoe_contracts.wire import OutputMode
from faasmoe_router.checkpoint.prepare import prepare

FAMILY_NAMES = {
    "qwen2moe": "qwen2_moe",
    "qwen3moe": "qwen3_moe",
    "gpt-oss": "gpt_oss",
    "minimax-m2": "minimax_m2",
}


@pytest.fixture(scope="module")
def sandboxes(sandbox: StartSandbox) -> Iterator[Sandboxes]:
    with ExitStack() as stack:
        yield tuple(stack.enter_context(sandbox(capacity=100, token="secret")) for _ in range(2))


@pytest.mark.parametrize(
    ("architecture", "type_name", "scheme"),
    [
        ("qwen2moe", "Q8_0", "int8"),
        ("qwen2moe", "Q6_K", None),
        ("qwen3moe", "Q8_0", "int8"),
        ("qwen3moe", "Q4_0", "int4"),
        ("qwen3moe", "Q4_K", None),
        ("qwen3moe", "Q5_K", None),
        ("qwen3moe", "Q6_K", None),
        ("gpt-oss", "MXFP4", "mxfp4"),
        ("gpt-oss", "Q4_K", None),
        ("minimax-m2", "Q8_0", "int8"),
        ("minimax-m2", "Q4_K", None),
    ],
)
def test_logits_equal_those_of_the_decoded_weights(
    architecture: str, type_name: str, scheme: str | None, sandboxes: Sandboxes, tmp_path: Path
) -> None:
    gguf_family = GGUF_FAMILIES[architecture]
    model = build_model(gguf_family)
    tensors = file_tensors(gguf_family, model, type_name)
    path = write_gguf(tmp_path / "model.gguf", gguf_family, model, tensors.blocks)
    model.load_state_dict(tensors.weights)
    model.set_experts_implementation("eager")

    family = next(family for family in FAMILIES if family.name == FAMILY_NAMES[architecture])
    store = prepare(str(path), tmp_path / "store", dtype="float32")
    schemes = {e.scheme for layer in store.manifest.layers for e in layer.quantization.values()}
    assert schemes == ({scheme} if scheme else set())
    got = logits_through_functions(
        family, store, sandboxes, block=3, mode=OutputMode.REDUCED, dtype=torch.float32
    )  # [B, S, V]
    expected = forward_logits(family, model, prompts())  # [B, S, V]
    # Native kernels round activations to 16 bits in every layer.
    assert (got - expected).abs().max() <= 2 * TOLERANCE * expected.abs().max().clamp(min=1)
    assert torch.equal(got.argmax(-1), expected.argmax(-1))
