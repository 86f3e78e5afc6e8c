"""POST /v1/chat/completions and POST /v1/completions.

Both routes validate and preprocess their own kind of body into `GenerationRequest`s. The rest is
shared: admission, generation, and a response that is either one JSON body or a stream of
server-sent events. However a request ends, its sequences are freed and its usage is recorded.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel

from faasmoe_contracts.stream_records import (
    INPUT_TOKENS_HEADER,
    OUTPUT_TOKENS_HEADER,
    RECORDS_HEADER,
)
from faasmoe_router.api.admission import (
    RequestActivator,
    TenantAdmission,
    queue_until_activated,
    record_outcome_on_error,
)
from faasmoe_router.api.body import BodyReader
from faasmoe_router.api.chat_choices import ChatChoiceFormatter
from faasmoe_router.api.chat_templates import template_notes
from faasmoe_router.api.choices import ChoiceFormatter
from faasmoe_router.api.completion_choices import CompletionChoiceFormatter
from faasmoe_router.api.documented_routes import new_router
from faasmoe_router.api.errors import model_not_found
from faasmoe_router.api.middleware import get_caller
from faasmoe_router.api.openapi import (
    ChatCompletionResponse,
    CompletionResponse,
    json_request_body,
    json_responses,
)
from faasmoe_router.api.origin import Origin, get_origin
from faasmoe_router.api.preparation import release_turn
from faasmoe_router.api.preprocessing import Preprocessor
from faasmoe_router.api.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    CompletionRequestBase,
    StreamOptions,
)
from faasmoe_router.api.rendering import PlainRendering, Rendering
from faasmoe_router.api.request_span import begin_generation_span, ended_on_error, get_span
from faasmoe_router.api.response_builder import RequestCounts, ResponseBuilder, ResponseMeta
from faasmoe_router.api.resumption import (
    StreamJournal,
    comment_record,
    get_resumption,
    has_front,
    invalid_journal,
    tell_prepared,
)
from faasmoe_router.api.streaming import (
    KEEPALIVE_FRAME,
    KEEPALIVE_S,
    EventStreamResponse,
    run_until_disconnect,
)
from faasmoe_router.api.token_details import TokenBytes, TokenDetails
from faasmoe_router.engine.engine import Engine
from faasmoe_router.engine.generation import CompletionOutput, Generation, GenerationRequest
from faasmoe_router.engine.journal import JournalError
from faasmoe_router.errors import EngineUnavailable
from faasmoe_router.tenants.service import Caller, RequestUsageRecorder
from faasmoe_tracing import Span

ERROR_STATUSES = (400, 404, 413, 429, 500, 503)
WARNING_HEADER = "X-FaaSMoE-Warning"
MAX_WARNING_LENGTH = 1000


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
    bodies: BodyReader,
) -> APIRouter:
    """Return the routes that generate text."""
    router = new_router()

    async def prepare_completion(request: Request, caller: Caller) -> PreparedRequest:
        async with bodies.reading(request, CompletionRequest, caller) as body:
            generator.check_request(body, caller)
            requests, echoed_prompts = await run_until_disconnect(
                request,
                preprocessor.build_completion_requests(
                    body, caller, origin=get_origin(request), span=get_span(request)
                ),
            )
            formatter = CompletionChoiceFormatter(
                _logprob_token_bytes(engine, body),
                echoed_prompts,
                prompts=[r.prompt_token_ids for r in requests] if body.scores_prompt else (),
                n_top=body.n_reported_logprobs,
                as_ids=bool(body.return_tokens_as_token_ids),
            )
            return PreparedRequest(body.without_contents(), requests, formatter)

    @router.post(
        "/v1/chat/completions",
        responses=json_responses(ChatCompletionResponse, *ERROR_STATUSES, is_streamable=True),
        openapi_extra=json_request_body(ChatCompletionRequest),
    )
    async def create_chat_completion(request: Request) -> Response:
        """Generate the next message of a conversation."""
        return await chats.respond(request, ChatCompletionRequest, _plain_chat)

    @router.post(
        "/v1/completions",
        responses=json_responses(CompletionResponse, *ERROR_STATUSES, is_streamable=True),
        openapi_extra=json_request_body(CompletionRequest),
    )
    async def create_completion(request: Request) -> Response:
        """Generate the continuation of one or several prompts."""
        prepared = await prepare_completion(request, get_caller(request))
        return await generator.respond(request, prepared)

    return router


def _plain_chat(
    body: ChatCompletionRequest, origin: Origin
) -> tuple[ChatCompletionRequest, Rendering]:
    return body, PlainRendering()


@dataclass(frozen=True, slots=True)
class PreparedRequest:
    """A request that is ready to be generated.

    Attributes:
        body: its parameters, without what only the prompt needs.
        requests: one generation request per choice of each prompt.
        formatter: formats the choices.
        rendering: writes the response.
        headers: headers of the response.
    """

    body: CompletionRequestBase
    requests: Sequence[GenerationRequest]
    formatter: ChoiceFormatter
    rendering: Rendering = field(default_factory=PlainRendering)
    headers: Mapping[str, str] = field(default_factory=dict)


Source = TypeVar("Source", bound=BaseModel)
ToChat = Callable[[Source, Origin], tuple[ChatCompletionRequest, Rendering]]
"""Makes a chat of a body, and what writes its response with an origin."""


class ChatService:
    """Answers chats, in whatever form they are asked and the response is written.

    Args:
        engine: generates text.
        generator: admits requests and responds.
        preprocessor: builds generation requests.
        bodies: reads the requests' bodies.
    """

    def __init__(
        self,
        engine: Engine,
        generator: "ResponseGenerator",
        preprocessor: Preprocessor,
        bodies: BodyReader,
    ) -> None:
        self._engine = engine
        self._generator = generator
        self._preprocessor = preprocessor
        self._bodies = bodies

    async def respond(
        self, request: Request, model: type[Source], to_chat: ToChat[Source]
    ) -> Response:
        """Return the response to a chat; raises ApiError or RouterError.

        Args:
            request: the HTTP request.
            model: the model of its body.
            to_chat: makes a chat of it.
        """
        return await self._generator.respond(request, await self._prepare(request, model, to_chat))

    async def count_prompt_tokens(
        self, request: Request, model: type[Source], to_chat: ToChat[Source]
    ) -> int:
        """Return the number of tokens of a chat's prompt; raises ApiError."""
        prepared = await self._prepare(request, model, to_chat)
        return len(prepared.requests[0].prompt_token_ids)

    async def _prepare(
        self, request: Request, model: type[Source], to_chat: ToChat[Source]
    ) -> PreparedRequest:
        caller, origin = get_caller(request), get_origin(request)

        def convert(source: Source) -> tuple[ChatCompletionRequest, Rendering]:
            return to_chat(source, origin)

        async with self._bodies.converting(request, model, caller, convert) as (body, rendering):
            self._generator.check_request(body, caller)
            message_format, requests = await run_until_disconnect(
                request,
                self._preprocessor.build_chat_requests(
                    body, caller, origin=origin, span=get_span(request)
                ),
            )
            tool_config = message_format.tool_config
            formatter = ChatChoiceFormatter(
                _logprob_token_bytes(self._engine, body),
                message_format,
                n_top=body.n_reported_logprobs,
                as_ids=bool(body.return_tokens_as_token_ids),
                origin=origin,
                echoed=body.echoed_text,
            )
            notes = [*template_notes(body, self._engine.tokenizer.tool_chat_template)]
            notes += () if tool_config is None else tool_config.notes
            headers = {WARNING_HEADER: _header_value("; ".join(notes))} if notes else {}
            return PreparedRequest(body.without_contents(), requests, formatter, rendering, headers)


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

    async def respond(self, request: Request, prepared: PreparedRequest) -> Response:
        """Return the response to a request; raises RouterError if it is not admitted."""
        release_turn()
        tell_prepared(request)
        body, requests, rendering = prepared.body, prepared.requests, prepared.rendering
        if not self._engine.is_ready:
            raise EngineUnavailable("the engine is starting")
        caller = get_caller(request)
        n_prompt_tokens = sum(len(r.prompt_token_ids) for r in requests) // (body.n or 1)
        builder = self._response_builder(
            body, prepared.formatter, n_prompt_tokens, requests, get_origin(request)
        )
        if has_front(request):
            headers = {**prepared.headers, INPUT_TOKENS_HEADER: str(n_prompt_tokens)}
            prepared = replace(prepared, headers=headers)
        with get_span(request).child("limit"):
            usage_recorder = self._tenant_admission.admit(
                caller,
                requests,
                n_prompt=n_prompt_tokens,
                request_id=get_origin(request).hex_id("usage"),
                is_admitted=get_resumption(request) is not None,
            )
        span = begin_generation_span(
            request,
            body,
            requests,
            model=self._served_model.name,
            tenant=caller.tenant,
            n_prompt_tokens=n_prompt_tokens,
        )
        start = asyncio.create_task(
            self._start(request, requests, usage_recorder, span, is_streamed=bool(body.stream))
        )
        try:
            if body.stream and not (await asyncio.wait({start}, timeout=KEEPALIVE_S))[0]:
                # From now on comments keep the connection; an error can only be an event.
                return self._late_stream(request, builder, start, prepared, usage_recorder)
            start_headers, generation = await start
            with record_outcome_on_error(usage_recorder):
                response = await _to_http_response(builder, generation, request, body, rendering)
        except asyncio.CancelledError:
            start.cancel()
            raise
        response.headers.update({**start_headers, **usage_recorder.headers, **prepared.headers})
        return response

    async def _start(
        self,
        request: Request,
        requests: Sequence[GenerationRequest],
        usage_recorder: RequestUsageRecorder,
        span: Span,
        *,
        is_streamed: bool,
    ) -> tuple[dict[str, str], Generation]:
        """Wait for activation and start the generation; return it and response headers."""
        caller, resumption = get_caller(request), get_resumption(request)
        queue_slot = partial(self._tenant_admission.queue_slot, caller)
        with record_outcome_on_error(usage_recorder), ended_on_error(span):
            headers = await queue_until_activated(
                self._activator, request, requests, queue_slot=queue_slot, span=span
            )
            try:
                generation = self._engine.generate(
                    requests,
                    tenant=caller.tenant,
                    usage_recorder=usage_recorder,
                    journal=() if resumption is None else resumption.entries,
                    span=span,
                    is_streamed=is_streamed,
                )
            except JournalError as error:
                raise invalid_journal(error) from error
        return headers, generation

    def _late_stream(
        self,
        request: Request,
        builder: ResponseBuilder,
        start: asyncio.Task[tuple[dict[str, str], Generation]],
        prepared: PreparedRequest,
        usage_recorder: RequestUsageRecorder,
    ) -> Response:
        """Return a stream whose generation has not started yet."""

        async def generation() -> Generation:
            return (await start)[1]

        def close() -> None:
            if start.done() and not start.cancelled() and start.exception() is None:
                start.result()[1].cancel()
            start.cancel()

        response = _stream_response(
            builder, generation, request, prepared.body, prepared.rendering, close
        )
        response.headers.update({**usage_recorder.headers, **prepared.headers})
        return response

    def _response_builder(
        self,
        body: CompletionRequestBase,
        formatter: ChoiceFormatter,
        n_prompt_tokens: int,
        requests: Sequence[GenerationRequest],
        origin: Origin,
    ) -> ResponseBuilder:
        extra_fields = {**self._served_model.extra_fields, **body.extra_response_fields}
        model = body.model or self._served_model.name
        meta = ResponseMeta.from_origin(formatter.id_prefix, model, origin, extra_fields)
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

        async def ready() -> Generation:
            return generation

        return _stream_response(builder, ready, request, body, rendering, generation.cancel)
    try:
        whole = await run_until_disconnect(request, builder.full_response(generation))
        response = JSONResponse(rendering.body(whole))
        if has_front(request):
            response.headers[OUTPUT_TOKENS_HEADER] = str(whole["usage"]["completion_tokens"])
        return response
    finally:
        generation.cancel()


def _stream_response(
    builder: ResponseBuilder,
    start: Callable[[], Awaitable[Generation]],
    request: Request,
    body: CompletionRequestBase,
    rendering: Rendering,
    on_close: Callable[[], None],
) -> EventStreamResponse:
    """Return a stream: of records if a front asks for it, which may have a part of it already."""
    options = body.stream_options or StreamOptions()
    if not has_front(request):
        outputs = stream_outputs(start)
        return EventStreamResponse(
            rendering.frames(builder.stream_chunks(outputs, options)), on_close
        )
    journal = StreamJournal(get_origin(request), get_resumption(request))
    frames = rendering.frames(builder.stream_chunks(journal.watch(stream_outputs(start)), options))
    response = EventStreamResponse(
        journal.records(frames), on_close, keepalive_frame=comment_record(KEEPALIVE_FRAME)
    )
    response.headers[RECORDS_HEADER] = "1"
    return response


async def stream_outputs(
    start: Callable[[], Awaitable[Generation]],
) -> AsyncIterator[tuple[int, CompletionOutput]]:
    """Yield the outputs; their usage is recorded before the client can have seen the end."""
    async with await start() as generation:
        async for output in generation:
            yield output


def _header_value(text: str) -> str:
    """Return a text as the value of a header: one line of printable ASCII."""
    line = " ".join(text.split()).encode("ascii", "backslashreplace").decode()
    return line[:MAX_WARNING_LENGTH]


def _logprob_token_bytes(engine: Engine, body: CompletionRequestBase) -> TokenBytes | None:
    return None if body.n_logprobs is None else engine.vocabulary.token_bytes
