"""Class and additional configuration fields of each family, beyond the table in `shrink`.

A field is listed if the family's code or validation requires it, or if it is a layer pattern that
combines all attention kinds of the family with sparse layers within three layers.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from families.shrink import EXPERT_WIDTH, HEAD_DIM, HEADS, HIDDEN

_DENSE_FIRST = ["dense", "sparse", "sparse"]
_LINEAR_MIX = ["linear_attention", "full_attention", "linear_attention"]
_INDEXED_MIX = ["linear_attention", "indexed_attention", "linear_attention"]
_SLIDING_MIX = ["sliding_attention", "full_attention", "sliding_attention"]
_INKLING_MIX = ["hybrid_sliding", "hybrid", "hybrid_sliding"]
_SAM = {"downsample_channels": [16, HIDDEN], "mlp_dim": 32}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}


@dataclass(frozen=True, slots=True)
class FamilyEntry:
    """One family.

    Attributes:
        architecture: model class to build.
        overrides: fields to set on its configuration.
        note: remarks.
    """

    architecture: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""


ENTRIES: Mapping[str, FamilyEntry] = {
    "afmoe": FamilyEntry("AfmoeForCausalLM", {"layer_types": _SLIDING_MIX}),
    "aria": FamilyEntry("AriaTextForCausalLM", note="transposed weights"),
    "axk1": FamilyEntry("AXK1ForCausalLM"),
    "axk2": FamilyEntry("AXK2ForCausalLM"),
    "bailing_hybrid": FamilyEntry("BailingHybridForCausalLM", {"layer_types": _LINEAR_MIX}),
    "beam": FamilyEntry("BeamForCausalLM", {"mlp_layer_types": _DENSE_FIRST}, "own gate, in fp32"),
    "cohere2_moe": FamilyEntry(
        "Cohere2MoeForCausalLM",
        {"logit_scale": 1.0, "num_shared_experts": 1, "layer_types": _SLIDING_MIX},
    ),
    "deepseek_ocr2": FamilyEntry(
        "DeepseekOcr2ForConditionalGeneration",
        {
            "text_config": {"mlp_layer_types": _DENSE_FIRST},
            "vision_config": {"sam_config": _SAM},
        },
    ),
    "deepseek_v2": FamilyEntry("DeepseekV2ForCausalLM", {"topk_method": "group_limited_greedy"}),
    "deepseek_v3": FamilyEntry("DeepseekV3ForCausalLM"),
    "deepseek_v32": FamilyEntry("DeepseekV32ForCausalLM"),
    "deepseek_v4": FamilyEntry(
        "DeepseekV4ForCausalLM",
        {
            "num_key_value_heads": 1,
            "head_dim": 16,
            "partial_rotary_factor": 0.5,
            "o_groups": 2,
            "layer_types": [
                "heavily_compressed_attention",
                "compressed_sparse_attention",
                "heavily_compressed_attention",
            ],
            "mlp_layer_types": ["hash_moe", "moe", "moe"],
            "compress_rates": {
                "compressed_sparse_attention": 2,
                "heavily_compressed_attention": 4,
            },
        },
        "first layer routes by a token id table; own gate with limits",
    ),
    "diffusion_gemma": FamilyEntry(
        "DiffusionGemmaForBlockDiffusion",
        {"canvas_length": 12, "text_config": {"global_head_dim": HEAD_DIM}},
        "block diffusion, not autoregressive; encoder and decoder share their experts' parameters",
    ),
    "dots1": FamilyEntry("Dots1ForCausalLM"),
    "dots3_note": FamilyEntry(
        "Dots3NoteForCausalLM",
        {
            "shared_experts_intermediate_size": 40,
            "swa_num_attention_heads": HEADS,
            "swa_num_key_value_heads": HEADS,
            "swa_q_lora_rank": 16,
            "swa_kv_lora_rank": 16,
            "swa_qk_nope_head_dim": 8,
            "swa_head_dim": 12,
            "swa_v_head_dim": 8,
        },
    ),
    "ernie4_5_moe": FamilyEntry("Ernie4_5_MoeForCausalLM"),
    "ernie4_5_vl_moe": FamilyEntry(
        "Ernie4_5_VLMoeForConditionalGeneration",
        {
            "text_config": {
                "moe_intermediate_size": [EXPERT_WIDTH, 16],
                "rope_parameters": {**_ROPE, "mrope_section": [1, 1, 2]},
            }
        },
        "two experts modules a layer, for text and for vision, of different widths",
    ),
    "exaone_moe": FamilyEntry("ExaoneMoeForCausalLM", {"layer_types": _SLIDING_MIX}),
    "flex_olmo": FamilyEntry("FlexOlmoForCausalLM"),
    "flint": FamilyEntry(
        "FlintForCausalLM",
        {
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
            "mlp_only_layers": [0],
        },
    ),
    "gemma4": FamilyEntry(
        "Gemma4ForCausalLM",
        {
            "enable_moe_block": True,
            "global_head_dim": HEAD_DIM,
            "hidden_size_per_layer_input": 8,
        },
    ),
    "glm4_moe": FamilyEntry("Glm4MoeForCausalLM"),
    "glm4_moe_lite": FamilyEntry("Glm4MoeLiteForCausalLM"),
    "glm4v_moe": FamilyEntry(
        "Glm4vMoeForConditionalGeneration",
        {
            "text_config": {
                "head_dim": 16,
                "rope_parameters": {
                    **_ROPE,
                    "partial_rotary_factor": 0.5,
                    "mrope_section": [2, 1, 1],
                },
            }
        },
    ),
    "glm5_next": FamilyEntry(
        "Glm5NextForConditionalGeneration",
        {
            "text_config": {
                "qk_rope_head_dim": 0,
                "index_kpool": 4,
                "mlp_layer_types": _DENSE_FIRST,
                "layer_types": _INDEXED_MIX,
            },
            "vision_config": {"projection_intermediate_size": 48},
        },
        "own gate with limits",
    ),
    "glm_moe_dsa": FamilyEntry("GlmMoeDsaForCausalLM"),
    "gpt_oss": FamilyEntry("GptOssForCausalLM", note="transposed, interleaved, biased; own gate"),
    "granitemoe": FamilyEntry("GraniteMoeForCausalLM"),
    "granitemoe_swa": FamilyEntry("GraniteMoeSWAForCausalLM"),
    "granitemoehybrid": FamilyEntry("GraniteMoeHybridForCausalLM", {"layer_types": _LINEAR_MIX}),
    "granitemoeshared": FamilyEntry("GraniteMoeSharedForCausalLM"),
    "hunyuan_v1_moe": FamilyEntry("HunYuanMoEV1ForCausalLM"),
    "hy_v3": FamilyEntry("HYV3ForCausalLM"),
    "hy_v4": FamilyEntry("HYV4ForCausalLM", note="own gate with limits"),
    "inkling": FamilyEntry(
        "InklingForCausalLM",
        {
            "d_rel": 4,
            "rel_extent": 16,
            "logits_mup_width_multiplier": 1.0,
            "mlp_layer_types": _DENSE_FIRST,
            "layer_types": _INKLING_MIX,
        },
    ),
    "inkling2": FamilyEntry(
        "Inkling2ForCausalLM",
        {
            "d_rel": 4,
            "rel_extent": 16,
            "layer_types": _INKLING_MIX,
            "n_layers_per_attn_res_block": 2,
        },
        "own gate, soft-capped; accumulates in fp32",
    ),
    "jamba": FamilyEntry(
        "JambaForCausalLM",
        {
            "num_hidden_layers": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 0,
            "use_mamba_kernels": False,
        },
    ),
    "kimi_linear": FamilyEntry("KimiLinearForCausalLM", {"layer_types": _LINEAR_MIX}),
    "kolibri1": FamilyEntry("Kolibri1ForCausalLM", {"layer_types": _SLIDING_MIX}),
    "laguna": FamilyEntry("LagunaForCausalLM", {"layer_types": _SLIDING_MIX}),
    "lfm2_moe": FamilyEntry(
        "Lfm2MoeForCausalLM", {"layer_types": ["conv", "full_attention", "conv"]}
    ),
    "mellum": FamilyEntry("MellumForCausalLM", {"layer_types": _SLIDING_MIX}),
    "mimo_v2_flash": FamilyEntry("MiMoV2FlashForCausalLM"),
    "minimax": FamilyEntry("MiniMaxForCausalLM", {"block_size": 8}),
    "minimax_m2": FamilyEntry("MiniMaxM2ForCausalLM"),
    "minimax_m3_vl": FamilyEntry(
        "MiniMaxM3VLForCausalLM",
        {
            "rotary_dim": 4,
            "index_block_size": 4,
            "index_topk_blocks": 2,
            "mlp_layer_types": _DENSE_FIRST,
            "layer_types": ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"],
        },
        "own gate with limits",
    ),
    "mistral4": FamilyEntry("Mistral4ForCausalLM"),
    "mistral_large4": FamilyEntry("MistralLarge4ForConditionalGeneration"),
    "mixtral": FamilyEntry("MixtralForCausalLM"),
    "muse_spark": FamilyEntry(
        "MuseSparkForConditionalGeneration",
        {
            "out_hidden_size": HIDDEN,
            "projector_hidden_size": HIDDEN,
            "text_config": {"moe_hidden_size": 16},
            "audio_config": {"patch_sizes": [2], "hidden_sizes": [16], "depths": [1]},
        },
        "experts narrower than the model's hidden size, and a norm after each expert",
    ),
    "nemotron_h": FamilyEntry(
        "NemotronHForCausalLM",
        {
            "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
            "num_hidden_layers": 4,
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "ssm_state_size": 8,
            "n_groups": 2,
            "chunk_size": 8,
            "moe_latent_size": 16,
            "use_mamba_kernels": False,
        },
        "no gate; experts narrower than the model's hidden size",
    ),
    "olmoe": FamilyEntry("OlmoeForCausalLM"),
    "openai_privacy_filter": FamilyEntry(
        "OpenAIPrivacyFilterForTokenClassification",
        {"id2label": {index: f"label-{index}" for index in range(5)}},
        "token classification, bidirectional; biased, transposed; computes in fp32",
    ),
    "phimoe": FamilyEntry("PhimoeForCausalLM"),
    "qwen2_moe": FamilyEntry("Qwen2MoeForCausalLM"),
    "qwen3_5_moe": FamilyEntry(
        "Qwen3_5MoeForCausalLM", {"layer_types": _LINEAR_MIX, "head_dim": 16}
    ),
    "qwen3_moe": FamilyEntry("Qwen3MoeForCausalLM"),
    "qwen3_next": FamilyEntry("Qwen3NextForCausalLM", {"layer_types": _LINEAR_MIX, "head_dim": 16}),
    "qwen3_omni_moe": FamilyEntry(
        "Qwen3OmniMoeThinkerForConditionalGeneration", note="the thinker, which writes the text"
    ),
    "qwen3_vl_moe": FamilyEntry("Qwen3VLMoeForConditionalGeneration"),
    "qwen4_exp": FamilyEntry(
        "Qwen4ExpForCausalLM",
        {
            "layer_types": _INDEXED_MIX,
            "head_dim": 16,
            "hc_lowrank": 8,
            "ple_layer_ids": [1],
            "ple_embed_dim": HIDDEN,
            "ngram_vocab_size_base": 64,
            "heads_per_ngram": 2,
            "split_ngram_parts": 2,
            "make_ngram_vocab_size_divisible_by": 8,
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 16,
            "indexer_budget": 8,
            "indexer_compress_ratio": 2,
        },
    ),
    "solar_open": FamilyEntry("SolarOpenForCausalLM"),
    "unlimited_ocr": FamilyEntry(
        "UnlimitedOcrForConditionalGeneration", {"vision_config": {"sam_config": _SAM}}
    ),
    "zaya": FamilyEntry(
        "ZayaForCausalLM",
        {
            "num_experts_per_tok": 1,
            "router_hidden_size": 16,
            "layer_types": ["hybrid", "hybrid_sliding", "hybrid"],
        },
        "top-1; a token that skips its experts comes as expert 0 with weight 0",
    ),
}
