"""Preparation streams: it succeeds under a memory limit far below the checkpoint's size."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import Qwen2MoeConfig

HEADROOM_BYTES = 160 << 20

# RLIMIT_DATA counts private memory (heap, anonymous and private writable mappings), not the page
# cache. It is set after the imports, so it limits only what preparation itself allocates.
_MEMORY_LIMITED_SCRIPT = """
import resource, sys
from pathlib import Path
import torch
from transformers import Qwen2MoeForCausalLM
from faasmoe_contracts.store import QuantizationEntry
from faasmoe_router.checkpoint.prepare import prepare

lines = Path("/proc/self/status").read_text().splitlines()
used_kb = next(int(line.split()[1]) for line in lines if line.startswith("VmData"))
limit = used_kb * 1024 + int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
try:
    torch.ones(2 * int(sys.argv[3]), dtype=torch.uint8)
except (RuntimeError, MemoryError):
    print("limit is enforced")
quantization = QuantizationEntry(*sys.argv[4:])
prepare(sys.argv[1], Path(sys.argv[2]), quantization=quantization).verify()
print("prepared")
"""


def _write_checkpoint(folder: Path, layers: int) -> int:
    """Write a bfloat16 checkpoint of `layers` shards and return its size in bytes."""
    config = Qwen2MoeConfig(
        vocab_size=512,
        hidden_size=512,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts=16,
        moe_intermediate_size=1024,
        shared_expert_intermediate_size=64,
        tie_word_embeddings=True,
        architectures=["Qwen2MoeForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    weight_map: dict[str, str] = {}
    for layer in range(layers):
        name = f"model-{layer}.safetensors"
        tensors = _layer(f"model.layers.{layer}.")
        if layer == 0:
            tensors |= {
                "model.embed_tokens.weight": _random_weight(512, 512),
                "model.norm.weight": _random_weight(512),
            }
        save_file(tensors, folder / name)
        weight_map |= dict.fromkeys(tensors, name)
    index = {"weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _layer(prefix: str) -> dict[str, torch.Tensor]:
    tensors = {
        "input_layernorm.weight": _random_weight(512),
        "post_attention_layernorm.weight": _random_weight(512),
        "mlp.gate.weight": _random_weight(16, 512),
        "mlp.shared_expert_gate.weight": _random_weight(1, 512),
        "mlp.shared_expert.gate_proj.weight": _random_weight(64, 512),
        "mlp.shared_expert.up_proj.weight": _random_weight(64, 512),
        "mlp.shared_expert.down_proj.weight": _random_weight(512, 64),
    }
    for name in "qkvo":
        tensors[f"self_attn.{name}_proj.weight"] = _random_weight(512, 512)
    for name in "qkv":
        tensors[f"self_attn.{name}_proj.bias"] = _random_weight(512)
    for expert in range(16):
        tensors[f"mlp.experts.{expert}.gate_proj.weight"] = _random_weight(1024, 512)
        tensors[f"mlp.experts.{expert}.up_proj.weight"] = _random_weight(1024, 512)
        tensors[f"mlp.experts.{expert}.down_proj.weight"] = _random_weight(512, 1024)
    return {prefix + name: tensor for name, tensor in tensors.items()}


def _random_weight(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.bfloat16)


@pytest.mark.parametrize("quantization", [("none", "none"), ("int4", "int8")])
def test_memory_stays_far_below_the_checkpoint_size(
    quantization: tuple[str, str], tmp_path: Path, environment: dict[str, str]
) -> None:
    size_bytes = _write_checkpoint(tmp_path / "checkpoint", layers=12)
    assert size_bytes > 3.5 * HEADROOM_BYTES
    arguments = [str(tmp_path / "checkpoint"), str(tmp_path / "store"), str(HEADROOM_BYTES)]
    child = subprocess.run(
        [sys.executable, "-c", _MEMORY_LIMITED_SCRIPT, *arguments, *quantization],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert child.stdout.splitlines() == ["limit is enforced", "prepared"], child.stderr
