"""From a validated request body to the engine's generation requests.

Renders chat templates, tokenizes, checks the limits of the model and of the caller, compiles
grammars, and builds one `GenerationRequest` per choice of each prompt. Whatever can be rejected
without tokenizing is rejected first: tokenizing a long text takes seconds.
"""

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from faasmoe_router.api.errors import ApiError, invalid_value, unsupported_param
from faasmoe_router.api.origin import Origin
from faasmoe_router.api.preparation import PreparationQueue
from faasmoe_router.api.protocol import (
    ChatCompletionRequest,
    ChatMessage,
    CompletionRequest,
    CompletionRequestBase,
)
from faasmoe_router.api.reasoning import (
    MessageFormat,
    needs_special_tokens,
    resolve_message_format,
    resolve_reasoning,
)
from faasmoe_router.api.structured_outputs import dump_json
from faasmoe_router.api.tool_calling import (
    ToolCallConfig,
    relax_tool_schemas,
    resolve_tool_calling,
)
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
from faasmoe_router.engine.tokenizer import RESERVED_TEMPLATE_KWARGS, ChatTemplateOptions
from faasmoe_router.errors import ChatTemplateError, GrammarError
from faasmoe_router.tenants.service import ANONYMOUS, Caller
from faasmoe_router.toolcalls.prompted import with_prompted_tools
from faasmoe_router.toolcalls.reasoning import detect_reasoning_format

OPENAI_DEFAULTS = SamplingDefaults()
# Work in units of bytes of text: of a token ID, of a message's rendering and of a tool's.
ID_BYTES, MESSAGE_BYTES, TOOL_BYTES = 4, 64, 1024


class Preprocessor:
    """Builds generation requests from request bodies; bound to one event loop.

    Args:
        engine: has the tokenizer and the limits.
        queue: runs the work, in turns between tenants.
        sampling_defaults: values of parameters that a request does not set.
    """

    def __init__(
        self,
        engine: Engine,
        queue: PreparationQueue,
        sampling_defaults: SamplingDefaults = OPENAI_DEFAULTS,
    ) -> None:
        self._engine = engine
        self._queue = queue
        self._request_builder = GenerationRequestBuilder(engine, queue, sampling_defaults)
        self._includes_marks = needs_special_tokens(engine.tokenizer)

    async def build_chat_requests(
        self,
        body: ChatCompletionRequest,
        caller: Caller = ANONYMOUS,
        *,
        origin: Origin | None = None,
    ) -> tuple[MessageFormat, list[GenerationRequest]]:
        """Return how the message is parsed, and one request per choice; raises ApiError."""
        self._check_n_choices(body, caller, n_prompts=1)
        tool_config = await self._queue.run(
            caller,
            partial(resolve_tool_calling, body, self._engine.tokenizer),
            size_bytes=TOOL_BYTES * len(body.tools or ()),
        )
        if tool_config is not None:
            run = partial(self._queue.run_in_turn, caller)
            tool_config = await relax_tool_schemas(tool_config, self._engine.grammar_compiler, run)
        template_options = _chat_template_options(
            body, tool_config, chat_template=self._engine.tokenizer.tool_chat_template
        )
        prompted_tools = (
            tool_config.template_tools
            if tool_config is not None and tool_config.is_prompted
            else ()
        )
        token_ids = await self.encode_chat(
            body.messages, template_options, caller, prompted_tools=prompted_tools
        )
        reasoning = resolve_reasoning(self._engine.tokenizer, token_ids)
        requests = await self._request_builder.build(
            body,
            [token_ids],
            caller,
            param="messages",
            origin=origin or Origin(),
            tool_config=tool_config,
            reasoning=reasoning.before_grammar,
            include_special_tokens=self._includes_marks or tool_config is not None,
        )
        message_format = resolve_message_format(
            body, self._engine.tokenizer, reasoning, tool_config
        )
        return message_format, requests

    async def build_completion_requests(
        self,
        body: CompletionRequest,
        caller: Caller = ANONYMOUS,
        *,
        origin: Origin | None = None,
    ) -> tuple[list[GenerationRequest], list[str] | None]:
        """Return one request per choice of each prompt, in that order, and the prompts' texts.

        The texts are those of each choice if the request wants them echoed: verbatim if given as
        text, decoded if as tokens. Raises ApiError.
        """
        self._check_n_choices(body, caller, n_prompts=len(body.prompt))
        for index, prompt in enumerate(body.prompt):
            if isinstance(prompt, str):
                self.check_text_size([prompt], param="prompt")
            else:
                self.check_token_ids(prompt, param=f"prompt[{index}]")
        prompts = [
            await self.encode(
                prompt, add_special_tokens=body.add_special_tokens is not False, caller=caller
            )
            if isinstance(prompt, str)
            else prompt
            for prompt in body.prompt
        ]
        requests = await self._request_builder.build(
            body, prompts, caller, param="prompt", origin=origin or Origin()
        )
        if not body.echo:
            return requests, None
        texts = [
            prompt
            if isinstance(prompt, str)
            else await self.decode(prompt, caller, include_special_tokens=True)
            for prompt in body.prompt
        ]
        return requests, [text for text in texts for _ in range(body.n or 1)]

    async def encode(
        self, text: str, *, add_special_tokens: bool = True, caller: Caller = ANONYMOUS
    ) -> Sequence[int]:
        """Return the token IDs of a text, by default with the tokenizer's BOS token, if any."""
        encode = partial(self._engine.tokenizer.encode, text, add_special_tokens=add_special_tokens)
        return await self._queue.run(caller, encode, size_bytes=len(text))

    async def decode(
        self,
        token_ids: Sequence[int],
        caller: Caller = ANONYMOUS,
        *,
        include_special_tokens: bool = False,
    ) -> str:
        """Return the text of token IDs."""
        decode = partial(
            self._engine.tokenizer.decode,
            token_ids,
            include_special_tokens=include_special_tokens,
        )
        return await self._queue.run(caller, decode, size_bytes=ID_BYTES * len(token_ids))

    async def encode_chat(
        self,
        messages: Sequence[ChatMessage],
        template_options: ChatTemplateOptions,
        caller: Caller = ANONYMOUS,
        *,
        prompted_tools: Sequence[Mapping[str, Any]] = (),
    ) -> Sequence[int]:
        """Return the token IDs of a conversation, with the caller's system prompt if it has one.

        `prompted_tools` are written into the messages, as the template knows no tools.

        Raises:
            ApiError: a message is invalid, the texts are too long, or the chat template fails.
        """
        size_bytes = len(caller.system_prompt or "") + sum(map(_n_characters, messages))
        size_bytes += TOOL_BYTES * (len(template_options.tools) + len(prompted_tools))
        render_and_encode = partial(
            self._encode_chat, messages, template_options, caller, prompted_tools
        )
        return await self._queue.run(caller, render_and_encode, size_bytes=size_bytes)

    def _encode_chat(
        self,
        messages: Sequence[ChatMessage],
        template_options: ChatTemplateOptions,
        caller: Caller,
        prompted_tools: Sequence[Mapping[str, Any]],
    ) -> Sequence[int]:
        template_messages = [
            m.to_template(f"messages[{index}]") for index, m in enumerate(messages)
        ]
        template_messages = caller.with_system_prompt(template_messages)
        if not self._engine.tokenizer.knows_developer_role:
            template_messages = [_as_system_message(m) for m in template_messages]
        if prompted_tools:
            template_messages = with_prompted_tools(template_messages, prompted_tools)
        self.check_text_size(_message_texts(template_messages), param="messages")
        self.check_text_size(map(dump_json, template_options.tools), param="tools")
        try:
            return self._engine.tokenizer.encode_chat(template_messages, template_options)
        except ChatTemplateError as error:
            raise invalid_value("messages", str(error)) from error

    def check_text_size(self, texts: Iterable[str], *, param: str) -> None:
        """Raise ApiError if texts have too many bytes to fit into the context, however encoded."""
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
        """Raise ApiError if a token ID is not in the vocabulary."""
        _check_token_ids(token_ids, vocab_size=self._engine.vocab_size, param=param)

    def _check_n_choices(
        self, body: CompletionRequestBase, caller: Caller, *, n_prompts: int
    ) -> None:
        """Raise ApiError if even an idle engine could not hold this many choices of the caller."""
        capacity = self._engine.max_sequences(caller.tenant)
        n = body.n or 1
        if n_prompts * n > capacity:
            raise invalid_value(
                "prompt" if n_prompts > capacity else "n",
                f"got {n_prompts} prompts with n={n}, expected at most {capacity} choices in total",
            )


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
        prompts = [_truncated(ids, body, context_len) for ids in prompts]
        max_tokens_per_prompt = [
            _resolve_max_tokens(
                body, len(ids), context_len, caller, param=param, defaults=self._defaults
            )
            for ids in prompts
        ]
        self._check_token_params(body)
        logit_bias = await self._queue.run(
            caller, partial(self._logit_bias, body), size_bytes=sum(map(len, body.bad_words))
        )
        grammar = await self._compiled_grammar(body, tool_config, caller)
        if body.n_computed_logprobs is not None:
            await self._prepare_vocabulary()
        seed = origin.seed if body.seed is None else body.seed
        return [
            GenerationRequest(
                prompt_token_ids=ids,
                max_tokens=max_tokens,
                sampling_params=SamplingParams(
                    draw=_draw_params(body, self._defaults, seed + choice),
                    penalties=_penalties(body, self._defaults),
                    logit_bias=logit_bias,
                    n_logprobs=body.n_computed_logprobs,
                    logprob_token_ids=body.logprob_token_ids or (),
                    grammar=grammar,
                    reasoning=reasoning,
                ),
                stop_conditions=_stop_conditions(body),
                include_special_tokens=include_special_tokens or body.skip_special_tokens is False,
                scores_prompt=body.scores_prompt,
                priority=body.priority or 0,
                cache_salt=body.cache_salt,
            )
            for ids, max_tokens in zip(map(tuple, prompts), max_tokens_per_prompt, strict=True)
            for choice in range(body.n or 1)
        ]

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
            _check_token_ids(ids, vocab_size=self._engine.vocab_size, param=name)

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


def template_variables(chat_template_kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return a request's chat template variables; raises ApiError if one has a reserved name."""
    reserved = RESERVED_TEMPLATE_KWARGS.intersection(chat_template_kwargs or ())
    if reserved:
        raise invalid_value(
            f"chat_template_kwargs.{min(reserved)}", "this template variable is reserved"
        )
    return dict(chat_template_kwargs or {})


def _chat_template_options(
    body: ChatCompletionRequest, tool_config: ToolCallConfig | None, *, chat_template: str
) -> ChatTemplateOptions:
    variables = {
        **_effort_variables(body.reasoning_effort, chat_template),
        **template_variables(body.chat_template_kwargs),
    }
    return ChatTemplateOptions(
        tools=() if tool_config is None or tool_config.is_prompted else tool_config.template_tools,
        add_generation_prompt=body.add_generation_prompt is not False,
        continue_final_message=bool(body.continue_final_message),
        add_special_tokens=bool(body.add_special_tokens),
        template_kwargs=variables,
    )


def _effort_variables(effort: str | None, chat_template: str) -> dict[str, Any]:
    """Return the template variables of a reasoning effort; raises ApiError if there are none.

    Templates without efforts may turn reasoning off, and models without reasoning need not.
    """
    if effort is None:
        return {}
    if "reasoning_effort" in chat_template:
        return {"reasoning_effort": effort}
    if effort == "none" and "enable_thinking" in chat_template:
        return {"enable_thinking": False}
    if effort == "none" and detect_reasoning_format(chat_template) is None:
        return {}
    raise unsupported_param("reasoning_effort", "is not supported by this model's chat template")


def _as_system_message(message: dict[str, Any]) -> dict[str, Any]:
    return {**message, "role": "system"} if message["role"] == "developer" else message


def _message_texts(messages: Iterable[Mapping[str, Any]]) -> Iterable[str]:
    for message in messages:
        for name, value in message.items():
            if name == "tool_calls":
                for call in value:
                    yield call["function"]["name"]
                    yield str(call["function"]["arguments"])
            elif name != "role":
                yield value if isinstance(value, str) else dump_json(value)


def _n_characters(message: ChatMessage) -> int:
    n = len(message.content or "") + len(message.name or "")
    for call in message.tool_calls or ():
        n += len(call.function.name) + TOOL_BYTES
    return n + MESSAGE_BYTES


def _check_token_ids(token_ids: Sequence[int], *, vocab_size: int, param: str) -> None:
    if token_ids and max(token_ids) >= vocab_size:
        raise invalid_value(param, f"expected token IDs below {vocab_size}, got {max(token_ids)}")


def _truncated(
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


def _draw_params(body: CompletionRequestBase, defaults: SamplingDefaults, seed: int) -> DrawParams:
    return DrawParams(
        temperature=_given(body.temperature, defaults.temperature),
        top_p=_given(body.top_p, defaults.top_p),
        top_k=max(_given(body.top_k, defaults.top_k), 0),
        min_p=_given(body.min_p, defaults.min_p),
        seed=seed,
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


def _resolve_max_tokens(
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
