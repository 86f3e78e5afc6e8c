"""POST /v1/chat/completions and POST /v1/completions.

Both routes validate and preprocess their own kind of body into `GenerationRequest`s. The rest is
shared: admission, generation, and a response that is either one JSON body or a stream of
server-sent events. However a request ends, its sequences are freed and its usage is recorded.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from faasmoe_router.api.admission import (
    RequestActivator,
    TenantAdmission,
    queue_until_activated,
    record_outcome_on_error,
)
from faasmoe_router.api.errors import model_not_found
from faasmoe_router.api.middleware import get_caller
from faasmoe_router.api.openapi import ChatCompletionResponse, CompletionResponse, json_responses
from faasmoe_router.api.preprocessing import Preprocessor
from faasmoe_router.api.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    CompletionRequestBase,
    StreamOptions,
)
from faasmoe_router.api.reasoning import resolve_message_format
from faasmoe_router.api.rendering import PlainRendering, Rendering
from faasmoe_router.api.responses import (
    ChatChoiceFormatter,
    ChoiceFormatter,
    CompletionChoiceFormatter,
    RequestCounts,
    ResponseBuilder,
    ResponseMeta,
)
from faasmoe_router.api.streaming import (
    KEEPALIVE_S,
    ClientDisconnected,
    EventStreamResponse,
    run_until_disconnect,
)
from faasmoe_router.api.token_details import TokenBytes, TokenDetails
from faasmoe_router.api.tool_calling import ToolCallConfig, relax_tool_schemas, resolve_tool_calling
from faasmoe_router.engine.engine import Engine
from faasmoe_router.engine.generation import Generation, GenerationRequest
from faasmoe_router.errors import EngineUnavailable
from faasmoe_router.tenants.service import Caller, RequestUsageRecorder

ERROR_STATUSES = (400, 404, 413, 429, 500, 503)
WARNING_HEADER = "X-FaaSMoE-Warning"
MAX_WARNING_LENGTH = 1000
CLIENT_CLOSED_REQUEST = 499  # nginx's status for it; seen by middleware only


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The model that this router serves.

    Attributes:
        name: the name that requests give it.
        fingerprint: identifies its weights and the numerics they run with; None if unknown.
    """

    name: str
    fingerprint: str | None = None

    @property
    def extra_fields(self) -> Mapping[str, str]:
        """Fields of every response that this model generates."""
        return {} if self.fingerprint is None else {"system_fingerprint": self.fingerprint}


def completion_routes(
    engine: Engine,
    generator: "ResponseGenerator",
    preprocessor: Preprocessor,
    chats: "ChatService",
) -> APIRouter:
    """Return the routes that generate text."""
    router = APIRouter()

    @router.post(
        "/v1/chat/completions",
        responses=json_responses(ChatCompletionResponse, *ERROR_STATUSES, is_streamable=True),
    )
    async def create_chat_completion(body: ChatCompletionRequest, request: Request) -> Response:
        """Generate the next message of a conversation."""
        return await chats.respond(body, request, PlainRendering())

    @router.post(
        "/v1/completions",
        responses=json_responses(CompletionResponse, *ERROR_STATUSES, is_streamable=True),
    )
    async def create_completion(body: CompletionRequest, request: Request) -> Response:
        """Generate the continuation of one or several prompts."""
        caller = get_caller(request)
        generator.check_request(body, caller)
        requests = await preprocessor.build_completion_requests(body, caller)
        echoed_prompts = _echoed_prompts(engine, body, requests) if body.echo else None
        formatter = CompletionChoiceFormatter(
            _logprob_token_bytes(engine, body),
            echoed_prompts,
            prompts=[r.prompt_token_ids for r in requests] if body.scores_prompt else (),
            n_top=body.n_logprobs,
            as_ids=bool(body.return_tokens_as_token_ids),
        )
        return await generator.respond(request, body, requests, formatter)

    return router


class ChatService:
    """Answers chats, however the response is written.

    Args:
        engine: generates text.
        generator: admits requests and responds.
        preprocessor: builds generation requests.
    """

    def __init__(
        self, engine: Engine, generator: "ResponseGenerator", preprocessor: Preprocessor
    ) -> None:
        self._engine = engine
        self._generator = generator
        self._preprocessor = preprocessor

    async def respond(
        self, body: ChatCompletionRequest, request: Request, rendering: Rendering
    ) -> Response:
        """Return the response to a chat; raises ApiError or RouterError."""
        requests, tool_config = await self._prepare(body, request)
        message_format = resolve_message_format(
            body, self._engine.tokenizer, requests[0].prompt_token_ids, tool_config
        )
        formatter = ChatChoiceFormatter(
            _logprob_token_bytes(self._engine, body),
            message_format,
            n_top=body.n_logprobs,
            as_ids=bool(body.return_tokens_as_token_ids),
        )
        response = await self._generator.respond(request, body, requests, formatter, rendering)
        if tool_config is not None and tool_config.notes:
            response.headers[WARNING_HEADER] = _header_value("; ".join(tool_config.notes))
        return response

    async def count_prompt_tokens(self, body: ChatCompletionRequest, request: Request) -> int:
        """Return the number of tokens of a chat's prompt; raises ApiError."""
        requests, _ = await self._prepare(body, request)
        return len(requests[0].prompt_token_ids)

    async def _prepare(
        self, body: ChatCompletionRequest, request: Request
    ) -> tuple[list[GenerationRequest], ToolCallConfig | None]:
        caller = get_caller(request)
        self._generator.check_request(body, caller)
        tool_config = resolve_tool_calling(body, self._engine.tokenizer)
        if tool_config is not None:
            tool_config = await relax_tool_schemas(tool_config, self._engine.grammar_compiler)
        requests = await self._preprocessor.build_chat_requests(body, tool_config, caller)
        return requests, tool_config


class ResponseGenerator:
    """Admits a preprocessed request, generates its choices and responds, whole or streamed."""

    def __init__(
        self,
        engine: Engine,
        *,
        served_model: ServedModel,
        activator: RequestActivator,
        tenant_admission: TenantAdmission,
    ) -> None:
        self._engine = engine
        self._served_model = served_model
        self._activator = activator
        self._tenant_admission = tenant_admission

    def check_request(self, body: CompletionRequestBase, caller: Caller) -> None:
        """Check a body on its own, and that the caller knows its model; raises ApiError."""
        names = caller.model_names(self._served_model.name)
        if body.model is not None and body.model not in names:
            raise model_not_found(body.model)
        body.check_params()

    async def respond(
        self,
        request: Request,
        body: CompletionRequestBase,
        requests: Sequence[GenerationRequest],
        formatter: ChoiceFormatter,
        rendering: Rendering | None = None,
    ) -> Response:
        """Return the response to a request; raises RouterError if it is not admitted.

        Args:
            request: the HTTP request.
            body: its validated body.
            requests: one generation request per choice of each prompt.
            formatter: formats the choices.
            rendering: writes the response; None writes it as it is.
        """
        rendering = rendering or PlainRendering()
        if not self._engine.is_ready:
            raise EngineUnavailable("the engine is starting")
        caller = get_caller(request)
        n_prompt_tokens = sum(len(r.prompt_token_ids) for r in requests) // (body.n or 1)
        builder = self._response_builder(body, formatter, n_prompt_tokens, requests)
        usage_recorder = self._tenant_admission.admit(caller, requests, n_prompt=n_prompt_tokens)
        start = asyncio.create_task(self._start(request, requests, usage_recorder))
        try:
            if body.stream and not (await asyncio.wait({start}, timeout=KEEPALIVE_S))[0]:
                # From now on comments keep the connection; an error can only be an event.
                return self._late_stream(builder, start, body, usage_recorder, rendering)
            headers, generation = await start
            with record_outcome_on_error(usage_recorder):
                response = await _to_http_response(builder, generation, request, body, rendering)
        except ClientDisconnected:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        except asyncio.CancelledError:
            start.cancel()
            raise
        response.headers.update({**headers, **usage_recorder.headers})
        return response

    async def _start(
        self,
        request: Request,
        requests: Sequence[GenerationRequest],
        usage_recorder: RequestUsageRecorder,
    ) -> tuple[dict[str, str], Generation]:
        """Wait for activation and start the generation; return it and response headers."""
        caller = get_caller(request)
        queue_slot = partial(self._tenant_admission.queue_slot, caller)
        with record_outcome_on_error(usage_recorder):
            headers = await queue_until_activated(
                self._activator, request, requests, queue_slot=queue_slot
            )
            generation = self._engine.generate(
                requests, tenant=caller.tenant, usage_recorder=usage_recorder
            )
        return headers, generation

    def _late_stream(
        self,
        builder: ResponseBuilder,
        start: asyncio.Task[tuple[dict[str, str], Generation]],
        body: CompletionRequestBase,
        usage_recorder: RequestUsageRecorder,
        rendering: Rendering,
    ) -> Response:
        """Return a stream whose generation has not started yet."""

        async def chunks() -> AsyncIterator[dict[str, Any]]:
            _, generation = await start
            async for chunk in builder.stream_chunks(
                generation, body.stream_options or StreamOptions()
            ):
                yield chunk

        def close() -> None:
            if start.done() and not start.cancelled() and start.exception() is None:
                start.result()[1].cancel()
            start.cancel()

        response = EventStreamResponse(rendering.frames(chunks()), close)
        response.headers.update(usage_recorder.headers)
        return response

    def _response_builder(
        self,
        body: CompletionRequestBase,
        formatter: ChoiceFormatter,
        n_prompt_tokens: int,
        requests: Sequence[GenerationRequest],
    ) -> ResponseBuilder:
        extra_fields = {**self._served_model.extra_fields, **body.extra_response_fields}
        model = body.model or self._served_model.name
        meta = ResponseMeta(formatter.id_prefix, model, extra_fields)
        if body.request_id is not None:
            meta = replace(meta, id=body.request_id)
        token_details = TokenDetails(
            prompts=[r.prompt_token_ids for r in requests],
            returns_ids=bool(body.return_token_ids),
            n_prompt_logprobs=body.prompt_logprobs,
            token_bytes=self._engine.vocabulary.token_bytes if body.scores_prompt else None,
            is_chat=formatter.id_prefix == ChatChoiceFormatter.id_prefix,
        )
        counts = RequestCounts(n_prompt_tokens, len(requests), body.n or 1)
        return ResponseBuilder(formatter, meta, counts, token_details)


async def _to_http_response(
    builder: ResponseBuilder,
    generation: Generation,
    request: Request,
    body: CompletionRequestBase,
    rendering: Rendering,
) -> Response:
    if body.stream:
        options = body.stream_options or StreamOptions()
        frames = rendering.frames(builder.stream_chunks(generation, options))
        return EventStreamResponse(frames, generation.cancel)
    try:
        whole = await run_until_disconnect(request, builder.full_response(generation))
        return JSONResponse(rendering.body(whole))
    finally:
        generation.cancel()


def _header_value(text: str) -> str:
    """Return a text as the value of a header: one line of printable ASCII."""
    line = " ".join(text.split()).encode("ascii", "backslashreplace").decode()
    return line[:MAX_WARNING_LENGTH]


def _logprob_token_bytes(engine: Engine, body: CompletionRequestBase) -> TokenBytes | None:
    return None if body.n_logprobs is None else engine.vocabulary.token_bytes


def _echoed_prompts(
    engine: Engine, body: CompletionRequest, requests: Sequence[GenerationRequest]
) -> list[str]:
    """Return the prompt text of each choice: verbatim if given as text, decoded if as tokens."""
    prompts = [p if isinstance(p, str) else engine.tokenizer.decode(p) for p in body.prompt]
    n = len(requests) // len(prompts)
    return [prompt for prompt in prompts for _ in range(n)]
