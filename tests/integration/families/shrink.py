"""Builds tiny configurations from the field names of a family's configuration class.

Families agree on most names (`hidden_size`, `kv_lora_rank`, `n_group`, ...), so one table serves
all of them and `entries` only lists what a family needs in addition.
"""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from transformers import PretrainedConfig

HIDDEN = 32
HEADS = 4
HEAD_DIM = 8
EXPERTS = 8
TOP_K = 3
EXPERT_WIDTH = 24  # unique among all widths, so that mixed-up dimensions are detected
VOCAB = 128
LAYERS = 3
POSITIONS = 128
SLIDING_WINDOW = 8  # shorter than the prompts, so that it has an effect

TEXT: Mapping[str, Any] = {
    "vocab_size": VOCAB,
    "unpadded_vocab_size": VOCAB - 8,
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "max_position_embeddings": POSITIONS,
    "model_max_length": POSITIONS,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # attention
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "head_dim": HEAD_DIM,
    "swa_num_attention_heads": HEADS,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": HEAD_DIM,
    "sliding_window": SLIDING_WINDOW,
    "sliding_window_size": SLIDING_WINDOW,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "o_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "index_topk": 8,
    "index_head_dim": 8,
    "index_n_heads": 2,
    # linear attention and state space
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_chunk_size": 8,
    "mamba_dt_rank": 4,
    # feed-forward and routing
    "intermediate_size": 48,
    "dense_intermediate_size": 48,
    "shared_intermediate_size": 40,
    "shared_expert_intermediate_size": 40,
    "shared_experts_intermediate_size": 40,
    "moe_shared_expert_intermediate_size": 40,
    "moe_intermediate_size": EXPERT_WIDTH,
    "num_experts": EXPERTS,
    "n_routed_experts": EXPERTS,
    "num_local_experts": EXPERTS,
    "moe_num_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
    "num_experts_per_token": TOP_K,
    "top_k_experts": TOP_K,
    "moe_topk": TOP_K,
    "moe_k": TOP_K,
    "n_shared_experts": 1,
    "n_group": 2,
    "num_expert_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
}

TOWER: Mapping[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "depth": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_heads": 2,
    "image_size": 32,
    "patch_size": 8,
    "out_hidden_size": HIDDEN,
    "head_dim": 16,
    "initializer_range": 0.2,
    "num_position_embeddings": 16,
    "position_embedding_size": 16,
    "deepstack_visual_indexes": [0],
    "global_attn_indexes": [0],
    "window_size": 2,
    "output_channels": 8,
    # audio encoders, named as in Whisper
    "d_model": 32,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "output_dim": HIDDEN,
    "downsample_hidden_size": 8,
    "max_source_positions": 16,
    "num_mel_bins": 16,
}


def shrink(
    config_class: type[PretrainedConfig],
    overrides: Mapping[str, Any],
    *,
    table: Mapping[str, Any] = TEXT,
) -> PretrainedConfig:
    """Build a tiny configuration.

    Args:
        config_class: configuration class of the family.
        overrides: fields to set; a mapping under the name of a sub-configuration has its fields.
        table: tiny values by field name.
    """
    fields = {
        name: value for name, value in table.items() if name in config_class.__dataclass_fields__
    }
    if "kv_lora_rank" in fields:
        fields["num_key_value_heads"] = HEADS  # latent attention has one key head per query head
    if config_class.sub_configs:
        fields |= _shrunk_sub_configs(config_class, overrides)
    nested = set(config_class.sub_configs)
    # Copies, because some configurations modify the lists that they receive.
    fields |= {name: deepcopy(value) for name, value in overrides.items() if name not in nested}
    return config_class(**fields)


def _shrunk_sub_configs(
    config_class: type[PretrainedConfig], overrides: Mapping[str, Any]
) -> dict[str, PretrainedConfig]:
    defaults = config_class()
    shrunk = {}
    for name in config_class.sub_configs:
        default = getattr(defaults, name)
        if default is None:
            continue
        table = TEXT if "text" in name or "thinker" in name else TOWER
        shrunk[name] = shrink(type(default), overrides.get(name, {}), table=table)
    return shrunk
