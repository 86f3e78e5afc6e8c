"""How many tokens a prompt keeps, and how many each of its choices may generate."""

from collections.abc import Sequence

from faasmoe_router.api.errors import ApiError, invalid_value
from faasmoe_router.api.protocol import CompletionRequestBase
from faasmoe_router.engine.sampling_defaults import SamplingDefaults
from faasmoe_router.tenants.service import Caller


def truncated_prompt(
    token_ids: Sequence[int], body: CompletionRequestBase, context_len: int
) -> Sequence[int]:
    """Return the tokens of a prompt that the request keeps; -1 keeps as many as fit.

    Tokens are cut from its left side unless the request says otherwise.
    """
    if body.truncate_prompt_tokens is None:
        return token_ids
    n_kept = context_len - 1 if body.truncate_prompt_tokens == -1 else body.truncate_prompt_tokens
    if body.truncation_side == "right":
        return token_ids[:n_kept]
    return token_ids[-n_kept:] if n_kept else ()


def resolve_max_tokens(
    body: CompletionRequestBase,
    n_prompt_tokens: int,
    context_len: int,
    caller: Caller,
    *,
    param: str,
    defaults: SamplingDefaults,
) -> int:
    """Return how many tokens each choice of a prompt may generate.

    Args:
        body: the client's request.
        n_prompt_tokens: tokens of the prompt.
        context_len: the most tokens of prompt and completion together.
        caller: whose limits apply.
        param: the parameter that holds the prompt, for errors.
        defaults: the checkpoint's defaults.

    Raises:
        ApiError: the prompt is empty, or a limit of the model or the caller is exceeded.
    """
    if n_prompt_tokens == 0:
        raise invalid_value(param, "expected at least one token, got none")
    name, requested = body.token_limit or (param, None)
    n_needed = 1 if requested is None else requested
    if n_prompt_tokens + n_needed > context_len:
        completion = "" if requested is None else f" and {requested} for the completion ({name})"
        raise ApiError(
            f"This model's maximum context length is {context_len} tokens. However, you requested "
            f"{n_prompt_tokens} in the {param}{completion}.",
            param=name if n_prompt_tokens < context_len else param,
            code="context_length_exceeded",
        )
    n_remaining = context_len - n_prompt_tokens
    max_tokens = _permitted_max_tokens(
        body,
        caller,
        n_prompt_tokens=n_prompt_tokens,
        n_remaining=n_remaining,
        default=body.default_max_tokens or defaults.max_new_tokens or n_remaining,
    )
    if (body.min_tokens or 0) > max_tokens:
        raise invalid_value("min_tokens", f"expected at most {max_tokens}, got {body.min_tokens}")
    return max_tokens


def _permitted_max_tokens(
    body: CompletionRequestBase,
    caller: Caller,
    *,
    n_prompt_tokens: int,
    n_remaining: int,
    default: int,
) -> int:
    """Return how many of the `n_remaining` tokens of the context each choice may generate.

    A requested limit above the caller's is an ApiError; without one, the caller's limits apply.
    """
    n = body.n or 1
    max_output_tokens = caller.max_output_tokens or n_remaining
    if body.token_limit is None:
        max_request_tokens = caller.max_request_tokens or n_prompt_tokens + n_remaining * n
        max_choice_tokens = (max_request_tokens - n_prompt_tokens) // n
        return max(1, min(n_remaining, default, max_output_tokens, max_choice_tokens))
    name, requested = body.token_limit
    if requested > max_output_tokens:
        raise ApiError(
            f"{name} is too large: {requested}. Your tenant may generate at most "
            f"{max_output_tokens} completion tokens, whereas you provided {requested}.",
            param=name,
            code="invalid_value",
        )
    return requested
