"""Tiny GGUF files of MoE models, written with the package gguf as llama.cpp's converter does.

Names come from gguf's own tables, so that the project's are compared with them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from gguf import GGMLQuantizationType, GGUFWriter
from numpy.typing import NDArray
from tiny_chat import CHAT_TEMPLATE, SPECIAL_TOKENS, tiny_tokenizer
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

SIZES: Mapping[str, Any] = {
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "num_experts_per_tok": 2,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
    "initializer_range": 0.1,
}
NEVER_QUANTISED = ("_norm", "ffn_gate_inp.", "exp_probs_b", "attn_sinks")
N_EXPERTS = 4


@dataclass(frozen=True)
class GgufFamily:
    """A family with its architecture in GGUF files.

    Attributes:
        architecture: the architecture's name.
        class_name: transformers' class.
        config: fields of its config, beyond SIZES.
    """

    architecture: str
    class_name: str
    config: Mapping[str, Any]


GGUF_FAMILIES: Mapping[str, GgufFamily] = {
    family.architecture: family
    for family in (
        GgufFamily(
            "qwen2moe",
            "Qwen2MoeForCausalLM",
            {
                "num_experts": N_EXPERTS,
                "moe_intermediate_size": 256,
                "shared_expert_intermediate_size": 512,
            },
        ),
        GgufFamily(
            "qwen3moe",
            "Qwen3MoeForCausalLM",
            {
                "num_local_experts": N_EXPERTS,
                "moe_intermediate_size": 256,
                "head_dim": 128,
                "norm_topk_prob": True,
            },
        ),
        GgufFamily(
            "gpt-oss",
            "GptOssForCausalLM",
            {
                "num_local_experts": N_EXPERTS,
                "intermediate_size": 256,
                "head_dim": 64,
                "sliding_window": 8,
                "rope_parameters": {
                    "rope_type": "yarn",
                    "rope_theta": 150000.0,
                    "factor": 8.0,
                    "original_max_position_embeddings": 32,
                    "beta_fast": 32.0,
                    "beta_slow": 1.0,
                    "truncate": False,
                },
            },
        ),
        GgufFamily(
            "minimax-m2",
            "MiniMaxM2ForCausalLM",
            {
                "num_local_experts": N_EXPERTS,
                "intermediate_size": 256,
                "head_dim": 64,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 5000000.0,
                    "partial_rotary_factor": 0.5,
                },
            },
        ),
    )
}


def build_model(family: GgufFamily, **overrides: Any) -> PreTrainedModel:
    """Return a random model in float32, the same each time."""
    model_class = getattr(transformers, family.class_name)
    vocab_size = len(tiny_tokenizer())
    config = model_class.config_class(
        **{**SIZES, **family.config, "vocab_size": vocab_size, **overrides}
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: PreTrainedModel = model_class(config)
        for name, parameter in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith(("bias", "sinks")) or "norm" in name:
                parameter.data.add_(torch.randn_like(parameter.data), alpha=0.1)
    return model.eval()


@dataclass(frozen=True)
class Tensors:
    """The tensors of a file, and the weights that they stand for.

    Attributes:
        blocks: data and type by name in the file.
        weights: in float32, by name in transformers' model.
    """

    blocks: dict[str, tuple[NDArray[Any], GGMLQuantizationType]]
    weights: dict[str, Tensor]


def file_tensors(family: GgufFamily, model: PreTrainedModel, type_name: str) -> Tensors:
    """Return the tensors of a model in a type; norms, gates and biases stay float32."""
    names = gguf.get_tensor_name_map(_architecture(family), model.config.num_hidden_layers)
    tensors = Tensors({}, {})
    for name, weight in model.state_dict().items():
        decoded: dict[str, Tensor] = {}
        for part, matrix in _file_parts(family, name, weight):
            stem, _, suffix = part.rpartition(".")
            file_name = f"{names.get_name(stem)}.{suffix}"
            assert not file_name.startswith("None"), part
            kind = GGMLQuantizationType.F32
            if matrix.dim() > 1 and not any(n in file_name for n in NEVER_QUANTISED):
                kind = GGMLQuantizationType[type_name] if suffix == "weight" else kind
            data = encode(matrix.numpy(), kind)
            tensors.blocks[file_name] = data, kind
            values = gguf.dequantize(data, kind).astype(np.float32)
            decoded[part] = torch.from_numpy(values).view(matrix.shape)
        tensors.weights[name] = _model_weight(family, name, decoded).reshape(weight.shape)
    return tensors


def encode(weight: NDArray[np.float32], kind: GGMLQuantizationType) -> NDArray[Any]:
    """Return weights in a type; the package cannot quantise to K-quants: these are random blocks.

    Their scales are small, so that a model of them computes ordinary values.
    """
    if "_K" not in kind.name:
        quantized: NDArray[Any] = gguf.quantize(np.ascontiguousarray(weight), kind)
        return quantized
    block_elements, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    n_blocks = weight.size // block_elements
    generator = np.random.default_rng(n_blocks)
    blocks = generator.integers(0, 256, (n_blocks, block_bytes), np.uint8)
    scales = generator.uniform(1e-4, 2e-4, (n_blocks, 2)).astype(np.float16)
    first = {"Q6_K": 208, "Q3_K": 108, "Q2_K": 80}.get(kind.name, 0)
    n_scales = 1 if kind.name in ("Q6_K", "Q3_K") else 2
    blocks[:, first : first + 2 * n_scales] = scales[:, :n_scales].copy().view(np.uint8)
    return blocks.reshape(*weight.shape[:-1], -1)


def write_gguf(
    path: Path,
    family: GgufFamily,
    model: PreTrainedModel,
    tensors: Mapping[str, tuple[NDArray[Any], GGMLQuantizationType]],
    **writer_options: Any,
) -> Path:
    """Write a file with the model's config, a tokenizer and tensors."""
    writer = GGUFWriter(path, family.architecture, **writer_options)
    _add_config(writer, family, model)
    _add_tokenizer(writer, tiny_tokenizer())
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _architecture(family: GgufFamily) -> gguf.MODEL_ARCH:
    return next(a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == family.architecture)


def _file_parts(family: GgufFamily, name: str, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield what a parameter is in a file, under names that gguf's tables know."""
    weight = weight.float()
    match = re.fullmatch(r"(.*\.experts)\.(gate_up|down)_proj(_bias)?", name)
    if match is None:
        renamed = name.replace("e_score_correction_bias", "e_score_correction.bias")
        renamed += ".weight" if name.endswith("sinks") else ""
        yield renamed, weight.flatten() if "shared_expert_gate" in name else weight
        return
    suffix = "bias" if match[3] else "weight"
    is_gpt_oss = family.architecture == "gpt-oss"
    if is_gpt_oss and suffix == "weight":
        weight = weight.transpose(-1, -2)  # [E, in, out] to [E, out, in]
    if match[2] == "down":
        yield f"{match[1]}.down_proj.{suffix}", weight.contiguous()
        return
    gate, up = (weight[:, ::2], weight[:, 1::2]) if is_gpt_oss else weight.chunk(2, dim=1)
    yield f"{match[1]}.gate_proj.{suffix}", gate.contiguous()
    yield f"{match[1]}.up_proj.{suffix}", up.contiguous()


def _model_weight(family: GgufFamily, name: str, parts: Mapping[str, Tensor]) -> Tensor:
    """Return the parameter of the parts in a file: the inverse of `_file_parts`."""
    values = list(parts.values())
    is_gpt_oss = family.architecture == "gpt-oss"
    if len(values) == 2:
        joined = torch.stack(values, dim=2).flatten(1, 2) if is_gpt_oss else torch.cat(values, 1)
    else:
        joined = values[0]
    is_stack = name.endswith("_proj") and ".experts." in name
    return joined.transpose(-1, -2) if is_gpt_oss and is_stack else joined


def _add_config(writer: GGUFWriter, family: GgufFamily, model: PreTrainedModel) -> None:
    config: Any = model.config
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_expert_count(N_EXPERTS)
    writer.add_expert_used_count(config.num_experts_per_tok)
    width = getattr(config, "moe_intermediate_size", config.intermediate_size)
    writer.add_expert_feed_forward_length(width)
    head_dim = getattr(config, "head_dim", None)
    if head_dim is not None:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
        factor = config.rope_parameters.get("partial_rotary_factor", 1.0)
        writer.add_rope_dimension_count(int(head_dim * factor))
    if family.architecture == "qwen2moe":
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    if family.architecture == "minimax-m2":
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    if family.architecture == "gpt-oss":
        rope = config.rope_parameters
        writer.add_sliding_window(config.sliding_window)
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def _add_tokenizer(writer: GGUFWriter, tokenizer: PreTrainedTokenizerFast) -> None:
    vocabulary = tokenizer.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    kinds = [
        gguf.TokenType.CONTROL if token in SPECIAL_TOKENS else gguf.TokenType.NORMAL
        for token in tokens
    ]
    merges = tokenizer_merges(tokenizer)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_eos_token_id(vocabulary[SPECIAL_TOKENS[0]])
    writer.add_eot_token_id(vocabulary[SPECIAL_TOKENS[2]])
    writer.add_chat_template(CHAT_TEMPLATE)


def tokenizer_merges(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Return the merges of a byte-level tokenizer as GGUF files have them."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    return [" ".join(merge) for merge in model["merges"]]
