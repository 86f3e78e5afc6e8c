"""From a request's parameters to how each of its choices is generated.

From a checked request to what the engine generates from: tokens and limits.
"""

import asyncio
import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from faasmoe_router.api.errors import ApiError
from faasmoe_router.api.protocol import (
    ChatCompletionRequest,
    ChatMessage,
    CompletionRequest,
    CompletionRequestBase,
)
from faasmoe_router.api.structured_outputs import dump_json
from faasmoe_router.api.tool_calling import ToolCallConfig
from faasmoe_router.api.validation import unsupported_param
from faasmoe_router.engine.engine import Engine
from faasmoe_router.engine.generation import GenerationRequest, SamplingParams, StopConditions
from faasmoe_router.engine.sampler import DrawParams, LogitBias, Penalties
from faasmoe_router.engine.structured_output import CompiledGrammar, GrammarSource
from faasmoe_router.engine.tokenizer import RESERVED_TEMPLATE_KWARGS, ChatTemplateOptions
from faasmoe_router.errors import ChatTemplateError, GrammarError
from faasmoe_router.tenants.caller import ANONYMOUS, Caller

SEED_BITS = 63


class GenerationRequestBuilder:
    """Makes a request of the engine for each choice of a request of a client."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def build(
        self,
        body: CompletionRequestBase,
        prompts: Sequence[Sequence[int]],
        caller: Caller,
        *,
        param: str,
        tool_config: ToolCallConfig | None = None,
    ) -> list[GenerationRequest]:
        """Return a request for each choice of each prompt; raises ApiError.

        Args:
            body: the client's request.
            prompts: the prompts' tokens.
            caller: who asks.
            param: the parameter that they came from.
            tool_config: how tools are called, if they are.
        """
        context_len = caller.effective_max_model_len(self._engine.limits.max_model_len)
        max_tokens_per_prompt = [
            _resolve_max_tokens(body, len(ids), context_len, caller, param=param) for ids in prompts
        ]
        self._check_token_params(body)
        bias = self._logit_bias(body)
        grammar = await self._compiled_grammar(body, tool_config)
        if body.n_logprobs is not None:
            await self._prepare_vocabulary()
        seed = secrets.randbits(SEED_BITS) if body.seed is None else body.seed
        return [
            GenerationRequest(
                prompt_token_ids=tuple(ids),
                max_tokens=max_tokens,
                sampling_params=SamplingParams(
                    draw=_sampling_params(body, seed + choice),
                    penalties=_penalties(body),
                    logit_bias=bias,
                    n_logprobs=body.n_logprobs,
                    grammar=grammar,
                ),
                stop_conditions=_stop_conditions(body),
                include_special_tokens=body.skip_special_tokens is False or tool_config is not None,
            )
            for ids, max_tokens in zip(prompts, max_tokens_per_prompt, strict=True)
            for choice in range(body.n or 1)
        ]

    async def _compiled_grammar(
        self, body: CompletionRequestBase, tool_config: ToolCallConfig | None
    ) -> CompiledGrammar | None:
        if tool_config is not None and tool_config.grammar is not None:
            return await self._compile_grammar(tool_config.grammar, param="tools")
        structured_output = body.resolved_structured_output
        if structured_output is None:
            return None
        return await self._compile_grammar(structured_output.grammar, param=structured_output.param)

    async def _compile_grammar(self, source: GrammarSource, *, param: str) -> CompiledGrammar:
        try:
            return await self._engine.grammar_compiler.compile(source)
        except GrammarError as error:
            raise ApiError(
                f"Invalid value for '{param}': unsupported or invalid schema: {error}.",
                param=param,
                code="invalid_value",
            ) from error

    async def _prepare_vocabulary(self) -> None:
        try:
            await asyncio.to_thread(self._engine.vocabulary.prepare)
        except GrammarError as error:
            raise ApiError(
                f"Unsupported parameter: 'logprobs' is not supported here: {error}.",
                param="logprobs",
                code="unsupported_parameter",
            ) from error

    def _check_token_params(self, body: CompletionRequestBase) -> None:
        for name, ids in (
            ("logit_bias", [token for token, _ in body.logit_bias]),
            ("allowed_token_ids", body.allowed_token_ids or ()),
            ("stop_token_ids", body.stop_token_ids or ()),
        ):
            check_token_ids(ids, vocab_size=self._engine.vocab_size, param=name)

    def _logit_bias(self, body: CompletionRequestBase) -> LogitBias:
        words = {
            tuple(
                self._engine.tokenizer.encode(f"{space}{word.lstrip()}", add_special_tokens=False)
            )
            for word in body.bad_words
            for space in ("", " ")
        }
        return LogitBias(
            biases=body.logit_bias,
            allowed_token_ids=body.allowed_token_ids or None,
            bad_words_token_ids=tuple(sorted(word for word in words if word)),
        )


def check_token_ids(token_ids: Sequence[int], *, vocab_size: int, param: str) -> None:
    """Refuse tokens that are too large; raises ApiError."""
    if token_ids and max(token_ids) >= vocab_size:
        raise ApiError(
            f"Invalid value for '{param}': expected tokens below {vocab_size}, got {max(token_ids)}.",
            param=param,
            code="invalid_value",
        )


def _sampling_params(body: CompletionRequestBase, seed: int) -> DrawParams:
    return DrawParams(
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=max(body.top_k or 0, 0),
        min_p=body.min_p or 0.0,
        seed=seed,
    )


def _penalties(body: CompletionRequestBase) -> Penalties:
    return Penalties(
        presence=body.presence_penalty or 0.0,
        frequency=body.frequency_penalty or 0.0,
        repetition=1.0 if body.repetition_penalty is None else body.repetition_penalty,
    )


def _stop_conditions(body: CompletionRequestBase) -> StopConditions:
    return StopConditions(
        stop_strings=body.stop,
        stop_token_ids=body.stop_token_ids or (),
        ignore_eos=bool(body.ignore_eos),
        min_tokens=body.min_tokens or 0,
        include_stop=bool(body.include_stop_str_in_output),
    )


def _resolve_max_tokens(
    body: CompletionRequestBase,
    n_prompt_tokens: int,
    context_len: int,
    caller: Caller,
    *,
    param: str,
) -> int:
    if n_prompt_tokens == 0:
        raise ApiError(
            f"Invalid value for '{param}': expected at least one token, got none.",
            param=param,
            code="invalid_value",
        )
    limit = body.token_limit
    name, requested = limit if limit is not None else (param, None)
    if n_prompt_tokens + (requested or 1) > context_len:
        completion = "" if requested is None else f" and {requested} for the completion ({name})"
        raise ApiError(
            f"This model's maximum context length is {context_len} tokens. However, you requested "
            f"{n_prompt_tokens} in the {param}{completion}.",
            param=name if n_prompt_tokens < context_len else param,
            code="context_length_exceeded",
        )
    max_tokens = _permitted_max_tokens(
        body, caller, n_prompt_tokens=n_prompt_tokens, n_remaining=context_len - n_prompt_tokens
    )
    if (body.min_tokens or 0) > max_tokens:
        raise ApiError(
            f"Invalid value for 'min_tokens': expected at most {max_tokens}, got {body.min_tokens}.",
            param="min_tokens",
            code="invalid_value",
        )
    return max_tokens


def _permitted_max_tokens(
    body: CompletionRequestBase, caller: Caller, *, n_prompt_tokens: int, n_remaining: int
) -> int:
    """Return how much a choice may generate of what is `left` of the context; raises ApiError.

    What a caller asks for and may not have is refused; what it leaves open is what it may have.
    """
    max_output_tokens = caller.max_output_tokens or n_remaining
    if body.token_limit is None:
        max_request_tokens = caller.max_request_tokens or n_prompt_tokens + n_remaining * (
            body.n or 1
        )
        return max(
            1,
            min(
                n_remaining,
                max_output_tokens,
                (max_request_tokens - n_prompt_tokens) // (body.n or 1),
            ),
        )
    name, requested = body.token_limit
    if requested > max_output_tokens:
        raise ApiError(
            f"{name} is too large: {requested}. Your tenant may have at most {max_output_tokens} completion "
            f"tokens, whereas you provided {requested}.",
            param=name,
            code="invalid_value",
        )
    return requested


MAX_CONCURRENT_TOKENIZATIONS = 2  # at a time: long texts must not take every core from the engine


class Preprocessor:
    """Makes engine requests of bodies, within what the engine may hold; belongs to one loop.

    What can be refused without the tokens is refused first: tokens of a long text take seconds.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._request_builder = GenerationRequestBuilder(engine)
        self._tokenization_slots = asyncio.Semaphore(MAX_CONCURRENT_TOKENIZATIONS)

    async def build_chat_requests(
        self,
        body: ChatCompletionRequest,
        tool_config: ToolCallConfig | None,
        caller: Caller = ANONYMOUS,
    ) -> list[GenerationRequest]:
        """Return a request for each choice of a chat completion; raises ApiError."""
        self._check_n_choices(body, n_prompts=1)
        chat_view = build_chat_view(
            body, tool_config, template=self._engine.tokenizer.tool_chat_template
        )
        ids = await self.encode_chat(body.messages, chat_view, caller)
        return await self._request_builder.build(
            body, [ids], caller, param="messages", tool_config=tool_config
        )

    async def build_completion_requests(
        self, body: CompletionRequest, caller: Caller = ANONYMOUS
    ) -> list[GenerationRequest]:
        """Return a request for each choice of each prompt of a completion; raises ApiError."""
        self._check_n_choices(body, n_prompts=len(body.prompt))
        for index, prompt in enumerate(body.prompt):
            if isinstance(prompt, str):
                self.check_text_size([prompt], param="prompt")
            else:
                self.check_token_ids(prompt, param=f"prompt[{index}]")
        prompts = [
            await self.encode(prompt) if isinstance(prompt, str) else prompt
            for prompt in body.prompt
        ]
        return await self._request_builder.build(body, prompts, caller, param="prompt")

    async def encode(self, text: str, *, special: bool = True) -> Sequence[int]:
        """Return a text's tokens, with those that the tokenizer adds to a prompt."""
        async with self._tokenization_slots:
            return await asyncio.to_thread(
                self._engine.tokenizer.encode, text, add_special_tokens=special
            )

    async def encode_chat(
        self,
        messages: Sequence[ChatMessage],
        chat_view: ChatTemplateOptions,
        caller: Caller = ANONYMOUS,
    ) -> Sequence[int]:
        """Return the tokens of a conversation; raises ApiError."""
        template_messages = [
            m.to_template(f"messages[{index}]") for index, m in enumerate(messages)
        ]
        template_messages = caller.with_system_prompt(template_messages)
        self.check_text_size(_message_texts(template_messages), param="messages")
        self.check_text_size(map(dump_json, chat_view.tools), param="tools")
        try:
            async with self._tokenization_slots:
                return await asyncio.to_thread(
                    self._engine.tokenizer.encode_chat, template_messages, chat_view
                )
        except ChatTemplateError as error:
            raise ApiError(
                f"Invalid 'messages' for this model: {error}",
                param="messages",
                code="invalid_value",
            ) from error

    def check_text_size(self, texts: Iterable[str], *, param: str) -> None:
        """Refuse texts that no tokens could bring within the context; raises ApiError."""
        context_len = self._engine.limits.max_model_len
        max_bytes = context_len * self._engine.tokenizer.max_token_bytes
        size_bytes = sum(len(text.encode()) for text in texts)
        if size_bytes > max_bytes:
            raise ApiError(
                f"This model's maximum context length is {context_len} tokens, at most {max_bytes} "
                f"bytes of text. However, you requested {size_bytes} bytes in the {param}.",
                param=param,
                code="context_length_exceeded",
            )

    def check_token_ids(self, token_ids: Sequence[int], *, param: str) -> None:
        """Refuse tokens that the model does not have; raises ApiError."""
        check_token_ids(token_ids, vocab_size=self._engine.vocab_size, param=param)

    def _check_n_choices(self, body: CompletionRequestBase, *, n_prompts: int) -> None:
        """Refuse what would not fit into an idle engine either: trying again is no use."""
        capacity = self._engine.limits.max_requests
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


def build_chat_view(
    body: ChatCompletionRequest, tool_config: ToolCallConfig | None, *, template: str
) -> ChatTemplateOptions:
    """Return what a chat template is told besides the messages; raises ApiError."""
    variables = template_variables(body.chat_template_kwargs)
    if body.reasoning_effort is not None:
        if "reasoning_effort" not in template:
            raise unsupported_param(
                "reasoning_effort", "is not supported by this model's chat template"
            )
        variables["reasoning_effort"] = body.reasoning_effort
    return ChatTemplateOptions(
        tools=() if tool_config is None else tool_config.template_tools,
        add_generation_prompt=body.add_generation_prompt is not False,
        continue_final_message=bool(body.continue_final_message),
        template_kwargs=variables,
    )


def template_variables(chat_template_kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return a chat template's variables as a request gives them; raises ApiError."""
    reserved = RESERVED_TEMPLATE_KWARGS.intersection(chat_template_kwargs or ())
    if reserved:
        param = f"chat_template_kwargs.{min(reserved)}"
        raise ApiError(
            f"Invalid value for '{param}': this template variable is reserved.",
            param=param,
            code="invalid_value",
        )
    return dict(chat_template_kwargs or {})


def _message_texts(messages: Iterable[Mapping[str, Any]]) -> Iterable[str]:
    for message in messages:
        yield message["content"]
        for call in message.get("tool_calls", ()):
            yield call["function"]["name"]
            yield str(call["function"]["arguments"])
