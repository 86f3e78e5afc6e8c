"""Sizes of the models that are simulated: published configs, a config.json or a prepared store.

Parameters are counted from the config: three matrices per expert (gate, up, down), the shared
experts, the dense layers, attention (grouped-query, or latent as DeepSeek-V3's), embeddings and LM
head. Norms, biases and gates' corrections are left out: less than a thousandth of the weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.simulation.errors import SimulationError

from faasmoe_contracts.store import Manifest

# From the checkpoints' config.json on the Hugging Face hub: Qwen/Qwen3-235B-A22B,
# deepseek-ai/DeepSeek-V3 and moonshotai/Kimi-K2-Instruct (the keys that sizes depend on).
PUBLISHED: Mapping[str, Mapping[str, Any]] = {
    "qwen3-235b": {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "moe_intermediate_size": 1536,
        "num_hidden_layers": 94,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_attention_heads": 64,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": 151936,
        "tie_word_embeddings": False,
    },
    "deepseek-v3": {
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 61,
        "first_k_dense_replace": 3,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "num_attention_heads": 128,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "vocab_size": 129280,
        "tie_word_embeddings": False,
    },
    "kimi-k2": {
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 61,
        "first_k_dense_replace": 1,
        "n_routed_experts": 384,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "num_attention_heads": 64,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "vocab_size": 163840,
        "tie_word_embeddings": False,
    },
}
BYTES_PER_WEIGHT = {"none": 2.0, "int8": 1.0625, "int4": 0.5625, "mxfp4": 0.53125}
"""Bytes of a weight by scheme, with a 16-bit scale per group of 32 (mxfp4: 8 bits)."""
FACTOR_KEYS = ("num_experts", "n_routed_experts", "num_local_experts")


@dataclass(frozen=True, slots=True)
class MoELayer:
    """One MoE layer; a `faasmoe_operator.plan.functions.LayerShape`."""

    index: int
    num_experts: int
    top_k: int
    expert_bytes: int
    shared_bytes: int = 0


@dataclass(frozen=True, slots=True)
class ModelGeometry:
    """What the simulation knows of a model.

    Attributes:
        name: name in reports.
        layers: its MoE layers.
        expert_weights: weights of one routed expert.
        dense_weights: weights that the router computes every token with.
        router_bytes: size of all weights of the router, embeddings included.
        kv_token_bytes: KV cache of one token.
        hidden_size: width of a row between router and functions.
    """

    name: str
    layers: tuple[MoELayer, ...]
    expert_weights: int
    dense_weights: int
    router_bytes: int
    kv_token_bytes: int
    hidden_size: int

    @property
    def expert_bytes(self) -> int:
        """Size of all routed experts."""
        return sum(layer.num_experts * layer.expert_bytes for layer in self.layers)

    @property
    def weight_bytes(self) -> int:
        """Size of all weights."""
        return self.router_bytes + self.expert_bytes


def load_geometry(name: str, *, quantization: str) -> ModelGeometry:
    """Return the geometry of a published model's name or of a config.json.

    Raises:
        SimulationError: the name is unknown, or the file is no config of a MoE model.
    """
    if name in PUBLISHED:
        return from_config(PUBLISHED[name], name=name, quantization=quantization)
    path = Path(name) / "config.json" if Path(name).is_dir() else Path(name)
    if not path.is_file():
        expected = f"{', '.join(PUBLISHED)}, a config.json or its folder"
        raise SimulationError("--geometry", got=name, expected=expected)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SimulationError("--geometry", got=name, expected="a JSON file") from error
    config = config.get("text_config", config)
    return from_config(config, name=path.resolve().parent.name, quantization=quantization)


def from_config(config: Mapping[str, Any], *, name: str, quantization: str) -> ModelGeometry:
    """Return the geometry of a model config.

    Args:
        config: the keys of a config.json.
        name: name in reports.
        quantization: scheme of the experts' weights; the router's are bfloat16.
    """
    hidden, n_layers = _size(config, "hidden_size"), _size(config, "num_hidden_layers")
    expert_weights = 3 * hidden * _size(config, "moe_intermediate_size", "intermediate_size")
    n_dense = int(config.get("first_k_dense_replace") or 0)
    layer_sizes = {
        "num_experts": _size(config, *FACTOR_KEYS),
        "top_k": _size(config, "num_experts_per_tok"),
        "expert_bytes": round(expert_weights * BYTES_PER_WEIGHT[quantization]),
    }
    layers = tuple(MoELayer(index, **layer_sizes) for index in range(n_layers - n_dense))
    shared = int(config.get("shared_expert_intermediate_size") or 0)
    shared_weights = 3 * hidden * shared + expert_weights * int(config.get("n_shared_experts") or 0)
    embedding = _size(config, "vocab_size") * hidden
    dense_weights = (
        n_layers * _attention_weights(config, hidden)
        + n_dense * 3 * hidden * _size(config, "intermediate_size")
        + len(layers) * (shared_weights + hidden * layer_sizes["num_experts"])
        + embedding  # the LM head
    )
    n_stored = dense_weights + (0 if config.get("tie_word_embeddings") else embedding)
    return ModelGeometry(
        name,
        layers,
        expert_weights,
        dense_weights,
        router_bytes=2 * n_stored,
        kv_token_bytes=2 * n_layers * _kv_width(config, hidden),
        hidden_size=hidden,
    )


def from_store(manifest: Manifest, config: Mapping[str, Any], *, name: str) -> ModelGeometry:
    """Return the geometry of a prepared store: its own sizes, and the rest from its config."""
    planned = from_config(config, name=name, quantization="none")
    layers = tuple(
        MoELayer(s.index, s.num_experts, s.top_k, s.expert_bytes, s.shared_bytes)
        for s in manifest.layers
    )
    return ModelGeometry(
        name,
        layers,
        planned.expert_weights,
        planned.dense_weights,
        router_bytes=manifest.router_bytes,
        kv_token_bytes=planned.kv_token_bytes,
        hidden_size=planned.hidden_size,
    )


def _attention_weights(config: Mapping[str, Any], hidden: int) -> int:
    heads = _size(config, "num_attention_heads")
    if config.get("kv_lora_rank"):
        q_rank, kv_rank = _size(config, "q_lora_rank"), _size(config, "kv_lora_rank")
        nope, rope = _size(config, "qk_nope_head_dim"), _size(config, "qk_rope_head_dim")
        value = _size(config, "v_head_dim")
        query = hidden * q_rank + q_rank * heads * (nope + rope)
        key_value = hidden * (kv_rank + rope) + kv_rank * heads * (nope + value)
        return query + key_value + heads * value * hidden
    kv_heads = int(config.get("num_key_value_heads") or heads)
    head_dim = int(config.get("head_dim") or hidden // heads)
    return hidden * head_dim * (2 * heads + 2 * kv_heads)


def _kv_width(config: Mapping[str, Any], hidden: int) -> int:
    if config.get("kv_lora_rank"):
        return _size(config, "kv_lora_rank") + _size(config, "qk_rope_head_dim")
    heads = _size(config, "num_attention_heads")
    kv_heads = int(config.get("num_key_value_heads") or heads)
    return 2 * kv_heads * int(config.get("head_dim") or hidden // heads)


def _size(config: Mapping[str, Any], *names: str) -> int:
    for name in names:
        value = config.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    got = {name: config.get(name) for name in names}
    raise SimulationError(f"config.json {names[0]}", got=got, expected="a positive integer")
