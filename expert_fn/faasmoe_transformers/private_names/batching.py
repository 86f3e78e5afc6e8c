"""Private names of continuous batching: its loop, scheduler, cache and attention."""

from __future__ import annotations

from faasmoe_transformers.private_names.private_name import PrivateName, names

_CB = "transformers.generation.continuous_batching"
_API = f"{_CB}.continuous_api"
_CACHE = f"{_CB}.cache:PagedAttentionCache."
_ALLOCATOR = f"{_CB}.cache_allocators.cache_allocator:CacheAllocator."

BATCHING_NAMES: tuple[PrivateName, ...] = (
    # native_attention, native_step, batch_inputs, observation
    *names(
        "transformers.modeling_utils:ALL_ATTENTION_FUNCTIONS.",
        "register",
        "native_attention",
        "registers the attention implementation of the kernel library",
    ),
    *names(
        "transformers.integrations.sdpa_attention:",
        "sdpa_attention_forward",
        "native_attention",
        "computes what the kernels do not, such as attention without a paged cache",
    ),
    *names(
        "transformers:PreTrainedConfig.",
        "_attn_implementation",
        "native_attention",
        "whether the implementation was accepted",
    ),
    *names(
        _CACHE,
        "layer_to_allocator",
        "native_attention",
        "the cache of a layer",
    ),
    *names(
        f"{_CB}.cache_allocators.full_attention:FullAttentionCacheAllocator.",
        "_kv_token_views",
        "native_attention",
        "keys and values of a layer, by slot",
    ),
    *names(
        f"{_CB}.cache_allocators.sliding_attention:SlidingAttentionCacheAllocator.",
        "sliding_window",
        "native_attention",
        "keys that a query sees",
    ),
    *names(
        f"{_CB}.cache_allocators.cache_allocator:CacheAllocator.",
        "layer_type",
        "native_attention",
        "which of a batch's indices belong to a cache",
    ),
    *names(
        f"{_CB}.input_outputs:PagedAttentionArgs.",
        "cu_seq_lens_q cu_seq_lens_k read_index write_index",
        "native_attention",
        "a batch's offsets, read_index and write_index",
    ),
    *names(
        "transformers:PreTrainedModel.",
        "base_model_prefix",
        "native_step",
        "finds the module with the decoder layers",
    ),
    *names(
        f"{_API}:ContinuousBatchProcessor.",
        "_generation_step cache inputs_and_outputs model_runner",
        "native_step",
        "replaced: a program computes whole steps",
    ),
    *names(
        f"{_CB}.input_outputs:ContinuousBatchingIOs.",
        "prepare_batch_tensors output_ids",
        "native_step",
        "replaced: prepares batches without torch; where the tokens of a batch are read",
    ),
    *names(
        f"{_CB}.input_outputs:ContinuousBatchingIOs.",
        "input_ids position_ids cumulative_seqlens_q cumulative_seqlens_k logits_indices"
        " read_index_storage write_index_storage requests_in_batch num_request_in_batch"
        " attention_mask block_table return_logprobs device",
        "batch_inputs",
        "the static memory of a batch, and what batches may be",
    ),
    *names(
        f"{_CB}.model_runner:ModelRunner.",
        "pad_inputs do_sample",
        "batch_inputs",
        "what batches may be",
    ),
    *names(
        f"{_CB}.cache_allocators:",
        "FULL_ATTENTION",
        "batch_inputs",
        "the kind of cache whose slots follow from its block table",
    ),
    *names(
        _ALLOCATOR,
        "index layer_type block_table block_physical_stride tokens_per_page get_seqlen_k"
        " get_read_indices get_write_indices",
        "batch_inputs",
        "places of a request's tokens in a cache",
    ),
    *names(_CACHE, "cache_allocators", "batch_inputs", "the caches of a batch"),
    *names(
        f"{_CB}.requests:",
        "TMP_TOKEN_ID",
        "batch_inputs",
        "stands for a request's next token while it is computed",
    ),
    *names(
        f"{_CB}.requests:RequestState.",
        "request_id position_offset tokens_to_process",
        "batch_inputs",
        "the tokens of a request in a batch",
    ),
    *names(
        f"{_CB}.requests:FutureRequestState.",
        "state query_length has_new_token",
        "batch_inputs",
        "the requests of a batch",
    ),
    *names(
        f"{_CB}.requests:",
        "create_warmup_future_states FutureRequestState RequestStatus",
        "observation",
        "requests of the passes that the program is compared with",
    ),
    *names(
        f"{_CB}.input_outputs:ContinuousBatchingIOs.",
        "prepare_batch_tensors get_model_kwargs reset",
        "observation",
        "prepares these passes, and forgets them; logits_indices, one per sequence of a batch, is "
        "an attribute of its objects",
    ),
    *names(
        f"{_API}:ContinuousBatchProcessor.",
        "cache inputs_and_outputs logit_processor",
        "observation",
        "prepares these passes",
    ),
    *names(
        _CACHE,
        "can_store_request_tokens free_blocks reset cache_allocators",
        "observation",
        "their place in the cache",
    ),
    # continuous_batching
    *names(
        "transformers:GenerationMixin.",
        "init_continuous_batching",
        "continuous_batching",
        "creates a manager with a config of our own",
    ),
    *names(
        "transformers:GenerationMixin.",
        "_get_logits_processor",
        "continuous_batching",
        "replaced while the manager is created, to install our logits processor",
    ),
    *names(
        "transformers.generation:ContinuousBatchingConfig",
        "(scheduler_type)",
        "continuous_batching",
        "selects a scheduler that is only registered in SCHEDULER_MAPPING",
    ),
    *names(
        f"{_API}:OutputRouter.",
        "deliver deliver_batch",
        "continuous_batching",
        "overridden: one wake-up of the event loop per batch, and no handler per request",
    ),
    *names(
        f"{_API}:ContinuousBatchingManager.",
        "output_router",
        "continuous_batching",
        "replaced, to receive the outputs",
    ),
    *names(
        f"{_API}:ContinuousBatchingManager.",
        "batch_processor input_queue",
        "continuous_batching",
        "reaches cache and scheduler; counts waiting requests",
    ),
    *names(
        f"{_API}:ContinuousBatchingManager.",
        "background_thread_status",
        "continuous_batching",
        "whether the thread runs, and what ended it",
    ),
    *names(
        f"{_API}:BackgroundThreadStatus.",
        "can_accept_new_requests fatal_error",
        "continuous_batching",
        "whether the thread runs, and what ended it",
    ),
    *names(
        f"{_API}:ContinuousBatchingManager.",
        "_wake_up_loop",
        "continuous_batching",
        "wakes an idle thread for a preemption or resumption",
    ),
    *names(
        f"{_API}:ContinuousBatchingManager.",
        "_fail_all_remaining_requests",
        "continuous_batching",
        "replaced: requests that outlive the thread are resumed by another",
    ),
    *names(
        f"{_API}:ContinuousBatchingManager.",
        "distributed_helper",
        "continuous_batching",
        "reaches what seeds the generators",
    ),
    *names(
        f"{_CB}.distributed:DistributedHelper.",
        "set_tp_seed",
        "continuous_batching",
        "replaced: samplers draw by themselves",
    ),
    *names(
        f"{_API}:ContinuousBatchingManager.",
        "add_request(logit_processor_kwargs)",
        "continuous_batching",
        "hands a request's sampling state to the logits processor",
    ),
    *names(
        f"{_API}:ContinuousBatchingManager.",
        "logit_processor",
        "continuous_batching",
        "reserves the argument row of our logits processor",
    ),
    *names(
        f"{_CB}.cb_logits_processors:ContinuousBatchingLogitsProcessorList.",
        "tensors_required",
        "continuous_batching",
        "reserves the argument row of our logits processor",
    ),
    *names(
        f"{_API}:ContinuousBatchProcessor.",
        "cache scheduler",
        "continuous_batching",
        "reaches cache and scheduler",
    ),
    *names(
        _CACHE,
        "cache_allocators num_sectors",
        "continuous_batching",
        "checks that one request fits",
    ),
    *names(
        _ALLOCATOR,
        "needs_new_sectors",
        "continuous_batching",
        "checks that one request fits",
    ),
    *names(
        f"{_CB}.requests:GenerationOutput.",
        "request_id generated_tokens error is_finished",
        "continuous_batching",
        "the fields that BatchOutput declares",
    ),
    # continuous_batching: logits processor
    *names(
        f"{_CB}.cb_logits_processors:ContinuousBatchingLogitsProcessor.",
        "supported_kwargs ignored_kwargs fill_defaults prepare_tensor_args __call__",
        "continuous_batching",
        "implemented: per-request sampling",
    ),
    *names(
        f"{_CB}.requests:RequestState.",
        "request_id initial_tokens generated_tokens logit_processor_kwargs",
        "continuous_batching",
        "a request's tokens and its sampling state, which is deep-copied on preemption",
    ),
    *names(
        f"{_CB}.requests:FutureRequestState.",
        "state",
        "continuous_batching",
        "the requests behind the rows of the scores",
    ),
    # scheduler
    *names(
        f"{_CB}.scheduler:",
        "SCHEDULER_MAPPING FIFOScheduler",
        "scheduler",
        "registers a subclass of the FIFO scheduler",
    ),
    *names(
        f"{_CB}.scheduler:FIFOScheduler.",
        "reset clear_cancelled_requests schedule_batch _infer_request_tokens"
        " _process_candidates _schedule_request",
        "scheduler",
        "overridden: preemption, token counts, prefix-cache hits and the division between prompts",
    ),
    *names(
        f"{_CB}.scheduler:FIFOScheduler.",
        "waiting_requests waiting_requests_order active_requests add_waiting_request"
        " finish_request",
        "scheduler",
        "moves preempted requests out and back",
    ),
    *names(
        f"{_CB}.scheduler:FIFOScheduler.",
        "_requests_to_cancel block_new_requests has_pending_requests",
        "scheduler",
        "resumes cancelled requests so that they are removed; unblocks admission; idleness",
    ),
    *names(
        f"{_CB}.requests:RequestStatus.",
        "FINISHED",
        "scheduler",
        "ends the state of a preempted request without its log line",
    ),
    *names(
        f"{_CB}.requests:RequestState.",
        "create_equivalent_initial_request _status",
        "scheduler",
        "turns a running request into one that waits with its tokens as prompt",
    ),
    *names(
        f"{_CB}.requests:RequestState.",
        "remaining_prefill_tokens generated_tokens _true_initial_tokens",
        "scheduler",
        "how many tokens of a prompt the prefix cache had",
    ),
    *names(
        f"{_CB}.requests:FutureRequestState.",
        "state query_length",
        "scheduler",
        "tokens computed per request",
    ),
    *names(
        _CACHE,
        "cache_tensor evict_cached_blocks allow_block_sharing",
        "scheduler",
        "releases the memory of an idle cache",
    ),
    *names(
        _CACHE,
        "use_prefix_sharing",
        "continuous_batching",
        "whether later prompts find a prompt's pages",
    ),
    # prefix_cache
    *names(
        _CACHE,
        "search_prefix_match cache_allocators",
        "prefix_cache",
        "replaced: looks blocks up by salted hashes, of tokens as signed 32-bit integers",
    ),
    *names(
        _ALLOCATOR,
        "mark_complete_blocks",
        "prefix_cache",
        "replaced: registers blocks by salted hashes",
    ),
    # error_isolation
    *names(
        f"{_API}:ContinuousBatchingManager.",
        "_generation_step _generation_loop_body",
        "error_isolation",
        "replaced: computes the requests of a failed step again",
    ),
    *names(
        f"{_API}:ContinuousBatchingManager.",
        "model batch_processor",
        "error_isolation",
        "the device to check; the requests of the step",
    ),
    *names(
        f"{_API}:ContinuousBatchProcessor.",
        "inputs_and_outputs update_batch _handle_request_error scheduler",
        "error_isolation",
        "advances recomputed requests; fails the one that raises",
    ),
    *names(
        f"{_CB}.input_outputs:ContinuousBatchingIOs.prepare_batch_tensors",
        "(requests_in_batch) (num_q_tokens)",
        "error_isolation",
        "replaced: learns the requests of a step, and prepares part of them",
    ),
    *names(
        f"{_CB}.requests:RequestState.",
        "request_id position_offset tokens_to_process",
        "error_isolation",
        "restores a request to its state before the step",
    ),
    *names(
        f"{_CB}.requests:FutureRequestState.",
        "state query_length",
        "error_isolation",
        "the requests of a step and their token counts",
    ),
    *names(
        f"{_CB}.scheduler:FIFOScheduler.",
        "finish_request block_new_requests",
        "error_isolation",
        "removes the failed request",
    ),
    *names(
        f"{_API}:ContinuousBatchProcessor.",
        "cache",
        "error_isolation",
        "copies what a step overwrites",
    ),
    *names(_CACHE, "cache_allocators", "error_isolation", "the caches with a window"),
    *names(
        f"{_CB}.cache_allocators.sliding_attention:SlidingAttentionCacheAllocator.",
        "sliding_window get_write_indices write_trash_index",
        "error_isolation",
        "places of new tokens in the ring of a window",
    ),
    *names(
        f"{_CB}.cache_allocators.full_attention:FullAttentionCacheAllocator.",
        "_kv_token_views",
        "error_isolation",
        "keys and values of a layer, by slot",
    ),
)
