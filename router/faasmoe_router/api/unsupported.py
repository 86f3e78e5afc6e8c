"""Parameters that clients know and this server does not honour: refused by name when they ask.

What is not named here, and not in a body either, is unknown and ignored, as clients expect.
"""

from collections.abc import Mapping
from typing import Any

from faasmoe_router.api.errors import ApiError

# What each parameter may be for it to change nothing.
PARAMETERS: Mapping[str, tuple[Any, ...]] = {
    "audio": (),
    "cache_salt": (),
    "chat_template": (),
    "documents": ([],),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "kv_transfer_params": (),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "media_io_kwargs": ({},),
    "mm_processor_kwargs": ({},),
    "modalities": (["text"],),
    "moderation": (),
    "prediction": (),
    "priority": (0,),
    "prompt_cache_options": ({}, {"mode": "implicit"}),
    "prompt_cache_retention": ("in_memory",),
    "prompt_embeds": (),
    "prompt_logprobs": (False,),
    "request_id": (),
    "service_tier": ("auto", "default"),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "spaces_between_special_tokens": (True,),
    "structural_tag": (),
    "suffix": ("",),
    "truncate_prompt_tokens": (-1,),
    "use_beam_search": (False,),
    "verbosity": (),
    "vllm_xargs": ({},),
    "web_search_options": (),
}
CHAT_PARAMETERS: Mapping[str, tuple[Any, ...]] = {
    **PARAMETERS,
    "add_special_tokens": (False,),
    "best_of": (1,),
    "echo": (False,),
}
COMPLETION_PARAMETERS: Mapping[str, tuple[Any, ...]] = {
    **PARAMETERS,
    "add_special_tokens": (True,),
    "parallel_tool_calls": (True, False),
    "reasoning_effort": (),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
}
MESSAGE_PARAMETERS: Mapping[str, tuple[Any, ...]] = {
    "audio": (),
    "function_call": (),
}


def refuse(
    extra: Mapping[str, Any] | None, neutral: Mapping[str, tuple[Any, ...]], path: str = ""
) -> None:
    """Refuse what is asked for and not honoured; raises ApiError that names it.

    Args:
        extra: a body's fields beyond those that are read.
        neutral: what each known one may be.
        path: where the body is within the request.
    """
    for name, value in (extra or {}).items():
        if name in neutral and value is not None and not _is_one_of(value, neutral[name]):
            raise unsupported(f"{path}{name}")


def unsupported(param: str, why: str = "is not supported by this server") -> ApiError:
    """Return the refusal of a parameter that is known and not honoured."""
    return ApiError(
        f"Unsupported parameter: '{param}' {why}.", param=param, code="unsupported_parameter"
    )


def _is_one_of(value: Any, neutral: tuple[Any, ...]) -> bool:
    # 0 == False, but a completion's "logprobs": 0 does ask for something.
    return any(value == n and isinstance(value, bool) == isinstance(n, bool) for n in neutral)
