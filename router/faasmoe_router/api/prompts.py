"""From a checked request to what the engine generates from: tokens, limits, sampling."""

import asyncio
import secrets
from collections.abc import Iterable, Mapping, Sequence

from faasmoe_router.api.errors import ApiError
from faasmoe_router.api.requests import ChatBody, CompletionBody, SamplingBody
from faasmoe_router.engine.engine import Engine
from faasmoe_router.engine.generation import GenerationRequest
from faasmoe_router.engine.sampling import SamplingParams
from faasmoe_router.errors import ChatTemplateError
from faasmoe_router.tenants.callers import OPEN, Caller

SEED_BITS = 63
MAX_ENCODINGS = 2  # at a time: long texts must not take every core from the engine


class PromptReader:
    """Makes engine requests of bodies, within what the engine may hold; belongs to one loop.

    What can be refused without the tokens is refused first: tokens of a long text take seconds.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._encoding = asyncio.Semaphore(MAX_ENCODINGS)

    async def read_chat(self, body: ChatBody, caller: Caller = OPEN) -> list[GenerationRequest]:
        """Return a request for each choice of a chat completion; raises ApiError."""
        messages = caller.with_system_prompt(
            [
                message.for_template(f"messages[{index}]")
                for index, message in enumerate(body.messages)
            ]
        )
        self._check_choices(body, n_prompts=1)
        self._check_size((message["content"] for message in messages), param="messages")
        try:
            ids = await self._encode_chat(messages)
        except ChatTemplateError as error:
            raise ApiError(
                f"Invalid 'messages' for model `{body.model}`: {error}",
                param="messages",
                code="invalid_value",
            ) from error
        return self._choices(body, ids, caller, param="messages")

    async def read_completion(
        self, body: CompletionBody, caller: Caller = OPEN
    ) -> list[GenerationRequest]:
        """Return a request for each choice of each prompt of a completion; raises ApiError."""
        self._check_choices(body, n_prompts=len(body.prompt))
        for index, prompt in enumerate(body.prompt):
            if isinstance(prompt, str):
                self._check_size([prompt], param="prompt")
            else:
                self._check_vocabulary(prompt, param=f"prompt[{index}]")
        requests: list[GenerationRequest] = []
        for prompt in body.prompt:
            ids = await self._encode(prompt) if isinstance(prompt, str) else prompt
            requests += self._choices(body, ids, caller, param="prompt")
        return requests

    async def _encode(self, text: str) -> Sequence[int]:
        async with self._encoding:
            return await asyncio.to_thread(self._engine.codec.encode, text)

    async def _encode_chat(self, messages: Sequence[Mapping[str, str]]) -> Sequence[int]:
        async with self._encoding:
            return await asyncio.to_thread(self._engine.codec.encode_chat, messages)

    def _check_choices(self, body: SamplingBody, *, n_prompts: int) -> None:
        """Refuse what would not fit into an idle engine either: trying again is no use."""
        capacity = self._engine.limits.capacity
        n = body.n or 1
        if n_prompts * n <= capacity:
            return
        param = "prompt" if n_prompts > capacity else "n"
        raise ApiError(
            f"Invalid value for '{param}': got {n_prompts} prompts with n={n}, "
            f"expected at most {capacity} choices in all.",
            param=param,
            code="invalid_value",
        )

    def _check_size(self, texts: Iterable[str], *, param: str) -> None:
        context = self._engine.limits.max_model_len
        most_bytes = context * self._engine.codec.longest_token_bytes
        size_bytes = sum(len(text.encode()) for text in texts)
        if size_bytes > most_bytes:
            raise ApiError(
                f"This model's maximum context length is {context} tokens, at most {most_bytes} "
                f"bytes of text. However, you requested {size_bytes} bytes in the {param}.",
                param=param,
                code="context_length_exceeded",
            )

    def _check_vocabulary(self, ids: Sequence[int], *, param: str) -> None:
        if max(ids) >= self._engine.vocab_size:
            raise ApiError(
                f"Invalid value for '{param}': expected tokens below {self._engine.vocab_size}, "
                f"got {max(ids)}.",
                param=param,
                code="invalid_value",
            )

    def _choices(
        self, body: SamplingBody, ids: Sequence[int], caller: Caller, *, param: str
    ) -> list[GenerationRequest]:
        context = caller.context_of(self._engine.limits.max_model_len)
        max_tokens = bounded_output(
            caller, body, n_prompt=len(ids), left=_max_tokens(body, len(ids), context, param=param)
        )
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


def bounded_output(caller: Caller, body: SamplingBody, *, n_prompt: int, left: int) -> int:
    """Return how much a choice may generate of what is `left` of the context; raises ApiError.

    What a caller asks for and may not have is refused; what it leaves open is what it may have.
    """
    most = caller.max_output_tokens or left
    if body.token_limit is None:
        affordable = (caller.max_request_tokens or n_prompt + left) - n_prompt
        return max(1, min(left, most, affordable // (body.n or 1)))
    name, wanted = body.token_limit
    if wanted > most:
        raise ApiError(
            f"{name} is too large: {wanted}. Your tenant may have at most {most} completion "
            f"tokens, whereas you provided {wanted}.",
            param=name,
            code="invalid_value",
        )
    return wanted


def _max_tokens(body: SamplingBody, n_prompt: int, context: int, *, param: str) -> int:
    if n_prompt == 0:
        raise ApiError(
            f"Invalid value for '{param}': expected at least one token, got none.",
            param=param,
            code="invalid_value",
        )
    limit = body.token_limit
    name, wanted = limit if limit is not None else (param, None)
    if n_prompt + (wanted or 1) > context:
        completion = "" if wanted is None else f" and {wanted} for the completion ({name})"
        raise ApiError(
            f"This model's maximum context length is {context} tokens. However, you requested "
            f"{n_prompt} in the {param}{completion}.",
            param=name if n_prompt < context else param,
            code="context_length_exceeded",
        )
    return wanted or context - n_prompt
