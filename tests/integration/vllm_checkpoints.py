"""Tiny random checkpoints that vLLM serves: its CPU attention needs heads of 32 and more."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from families.reference import load_dequantised
from safetensors.torch import load_file, save_file
from tiny_chat import tiny_tokenizer
from transformers import AutoTokenizer

from faasmoe_contracts.store import Store

SIZES: Mapping[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "eos_token_id": 2,
    "bos_token_id": 1,
    "pad_token_id": 0,
}
EIGHT_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3}
LATENT = {"q_lora_rank": None, "kv_lora_rank": 512, "qk_rope_head_dim": 64}
"""Sizes of latent attention that vLLM's kernels for CPUs have."""
LATENT_HEADS = {"num_key_value_heads": 2, "qk_nope_head_dim": 32, "v_head_dim": 32}
GROUPS = {"n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 2, "topk_group": 1}
SHARED = {"n_shared_experts": 1, "first_k_dense_replace": 1, "moe_intermediate_size": 32}
FAMILIES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "qwen2_moe": (
        "Qwen2Moe",
        EIGHT_EXPERTS | {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 48},
    ),
    "qwen3_moe": ("Qwen3Moe", EIGHT_EXPERTS | {"moe_intermediate_size": 32, "head_dim": 32}),
    "mixtral": ("Mixtral", {"num_local_experts": 8, "num_experts_per_tok": 2}),
    "olmoe": ("Olmoe", EIGHT_EXPERTS),
    "glm4_moe": ("Glm4Moe", GROUPS | SHARED | {"head_dim": 32, "n_group": 1}),
    "deepseek_v2": ("DeepseekV2", LATENT | LATENT_HEADS | GROUPS | SHARED),
    "deepseek_v3": (
        "DeepseekV3",
        LATENT | LATENT_HEADS | GROUPS | SHARED | {"topk_method": "noaux_tc"},
    ),
    "gpt_oss": (
        "GptOss",
        {"num_local_experts": 8, "num_experts_per_tok": 3, "head_dim": 64, "sliding_window": 16},
    ),
}
"""By family: the prefix of its classes in transformers, and the fields of its config."""


def save_checkpoint(family: str, folder: Path, *, dtype: torch.dtype = torch.float32) -> Path:
    """Save a family's tiny model to a folder; return the folder."""
    prefix, fields = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{prefix}Config")(**{**SIZES, **fields})
    config.dtype = torch.float32
    model = getattr(transformers, f"{prefix}ForCausalLM")(config)
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "sinks")):  # zero at first
            torch.nn.init.normal_(parameter, std=0.2)
    model.eval().to(dtype).save_pretrained(folder)
    return folder


def save_dequantised(store: Store, checkpoint: Path, folder: Path) -> Path:
    """Save a checkpoint in float32 with the weights of a store that was prepared from it."""
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    load_dequantised(model, store)
    model.save_pretrained(folder)
    return folder


def give_end_token(folder: Path, token: str) -> None:
    """Let grammars end texts of a checkpoint by a token, which is never the likeliest otherwise.

    vLLM ends a constrained text by the tokenizer's EOS token only. Texts are greedy by default.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = token
    tokenizer.save_pretrained(folder)
    weights, partial = folder / "model.safetensors", folder / "partial"
    tensors = load_file(weights)
    tensors["lm_head.weight"][tokenizer.eos_token_id] = 0
    save_file(tensors, partial, metadata={"format": "pt"})  # they may be mapped from the old file
    partial.rename(weights)
    settings = {"eos_token_id": tokenizer.eos_token_id, "temperature": 0}
    (folder / "generation_config.json").write_text(json.dumps(settings))


def save_chat_checkpoint(folder: Path, *, max_model_len: int = 256) -> Path:
    """Save a tiny Qwen2-MoE model with a tokenizer and a chat template; return the folder."""
    tokenizer = tiny_tokenizer()
    prefix, fields = FAMILIES["qwen2_moe"]
    no_special_tokens = {"eos_token_id": None, "bos_token_id": None, "pad_token_id": None}
    torch.manual_seed(0)
    sizes = {**SIZES, **fields, "vocab_size": len(tokenizer), **no_special_tokens}
    sizes["max_position_embeddings"] = max_model_len
    config = getattr(transformers, f"{prefix}Config")(**sizes)
    getattr(transformers, f"{prefix}ForCausalLM")(config).eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
