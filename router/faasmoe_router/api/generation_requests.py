"""From tokenized prompts and a request's parameters to the engine's generation requests."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

from faasmoe_router.api.errors import invalid_value, unsupported_param
from faasmoe_router.api.origin import Origin
from faasmoe_router.api.preparation import PreparationQueue
from faasmoe_router.api.prompt_encoding import check_token_ids
from faasmoe_router.api.protocol import CompletionRequestBase
from faasmoe_router.api.token_limits import resolve_max_tokens, truncated_prompt
from faasmoe_router.api.tool_calling import ToolCallConfig
from faasmoe_router.engine.engine import Engine
from faasmoe_router.engine.generation import (
    GenerationRequest,
    ReasoningTokens,
    SamplingParams,
    StopConditions,
)
from faasmoe_router.engine.sampler import DrawParams, LogitBias, Penalties
from faasmoe_router.engine.sampling_defaults import SamplingDefaults
from faasmoe_router.engine.structured_output import CompiledGrammar, GrammarSource
from faasmoe_router.errors import GrammarError
from faasmoe_router.tenants.service import Caller


class GenerationRequestBuilder:
    """Builds the generation requests of tokenized prompts.

    Args:
        engine: has the vocabulary and the limits.
        queue: compiles grammars and tokenizes, in turns between tenants.
        sampling_defaults: values of parameters that a request does not set.
    """

    def __init__(
        self, engine: Engine, queue: PreparationQueue, sampling_defaults: SamplingDefaults
    ) -> None:
        self._engine = engine
        self._queue = queue
        self._defaults = sampling_defaults

    async def build(
        self,
        body: CompletionRequestBase,
        prompts: Sequence[Sequence[int]],
        caller: Caller,
        *,
        param: str,
        origin: Origin,
        tool_config: ToolCallConfig | None = None,
        reasoning: ReasoningTokens | None = None,
        include_special_tokens: bool = False,
    ) -> list[GenerationRequest]:
        """Return one request per choice of each prompt; choices get consecutive seeds.

        Args:
            body: the client's request.
            prompts: the token IDs of each prompt.
            caller: whose limits apply.
            param: the parameter that holds the prompts, for errors.
            origin: of the seed of a request that sets none.
            tool_config: how the model calls tools; None if it may not.
            reasoning: tokens of the reasoning that may precede a constrained text; None for none.
            include_special_tokens: whether the text is parsed, for which it needs special tokens.

        Raises:
            ApiError: a parameter does not fit the model or exceeds a limit.
        """
        context_len = caller.effective_max_model_len(self._engine.limits.max_model_len)
        kept = [tuple(truncated_prompt(ids, body, context_len)) for ids in prompts]
        max_tokens_per_prompt = [
            resolve_max_tokens(
                body, len(ids), context_len, caller, param=param, defaults=self._defaults
            )
            for ids in kept
        ]
        params = await self._sampling_params(body, caller, tool_config, reasoning)
        seed = origin.seed if body.seed is None else body.seed
        return [
            GenerationRequest(
                prompt_token_ids=ids,
                max_tokens=max_tokens,
                sampling_params=replace(params, draw=replace(params.draw, seed=seed + choice)),
                stop_conditions=_stop_conditions(body),
                include_special_tokens=include_special_tokens or body.skip_special_tokens is False,
                scores_prompt=body.scores_prompt,
                priority=body.priority or 0,
                cache_salt=body.cache_salt,
                scores_stop=bool(body.return_token_ids),
            )
            for ids, max_tokens in zip(kept, max_tokens_per_prompt, strict=True)
            for choice in range(body.n or 1)
        ]

    async def _sampling_params(
        self,
        body: CompletionRequestBase,
        caller: Caller,
        tool_config: ToolCallConfig | None,
        reasoning: ReasoningTokens | None,
    ) -> SamplingParams:
        """Return what the choices share: all but the seed; raises ApiError."""
        self._check_token_params(body)
        logit_bias = await self._queue.run(
            caller, partial(self._logit_bias, body), size_bytes=sum(map(len, body.bad_words))
        )
        grammar = await self._compiled_grammar(body, tool_config, caller)
        if body.n_computed_logprobs is not None:
            await self._prepare_vocabulary()
        return SamplingParams(
            draw=_draw_params(body, self._defaults),
            penalties=_penalties(body, self._defaults),
            logit_bias=logit_bias,
            n_logprobs=body.n_computed_logprobs,
            logprob_token_ids=body.logprob_token_ids or (),
            grammar=grammar,
            reasoning=reasoning,
        )

    async def _compiled_grammar(
        self, body: CompletionRequestBase, tool_config: ToolCallConfig | None, caller: Caller
    ) -> CompiledGrammar | None:
        if tool_config is not None and tool_config.grammar is not None:
            return await self._compile_grammar(tool_config.grammar, caller, param="tools")
        structured_output = body.resolved_structured_output
        if structured_output is None:
            return None
        return await self._compile_grammar(
            structured_output.grammar, caller, param=structured_output.param
        )

    async def _compile_grammar(
        self, source: GrammarSource, caller: Caller, *, param: str
    ) -> CompiledGrammar:
        run = partial(self._queue.run_in_turn, caller)
        try:
            return await self._engine.grammar_compiler.compile(source, run)
        except GrammarError as error:
            raise invalid_value(param, f"unsupported or invalid schema: {error}") from error

    async def _prepare_vocabulary(self) -> None:
        try:
            await asyncio.to_thread(self._engine.vocabulary.prepare)
        except GrammarError as error:
            raise unsupported_param(
                "logprobs", f"is not supported by this server: {error}"
            ) from error

    def _check_token_params(self, body: CompletionRequestBase) -> None:
        for name, ids in (
            ("logit_bias", [token for token, _ in body.logit_bias]),
            ("allowed_token_ids", body.allowed_token_ids or ()),
            ("stop_token_ids", body.stop_token_ids or ()),
            ("logprob_token_ids", body.logprob_token_ids or ()),
        ):
            check_token_ids(ids, vocab_size=self._engine.vocab_size, param=name)

    def _logit_bias(self, body: CompletionRequestBase) -> LogitBias:
        """Return the bias; a bad word is forbidden with and without a leading space."""
        bad_words = {
            tuple(
                self._engine.tokenizer.encode(f"{space}{word.lstrip()}", add_special_tokens=False)
            )
            for word in body.bad_words
            for space in ("", " ")
        }
        return LogitBias(
            biases=body.logit_bias,
            allowed_token_ids=body.allowed_token_ids or None,
            bad_words_token_ids=tuple(sorted(word for word in bad_words if word)),
        )


def _draw_params(body: CompletionRequestBase, defaults: SamplingDefaults) -> DrawParams:
    return DrawParams(
        temperature=_given(body.temperature, defaults.temperature),
        top_p=_given(body.top_p, defaults.top_p),
        top_k=max(_given(body.top_k, defaults.top_k), 0),
        min_p=_given(body.min_p, defaults.min_p),
    )


Number = TypeVar("Number", int, float)


def _given(value: Number | None, default: Number) -> Number:
    return default if value is None else value


def _penalties(body: CompletionRequestBase, defaults: SamplingDefaults) -> Penalties:
    return Penalties(
        presence=body.presence_penalty or 0.0,
        frequency=body.frequency_penalty or 0.0,
        repetition=_given(body.repetition_penalty, defaults.repetition_penalty),
    )


def _stop_conditions(body: CompletionRequestBase) -> StopConditions:
    return StopConditions(
        stop_strings=body.stop,
        stop_token_ids=body.stop_token_ids or (),
        ignore_eos=bool(body.ignore_eos),
        min_tokens=body.min_tokens or 0,
        include_stop=bool(body.include_stop_str_in_output),
    )
