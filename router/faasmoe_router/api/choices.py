"""From a request's parameters to how each of its choices is generated."""

import asyncio
import secrets
from collections.abc import Sequence

from faasmoe_router.api.calling import Calling
from faasmoe_router.api.errors import ApiError
from faasmoe_router.api.requests import SamplingBody
from faasmoe_router.engine.bias import Bias
from faasmoe_router.engine.choosing import Choosing
from faasmoe_router.engine.ending import Ending
from faasmoe_router.engine.engine import Engine
from faasmoe_router.engine.generation import GenerationRequest
from faasmoe_router.engine.grammar import Grammar, GrammarSource
from faasmoe_router.engine.penalties import Penalties
from faasmoe_router.engine.sampling import SamplingParams
from faasmoe_router.errors import ConstraintError
from faasmoe_router.tenants.callers import Caller

SEED_BITS = 63


class ChoiceReader:
    """Makes a request of the engine for each choice of a request of a client."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def read(
        self,
        body: SamplingBody,
        prompts: Sequence[Sequence[int]],
        caller: Caller,
        *,
        param: str,
        calling: Calling | None = None,
    ) -> list[GenerationRequest]:
        """Return a request for each choice of each prompt; raises ApiError.

        Args:
            body: the client's request.
            prompts: the prompts' tokens.
            caller: who asks.
            param: the parameter that they came from.
            calling: how tools are called, if they are.
        """
        context = caller.context_of(self._engine.limits.max_model_len)
        limits = [_max_tokens(body, len(ids), context, caller, param=param) for ids in prompts]
        self._check_tokens(body)
        bias = self._bias(body)
        grammar = await self._grammar(body, calling)
        if body.n_logprobs is not None:
            await self._prepare_vocabulary()
        seed = secrets.randbits(SEED_BITS) if body.seed is None else body.seed
        return [
            GenerationRequest(
                prompt_ids=tuple(ids),
                max_tokens=max_tokens,
                choosing=Choosing(
                    sampling=_sampling(body, seed + choice),
                    penalties=_penalties(body),
                    bias=bias,
                    n_logprobs=body.n_logprobs,
                    grammar=grammar,
                ),
                ending=_ending(body),
                special=body.skip_special_tokens is False or calling is not None,
            )
            for ids, max_tokens in zip(prompts, limits, strict=True)
            for choice in range(body.n or 1)
        ]

    async def _grammar(self, body: SamplingBody, calling: Calling | None) -> Grammar | None:
        if calling is not None and calling.grammar is not None:
            return await self._compile(calling.grammar, param="tools")
        constraint = body.constraint
        if constraint is None:
            return None
        return await self._compile(constraint.source, param=constraint.param)

    async def _compile(self, source: GrammarSource, *, param: str) -> Grammar:
        try:
            return await self._engine.grammars.compile(source)
        except ConstraintError as error:
            raise ApiError(
                f"Invalid value for '{param}': a text cannot be held to it: {error}.",
                param=param,
                code="invalid_value",
            ) from error

    async def _prepare_vocabulary(self) -> None:
        try:
            await asyncio.to_thread(self._engine.vocabulary.prepare)
        except ConstraintError as error:
            raise ApiError(
                f"Unsupported parameter: 'logprobs' is not supported here: {error}.",
                param="logprobs",
                code="unsupported_parameter",
            ) from error

    def _check_tokens(self, body: SamplingBody) -> None:
        for name, ids in (
            ("logit_bias", [token for token, _ in body.logit_bias]),
            ("allowed_token_ids", body.allowed_token_ids or ()),
            ("stop_token_ids", body.stop_token_ids or ()),
        ):
            check_tokens(ids, below=self._engine.vocab_size, param=name)

    def _bias(self, body: SamplingBody) -> Bias:
        words = {
            tuple(self._engine.codec.encode(f"{space}{word.lstrip()}", special=False))
            for word in body.bad_words
            for space in ("", " ")
        }
        return Bias(
            added=body.logit_bias,
            allowed=body.allowed_token_ids or None,
            bad_words=tuple(sorted(word for word in words if word)),
        )


def check_tokens(ids: Sequence[int], *, below: int, param: str) -> None:
    """Refuse tokens that are too large; raises ApiError."""
    if ids and max(ids) >= below:
        raise ApiError(
            f"Invalid value for '{param}': expected tokens below {below}, got {max(ids)}.",
            param=param,
            code="invalid_value",
        )


def _sampling(body: SamplingBody, seed: int) -> SamplingParams:
    return SamplingParams(
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=max(body.top_k or 0, 0),
        min_p=body.min_p or 0.0,
        seed=seed,
    )


def _penalties(body: SamplingBody) -> Penalties:
    return Penalties(
        presence=body.presence_penalty or 0.0,
        frequency=body.frequency_penalty or 0.0,
        repetition=1.0 if body.repetition_penalty is None else body.repetition_penalty,
    )


def _ending(body: SamplingBody) -> Ending:
    return Ending(
        stops=body.stop,
        stop_ids=body.stop_token_ids or (),
        ignore_eos=bool(body.ignore_eos),
        min_tokens=body.min_tokens or 0,
        included=bool(body.include_stop_str_in_output),
    )


def _max_tokens(
    body: SamplingBody, n_prompt: int, context: int, caller: Caller, *, param: str
) -> int:
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
    most = _affordable(body, caller, n_prompt=n_prompt, left=context - n_prompt)
    if (body.min_tokens or 0) > most:
        raise ApiError(
            f"Invalid value for 'min_tokens': expected at most {most}, got {body.min_tokens}.",
            param="min_tokens",
            code="invalid_value",
        )
    return most


def _affordable(body: SamplingBody, caller: Caller, *, n_prompt: int, left: int) -> int:
    """Return how much a choice may generate of what is `left` of the context; raises ApiError.

    What a caller asks for and may not have is refused; what it leaves open is what it may have.
    """
    most = caller.max_output_tokens or left
    if body.token_limit is None:
        whole = caller.max_request_tokens or n_prompt + left * (body.n or 1)
        return max(1, min(left, most, (whole - n_prompt) // (body.n or 1)))
    name, wanted = body.token_limit
    if wanted > most:
        raise ApiError(
            f"{name} is too large: {wanted}. Your tenant may have at most {most} completion "
            f"tokens, whereas you provided {wanted}.",
            param=name,
            code="invalid_value",
        )
    return wanted
