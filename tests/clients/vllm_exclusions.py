"""Which of vLLM's tests run against FaaSMoE, which do not apply, and which fail as known.

Patterns match a test's id below `tests/`; the first that matches counts.
"""

_CHAT = "entrypoints/openai/chat_completion"
_OPTION = "an option of `vllm serve` that FaaSMoE has not"
_MODEL = "what a trained model of the test answers (the demo model has 135 M parameters)"
_ENDS = f"{_MODEL}: that a text ends in time"
_RESPONSES = "entrypoints/openai/responses"
_CALLS = f"{_RESPONSES}/test_function_call.py"
_STORED = "stored responses, which are refused by name"

FILES = (
    f"{_CHAT}/test_chat.py",
    f"{_CHAT}/test_chat_completion.py",
    f"{_CHAT}/test_chat_echo.py",
    f"{_CHAT}/test_chat_logit_bias_validation.py",
    f"{_CHAT}/test_completion_with_function_calling.py",
    f"{_CHAT}/test_enable_force_include_usage.py",
    f"{_CHAT}/test_include_reasoning.py",
    f"{_CHAT}/test_logprob_token_ids.py",
    f"{_CHAT}/test_root_path.py",
    "entrypoints/openai/completion/test_completion.py",
    "entrypoints/openai/completion/test_prompt_validation.py",
    "entrypoints/openai/models/test_models.py",
    "entrypoints/openai/test_chunked_prompt.py",
    "entrypoints/openai/test_return_token_ids.py",
    "entrypoints/openai/test_return_tokens_as_ids.py",
    "entrypoints/openai/responses/test_basic.py",
    "entrypoints/openai/responses/test_function_call.py",
    "entrypoints/openai/responses/test_simple.py",
    "entrypoints/openai/responses/test_stateful.py",
    "entrypoints/openai/responses/test_structured_output.py",
    "tool_use/test_chat_completions.py",
    "tool_use/test_tool_calls.py",
    "tool_use/test_parallel_tool_calls.py",
    "entrypoints/anthropic/test_messages.py",
    "entrypoints/serve/tokenize/test_tokenization.py",
    "entrypoints/serve/instrumentator/test_basic.py",
    "entrypoints/serve/instrumentator/test_metrics.py",
)

NOT_RUN: tuple[tuple[str, str], ...] = (
    (f"{_CHAT}/test_thinking_token_budget.py", "`thinking_token_budget` is refused by name"),
    (f"{_CHAT}/test_batched_chat_completions.py", "vLLM's endpoint for batches of chats"),
    (f"{_CHAT}/test_*_prompt_embeds.py, test_extra_content_fields.py", "multimodal input"),
    (f"{_RESPONSES}/test_harmony.py, test_mcp_tools.py", "tools run by the server"),
    (f"{_RESPONSES}/test_parsable_context.py", "tools run by the server"),
    ("entrypoints/openai/test_openai_schema.py", "a schema with images (test_fuzz.py has ours)"),
    ("entrypoints/openai/correctness", "the accuracy of a trained model"),
    ("entrypoints/openai/completion/test_tensorizer_entrypoint.py", _OPTION),
    ("entrypoints/openai/decisions, generate, cohere, scale_out, rl", "endpoints of vLLM's own"),
    ("entrypoints/launchers", "the process of `vllm serve`"),
    ("entrypoints/multimodal, pooling, speech_to_text", "models of other kinds"),
    ("entrypoints/tool_parsers", "the models of these parsers"),
    ("entrypoints/openai/completion/test_token_in_token_out.py", _OPTION),
    (
        "entrypoints/serve/instrumentator/test_orca_metrics.py, test_uds.py, middleware/"
        "test_optional_middleware.py",
        _OPTION,
    ),
    ("entrypoints/serve/lora", "LoRA"),
    ("entrypoints/serve/sagemaker, dev", "endpoints of vLLM's own"),
)
"""Files with HTTP-level tests that are left out, and why."""

NOT_APPLICABLE: tuple[tuple[str, str], ...] = (
    ("*zephyr-lora*", "LoRA"),
    ("*/models/test_models.py::test_check_models", "LoRA"),
    ("*watermarked*", _OPTION),
    ("*/test_root_path.py*", _OPTION),
    ("*/test_enable_force_include_usage.py*", _OPTION),
    ("*test_per_request_metrics*", _OPTION),
    ("*test_tokenizer_info*", _OPTION),
    ("*/test_return_tokens_as_ids.py*[[]True]", _OPTION),
    ("*/test_chat_echo.py::test_chat_session_with_echo*", _ENDS),
    ("*test_comparison_with_prompt_logprobs_and_logprobs", f"{_MODEL}: that it writes a text"),
    ("*/test_chat_echo.py::test_prompt_logprobs", f"{_OPTION} (--max-logprobs)"),
    ("*/test_chat_echo.py::test_top_logprobs", f"{_OPTION} (--max-logprobs)"),
    ("*test_kv_transfer*", "vLLM's disaggregated serving"),
    ("*test_invocations*", "SageMaker's endpoint"),
    ("*/responses/test_stateful.py*", _STORED),
    ("*/test_include_reasoning.py*", _MODEL),
    (f"*{_RESPONSES}/test_simple.py::test_reasoning_item*", f"{_MODEL}: reasoning"),
    ("*test_streaming_reasoning_tokens_e2e*", f"{_MODEL}: reasoning"),
    ("*test_non_streaming_reasoning_tokens_e2e*", f"{_MODEL}: reasoning"),
    (f"*{_RESPONSES}/test_basic.py::test_simple_input", f"{_MODEL}: 13 * 24, and reasoning"),
    (f"*{_RESPONSES}/test_basic.py::test_instructions", f"{_MODEL}: 13 * 24"),
    (f"*{_RESPONSES}/test_basic.py::test_chat", f"{_MODEL}: 15 * 2"),
    (f"*{_RESPONSES}/test_simple.py::test_streaming_output_consistency*", _ENDS),
    (f"*{_RESPONSES}/test_simple.py::test_streaming_logprobs*", _ENDS),
    (f"*{_RESPONSES}/test_structured_output.py*", f"{_MODEL}: what it extracts"),
    (f"*{_CALLS}::test_function_tool_use[[]auto*", f"{_MODEL}: calls of its own accord"),
    (f"*{_CALLS}::test_function_calling_with_streaming_expected*", f"{_MODEL}: calls"),
    (f"*{_CALLS}::*forced_tool_choice[[]auto*", f"{_MODEL}: calls of its own accord"),
    (f"*{_CALLS}::*forced_tool_choice[[]tool_choice2*", _ENDS),
    (f"*{_CALLS}::*streaming_types[[]*-required-*", _ENDS),
    (f"*{_CALLS}::*streaming_types[[]*-tool_choice2-*", _ENDS),
    (f"*{_CALLS}::test_named_tool_use*", _ENDS),
    ("*test_function_tool_use[[]plain-True-*", f"{_MODEL}: reasoning"),
    ("*test_function_tool_use[[]plain-False-auto-*", f"{_MODEL}: calls of its own accord"),
    ("*/test_completion_with_function_calling.py::test_named_tool_use*", _ENDS),
    ("*test_return_token_ids.py::test_chat_completion_with_tool_use", f"{_MODEL}: calls"),
    ("*test_return_token_ids.py::test_chat_completion_with_emoji*", _ENDS),
    (f"*{_CALLS}::*streaming_forced_tool_choice[[]required*", _ENDS),
    ("*/test_chat.py::test_structured_outputs_json_chat*", _ENDS),
    ("*/test_chat.py::test_response_format_json_object*", f"{_MODEL}: 1 + 1"),
    ("*/test_messages.py::test_s*_message*", _ENDS),
    ("*test_response_format_with_tool_choice_required*", _ENDS),
    ("*/test_messages.py::test_anthropic_structured_output", _ENDS),
    ("*/test_messages.py::test_anthropic_tool_call", f"{_MODEL}: calls of its own accord"),
    ("tool_use/test_tool_calls.py::test_tool_call_and_choice*", f"{_MODEL}: calls"),
    ("tool_use/test_parallel_tool_calls.py*", f"{_MODEL}: calls, and what it makes of results"),
    ("*test_more_than_one_prompt_logprobs_chat*", _MODEL),
    ("*test_single_chat_session*", f"{_MODEL}: the number of tokens"),
    ("*test_structured_outputs_choice_chat*", f"{_MODEL}: two different choices"),
    ("*test_response_format_json_schema*", f"{_MODEL}: 1 + 1"),
    ("*test_complex_message_content*", f"{_MODEL}: 1 + 1"),
    ("*/test_basic.py::test_show_version*", "vLLM's version"),
    ("*/test_basic.py::test_request_cancellation*", "10,000 tokens; the demo model has 8192"),
    ("*/test_metrics.py::*multimodal*", "models of other kinds"),
    ("*/test_metrics.py::*--[es]*", _OPTION),
    ("*/test_metrics.py::test_metrics_exist_run_batch*", _OPTION),
)

NOT_SUPPORTED: tuple[tuple[str, str], ...] = (
    ("*test_batch_completions*", "beam search is refused by name"),
    ("*test_long_seed*", "the error is another text"),
    ("*test_empty_prompt*", "the error is another text"),
    ("*test_enable_response_messages*", "`enable_response_messages` is refused by name"),
    (
        "*test_tokenize_chat_with_tools*",
        "on the engine `vllm`, which gives templates what a tool lacks as null",
    ),
    ("*test_basic.py::test_logprobs", "the demo model does not reason"),
    ("*test_basic.py::test_streaming", "a text of the demo model may not end in time"),
    ("*test_function_tool_use[[]required*", "the demo model does not reason"),
)
