"""The mixture of experts that is cut out of the dense model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

from faasmoe_router.checkpoint.demo.split import (
    NUM_EXPERTS,
    TOP_K,
    DenseBlock,
    shared_size,
    split_block,
)

_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def cut(
    dense: Any,
    inputs: list[torch.Tensor],
    *,
    exact: bool,
    generator: torch.Generator,
    step: Callable[[], None],
) -> Any:
    """Return the mixture cut out of `dense`; `step` is called once for each layer."""
    config = mixture_config(dense.config, exact=exact)
    old = dense.state_dict()
    new = {name: tensor for name, tensor in old.items() if ".mlp." not in name}
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}.mlp."
        weights = [old[f"{prefix}{name}.weight"] for name in _PROJECTIONS]
        if layer in config.mlp_only_layers:
            parts = dict(zip((f"{name}.weight" for name in _PROJECTIONS), weights, strict=True))
        else:
            parts = split_block(
                DenseBlock(*weights), inputs[layer], exact=exact, generator=generator
            )
        new |= {prefix + name: tensor for name, tensor in parts.items()}
        step()
    model = Qwen2MoeForCausalLM(config)
    model.load_state_dict(new)
    return model.eval()


def mixture_config(dense: Any, *, exact: bool) -> Qwen2MoeConfig:
    """Return the config; the first two layers and the last stay dense unless `exact`."""
    layers = dense.num_hidden_layers
    shared = shared_size(dense.intermediate_size)
    return Qwen2MoeConfig(
        vocab_size=dense.vocab_size,
        hidden_size=dense.hidden_size,
        intermediate_size=dense.intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=dense.num_attention_heads,
        num_key_value_heads=dense.num_key_value_heads,
        max_position_embeddings=dense.max_position_embeddings,
        rms_norm_eps=dense.rms_norm_eps,
        rope_parameters=dense.rope_parameters,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        qkv_bias=False,
        decoder_sparse_step=1,
        moe_intermediate_size=(dense.intermediate_size - shared) // NUM_EXPERTS,
        shared_expert_intermediate_size=shared,
        num_experts=NUM_EXPERTS,
        norm_topk_prob=True,
        num_experts_per_tok=NUM_EXPERTS if exact else TOP_K,
        mlp_only_layers=[] if exact else [0, 1, layers - 1],
    )
