"""The config of transformers' class for a GGUF file, from its keys and the shapes of its tensors.

What the file says and transformers' own reader ignores is used (widths of the experts, YaRN), and
what the class cannot do is refused rather than left out.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from faasmoe_router.checkpoint.gguf.architectures import Architecture
from faasmoe_router.checkpoint.gguf.header import TensorInfo
from faasmoe_router.checkpoint.gguf.metadata import Metadata

MAX_LAYERS = 1 << 12
_GATING_FUNCTIONS: Mapping[str, int] = {"minimax_m2": 2}  # sigmoid
_SOFTMAX_GATING = (1, 3)  # over all experts, or over those that were chosen
_TOKEN_KEYS: Mapping[str, str] = {
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
    "pad_token_id": "tokenizer.ggml.padding_token_id",
}
_END_KEYS = tuple(f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))
_SAMPLING_KEYS: Mapping[str, tuple[str, float]] = {  # with the largest value
    "temperature": ("general.sampling.temp", 2),
    "top_p": ("general.sampling.top_p", 1),
    "min_p": ("general.sampling.min_p", 1),
    "repetition_penalty": ("general.sampling.penalty_repeat", 10),
}
_FLOAT_TYPES = ("F32", "F16", "BF16")


def model_config(
    architecture: Architecture, metadata: Metadata, tensors: Mapping[str, TensorInfo]
) -> dict[str, Any]:
    """Return the content of config.json.

    Raises:
        SourceDamaged: a key is missing, of another type or out of range, or contradicts a tensor.
    """
    fields = _Fields(architecture, metadata, tensors)
    config = {
        "architectures": [architecture.class_name],
        "model_type": architecture.model_type,
        "dtype": weight_dtype(tensors),
        "vocab_size": fields.shape("token_embd.weight", 2)[0],
        "hidden_size": fields.integer("embedding_length"),
        "num_hidden_layers": _layer_count(fields),
        "max_position_embeddings": fields.integer("context_length"),
        "rms_norm_eps": metadata.number(fields.key("attention.layer_norm_rms_epsilon"), maximum=1),
        "tie_word_embeddings": "output.weight" not in tensors,
        **_attention(fields),
        **_experts(fields),
        **{name: metadata.optional_integer(key, minimum=0) for name, key in _TOKEN_KEYS.items()},
    }
    _reject_unsupported(fields)
    return config | _family_fields(fields, config)


def generation_config(metadata: Metadata) -> dict[str, Any]:
    """Return the content of generation_config.json: all tokens that end a text, and sampling."""
    ends = {metadata.optional_integer(key, minimum=0): None for key in _END_KEYS}
    config: dict[str, Any] = {
        "eos_token_id": [token for token in ends if token is not None] or None,
        "bos_token_id": metadata.optional_integer(_TOKEN_KEYS["bos_token_id"], minimum=0),
        "pad_token_id": metadata.optional_integer(_TOKEN_KEYS["pad_token_id"], minimum=0),
    }
    for name, (key, maximum) in _SAMPLING_KEYS.items():
        config[name] = metadata.optional_number(key, maximum=maximum)
    config["top_k"] = metadata.optional_integer("general.sampling.top_k")
    present = {name: value for name, value in config.items() if value is not None}
    return present | ({"do_sample": True} if "temperature" in present else {})


def weight_dtype(tensors: Mapping[str, TensorInfo]) -> str:
    """Return the dtype of a file's matrices; bfloat16 if any is quantised."""
    names = {info.type.name for info in tensors.values() if len(info.shape) > 1}
    if names <= set(_FLOAT_TYPES) and "BF16" not in names:
        return "float16" if "F16" in names else "float32"
    return "bfloat16"


class _Fields:
    """The keys of a file's architecture, and the shapes of its tensors."""

    def __init__(
        self, architecture: Architecture, metadata: Metadata, tensors: Mapping[str, TensorInfo]
    ) -> None:
        self.architecture = architecture
        self.metadata = metadata
        self.tensors = tensors

    def key(self, name: str) -> str:
        return f"{self.architecture.name}.{name}"

    def integer(self, name: str) -> int:
        return self.metadata.integer(self.key(name))

    def shape(self, name: str, n_dimensions: int) -> tuple[int, ...]:
        """Return the shape of a tensor that every model has."""
        info = self.tensors.get(name)
        if info is None or len(info.shape) != n_dimensions:
            got = None if info is None else list(info.shape)
            raise self.metadata.error(name, got, f"a tensor with {n_dimensions} dimensions")
        return info.shape

    def match(self, key: str, value: int, expected: int, source: str) -> int:
        """Return a value of a key that a tensor's shape must agree with."""
        if value != expected:
            raise self.metadata.error(self.key(key), value, f"{expected}, as {source} has it")
        return value


def _layer_count(fields: _Fields) -> int:
    """Return the number of layers: each has a tensor, so a file cannot claim too many."""
    n_layers = fields.metadata.integer(fields.key("block_count"), maximum=MAX_LAYERS)
    for layer in (0, n_layers - 1):
        fields.shape(f"blk.{layer}.attn_norm.weight", 1)
    return n_layers


def _attention(fields: _Fields) -> dict[str, Any]:
    hidden = fields.integer("embedding_length")
    fields.match(
        "embedding_length", hidden, fields.shape("token_embd.weight", 2)[1], "token_embd.weight"
    )
    n_heads = fields.integer("attention.head_count")
    name = "blk.0.attn_q.weight"
    rows, _ = fields.shape(name, 2)
    if rows % (2 * n_heads):  # halves of a head are rotated
        expected = f"half a divisor of the {rows} rows of {name}"
        raise fields.metadata.error(fields.key("attention.head_count"), n_heads, expected)
    head_dim = rows // n_heads
    key = "attention.key_length"
    if fields.key(key) in fields.metadata:
        fields.match(key, fields.integer(key), head_dim, name)
    name = "blk.0.attn_k.weight"
    n_kv_heads = fields.integer("attention.head_count_kv")
    fields.match("attention.head_count_kv", n_kv_heads * head_dim, fields.shape(name, 2)[0], name)
    if n_heads % n_kv_heads:
        key = fields.key("attention.head_count_kv")
        raise fields.metadata.error(key, n_kv_heads, f"a divisor of {n_heads}, the heads")
    return {
        "num_attention_heads": n_heads,
        "num_key_value_heads": n_kv_heads,
        "head_dim": head_dim,
        "rope_parameters": _rope_parameters(fields, head_dim),
    }


def _rope_parameters(fields: _Fields, head_dim: int) -> dict[str, Any]:
    metadata, key = fields.metadata, fields.key
    parameters: dict[str, Any] = {
        "rope_theta": metadata.optional_number(key("rope.freq_base")) or 10000.0,
        "rope_type": "default",
    }
    scaling = metadata.choice(key("rope.scaling.type"), ("none", "linear", "yarn"), "none")
    if scaling != "none":
        parameters["rope_type"] = scaling
        parameters["factor"] = metadata.number(key("rope.scaling.factor"), maximum=1e6)
    if scaling == "yarn":
        name = "rope.scaling.original_context_length"
        original = metadata.optional_integer(key(name)) or fields.integer("context_length")
        fast = metadata.optional_number(key("rope.scaling.yarn_beta_fast"))
        slow = metadata.optional_number(key("rope.scaling.yarn_beta_slow"))
        parameters |= {
            "original_max_position_embeddings": original,
            "beta_fast": fast or 32.0,  # llama.cpp's and transformers' defaults
            "beta_slow": slow or 1.0,
        }
    return parameters | _partial_rotation(fields, head_dim)


def _partial_rotation(fields: _Fields, head_dim: int) -> dict[str, Any]:
    """Return the part of each head that is rotated, if not all of it."""
    name = "rope.dimension_count"
    n_rotated = fields.metadata.optional_integer(fields.key(name), maximum=head_dim)
    if n_rotated is None or n_rotated == head_dim:
        return {}
    if fields.architecture.model_type != "minimax_m2":
        fields.match(name, n_rotated, head_dim, "blk.0.attn_q.weight")
    return {"partial_rotary_factor": n_rotated / head_dim}


def _experts(fields: _Fields) -> dict[str, Any]:
    name = "blk.0.ffn_up_exps.weight"
    n_experts, width, _ = fields.shape(name, 3)
    fields.match("expert_count", fields.integer("expert_count"), n_experts, name)
    key = fields.key("expert_used_count")
    top_k = fields.metadata.integer(key, maximum=n_experts)
    key = "expert_feed_forward_length"
    if fields.key(key) in fields.metadata:
        fields.match(key, fields.integer(key), width, name)
    family = fields.architecture.model_type
    count_name = "num_experts" if family == "qwen2_moe" else "num_local_experts"
    is_only_width = family in ("gpt_oss", "minimax_m2")
    width_name = "intermediate_size" if is_only_width else "moe_intermediate_size"
    return {"num_experts_per_tok": top_k, count_name: n_experts, width_name: width}


def _reject_unsupported(fields: _Fields) -> None:
    """Raise SourceDamaged for keys that change what is computed and that the class cannot do."""
    metadata, key = fields.metadata, fields.key
    gating = _GATING_FUNCTIONS.get(fields.architecture.model_type)
    choices = _SOFTMAX_GATING if gating is None else (gating,)
    metadata.choice(key("expert_gating_func"), choices, choices[0])
    factors = ("expert_weights_scale", "rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor")
    for name in map(key, factors):
        metadata.choice(name, (0.0, 1.0), 1.0)  # llama.cpp takes 0 for none
    metadata.choice("general.type", ("model",), "model")


def _family_fields(fields: _Fields, config: Mapping[str, Any]) -> dict[str, Any]:
    family = _FAMILIES.get(fields.architecture.model_type)
    return {} if family is None else family(fields, config)


def _qwen2_moe(fields: _Fields, config: Mapping[str, Any]) -> dict[str, Any]:
    shared_name = "blk.0.ffn_up_shexp.weight"
    norm = fields.metadata.boolean(fields.key("expert_weights_norm"), default=False)
    return {
        "shared_expert_intermediate_size": fields.shape(shared_name, 2)[0],
        "qkv_bias": _has_bias(fields.tensors),
        "norm_topk_prob": norm,
        "mlp_only_layers": [],
        "decoder_sparse_step": 1,
    }


def _qwen3_moe(fields: _Fields, config: Mapping[str, Any]) -> dict[str, Any]:
    norm = fields.metadata.boolean(fields.key("expert_weights_norm"), default=True)
    return {
        "attention_bias": _has_bias(fields.tensors),
        "norm_topk_prob": norm,
        "mlp_only_layers": [],
        "decoder_sparse_step": 1,
    }


def _gpt_oss(fields: _Fields, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of GPT-OSS; llama.cpp has its window on every other layer."""
    n_layers = config["num_hidden_layers"]
    kinds = ("sliding_attention", "full_attention")
    rope = dict(config["rope_parameters"])
    if rope["rope_type"] == "yarn":
        rope["truncate"] = False
    return {
        "rope_parameters": rope,
        "sliding_window": fields.integer("attention.sliding_window"),
        "layer_types": [kinds[layer % 2] for layer in range(n_layers)],
        "attention_bias": True,
    }


def _has_bias(tensors: Collection[str]) -> bool:
    return "blk.0.attn_q.bias" in tensors


_FAMILIES = {"qwen2_moe": _qwen2_moe, "qwen3_moe": _qwen3_moe, "gpt_oss": _gpt_oss}
