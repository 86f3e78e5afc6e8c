"""From a validated request body to the engine's generation requests.

A `Preprocessor` resolves tools and reasoning of chats, has the prompts tokenized
(`prompt_encoding`), and builds one `GenerationRequest` per choice of each prompt
(`generation_requests`).
"""

from functools import partial

from faasmoe_router.api.chat_templates import chat_template_options
from faasmoe_router.api.errors import invalid_value
from faasmoe_router.api.generation_requests import GenerationRequestBuilder
from faasmoe_router.api.origin import Origin
from faasmoe_router.api.preparation import PreparationQueue
from faasmoe_router.api.prompt_encoding import TOOL_BYTES, PromptEncoder
from faasmoe_router.api.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    CompletionRequestBase,
)
from faasmoe_router.api.reasoning import (
    MessageFormat,
    needs_special_tokens,
    resolve_message_format,
    resolve_reasoning,
)
from faasmoe_router.api.tool_calling import (
    ToolCallConfig,
    relax_tool_schemas,
    resolve_tool_calling,
)
from faasmoe_router.engine.engine import Engine
from faasmoe_router.engine.generation import GenerationRequest
from faasmoe_router.engine.sampling_defaults import SamplingDefaults
from faasmoe_router.tenants.service import ANONYMOUS, Caller
from faasmoe_tracing import NO_SPAN, Span


class Preprocessor:
    """Builds generation requests from request bodies; bound to one event loop.

    Args:
        engine: has the tokenizer and the limits.
        queue: runs the work, in turns between tenants.
        encoder: tokenizes prompts.
        sampling_defaults: values of parameters that a request does not set.
    """

    def __init__(
        self,
        engine: Engine,
        queue: PreparationQueue,
        encoder: PromptEncoder,
        sampling_defaults: SamplingDefaults,
    ) -> None:
        self._engine = engine
        self._queue = queue
        self._encoder = encoder
        self._request_builder = GenerationRequestBuilder(engine, queue, sampling_defaults)
        self._includes_marks = needs_special_tokens(engine.tokenizer)

    async def build_chat_requests(
        self,
        body: ChatCompletionRequest,
        caller: Caller = ANONYMOUS,
        *,
        origin: Origin | None = None,
        span: Span = NO_SPAN,
    ) -> tuple[MessageFormat, list[GenerationRequest]]:
        """Return how the message is parsed, and one request per choice; raises ApiError."""
        self._check_n_choices(body, caller, n_prompts=1)
        tokenizer = self._engine.tokenizer
        tool_config = await self._resolve_tools(body, caller)
        template_options = chat_template_options(
            body, tool_config, chat_template=tokenizer.tool_chat_template
        )
        is_prompted = tool_config is not None and tool_config.is_prompted
        token_ids = await self._encoder.encode_chat(
            body.messages,
            template_options,
            caller,
            prompted_tools=tool_config.template_tools if tool_config and is_prompted else (),
            span=span,
        )
        reasoning = resolve_reasoning(tokenizer, token_ids)
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
        return resolve_message_format(body, tokenizer, reasoning, tool_config), requests

    async def _resolve_tools(
        self, body: ChatCompletionRequest, caller: Caller
    ) -> ToolCallConfig | None:
        """Return how the model calls tools, with schemas that a grammar can enforce."""
        tool_config = await self._queue.run(
            caller,
            partial(resolve_tool_calling, body, self._engine.tokenizer),
            size_bytes=TOOL_BYTES * len(body.tools or ()),
        )
        if tool_config is None:
            return None
        run = partial(self._queue.run_in_turn, caller)
        return await relax_tool_schemas(tool_config, self._engine.grammar_compiler, run)

    async def build_completion_requests(
        self,
        body: CompletionRequest,
        caller: Caller = ANONYMOUS,
        *,
        origin: Origin | None = None,
        span: Span = NO_SPAN,
    ) -> tuple[list[GenerationRequest], list[str] | None]:
        """Return one request per choice of each prompt, in that order, and the prompts' texts.

        The texts are those of each choice if the request wants them echoed: verbatim if given as
        text, decoded if as tokens. Raises ApiError.
        """
        self._check_n_choices(body, caller, n_prompts=len(body.prompt))
        self._check_prompts(body)
        prompts = [
            await self._encoder.encode(
                prompt,
                add_special_tokens=body.add_special_tokens is not False,
                caller=caller,
                span=span,
            )
            if isinstance(prompt, str)
            else prompt
            for prompt in body.prompt
        ]
        requests = await self._request_builder.build(
            body, prompts, caller, param="prompt", origin=origin or Origin()
        )
        return requests, await self._echoed_prompts(body, caller) if body.echo else None

    def _check_prompts(self, body: CompletionRequest) -> None:
        for index, prompt in enumerate(body.prompt):
            if isinstance(prompt, str):
                self._encoder.check_text_size([prompt], param="prompt")
            else:
                self._encoder.check_token_ids(prompt, param=f"prompt[{index}]")

    async def _echoed_prompts(self, body: CompletionRequest, caller: Caller) -> list[str]:
        texts = [
            prompt
            if isinstance(prompt, str)
            else await self._encoder.decode(prompt, caller, include_special_tokens=True)
            for prompt in body.prompt
        ]
        return [text for text in texts for _ in range(body.n or 1)]

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
