"""From a checked request to what the engine generates from: tokens, limits, sampling."""

import asyncio
import secrets
from collections.abc import Sequence

from faasmoe_router.api.errors import ApiError
from faasmoe_router.api.requests import ChatBody, CompletionBody, SamplingBody
from faasmoe_router.engine.engine import Engine
from faasmoe_router.engine.generation import GenerationRequest
from faasmoe_router.engine.sampling import SamplingParams
from faasmoe_router.errors import ChatTemplateError

SEED_BITS = 63


async def chat_requests(body: ChatBody, engine: Engine) -> list[GenerationRequest]:
    """Return a request for each choice of a chat completion."""
    messages = [
        message.for_template(f"messages[{index}]") for index, message in enumerate(body.messages)
    ]
    try:
        # A long text takes a while; the event loop serves others meanwhile.
        ids = await asyncio.to_thread(engine.codec.encode_chat, messages)
    except ChatTemplateError as error:
        raise ApiError(
            f"Invalid 'messages' for model `{body.model}`: {error}",
            param="messages",
            code="invalid_value",
        ) from error
    return _choices(body, ids, engine, param="messages")


async def completion_requests(body: CompletionBody, engine: Engine) -> list[GenerationRequest]:
    """Return a request for each choice of each prompt of a completion."""
    requests: list[GenerationRequest] = []
    for index, prompt in enumerate(body.prompt):
        if isinstance(prompt, str):
            ids: Sequence[int] = await asyncio.to_thread(engine.codec.encode, prompt)
        else:
            ids = prompt
            _check_vocabulary(prompt, engine, param=f"prompt[{index}]")
        requests += _choices(body, ids, engine, param="prompt")
    return requests


def _choices(
    body: SamplingBody, ids: Sequence[int], engine: Engine, *, param: str
) -> list[GenerationRequest]:
    max_tokens = _max_tokens(body, len(ids), engine, param=param)
    seed = secrets.randbits(SEED_BITS) if body.seed is None else body.seed
    return [
        GenerationRequest(
            prompt_ids=tuple(ids),
            max_tokens=max_tokens,
            sampling=_sampling(body, seed + choice),
            stops=body.stop,
            ignore_eos=bool(body.ignore_eos),
        )
        for choice in range(body.n or 1)
    ]


def _sampling(body: SamplingBody, seed: int) -> SamplingParams:
    return SamplingParams(
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=max(body.top_k or 0, 0),
        seed=seed,
    )


def _max_tokens(body: SamplingBody, n_prompt: int, engine: Engine, *, param: str) -> int:
    context = engine.limits.max_model_len
    if n_prompt == 0:
        raise ApiError(
            f"Invalid value for '{param}': expected at least one token, got none.",
            param=param,
            code="invalid_value",
        )
    wanted = body.token_limit
    if n_prompt + (wanted or 1) > context:
        completion = "" if wanted is None else f" and {wanted} for the completion"
        raise ApiError(
            f"This model's maximum context length is {context} tokens. However, you requested "
            f"{n_prompt} in the {param}{completion}.",
            param=param,
            code="context_length_exceeded",
        )
    return wanted or context - n_prompt


def _check_vocabulary(ids: Sequence[int], engine: Engine, *, param: str) -> None:
    if max(ids) >= engine.vocab_size:
        raise ApiError(
            f"Invalid value for '{param}': expected tokens below {engine.vocab_size}, "
            f"got {max(ids)}.",
            param=param,
            code="invalid_value",
        )
