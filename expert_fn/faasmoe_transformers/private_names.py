"""The private and undocumented names of torch and transformers that this package uses.

PRIVATE_NAMES is the one table: where each name is, why it is needed and which module here uses it.
`version_check` resolves it against the installed versions. Documented classes that the package only
calls, such as ContinuousBatchingConfig, are not listed, nor are conventions of the families' own
classes, such as `shared_expert`, `num_experts` and the arguments of an experts module: the tests of
every family cover these.

A location is `module`, `module:attribute...`, or one of the latter followed by `(parameter)` for a
keyword argument or `[key]` for an entry of a mapping. An attribute of a class may also be one that
its instances get in a method.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PrivateName:
    """A name of torch or transformers that may change without notice.

    Attributes:
        location: where it is, see the module's docstring.
        used_by: the module of this package that uses it.
        reason: what it is needed for.
    """

    location: str
    used_by: str
    reason: str

    @property
    def library(self) -> str:
        """The library that it belongs to."""
        return self.location.partition(":")[0].partition(".")[0]

    @property
    def attribute(self) -> str:
        """The last component of the location, without parameter or key."""
        path = self.location.partition(":")[2].partition("(")[0].partition("[")[0]
        return path.rpartition(".")[2]


def _names(owner: str, names: str, used_by: str, reason: str) -> list[PrivateName]:
    """Return one entry for each of `names`, which are appended to `owner`."""
    return [PrivateName(owner + name, used_by, reason) for name in names.split()]


_CB = "transformers.generation.continuous_batching"
_API = f"{_CB}.continuous_api"
_CACHE = f"{_CB}.cache:PagedAttentionCache."
_ALLOCATOR = f"{_CB}.cache_allocators.cache_allocator:CacheAllocator."
_LOADING = "transformers.core_model_loading"
_EXPERTS = "transformers.integrations.moe:use_experts_implementation."

PRIVATE_NAMES: tuple[PrivateName, ...] = (
    # attention
    *_names(
        "transformers.utils.import_utils:",
        "is_flash_attn_2_available is_flash_attn_3_available",
        "attention",
        "whether flash attention is installed, without downloading kernels",
    ),
    *_names(
        "transformers:PreTrainedConfig.",
        "_attn_implementation",
        "attention",
        "the implementation that is currently selected",
    ),
    *_names(
        "transformers:PreTrainedModel.",
        "_supports_sdpa _supports_flash_attn",
        "attention",
        "which implementations the family can run with",
    ),
    *_names(
        "transformers.modeling_utils:ALL_ATTENTION_FUNCTIONS",
        "[paged|eager]",
        "attention",
        "name of the fallback for families without SDPA",
    ),
    # native_attention, native_step, observation, native_linear
    *_names(
        "transformers.modeling_utils:ALL_ATTENTION_FUNCTIONS.",
        "register",
        "native_attention",
        "registers the attention implementation of the kernel library",
    ),
    *_names(
        "transformers.integrations.sdpa_attention:",
        "sdpa_attention_forward",
        "native_attention",
        "computes what the kernels do not, such as attention without a paged cache",
    ),
    *_names(
        "transformers:PreTrainedConfig.",
        "_attn_implementation",
        "native_attention",
        "whether the implementation was accepted",
    ),
    *_names(
        _CACHE,
        "layer_to_allocator",
        "native_attention",
        "the cache of a layer",
    ),
    *_names(
        f"{_CB}.cache_allocators.full_attention:FullAttentionCacheAllocator.",
        "_kv_token_views",
        "native_attention",
        "keys and values of a layer, by slot",
    ),
    *_names(
        f"{_CB}.cache_allocators.sliding_attention:SlidingAttentionCacheAllocator.",
        "sliding_window",
        "native_attention",
        "keys that a query sees",
    ),
    *_names(
        f"{_CB}.cache_allocators.cache_allocator:CacheAllocator.",
        "layer_type",
        "native_attention",
        "which of a batch's indices belong to a cache",
    ),
    *_names(
        f"{_CB}.input_outputs:PagedAttentionArgs.",
        "cu_seq_lens_q cu_seq_lens_k read_index write_index",
        "native_attention",
        "a batch's offsets, read_index and write_index",
    ),
    *_names(
        "transformers:PreTrainedModel.",
        "base_model_prefix",
        "native_step",
        "finds the module with the decoder layers",
    ),
    *_names(
        f"{_API}:ContinuousBatchProcessor.",
        "_generation_step cache inputs_and_outputs model_runner",
        "native_step",
        "replaced: a program computes whole steps",
    ),
    *_names(
        f"{_CB}.input_outputs:ContinuousBatchingIOs.",
        "prepare_batch_tensors output_ids",
        "native_step",
        "replaced: prepares batches without torch; where the tokens of a batch are read",
    ),
    *_names(
        f"{_CB}.input_outputs:ContinuousBatchingIOs.",
        "input_ids position_ids cumulative_seqlens_q cumulative_seqlens_k logits_indices"
        " read_index_storage write_index_storage requests_in_batch num_request_in_batch"
        " attention_mask block_table return_logprobs device",
        "batch_inputs",
        "the static memory of a batch, and what batches may be",
    ),
    *_names(
        f"{_CB}.model_runner:ModelRunner.",
        "pad_inputs do_sample",
        "batch_inputs",
        "what batches may be",
    ),
    *_names(
        f"{_CB}.cache_allocators:",
        "FULL_ATTENTION",
        "batch_inputs",
        "the kind of cache whose slots follow from its block table",
    ),
    *_names(
        _ALLOCATOR,
        "index layer_type block_table block_physical_stride tokens_per_page get_seqlen_k"
        " get_read_indices get_write_indices",
        "batch_inputs",
        "places of a request's tokens in a cache",
    ),
    *_names(_CACHE, "cache_allocators", "batch_inputs", "the caches of a batch"),
    *_names(
        f"{_CB}.requests:",
        "TMP_TOKEN_ID",
        "batch_inputs",
        "stands for a request's next token while it is computed",
    ),
    *_names(
        f"{_CB}.requests:RequestState.",
        "request_id position_offset tokens_to_process",
        "batch_inputs",
        "the tokens of a request in a batch",
    ),
    *_names(
        f"{_CB}.requests:FutureRequestState.",
        "state query_length has_new_token",
        "batch_inputs",
        "the requests of a batch",
    ),
    *_names(
        f"{_CB}.requests:",
        "create_warmup_future_states FutureRequestState RequestStatus",
        "observation",
        "requests of the passes that the program is compared with",
    ),
    *_names(
        f"{_CB}.input_outputs:ContinuousBatchingIOs.",
        "prepare_batch_tensors get_model_kwargs reset",
        "observation",
        "prepares these passes, and forgets them; logits_indices, one per sequence of a batch, is "
        "an attribute of its objects",
    ),
    *_names(
        f"{_API}:ContinuousBatchProcessor.",
        "cache inputs_and_outputs logit_processor",
        "observation",
        "prepares these passes",
    ),
    *_names(
        _CACHE,
        "can_store_request_tokens free_blocks reset cache_allocators",
        "observation",
        "their place in the cache",
    ),
    *_names(
        "torch.nn:Module.",
        "_parameters",
        "native_linear",
        "keeps 16-bit weights out of a float32 model's parameters",
    ),
    # continuous_batching
    *_names(
        "transformers:GenerationMixin.",
        "init_continuous_batching",
        "continuous_batching",
        "creates a manager with a config of our own",
    ),
    *_names(
        "transformers:GenerationMixin.",
        "_get_logits_processor",
        "continuous_batching",
        "replaced while the manager is created, to install our logits processor",
    ),
    *_names(
        "transformers.generation:ContinuousBatchingConfig",
        "(scheduler_type)",
        "continuous_batching",
        "selects a scheduler that is only registered in SCHEDULER_MAPPING",
    ),
    *_names(
        f"{_API}:OutputRouter.",
        "deliver deliver_batch",
        "continuous_batching",
        "overridden: one wake-up of the event loop per batch, and no handler per request",
    ),
    *_names(
        f"{_API}:ContinuousBatchingManager.",
        "output_router",
        "continuous_batching",
        "replaced, to receive the outputs",
    ),
    *_names(
        f"{_API}:ContinuousBatchingManager.",
        "batch_processor input_queue",
        "continuous_batching",
        "reaches cache and scheduler; counts waiting requests",
    ),
    *_names(
        f"{_API}:ContinuousBatchingManager.",
        "background_thread_status",
        "continuous_batching",
        "whether the thread runs, and what ended it",
    ),
    *_names(
        f"{_API}:BackgroundThreadStatus.",
        "can_accept_new_requests fatal_error",
        "continuous_batching",
        "whether the thread runs, and what ended it",
    ),
    *_names(
        f"{_API}:ContinuousBatchingManager.",
        "_wake_up_loop",
        "continuous_batching",
        "wakes an idle thread for a preemption or resumption",
    ),
    *_names(
        f"{_API}:ContinuousBatchingManager.",
        "_fail_all_remaining_requests",
        "continuous_batching",
        "replaced: requests that outlive the thread are resumed by another",
    ),
    *_names(
        f"{_API}:ContinuousBatchingManager.",
        "add_request(logit_processor_kwargs)",
        "continuous_batching",
        "hands a request's sampling state to the logits processor",
    ),
    *_names(
        f"{_API}:ContinuousBatchingManager.",
        "logit_processor",
        "continuous_batching",
        "reserves the argument row of our logits processor",
    ),
    *_names(
        f"{_CB}.cb_logits_processors:ContinuousBatchingLogitsProcessorList.",
        "tensors_required",
        "continuous_batching",
        "reserves the argument row of our logits processor",
    ),
    *_names(
        f"{_API}:ContinuousBatchProcessor.",
        "cache scheduler",
        "continuous_batching",
        "reaches cache and scheduler",
    ),
    *_names(
        _CACHE,
        "cache_allocators num_sectors",
        "continuous_batching",
        "checks that one request fits",
    ),
    *_names(
        _ALLOCATOR,
        "needs_new_sectors",
        "continuous_batching",
        "checks that one request fits",
    ),
    *_names(
        f"{_CB}.requests:GenerationOutput.",
        "request_id generated_tokens error is_finished",
        "continuous_batching",
        "the fields that BatchOutput declares",
    ),
    # scheduler
    *_names(
        f"{_CB}.scheduler:",
        "SCHEDULER_MAPPING FIFOScheduler",
        "scheduler",
        "registers a subclass of the FIFO scheduler",
    ),
    *_names(
        f"{_CB}.scheduler:FIFOScheduler.",
        "reset clear_cancelled_requests schedule_batch _infer_request_tokens"
        " _process_candidates _schedule_request",
        "scheduler",
        "overridden: preemption, token counts, prefix-cache hits and the division between prompts",
    ),
    *_names(
        f"{_CB}.scheduler:FIFOScheduler.",
        "waiting_requests waiting_requests_order active_requests add_waiting_request"
        " finish_request",
        "scheduler",
        "moves preempted requests out and back",
    ),
    *_names(
        f"{_CB}.scheduler:FIFOScheduler.",
        "_requests_to_cancel block_new_requests has_pending_requests",
        "scheduler",
        "resumes cancelled requests so that they are removed; unblocks admission; idleness",
    ),
    *_names(
        f"{_CB}.requests:RequestStatus.",
        "FINISHED",
        "scheduler",
        "ends the state of a preempted request without its log line",
    ),
    *_names(
        f"{_CB}.requests:RequestState.",
        "create_equivalent_initial_request _status",
        "scheduler",
        "turns a running request into one that waits with its tokens as prompt",
    ),
    *_names(
        f"{_CB}.requests:RequestState.",
        "remaining_prefill_tokens generated_tokens _true_initial_tokens",
        "scheduler",
        "how many tokens of a prompt the prefix cache had",
    ),
    *_names(
        f"{_CB}.requests:FutureRequestState.",
        "state query_length",
        "scheduler",
        "tokens computed per request",
    ),
    *_names(
        _CACHE,
        "cache_tensor evict_cached_blocks allow_block_sharing",
        "scheduler",
        "releases the memory of an idle cache",
    ),
    *_names(
        _CACHE,
        "use_prefix_sharing",
        "continuous_batching",
        "whether later prompts find a prompt's pages",
    ),
    # prefix_cache
    *_names(
        _CACHE,
        "search_prefix_match cache_allocators",
        "prefix_cache",
        "replaced: looks blocks up by salted hashes, of tokens as signed 32-bit integers",
    ),
    *_names(
        _ALLOCATOR,
        "mark_complete_blocks",
        "prefix_cache",
        "replaced: registers blocks by salted hashes",
    ),
    # error_isolation
    *_names(
        f"{_API}:ContinuousBatchingManager.",
        "_generation_step _generation_loop_body",
        "error_isolation",
        "replaced: computes the requests of a failed step again",
    ),
    *_names(
        f"{_API}:ContinuousBatchingManager.",
        "model batch_processor",
        "error_isolation",
        "the device to check; the requests of the step",
    ),
    *_names(
        f"{_API}:ContinuousBatchProcessor.",
        "inputs_and_outputs update_batch _handle_request_error scheduler",
        "error_isolation",
        "advances recomputed requests; fails the one that raises",
    ),
    *_names(
        f"{_CB}.input_outputs:ContinuousBatchingIOs.prepare_batch_tensors",
        "(requests_in_batch) (num_q_tokens)",
        "error_isolation",
        "replaced: learns the requests of a step, and prepares part of them",
    ),
    *_names(
        f"{_CB}.requests:RequestState.",
        "request_id position_offset tokens_to_process",
        "error_isolation",
        "restores a request to its state before the step",
    ),
    *_names(
        f"{_CB}.requests:FutureRequestState.",
        "state query_length",
        "error_isolation",
        "the requests of a step and their token counts",
    ),
    *_names(
        f"{_CB}.scheduler:FIFOScheduler.",
        "finish_request block_new_requests",
        "error_isolation",
        "removes the failed request",
    ),
    *_names(
        f"{_API}:ContinuousBatchProcessor.",
        "cache",
        "error_isolation",
        "copies what a step overwrites",
    ),
    *_names(_CACHE, "cache_allocators", "error_isolation", "the caches with a window"),
    *_names(
        f"{_CB}.cache_allocators.sliding_attention:SlidingAttentionCacheAllocator.",
        "sliding_window get_write_indices write_trash_index",
        "error_isolation",
        "places of new tokens in the ring of a window",
    ),
    *_names(
        f"{_CB}.cache_allocators.full_attention:FullAttentionCacheAllocator.",
        "_kv_token_views",
        "error_isolation",
        "keys and values of a layer, by slot",
    ),
    # continuous_batching: logits processor
    *_names(
        f"{_CB}.cb_logits_processors:ContinuousBatchingLogitsProcessor.",
        "supported_kwargs ignored_kwargs fill_defaults prepare_tensor_args __call__",
        "continuous_batching",
        "implemented: per-request sampling",
    ),
    *_names(
        f"{_CB}.requests:RequestState.",
        "request_id initial_tokens generated_tokens logit_processor_kwargs",
        "continuous_batching",
        "a request's tokens and its sampling state, which is deep-copied on preemption",
    ),
    *_names(
        f"{_CB}.requests:FutureRequestState.",
        "state",
        "continuous_batching",
        "the requests behind the rows of the scores",
    ),
    # experts_backend
    *_names(
        "transformers.integrations.moe:ALL_EXPERTS_FUNCTIONS.",
        "register",
        "experts_backend",
        "registers the experts implementation",
    ),
    *_names(
        "torch.utils._pytree:",
        "tree_map_only",
        "experts_backend",
        "replaces deferred tensors within the arguments of an operation",
    ),
    *_names(
        "torch:Tensor.",
        "_make_subclass",
        "experts_backend",
        "creates a deferred tensor without computing it",
    ),
    *_names(
        "torch:Tensor.",
        "_version",
        "experts_backend",
        "whether rows were modified since their shared expert was computed",
    ),
    # dtypes
    *_names(
        "transformers:PreTrainedModel.",
        "_get_dtype_plan",
        "dtypes",
        "dtypes of parameters as from_pretrained has them",
    ),
    *_names(
        "torch:ops.mkldnn.",
        "_is_mkldnn_bf16_supported _is_mkldnn_fp16_supported",
        "onednn",
        "whether oneDNN computes products of a 16-bit dtype on this CPU",
    ),
    # meta_model, lazy_import
    *_names(
        "transformers:PreTrainedModel.",
        "_from_config _from_config(experts_implementation)",
        "meta_model",
        "builds a model of a class without weights, with an experts implementation",
    ),
    *_names(
        "torch.nn:Module.",
        "_parameters _buffers",
        "meta_model",
        "replaces tensors whatever their shape and dtype",
    ),
    *_names(
        "torch.",
        "_meta_registrations",
        "lazy_import",
        "deferred in sandboxes and routers: a quarter of torch's import time",
    ),
    # fast_import
    *_names(
        "torch._dynamo:",
        "disable allow_in_graph assume_constant_result mark_static_address",
        "fast_import",
        "replaced until torch's compiler is used: decorators and marks of transformers' modules",
    ),
    *_names(
        "torch._dynamo.",
        "_trace_wrapped_higher_order_op",
        "fast_import",
        "imported by transformers without the rest of torch's compiler",
    ),
    *_names(
        "transformers.utils.import_utils:",
        "define_import_structure is_torch_distributed_available",
        "fast_import",
        "replaced: caches the index of exported names; leaves out distributed code",
    ),
    # gguf_tokenizer
    *_names(
        "transformers.integrations.gguf:",
        "convert_gguf_tokenizer gguf_tokenizer_mapping.GGUF_PRE_TOKENIZER_SPLITS",
        "gguf_tokenizer",
        "builds the tokenizer that the keys of a GGUF file describe",
    ),
    # model_skeleton
    *_names(
        "transformers.models.auto.modeling_auto:",
        "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
        "model_skeleton",
        "class of a config that names none",
    ),
    *_names(
        "transformers:PreTrainedConfig.",
        "sub_configs",
        "model_skeleton",
        "sets the dtype of composite configs",
    ),
    *_names(
        "transformers:PreTrainedModel.",
        "get_init_context",
        "model_skeleton",
        "the contexts in which from_pretrained builds a model",
    ),
    *_names(
        _EXPERTS,
        "_is_expert_parallel has_gate is_transposed is_concatenated has_bias",
        "model_skeleton",
        "recognizes experts modules, and the form of their parameters",
    ),
    *_names(
        "transformers:PreTrainedConfig.",
        "_experts_implementation",
        "model_skeleton",
        "has an experts module computed by its family's own forward",
    ),
    *_names(
        "transformers:PreTrainedModel.",
        "_keys_to_ignore_on_load_missing _keys_to_ignore_on_load_unexpected _init_weights",
        "model_skeleton",
        "which tensors a checkpoint may lack or have in excess, and their initial values",
    ),
    # weight_conversion
    *_names(
        "transformers.conversion_mapping:",
        "get_model_conversion_mapping",
        "weight_conversion",
        "the family's renamings and weight converters",
    ),
    *_names(
        f"{_LOADING}:",
        "Concatenate.dim MergeModulelist.dim dot_natural_key rename_source_key",
        "weight_conversion",
        "matches a checkpoint's tensors to parameters, in from_pretrained's order",
    ),
    *_names(
        f"{_LOADING}:WeightRenaming.",
        "source_patterns collected_tensors convert",
        "weight_conversion",
        "runs one conversion at a time",
    ),
    *_names(
        f"{_LOADING}:WeightConverter.",
        "source_patterns collected_tensors convert operations",
        "weight_conversion",
        "runs one conversion at a time, by rows where experts are only stacked",
    ),
    *_names(
        "transformers:PreTrainedModel.",
        "base_model_prefix all_tied_weights_keys",
        "weight_conversion",
        "prefix and ties of parameters as from_pretrained has them",
    ),
)
