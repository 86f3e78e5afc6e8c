"""Private names of models: their modules, how they are built and loaded, and imports."""

from __future__ import annotations

from faasmoe_transformers.private_names.private_name import PrivateName, names

_LOADING = "transformers.core_model_loading"
_EXPERTS = "transformers.integrations.moe:use_experts_implementation."

MODEL_NAMES: tuple[PrivateName, ...] = (
    # attention
    *names(
        "transformers.utils.import_utils:",
        "is_flash_attn_2_available is_flash_attn_3_available",
        "attention",
        "whether flash attention is installed, without downloading kernels",
    ),
    *names(
        "transformers:PreTrainedConfig.",
        "_attn_implementation",
        "attention",
        "the implementation that is currently selected",
    ),
    *names(
        "transformers:PreTrainedModel.",
        "_supports_sdpa _supports_flash_attn",
        "attention",
        "which implementations the family can run with",
    ),
    *names(
        "transformers.modeling_utils:ALL_ATTENTION_FUNCTIONS",
        "[paged|eager]",
        "attention",
        "name of the fallback for families without SDPA",
    ),
    # native_linear
    *names(
        "torch.nn:Module.",
        "_parameters",
        "native_linear",
        "keeps 16-bit weights out of a float32 model's parameters",
    ),
    # tensor_places
    *names(
        "torch.nn:Module.",
        "_load_from_state_dict _load_state_dict_pre_hooks _load_state_dict_post_hooks",
        "tensor_places",
        "tells whether a family takes part in loading its tensors",
    ),
    # experts_backend
    *names(
        "transformers.integrations.moe:ALL_EXPERTS_FUNCTIONS.",
        "register",
        "experts_backend",
        "registers the experts implementation",
    ),
    *names(
        "torch.utils._pytree:",
        "tree_map_only",
        "experts_backend",
        "replaces deferred tensors within the arguments of an operation",
    ),
    *names(
        "torch:Tensor.",
        "_make_subclass",
        "experts_backend",
        "creates a deferred tensor without computing it",
    ),
    *names(
        "torch:Tensor.",
        "_version",
        "experts_backend",
        "whether rows were modified since their shared expert was computed",
    ),
    # dtypes, onednn
    *names(
        "transformers:PreTrainedModel.",
        "_get_dtype_plan",
        "dtypes",
        "dtypes of parameters as from_pretrained has them",
    ),
    *names(
        "torch:ops.mkldnn.",
        "_is_mkldnn_bf16_supported _is_mkldnn_fp16_supported",
        "onednn",
        "whether oneDNN computes products of a 16-bit dtype on this CPU",
    ),
    # meta_model, lazy_import
    *names(
        "transformers:PreTrainedModel.",
        "_from_config _from_config(experts_implementation)",
        "meta_model",
        "builds a model of a class without weights, with an experts implementation",
    ),
    *names(
        "torch.nn:Module.",
        "_parameters _buffers",
        "meta_model",
        "replaces tensors whatever their shape and dtype",
    ),
    *names(
        "torch.",
        "_meta_registrations",
        "lazy_import",
        "deferred in sandboxes and routers: a quarter of torch's import time",
    ),
    # fast_import
    *names(
        "torch._dynamo:",
        "disable allow_in_graph assume_constant_result mark_static_address",
        "fast_import",
        "replaced until torch's compiler is used: decorators and marks of transformers' modules",
    ),
    *names(
        "torch._dynamo.",
        "_trace_wrapped_higher_order_op",
        "fast_import",
        "imported by transformers without the rest of torch's compiler",
    ),
    *names(
        "transformers.utils.import_utils:",
        "define_import_structure is_torch_distributed_available",
        "fast_import",
        "replaced: caches the index of exported names; leaves out distributed code",
    ),
    # gguf_tokenizer
    *names(
        "transformers.integrations.gguf:",
        "convert_gguf_tokenizer gguf_tokenizer_mapping.GGUF_PRE_TOKENIZER_SPLITS",
        "gguf_tokenizer",
        "builds the tokenizer that the keys of a GGUF file describe",
    ),
    # model_skeleton
    *names(
        "transformers.models.auto.modeling_auto:",
        "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
        "model_skeleton",
        "class of a config that names none",
    ),
    *names(
        "transformers:PreTrainedConfig.",
        "sub_configs",
        "model_skeleton",
        "sets the dtype of composite configs",
    ),
    *names(
        "transformers:PreTrainedModel.",
        "get_init_context",
        "model_skeleton",
        "the contexts in which from_pretrained builds a model",
    ),
    *names(
        _EXPERTS,
        "_is_expert_parallel has_gate is_transposed is_concatenated has_bias",
        "model_skeleton",
        "recognizes experts modules, and the form of their parameters",
    ),
    *names(
        "transformers:PreTrainedConfig.",
        "_experts_implementation",
        "model_skeleton",
        "has an experts module computed by its family's own forward",
    ),
    *names(
        "transformers:PreTrainedModel.",
        "_keys_to_ignore_on_load_missing _keys_to_ignore_on_load_unexpected _init_weights",
        "model_skeleton",
        "which tensors a checkpoint may lack or have in excess, and their initial values",
    ),
    # compiled_artifacts
    *names(
        "torch._dynamo.aot_compile_types:",
        "BundledAOTAutogradSerializableCallable",
        "compiled_artifacts",
        "code compiled for a CPU, which vLLM saves and loads",
    ),
    # weight_conversion
    *names(
        "transformers.conversion_mapping:",
        "get_model_conversion_mapping",
        "weight_conversion",
        "the family's renamings and weight converters",
    ),
    *names(
        f"{_LOADING}:",
        "Concatenate.dim MergeModulelist.dim dot_natural_key rename_source_key",
        "weight_conversion",
        "matches a checkpoint's tensors to parameters, in from_pretrained's order",
    ),
    *names(
        f"{_LOADING}:WeightRenaming.",
        "source_patterns collected_tensors convert",
        "weight_conversion",
        "runs one conversion at a time",
    ),
    *names(
        f"{_LOADING}:WeightConverter.",
        "source_patterns collected_tensors convert operations",
        "weight_conversion",
        "runs one conversion at a time, by rows where experts are only stacked",
    ),
    *names(
        "transformers:PreTrainedModel.",
        "base_model_prefix all_tied_weights_keys",
        "weight_conversion",
        "prefix and ties of parameters as from_pretrained has them",
    ),
)
